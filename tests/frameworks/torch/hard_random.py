"""Random models out of a seed: branches by step and by rank, shared and reused blocks, frozen and unused parts."""

import random

import torch
from hard_support import CLASSES, INPUTS, tensors_of
from torch import nn
from torch.utils.checkpoint import checkpoint

SEEDS = range(10)
WIDTH = 5


class Block(nn.Module):
    """One of several kinds of layers of WIDTH to WIDTH."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layer = {"gru": lambda: nn.GRUCell(WIDTH, WIDTH), "norm": lambda: nn.LayerNorm(WIDTH)}.get(
            kind, lambda: nn.Linear(WIDTH, WIDTH, bias=kind != "checkpointed")
        )()

    def forward(self, x):
        if self.kind == "attribute":
            return torch.tanh(nn.functional.linear(x, self.layer.weight) + self.layer.bias)
        if self.kind == "checkpointed":
            return torch.tanh(checkpoint(self.layer, x, use_reentrant=False))
        return torch.tanh(self.layer(x))


class Random(nn.Module):
    """A list of stages: each is a block, a choice of blocks, or a block that was used before."""

    def __init__(self, seed):
        super().__init__()
        draw = random.Random(seed)
        kinds = ("linear", "attribute", "gru", "norm", "checkpointed")
        self.blocks = nn.ModuleList(Block(draw.choice(kinds)) for _ in range(draw.randint(4, 9)))
        self.stages = [
            (draw.choice(("one", "one", "by step", "by rank", "twice", "skipped")), draw.sample(range(len(self.blocks)), 3))
            for _ in range(draw.randint(2, 6))
        ]
        self.last = nn.Linear(WIDTH, CLASSES)
        self.first = nn.Linear(INPUTS, WIDTH)
        for block in draw.sample(list(self.blocks), draw.randint(0, 2)):
            block.requires_grad_(False)
        one, other = draw.sample([block.layer for block in self.blocks if isinstance(block.layer, nn.Linear)] * 2, 2) if any(
            isinstance(block.layer, nn.Linear) for block in self.blocks) else (None, None)  # fmt: skip
        if one is not None:
            other.weight = one.weight  # tied, or tied to itself

    def forward(self, batch):
        x = self.first(batch.x)
        for number, (kind, blocks) in enumerate(self.stages):
            choice = {"by step": batch.step + number, "by rank": batch.rank}.get(kind, 0) % 3
            if kind == "skipped" and batch.step % 2:
                continue
            for _ in range(2 if kind == "twice" else 1):
                x = x + self.blocks[blocks[choice]](x)
        return self.last(x)


def whole_batch(model, batch):
    return nn.functional.cross_entropy(model(batch), batch.target)


def trained(seed):
    """A case that trains the model of a seed."""

    def case(trainer):
        model, optimizer = trainer.start(lambda: Random(seed))
        trainer.train(model, optimizer, range(6), whole_batch)
        return tensors_of(model)

    return case


CASES = {f"seed {seed}": trained(seed) for seed in SEEDS}
