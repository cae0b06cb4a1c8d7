"""Whole scripts as people write them, in which several hard things meet."""

import copy
import io
from functools import partial

import torch
from hard_optimizers import has_momentum
from hard_support import CLASSES, INPUTS, Small, classify, tensors_of
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim import lr_scheduler
from torch.utils.checkpoint import checkpoint


def long_run(trainer):
    """Accumulation, GradScaler, clipping, EMA by lists made early, a schedule per step, and a restart from a checkpoint."""
    trainer.dtype = torch.float32
    model = trainer.model(Small)
    optimizer = trainer.wrap(trainer.make_optimizer(model.parameters()), model)
    schedule = partial(lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=12, cycle_momentum=has_momentum(optimizer))
    scheduler = schedule(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    means, captured, norms = [p.detach().clone() for p in model.parameters()], list(model.parameters()), []
    for step in range(8):
        if step == 4:  # the job was killed, and starts again from its file
            file = io.BytesIO()
            torch.save([one.state_dict() for one in (model, optimizer, scheduler, scaler)], file)
            states = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            model = trainer.model(Small, seed=7)
            optimizer = trainer.make_optimizer(model.parameters())
            scheduler = schedule(optimizer)
            for one, state in zip((model, optimizer, scheduler, scaler), states):
                one.load_state_dict(state)
            optimizer = trainer.wrap(optimizer, model)
            captured = list(model.parameters())
        for half in range(2):
            last = half == 1
            with trainer.no_sync(optimizer) if not last else torch.enable_grad():
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = trainer.loss(model, 2 * step + half) / 2
                scaler.scale(loss).backward()
        if trainer.form == "horovod":
            optimizer.synchronize()
        scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(captured, 0.2).detach().clone())
        with trainer.skip_synchronize(optimizer):
            scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        torch._foreach_lerp_(means, [parameter.detach() for parameter in captured], 0.1)
    return {**tensors_of(model), **{f"mean {n}": m for n, m in enumerate(means)}, "norms": torch.stack(norms)}


def penalized_adversaries(trainer):
    """WGAN-GP: the judge is frozen in every step of the generator, and its own loss has a gradient of a gradient."""
    torch.manual_seed(1 if trainer.alone else 1 + trainer.ranks[0])
    both = nn.ModuleList([nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, INPUTS)), Small()]).to(trainer.dtype)
    generator, judge = both
    of_generator, of_judge = (trainer.wrap(trainer.make_optimizer(model.parameters()), model) for model in both)

    def judged(judge, batch):
        fake = generator(batch.x).detach()
        mixed = (batch.x + fake).div(2).requires_grad_()
        slope = torch.autograd.grad(judge(mixed).sum(), mixed, create_graph=True)[0]
        return judge(fake).mean() - judge(batch.x).mean() + (slope.norm(dim=1) - 1).square().mean()

    for step in range(6):
        of_judge.zero_grad()
        trainer.loss(judge, step, judged).backward()
        of_judge.step()
        if step % 2:
            judge.requires_grad_(False)
            generator.zero_grad()
            trainer.loss(judge, step, lambda judge, batch: -judge(generator(batch.x)).mean()).backward()
            of_generator.step()
            judge.requires_grad_(True)
    return tensors_of(both)


class Backbone(nn.Module):
    """A backbone with normalization, and a head."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(INPUTS, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.backbone(x))


def finetuned(added):
    """The backbone is frozen for an epoch and then learns with a smaller rate; added: it joins the optimizer only then."""

    def case(trainer):
        model = trainer.model(Backbone)
        model.backbone.requires_grad_(False)
        groups = [{"params": list(model.head.parameters())}]
        late = {"params": list(model.backbone.parameters()), "lr": 0.002}
        optimizer = trainer.wrap(trainer.make_optimizer(groups if added else [*groups, late]), model)
        scheduler = None if added else lr_scheduler.LambdaLR(optimizer, [lambda epoch: 0.9**epoch, lambda epoch: 0.5**epoch])
        for epoch in range(4):
            if epoch == 2:
                model.backbone.requires_grad_(True)
                if added:
                    optimizer.add_param_group(late)
            trainer.train(model, optimizer, range(3 * epoch, 3 * epoch + 3))
            if scheduler is not None:
                scheduler.step()
            model.eval()
            with torch.no_grad():
                assert all(torch.isfinite(model(batch.x)).all() for batch in trainer.batches(100))
            model.train()
        return tensors_of(model)

    return case


class Sentences(nn.Module):
    """An embedding that is also the output layer, and an LSTM over packed sequences of different lengths."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(5, 11)
        self.rnn = nn.LSTM(5, 5, num_layers=2, batch_first=True)
        self.words = nn.Embedding(11, 5, padding_idx=0)
        self.out.weight = self.words.weight

    def forward(self, words, lengths, state):
        packed = pack_padded_sequence(self.words(words), lengths, batch_first=True, enforce_sorted=False)
        hidden, state = self.rnn(packed, state)
        return self.out(pad_packed_sequence(hidden, batch_first=True)[0]), state


def sentences(trainer):
    """Truncated backpropagation through time, with lengths that differ from step to step and rank to rank."""
    model = trainer.model(Sentences)
    optimizer = trainer.wrap(trainer.make_optimizer(model.parameters()), model)
    states = {}

    def loss_of(model, batch):
        generator = torch.Generator().manual_seed(100 * batch.step + batch.rank)
        lengths = torch.randint(1, 6, (4,), generator=generator)
        words = torch.randint(1, 11, (4, int(lengths.max())), generator=generator)
        scores, state = model(words, lengths, states.get(batch.rank))
        states[batch.rank] = tuple(part.detach() for part in state)
        return nn.functional.cross_entropy(scores.flatten(0, 1), words.flatten())

    for step in range(6):
        optimizer.zero_grad()
        trainer.loss(model, step, loss_of).backward()
        if trainer.form == "horovod":
            optimizer.synchronize()
        nn.utils.clip_grad_value_(model.parameters(), 0.05)
        with trainer.skip_synchronize(optimizer):
            optimizer.step()
    return tensors_of(model)


class Dropping(nn.Module):
    """Blocks whose activations are thrown away, with dropout, one of them used twice; both ways of checkpointing."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, CLASSES)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Tanh()) for _ in range(3))
        self.first = nn.Linear(INPUTS, 8)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for number, block in enumerate([*self.blocks, self.blocks[0]]):
            x = checkpoint(block, x, use_reentrant=number % 2 == 0)
        return self.last(x)


def dropping(trainer):
    """Activation checkpointing with dropout: what backward computes again draws the same numbers."""
    model, optimizer = trainer.start(Dropping)

    def loss_of(model, batch):
        torch.manual_seed(50 * batch.step + batch.rank)
        return classify(model, batch)

    trainer.train(model, optimizer, range(6), loss_of)
    return tensors_of(model)


def caught(trainer):
    """Forward fails on all ranks right behind a step and in the midst of an accumulation; the loop goes on."""
    model, optimizer = trainer.start(Small)
    for step in range(9):
        try:
            with trainer.no_sync(optimizer):
                (trainer.loss(model, 2 * step) / 2).backward()
            if step % 4 == 2:
                model(torch.ones(3, INPUTS + 1, dtype=trainer.dtype))  # a batch of another shape
            (trainer.loss(model, 2 * step + 1) / 2).backward()
            optimizer.step()
        except RuntimeError as error:
            assert "shapes" in str(error)
        optimizer.zero_grad()
    return tensors_of(model)


class Sharpness(torch.optim.Optimizer):
    """SAM as on GitHub: the user calls first_step() and second_step(), never step(); Foret et al., arXiv:2010.01412."""

    def __init__(self, base, rho=0.05):
        self.base = base
        super().__init__(base.param_groups, {"rho": rho})
        self.param_groups = base.param_groups

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["before"] = p.detach().clone()
                p.add_(p.grad * (0.05 / (norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["before"])
        self.base.step()
        self.zero_grad()

    def step(self, closure=None):
        raise AssertionError("nobody calls it")


def sharpness(trainer):
    """An optimizer of two halves, around one that is not wrapped."""
    model = trainer.model(Small)
    optimizer = trainer.wrap(Sharpness(trainer.make_optimizer(model.parameters())), model)
    for step in range(5):
        for half in (optimizer.first_step, optimizer.second_step):
            trainer.loss(model, step).backward()
            trainer.synchronize(optimizer)
            half()
    return tensors_of(model)


def pruned(trainer):
    """Weights are pruned in the midst of training, which replaces attributes, and made permanent later."""
    model, optimizer = trainer.start(Small)
    trainer.train(model, optimizer, range(3))
    for layer in (model.first, model.middle):
        prune.l1_unstructured(layer, "weight", amount=0.25)
    trainer.train(model, optimizer, range(3, 6))
    for layer in (model.first, model.middle):
        prune.remove(layer, "weight")
    trainer.train(model, optimizer, range(6, 9))
    return tensors_of(model)


def traced(trainer):
    """A snapshot for deployment right behind a step: what torch traces must not contain the pending update."""
    model, optimizer = trainer.start(Small)
    x = torch.linspace(-1, 1, INPUTS, dtype=trainer.dtype)[None]
    outputs = []

    def export(step):
        makers = (lambda: torch.jit.trace(model, x), lambda: torch.fx.symbolic_trace(model),
                  lambda: torch.export.export(model, (x,)).module())  # fmt: skip
        snapshot = makers[step % 3]()
        outputs.append(snapshot(x).detach().clone())
        assert torch.equal(snapshot(x), outputs[-1]) and torch.equal(model(x), outputs[-1])

    trainer.train(model, optimizer, range(7), each_step=export)
    return {**tensors_of(model), "outputs": torch.stack(outputs)}


def teacher(trainer):
    """A mean teacher, whose weights follow right behind every step, and a restart from the best weights so far."""
    model, optimizer = trainer.start(Small)
    other = copy.deepcopy(model).requires_grad_(False)
    best = None

    def loss_of(model, batch):
        return classify(model, batch) + (model(batch.x) - other(batch.x + 0.1)).square().mean()

    for step in range(8):
        optimizer.zero_grad()
        trainer.loss(model, step, loss_of).backward()
        optimizer.step()
        for slow, fast in zip(other.parameters(), model.parameters()):
            slow.mul_(0.9).add_(fast.detach(), alpha=0.1)
        if step == 3:
            best = copy.deepcopy(model.state_dict())
        if step == 5:
            model.load_state_dict(best)
    return {**tensors_of(model), **tensors_of(other, "teacher.")}


def halves(trainer):
    """LBFGS for the head and the trainer's optimizer for the rest of one model, in turn."""
    model = trainer.model(Backbone)
    parts = (("head.", torch.optim.LBFGS(model.head.parameters(), lr=0.3, max_iter=3)),
             ("backbone.", trainer.make_optimizer(model.backbone.parameters())))  # fmt: skip
    fast, slow = (trainer.wrap(optimizer, model.get_submodule(prefix[:-1]), [
        (name, parameter) for name, parameter in model.named_parameters() if name.startswith(prefix)])
        for prefix, optimizer in parts)  # fmt: skip
    for step in range(4):

        def closure(step=step):
            fast.zero_grad()
            with trainer.no_sync(slow):
                loss = trainer.loss(model, step)
                loss.backward(inputs=list(model.head.parameters()))
            return loss

        fast.step(closure)
        slow.zero_grad()
        with trainer.no_sync(fast):
            trainer.loss(model, step).backward()
        slow.step()
        fast.zero_grad()
    return tensors_of(model)


def in_one_thread(case):
    """The case without threads of torch's own, which bfloat16 on a CPU uses for the smallest tensors: they wait for cores."""

    def run(trainer):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return case(trainer)
        finally:
            torch.set_num_threads(threads)

    return run


CASES = {
    "long_run": in_one_thread(long_run), "penalized_adversaries": penalized_adversaries, "finetuned": finetuned(False),
    "finetuned, added": finetuned(True), "sentences": sentences, "dropping": dropping, "caught": caught,
    "sharpness": sharpness, "pruned": pruned, "traced": traced, "teacher": teacher, "halves": halves,
}  # fmt: skip
