"""Everything around the optimizer that is hard: schedulers, scalers, closures, several optimizers, checkpoints."""

import contextlib
import copy
import io

import torch
from hard_support import Small, classify, tensors_of
from lion_pytorch import Lion
from torch import nn
from torch.optim import lr_scheduler

# ---- schedulers


def sequential(optimizer):
    """A warm-up, then a cosine."""
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 4)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])


def chained(optimizer):
    """Two at once."""
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, total_iters=2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    )


def has_momentum(optimizer):
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.1),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.8),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=has_momentum(o)),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=has_momentum(o)),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
}


def scheduled(make_scheduler, before):
    """A scheduler made before or after wrapping."""

    def case(trainer):
        model = trainer.model(Small)
        optimizer = trainer.make_optimizer(model.parameters())
        scheduler = make_scheduler(optimizer) if before else None
        optimizer = trainer.wrap(optimizer, model)
        scheduler = scheduler or make_scheduler(optimizer)
        losses = [1.0, 0.9, 0.8, 0.1, 0.1, 0.1]
        plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        trainer.train(model, optimizer, range(6),
                      each_step=lambda step: scheduler.step(*([losses[step]] if plateau else [])))  # fmt: skip
        return {**tensors_of(model), "lr": torch.tensor(float(optimizer.param_groups[0]["lr"]))}

    return case


def options_by_hand(trainer):
    """Options written straight into the groups, between backward and step and after it; some change how a step is made."""
    model, optimizer = trainer.start(Small)
    changes = {3: {"momentum": 0.0, "betas": (0.5, 0.9)}, 4: {"momentum": 0.7, "nesterov": True},
               5: {"foreach": True, "maximize": True}, 6: {"foreach": None, "fused": True}, 7: {"fused": None}}  # fmt: skip
    for step in range(9):
        known = {name: value for name, value in changes.get(step, {}).items() if name in optimizer.defaults}
        optimizer.param_groups[0].update(known)
        optimizer.zero_grad()
        trainer.loss(model, step).backward()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.01 * step
    return tensors_of(model)


# ---- mixed precision


def autocast(trainer):
    """bfloat16 within autocast; the loop's optimizer is called inside of it."""
    trainer.dtype = torch.float32
    model, optimizer = trainer.start(Small)
    for step in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            trainer.loss(model, step).backward()
            optimizer.step()
    return tensors_of(model)


def scaled(unscale, infinite, make=None):
    """GradScaler; `infinite`: one rank's gradients are not finite in one step, which all ranks have to skip."""

    def case(trainer):
        trainer.dtype = torch.float32
        if make is not None:
            trainer.make_optimizer = make
        model, optimizer = trainer.start(Small)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
        scales = []

        def loss_of(model, batch):
            loss = classify(model, batch)
            return loss * float("inf") if infinite and batch.step == 2 and batch.rank == 1 else loss

        for step in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = trainer.loss(model, step, loss_of)
            scaler.scale(loss).backward()
            if trainer.form == "horovod":
                optimizer.synchronize()
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            with trainer.skip_synchronize(optimizer):
                scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        assert not infinite or scales[2] < scales[1]
        return {**tensors_of(model), "scales": torch.tensor(scales)}

    return case


# ---- closures


def closure(trainer):
    """step(closure) with an ordinary optimizer."""
    model, optimizer = trainer.start(Small)
    losses = []
    for step in range(5):

        def loss_of_step():
            optimizer.zero_grad()
            loss = trainer.loss(model, step)  # noqa: B023 (used at once)
            loss.backward()
            return loss

        losses.append(optimizer.step(loss_of_step).detach())
    return {**tensors_of(model), "losses": torch.stack(losses)}


def lbfgs(line_search):
    """LBFGS calls its closure many times, and decides by its losses."""

    def case(trainer):
        trainer.make_optimizer = lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=5, line_search_fn=line_search)
        return closure(trainer)

    return case


# ---- several optimizers and groups


def equal_names(trainer):
    """Two models with equal names, an optimizer each, without name=."""
    first, first_optimizer = trainer.start(Small)
    second = trainer.model(Small, seed=50)
    second_optimizer = trainer.wrap(trainer.make_optimizer(second.parameters()), second)
    for step in range(4):
        for model, optimizer in ((first, first_optimizer), (second, second_optimizer)):
            optimizer.zero_grad()
            trainer.loss(model, step).backward()
        second_optimizer.step()
        first_optimizer.step()
    return {**tensors_of(first), **tensors_of(second, "second.")}


def one_model(trainer):
    """Two optimizers for parts of one model."""
    model = trainer.model(Small)
    parts = [[*model.first.parameters()], [*model.middle.parameters(), *model.last.parameters()]]
    optimizers = [trainer.wrap(trainer.make_optimizer(part), model) for part in parts]
    for step in range(4):
        for optimizer in optimizers:
            optimizer.zero_grad()
        trainer.loss(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    return tensors_of(model)


def adversaries(trainer):
    """A generator and a discriminator: the generator's backward also reaches the discriminator."""
    torch.manual_seed(1 if trainer.alone else 1 + trainer.ranks[0])
    makers = nn.ModuleList([nn.Linear(6, 6), Small()]).to(trainer.dtype)
    generator, judge = makers
    optimizers = [trainer.wrap(trainer.make_optimizer(model.parameters()), model) for model in makers]
    for step in range(4):
        optimizers[1].zero_grad()
        trainer.loss(judge, step, lambda judge, batch: classify(judge, batch) + judge(
            generator(batch.x).detach()).square().mean()).backward()  # fmt: skip
        optimizers[1].step()
        optimizers[0].zero_grad()
        with trainer.no_sync(optimizers[1]):
            trainer.loss(judge, step, lambda judge, batch: -judge(generator(batch.x)).square().mean()).backward()
        optimizers[0].step()
    return tensors_of(makers)


def groups_added(trainer):
    """A layer begins to learn with options of its own; later one that the model gets only then."""
    model = trainer.model(Small)
    optimizer = trainer.wrap(trainer.make_optimizer([*model.last.parameters(), *model.middle.parameters()]), model)
    trainer.train(model, optimizer, range(3))
    optimizer.add_param_group({"params": list(model.first.parameters()), "lr": 0.02})
    trainer.train(model, optimizer, range(3, 6))
    torch.manual_seed(9 if trainer.alone or trainer.form == "horovod" else 9 + trainer.ranks[0])
    model.extra = nn.Linear(3, 3).to(trainer.dtype)
    optimizer.add_param_group({"params": model.extra.parameters()})
    trainer.train(model, optimizer, range(6, 10), lambda model, batch: nn.functional.cross_entropy(
        model.extra(model(batch.x)), batch.target))  # fmt: skip
    return tensors_of(model)


def groups_added_in_flight(trainer):
    """A layer is given to the optimizer between backward and step, with the gradient that it has."""
    model = trainer.model(Small)
    optimizer = trainer.wrap(trainer.make_optimizer([*model.last.parameters(), *model.middle.parameters()]), model)
    for step in range(6):
        optimizer.zero_grad()
        trainer.loss(model, step).backward()
        if step == 3:
            optimizer.add_param_group({"params": list(model.first.parameters()), "lr": 0.02})
        optimizer.step()
    return tensors_of(model)


def many_groups(trainer):
    """Options per layer; biases without decay."""
    model = trainer.model(Small)
    groups = [{"params": [p], "weight_decay": 0.0 if p.dim() == 1 else 0.1} for p in model.parameters()]
    groups[0]["lr"] = 0.001
    optimizer = trainer.wrap(trainer.make_optimizer(groups), model)
    trainer.train(model, optimizer)
    return tensors_of(model)


# ---- checkpoints


def stored(state):
    """What a file gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def resumed(into_wrapped, at_once):
    """A checkpoint goes on in new objects; `at_once`: it is taken right after step(), else after the next backward."""

    def case(trainer):
        model, optimizer = trainer.start(Small)
        trainer.train(model, optimizer, range(3))
        if not at_once:
            optimizer.zero_grad()
            trainer.loss(model, 3).backward()
        state = stored({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if not at_once:
            optimizer.step()
        other = trainer.model(Small, seed=77)
        new = trainer.make_optimizer(other.parameters())
        if into_wrapped:
            new = trainer.wrap(new, other)
        other.load_state_dict(state["model"])
        new.load_state_dict(state["optimizer"])
        if not into_wrapped:
            new = trainer.wrap(new, other)
        trainer.train(other, new, range(3, 6))
        return {**tensors_of(other), **tensors_of(model, "old.")}

    return case


def rolled_back(trainer):
    """An older state is loaded into the running objects, between backward and step and after step."""
    model, optimizer = trainer.start(Small)
    trainer.train(model, optimizer, range(2))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    trainer.train(model, optimizer, range(2, 4))
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    trainer.train(model, optimizer, range(4, 6))
    optimizer.zero_grad()
    trainer.loss(model, 6).backward()
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    optimizer.step()
    return tensors_of(model)


def options_changed_by_loading(trainer):
    """A loaded state that turns on what the state at wrapping did not have."""
    trainer.make_optimizer = lambda p: torch.optim.Adam(p, lr=0.01)
    model, optimizer = trainer.start(Small)
    trainer.train(model, optimizer, range(3))
    plain = torch.optim.Adam(trainer.model(Small).parameters(), lr=0.02, amsgrad=True, weight_decay=0.1)
    optimizer.load_state_dict(plain.state_dict())
    trainer.train(model, optimizer, range(3, 6))
    return tensors_of(model)


def copies(trainer):
    """Deep copies of model and optimizer are ordinary ones, and train on by themselves; so does the original."""
    model, optimizer = trainer.start(Small)
    trainer.train(model, optimizer, range(3))
    other, plain = copy.deepcopy((model, optimizer))
    if not trainer.alone:
        assert type(plain) is type(optimizer).__mro__[2]
    for parameter in other.parameters():
        parameter.grad = torch.ones_like(parameter)
    if not isinstance(plain, Lion):  # whose own copies lack what its step needs
        plain.step()
    trainer.train(model, optimizer, range(3, 5))
    return {**tensors_of(model), **tensors_of(other, "copy.")}


def implemented(way):
    """An optimizer that is fused, or works on lists of tensors, where it knows that way."""

    def case(trainer):
        make = trainer.make_optimizer

        def make_in_that_way(parameters):
            parameters = list(parameters)
            optimizer = make(parameters)
            known = {way: True} if way in optimizer.defaults else {}
            return type(optimizer)(parameters, **{"lr": 0.01, **known})

        trainer.make_optimizer = make_in_that_way
        model, optimizer = trainer.start(Small)
        trainer.train(model, optimizer)
        return tensors_of(model)

    return case


def fused_adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, fused=True)


def capturable(trainer):
    """capturable=True is an error of torch's on a CPU, with or without commlib."""
    trainer.make_optimizer = lambda p: torch.optim.Adam(p, lr=0.01, capturable=True)
    model, optimizer = trainer.start(Small)
    with contextlib.suppress(AssertionError, RuntimeError):
        trainer.train(model, optimizer, range(3))
        raise ValueError("torch accepted it")
    return tensors_of(model)


WITH_ALL_OPTIMIZERS = {
    **{way: implemented(way) for way in ("fused", "foreach")},
    **{
        f"{name}, {'before' if before else 'after'}": scheduled(make, before)
        for name, make in SCHEDULERS.items()
        for before in (True, False)
    },
    **{
        f"resumed {'wrapped' * into_wrapped}{', at once' * at_once}": resumed(into_wrapped, at_once)
        for into_wrapped in (True, False)
        for at_once in (True, False)
    },
    **{
        case.__name__: case
        for case in (options_by_hand, closure, equal_names, one_model, adversaries, groups_added, groups_added_in_flight,
                     many_groups, rolled_back, copies)
    },
}  # fmt: skip
# ---- sparse gradients


class Words(nn.Module):
    """Two sparse embeddings, of which the second is used by some ranks and in some steps only; and a dense layer."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 4, sparse=True)
        self.rare = nn.EmbeddingBag(5, 4, sparse=True, mode="sum")
        self.last = nn.Linear(4, 3)

    def forward(self, batch):
        tokens = (batch.x.abs() * 10).long() % 20
        hidden = self.words(tokens).sum(1)
        if (batch.rank + batch.step) % 2:
            hidden = hidden + self.rare(tokens % 5)
        return self.last(hidden)


def sparse(make_sparse, as_dense=False):
    """An optimizer that takes sparse gradients for the embeddings, and another for the rest."""

    def case(trainer):
        model = trainer.model(Words)
        embeddings = [*model.words.parameters(), *model.rare.parameters()]
        optimizers = [make_sparse(embeddings), torch.optim.SGD(model.last.parameters(), lr=0.1)]
        options = {"sparse_as_dense": True} if as_dense and not trainer.alone else {}
        optimizers = [trainer.wrap(optimizer, model, **options) for optimizer in optimizers]
        for step in range(6):
            for optimizer in optimizers:
                optimizer.zero_grad()
            trainer.loss(model, step, lambda model, batch: nn.functional.cross_entropy(model(batch), batch.target)).backward()
            for optimizer in optimizers:
                optimizer.step()
        return tensors_of(model)

    return case


SPARSE = {
    "sparse SGD": sparse(lambda p: torch.optim.SGD(p, lr=0.1)),
    "sparse SGD with momentum": sparse(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "sparse Adagrad": sparse(lambda p: torch.optim.Adagrad(p, lr=0.1)),
    "SparseAdam": sparse(lambda p: torch.optim.SparseAdam(p, lr=0.1)),
    "sparse as dense": sparse(lambda p: torch.optim.SGD(p, lr=0.1), as_dense=True),
}
FUSED_SCALED = {
    "scaled, fused": scaled(False, False, fused_adam),
    "scaled, fused, infinite": scaled(False, True, fused_adam),
    "scaled, fused, unscale": scaled(True, True, fused_adam),
}
WITH_ITS_OWN = {
    **SPARSE,
    **FUSED_SCALED,
    "lbfgs": lbfgs(None),
    "lbfgs, strong_wolfe": lbfgs("strong_wolfe"),
    **{case.__name__: case for case in (capturable, options_changed_by_loading)},
}
MIXED = {
    "autocast": autocast,
    **{
        f"scaled{', unscale' * unscale}{', infinite' * infinite}": scaled(unscale, infinite)
        for unscale in (True, False)
        for infinite in (True, False)
    },
}
CASES = {**WITH_ALL_OPTIMIZERS, **WITH_ITS_OWN, **MIXED}
