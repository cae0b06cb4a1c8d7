"""What ranks do differently: functions that run on ranks and give back what each rank was told.

The loops here are right on every single rank; it is only together that they are not, or need care.
"""

import torch
from hard_support import Small, Trainer, classify, tensors_of
from torch import nn


def told(case, form, *args):
    """On a rank: what the case's error says there, or its tensors if there was none."""
    try:
        return CASES[case](Trainer(form), *args)
    except RuntimeError as error:
        return str(error)


def use_of(names):
    """A loss that reaches the layers of these names only; no layer: no backward at all."""

    def loss_of(model, batch):
        return sum(getattr(model, name)(torch.ones(1, getattr(model, name).in_features, dtype=batch.x.dtype)).square().sum()
                   for name in names)  # fmt: skip

    return loss_of


def clipped(trainer, reach):
    """All ranks clip by norm; in step 3 the last rank's loss is reach() of the model: some layers, or none at all."""
    model, optimizer = trainer.start(Small)
    captured = list(model.parameters())
    for step in range(6):
        optimizer.zero_grad()
        is_odd = trainer.ranks[0] == max(1, len(trainer.ranks) - 1) and step == 3
        if not is_odd:
            trainer.loss(model, step).backward()
        elif reach:
            trainer.loss(model, step, use_of(reach)).backward()
        if trainer.form == "horovod":
            optimizer.synchronize()
        nn.utils.clip_grad_norm_(captured if step % 2 else model.parameters(), 0.05)
        with trainer.skip_synchronize(optimizer):
            optimizer.step()
    return tensors_of(model)


def empty_batches(trainer):
    """One rank has nothing to do in some steps; rank 0 looks at gradients, and changes none."""
    model, optimizer = trainer.start(Small)
    norms = []
    for step in range(6):
        optimizer.zero_grad()
        if trainer.ranks[0] != 1 or step % 3:
            trainer.loss(model, step).backward()
        if trainer.form != "horovod" and trainer.ranks[0] == 0:
            norms.append(sum(p.grad.norm() for p in model.parameters() if p.grad is not None))
        optimizer.step()
    return tensors_of(model)


def freezing(trainer, when):
    """Rank 1 alone freezes a layer, or unfreezes it: at the start (0), or after a step."""
    model = trainer.model(Small)
    if when == "unfreezes later":
        model.first.requires_grad_(False)
    if when == "at the start" and trainer.ranks[0] == 1:
        model.middle.requires_grad_(False)
    optimizer = trainer.wrap(trainer.make_optimizer(model.parameters()), model)

    def change(step):
        if step == 2 and trainer.ranks[0] == 1:
            if when == "freezes later":
                model.middle.requires_grad_(False)
            if when == "unfreezes later":
                model.first.requires_grad_(True)

    trainer.train(model, optimizer, range(8), classify, change)
    return tensors_of(model)


def frozen_after_backward(trainer):
    """All ranks freeze a layer between backward and step, which only some ranks used: that step still counts."""
    model, optimizer = trainer.start(Small)
    for step in range(6):
        optimizer.zero_grad()
        is_odd = trainer.ranks[0] == 1 and step == 3
        trainer.loss(model, step, use_of(["last"]) if is_odd else classify).backward()
        if step == 3:
            model.middle.requires_grad_(False)
        optimizer.step()
    return tensors_of(model)


CASES = {case.__name__: case for case in (clipped, empty_batches, freezing, frozen_after_backward)}
