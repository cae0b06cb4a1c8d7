"""Habits of scripts that an overlapped step could trip over: what is read, replaced, repeated or left out beside the loop.

All train hard_support.Small. Cases in ONE_RANK do something on one rank only, which no single process can repeat.
"""

import copy

import torch
from hard_support import Small, tensors_of
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

import commlib.torch as comm


def compiled(trainer):
    """A compiled model, accumulation within no_sync(), and clipping."""
    torch._dynamo.reset()
    model = trainer.model(Small)
    called = torch.compile(model, backend="eager")
    named = list(model.named_parameters())
    optimizer = trainer.wrap(trainer.make_optimizer(model.parameters()), model if trainer.form == "horovod" else called, named)
    for step in range(4):
        optimizer.zero_grad()
        with trainer.no_sync(optimizer):
            (trainer.loss(called, 2 * step) / 2).backward()
        (trainer.loss(called, 2 * step + 1) / 2).backward()
        if trainer.form == "horovod":
            optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        with trainer.skip_synchronize(optimizer):
            optimizer.step()
    return tensors_of(model)


def infinite_once(trainer):
    """GradScaler and accumulation: one rank's first half is not finite in two steps, which all ranks leave out."""
    trainer.dtype = torch.float32
    model, optimizer = trainer.start(Small)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scales = []
    for step in range(7):
        optimizer.zero_grad()
        is_bad = step in (1, 4) and trainer.ranks[0] == 1
        with trainer.no_sync(optimizer):
            scaler.scale(trainer.loss(model, 2 * step) * (float("inf") if is_bad else 0.5)).backward()
        scaler.scale(trainer.loss(model, 2 * step + 1) / 2).backward()
        if trainer.form == "horovod":
            optimizer.synchronize()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with trainer.skip_synchronize(optimizer):
            scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    assert scales[1] < scales[0] and scales[4] < scales[3]
    return {**tensors_of(model), "scales": torch.tensor(scales)}


def bad_batch(trainer):
    """Forward fails on one rank, before and in the middle of the model; that rank steps as the others do."""
    model, optimizer = trainer.start(Small)
    for step in range(7):
        optimizer.zero_grad()
        try:
            if step in (3, 5) and trainer.ranks[0] == 1:
                hidden = model.first(torch.ones(2, 6, dtype=trainer.dtype)) if step == 5 else None
                raise KeyError(hidden)
            trainer.loss(model, step).backward()
        except KeyError:
            pass
        optimizer.step()
    return tensors_of(model)


def rank_0_looks(trainer):
    """Rank 0 alone evaluates, saves and logs the norms of weights, between all steps."""
    model, optimizer = trainer.start(Small)
    captured = list(model.parameters())

    def look(step):
        if trainer.ranks[0] == 0:
            with torch.no_grad():
                model(torch.ones(1, 6, dtype=trainer.dtype))
            copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            assert all(torch.isfinite(parameter.norm()) for parameter in captured)

    trainer.train(model, optimizer, range(6), each_step=look)
    return tensors_of(model)


def shadowed(trainer):
    """A deep copy of the model right after every step, and an average of the copies."""
    model, optimizer = trainer.start(Small)
    average = AveragedModel(model)
    shadows = {}

    def follow(step):
        shadow = copy.deepcopy(model)
        average.update_parameters(shadow)
        shadows.update(tensors_of(shadow, f"after {step}."))

    trainer.train(model, optimizer, each_step=follow)
    return {**tensors_of(model), **tensors_of(average, "average."), **shadows}


def plateau(trainer):
    """ReduceLROnPlateau with a loss that all ranks agree on."""
    model, optimizer = trainer.start(Small)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.2)
    for step in range(6):
        optimizer.zero_grad()
        loss = trainer.loss(model, step)
        loss.backward()
        optimizer.step()
        scheduler.step(loss.item() if trainer.alone else comm.allreduce(loss.detach()).item())
    return {**tensors_of(model), "lr": torch.tensor(optimizer.param_groups[0]["lr"])}


def loaded_in_between(trainer):
    """An older state is loaded between backward and step."""
    model, optimizer = trainer.start(Small)
    trainer.train(model, optimizer, range(3))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    for step in range(3, 7):
        optimizer.zero_grad()
        trainer.loss(model, step).backward()
        if step == 5:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
        optimizer.step()
    return tensors_of(model)


def looks_while_accumulating(trainer):
    """Evaluation, saving and a look at gradients between the two backward passes of a step."""
    options = {} if trainer.alone else {"backward_passes_per_step": 2}
    model, optimizer = trainer.start(Small, **options)
    read = []
    for step in range(5):
        optimizer.zero_grad()
        (trainer.loss(model, 2 * step) / 2).backward()
        with torch.no_grad():
            read.append(model(torch.ones(1, 6, dtype=trainer.dtype)))
        assert all(parameter.grad is not None for parameter in model.parameters())
        copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        (trainer.loss(model, 2 * step + 1) / 2).backward()
        optimizer.step()
    return {**tensors_of(model), "read": torch.stack(read)}


def cadences(trainer):
    """Two optimizers over one model, one of which steps every second time."""
    model = trainer.model(Small)
    parts = [[*model.first.parameters()], [*model.middle.parameters(), *model.last.parameters()]]
    often, seldom = (trainer.wrap(trainer.make_optimizer(part), model, [
        (name, p) for name, p in model.named_parameters() if any(p is one for one in part)]) for part in parts)  # fmt: skip
    for step in range(8):
        often.zero_grad()
        if step % 2:
            trainer.loss(model, step).backward()
            seldom.step()
            seldom.zero_grad()
        else:
            with trainer.no_sync(seldom):
                trainer.loss(model, step).backward()
        often.step()
    return tensors_of(model)


def functional(is_captured):
    """torch.func.functional_call with the model's parameters, listed in every step or once."""

    def case(trainer):
        model, optimizer = trainer.start(Small)
        captured = dict(model.named_parameters())

        def loss_of(model, batch):
            parameters = captured if is_captured else dict(model.named_parameters())
            return nn.functional.cross_entropy(torch.func.functional_call(model, parameters, (batch.x,)), batch.target)

        trainer.train(model, optimizer, loss_of=loss_of)
        return tensors_of(model)

    return case


def transformed(trainer):
    """torch.func.grad, whose gradients are written into p.grad."""
    model, optimizer = trainer.start(Small)
    captured = dict(model.named_parameters())
    for step in range(5):
        values = {name: parameter.detach() for name, parameter in captured.items()}
        gradients = torch.func.grad(lambda values: sum(
            nn.functional.cross_entropy(torch.func.functional_call(model, values, (batch.x,)), batch.target)
            for batch in trainer.batches(step)) / len(trainer.ranks))(values)  # noqa: B023 (used at once)  # fmt: skip
        for name, parameter in captured.items():
            parameter.grad = gradients[name]
        optimizer.step()
        optimizer.zero_grad()
    return tensors_of(model)


def clamped_by_hooks(trainer):
    """Tensor hooks, made before wrapping, look at and change every gradient."""
    model = trainer.model(Small)
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient * 0.5)
    optimizer = trainer.wrap(trainer.make_optimizer(model.parameters()), model)
    trainer.train(model, optimizer)
    return tensors_of(model)


def changed_gradients(change):
    """change(parameter) of every reduced gradient, in place or not, through a list made before."""

    def case(trainer):
        model, optimizer = trainer.start(Small)
        captured = list(model.parameters())
        for step in range(5):
            optimizer.zero_grad()
            trainer.loss(model, step).backward()
            if trainer.form == "horovod":
                optimizer.synchronize()
            torch.manual_seed(step)
            for parameter in captured:
                change(parameter)
            with trainer.skip_synchronize(optimizer):
                optimizer.step()
        return tensors_of(model)

    return case


def with_noise(parameter):
    parameter.grad += 0.01 * torch.randn_like(parameter)


def replaced(parameter):
    parameter.grad = parameter.grad * 0.5


def by_data(parameter):
    parameter.grad.data.clamp_(-0.01, 0.01)


def zeroed_by_hand(trainer):
    """Old habits of zeroing: detach_() and zero_() where there is a gradient."""
    model, optimizer = trainer.start(Small)
    captured = list(model.parameters())
    for step in range(5):
        for parameter in captured:
            if parameter.grad is not None:
                parameter.grad.detach_()
                parameter.grad.zero_()
        trainer.loss(model, step).backward()
        optimizer.step()
    return tensors_of(model)


def stepped_first(trainer):
    """A step before the first backward, as some scripts make it to quieten schedulers."""
    model, optimizer = trainer.start(Small)
    optimizer.zero_grad()
    optimizer.step()
    trainer.train(model, optimizer)
    return tensors_of(model)


def in_shared_memory(trainer):
    """model.share_memory() after wrapping."""
    model, optimizer = trainer.start(Small)
    trainer.train(model, optimizer, range(2))
    model.share_memory()
    trainer.train(model, optimizer, range(2, 5))
    return tensors_of(model)


def swapped(trainer):
    """A conversion that swaps the insides of parameters, and with them the hooks."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model, optimizer = trainer.start(Small)
        trainer.train(model, optimizer, range(3))
        optimizer.zero_grad()
        optimizer.state.clear()
        trainer.dtype = torch.float32
        model.float()
        trainer.train(model, optimizer, range(3, 6))
        return tensors_of(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


ALL_RANKS = {
    "functional, captured": functional(True),
    "functional": functional(False),
    **{f"gradients {change.__name__}": changed_gradients(change) for change in (with_noise, replaced, by_data)},
    **{
        case.__name__: case
        for case in (compiled, shadowed, plateau, loaded_in_between, looks_while_accumulating, cadences, transformed,
                     clamped_by_hooks, zeroed_by_hand, stepped_first, in_shared_memory)
    },
}  # fmt: skip
# One rank alone does something, or rounding is that of float32.
APART = {case.__name__: case for case in (infinite_once, bad_batch, rank_0_looks, swapped)}
CASES = {**ALL_RANKS, **APART}
