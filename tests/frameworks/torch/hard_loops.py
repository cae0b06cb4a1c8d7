"""Training loops that are hard for an overlapped step: whatever scripts do between, around and inside of steps.

All train hard_support.Small. Each case returns what it read on the way beside the final weights.
"""

import copy
import io
import pickle

import torch
from hard_support import ROWS, Small, classify, tensors_of
from torch import nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset


# ---- zero_grad


def zero_grad(where, of, set_to_none):
    """A loop with zero_grad in one place, of one object, in one form."""

    def case(trainer):
        model, optimizer = trainer.start(Small)
        zero = {"model": model, "optimizer": optimizer}[of].zero_grad
        for step in range(4):
            if where == "first":
                zero(set_to_none=set_to_none)
            loss = trainer.loss(model, step)
            if where == "before backward":
                zero(set_to_none=set_to_none)
            loss.backward()
            optimizer.step()
            if where == "last":
                zero(set_to_none=set_to_none)
        return tensors_of(model)

    return case


def no_module_is_called_between(trainer):
    """Two steps without a forward between them; the gradient is made by hand."""
    model, optimizer = trainer.start(Small)
    for step in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, sum(step + rank for rank in trainer.ranks) / len(trainer.ranks))
        optimizer.step()
        optimizer.zero_grad()
    return tensors_of(model)


def gradients_by_hand(trainer):
    """torch.autograd.grad instead of backward."""
    model, optimizer = trainer.start(Small)
    captured = list(model.parameters())
    for step in range(4):
        gradients = torch.autograd.grad(trainer.loss(model, step), captured)
        for parameter, gradient in zip(captured, gradients):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()
    return tensors_of(model)


# ---- clipping


def clipping(clip, capture, partly=False):
    """clip(parameters) between backward and step; `partly`: only rank 0 uses the first layer, which comes last."""

    def case(trainer):
        model, optimizer = trainer.start(Small)
        captured = list(model.parameters())
        norms = []

        def partial(model, batch):
            hidden = model.first(batch.x) if batch.rank == 0 else batch.x @ torch.ones(6, 8, dtype=batch.x.dtype)
            return nn.functional.cross_entropy(model.last(hidden), batch.target)

        for step in range(4):
            optimizer.zero_grad()
            trainer.loss(model, step, partial if partly else classify).backward()
            if trainer.form == "horovod":
                optimizer.synchronize()
            norms.append(clip(captured if capture else model.parameters()))
            with trainer.skip_synchronize(optimizer):
                optimizer.step()
        return {**tensors_of(model), "norms": torch.stack([torch.as_tensor(norm) for norm in norms])}

    return case


def clip_norm(parameters):
    return nn.utils.clip_grad_norm_(parameters, 0.05)


def clip_value(parameters):
    nn.utils.clip_grad_value_(parameters, 0.01)
    return torch.zeros(())


def clip_by_hand(parameters):
    norms = []
    for parameter in parameters:
        if parameter.grad is not None:
            norms.append(parameter.grad.norm())
            parameter.grad.mul_(0.5)
    return torch.stack(norms).sum()


def skipped_by_norm(trainer):
    """Steps whose gradient is too large are left out, by all ranks alike."""
    model, optimizer = trainer.start(Small)
    for step in range(6):
        optimizer.zero_grad()
        trainer.loss(model, step).mul(1000.0 if step % 3 == 1 else 1.0).backward()
        if trainer.form == "horovod":
            optimizer.synchronize()
        if clip_norm(list(model.parameters())) < 10.0:
            with trainer.skip_synchronize(optimizer):
                optimizer.step()
    return tensors_of(model)


# ---- accumulation


def accumulate(trainer):
    """Two backward passes per step, counted by the optimizer."""
    options = {} if trainer.alone else {"backward_passes_per_step": 2}
    model, optimizer = trainer.start(Small, **options)
    for step in range(4):
        optimizer.zero_grad()
        for part in range(2):
            (trainer.loss(model, 2 * step + part) / 2).backward()
        optimizer.step()
    return tensors_of(model)


def without_sync(trainer):
    """Two backward passes per step; the first, within no_sync(), also uses what the second does not."""
    model, optimizer = trainer.start(Small)
    for step in range(4):
        optimizer.zero_grad()
        with trainer.no_sync(optimizer):
            trainer.loss(model, 2 * step).backward()
        if step % 2:
            trainer.loss(model, 2 * step + 1).backward()
        else:
            trainer.loss(model, 2 * step + 1, lambda model, batch: model.first(batch.x).square().mean()).backward()
        optimizer.step()
    return tensors_of(model)


def two_losses(trainer):
    """Two backward passes through one graph, each to a part of the model."""
    model, optimizer = trainer.start(Small)
    for step in range(4):
        optimizer.zero_grad()
        with trainer.no_sync(optimizer):
            trainer.loss(model, step, lambda model, batch: model.first(batch.x).square().mean()).backward()
        trainer.loss(model, step).backward()
        optimizer.step()
    return tensors_of(model)


def gradient_penalty(trainer):
    """A loss that holds the gradient of another loss."""
    model, optimizer = trainer.start(Small)

    def loss_of(model, batch):
        x = batch.x.requires_grad_()
        loss = nn.functional.cross_entropy(model(x), batch.target)
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + slope.square().sum()

    trainer.train(model, optimizer, loss_of=loss_of)
    return tensors_of(model)


# ---- who reads weights


def evaluation(trainer):
    """Evaluation after every step, in all modes, before and after the training batch."""
    model, optimizer = trainer.start(Small)
    read = []

    def evaluate(step):
        model.eval()
        for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
            with mode:
                read.append(model(torch.ones(1, 6, dtype=trainer.dtype)).detach().clone())
        model.train()

    trainer.train(model, optimizer, each_step=evaluate)
    return {**tensors_of(model), "read": torch.stack(read)}


def reading(read):
    """read(model, captured, optimizer) right after step(); its tensors are results."""

    def case(trainer):
        model, optimizer = trainer.start(Small)
        captured = list(model.parameters())
        seen = []

        def log(step):
            seen.append(read(model, captured, optimizer))

        trainer.train(model, optimizer, each_step=log)
        return {**tensors_of(model), "read": torch.stack(seen)}

    return case


READERS = {
    "norms by a captured list": lambda model, captured, optimizer: torch.stack([p.detach().norm() for p in captured]),
    "foreach norms": lambda model, captured, optimizer: torch.stack(torch._foreach_norm([p.detach() for p in captured])),
    "data": lambda model, captured, optimizer: captured[-1].data.clone(),
    "numpy": lambda model, captured, optimizer: torch.from_numpy(captured[-1].detach().numpy().copy()),
    "item": lambda model, captured, optimizer: torch.tensor(captured[-1].flatten()[0].item()),
    "param_groups": lambda model, captured, optimizer: optimizer.param_groups[0]["params"][2].sum().detach(),
    "vector": lambda model, captured, optimizer: nn.utils.parameters_to_vector(captured).detach(),
    "attribute": lambda model, captured, optimizer: model.middle.weight.detach().clone(),
    "state_dict": lambda model, captured, optimizer: model.state_dict()["middle.weight"].clone(),
    "copy": lambda model, captured, optimizer: copy.deepcopy(captured[2]).detach(),
    "pickle": lambda model, captured, optimizer: pickle.loads(pickle.dumps(captured[2])).detach(),
    "save": lambda model, captured, optimizer: saved(captured[2]).detach(),
    "state": lambda model, captured, optimizer: sum(
        t.sum() for t in optimizer.state[captured[0]].values() if torch.is_tensor(t)
    ),
    "func": lambda model, captured, optimizer: torch.func.functional_call(
        model, dict(model.named_parameters()), (torch.ones(1, 6, dtype=captured[0].dtype),)
    ).detach(),
}


def saved(tensor):
    """What torch.load gives back of what torch.save wrote."""
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def decay_by_hand(trainer):
    """Weights are changed after step() through a list made before."""
    model, optimizer = trainer.start(Small)
    captured = list(model.parameters())

    def decay(step):
        with torch.no_grad():
            for parameter in captured:
                parameter.mul_(0.99)
        captured[0].data.clamp_(-0.3, 0.3)

    trainer.train(model, optimizer, each_step=decay)
    return tensors_of(model)


def penalty(trainer):
    """A penalty on captured weights, computed before the forward pass."""
    model, optimizer = trainer.start(Small)
    captured = list(model.parameters())

    def loss_of(model, batch):
        squares = sum(parameter.abs().sum() for parameter in captured)
        return 0.01 * squares + classify(model, batch)

    trainer.train(model, optimizer, loss_of=loss_of)
    return tensors_of(model)


def ema(trainer):
    """Averages of weights: torch's, with buffers and without, and one by hand."""
    model, optimizer = trainer.start(Small)
    averaged = [AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))]
    captured = list(model.parameters())
    by_hand = [parameter.detach().clone() for parameter in captured]

    def update(step):
        for average in averaged:
            average.update_parameters(model)
        with torch.no_grad():
            for mean, parameter in zip(by_hand, captured):
                mean.lerp_(parameter, 0.1)

    trainer.train(model, optimizer, each_step=update)
    return {**tensors_of(model), **tensors_of(averaged[0], "swa."), **tensors_of(averaged[1], "ema."),
            **{f"hand.{index}": mean for index, mean in enumerate(by_hand)}}  # fmt: skip


def swa(trainer):
    """Stochastic weight averaging with its scheduler; the last weights are the average."""
    model, optimizer = trainer.start(Small)
    average, scheduler = AveragedModel(model), SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)

    def update(step):
        if step >= 2:
            average.update_parameters(model)
            scheduler.step()

    trainer.train(model, optimizer, each_step=update)
    torch.optim.swa_utils.update_bn([torch.ones(2, 6, dtype=trainer.dtype)], average)
    model.load_state_dict(average.module.state_dict())
    trainer.train(model, optimizer, range(5, 7))
    return tensors_of(model)


# ---- weights that others write


def initialised_again(trainer):
    """Weights are made anew between steps, in the usual ways."""
    model, optimizer = trainer.start(Small)

    def again(step):
        torch.manual_seed(step)
        if step == 1:
            model.middle.reset_parameters()
        if step == 2:
            nn.init.xavier_uniform_(model.first.weight)
        if step == 3:
            model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)

    trainer.train(model, optimizer, each_step=again)
    return tensors_of(model)


def frozen_and_unfrozen(trainer):
    """Layers stop and begin to learn; the first is frozen when the optimizer is wrapped."""
    model = trainer.model(Small)
    model.first.requires_grad_(False)
    optimizer = trainer.wrap(trainer.make_optimizer(model.parameters()), model)

    def change(step):
        if step == 1:
            model.first.requires_grad_(True)
        if step == 3:
            model.middle.requires_grad_(False)
        if step == 5:
            model.middle.weight.requires_grad_(True)
            model.last.requires_grad_(False)

    trainer.train(model, optimizer, range(8), each_step=change)
    return tensors_of(model)


def moved(trainer):
    """Another dtype in mid-training, with the state of the optimizer as it is in torch."""
    model, optimizer = trainer.start(Small)
    trainer.train(model, optimizer, range(2))
    optimizer.state.clear()  # most optimizers of torch cannot go on with a state of another dtype
    trainer.dtype = torch.float32
    model.float()
    trainer.train(model, optimizer, range(2, 4))
    optimizer.state.clear()
    trainer.dtype = torch.float64
    model.to(torch.float64)
    trainer.train(model, optimizer, range(4, 6))
    return tensors_of(model)


# ---- modes and machinery


def exceptions(trainer):
    """Forward and backward fail on all ranks; the loop goes on with the next batch."""
    model, optimizer = trainer.start(Small)

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise ArithmeticError("in backward")

    def loss_of(model, batch):
        hidden = torch.tanh(model.first(batch.x))
        if batch.step % 3 == 1:
            raise ArithmeticError("in forward")
        if batch.step % 3 == 2:
            hidden = Failing.apply(hidden)
        return nn.functional.cross_entropy(model.last(torch.tanh(model.middle(hidden))), batch.target)

    caught = 0
    for step in range(7):
        try:
            optimizer.zero_grad()
            trainer.loss(model, step, loss_of).backward()
            optimizer.step()
        except ArithmeticError:
            caught += 1
            trainer.synchronize(optimizer)
    assert caught == 4
    return tensors_of(model)


class Numbers(Dataset):
    """Rows by number, made in worker processes."""

    def __init__(self, dtype):
        self.dtype = dtype

    def __len__(self):
        return 6 * ROWS

    def __getitem__(self, index):
        return torch.full((6,), index / 10.0, dtype=self.dtype).sin(), index % 3


def workers(trainer):
    """Worker processes are forked while updates are pending."""
    model, optimizer = trainer.start(Small)
    for _ in range(2):
        for x, target in DataLoader(Numbers(trainer.dtype), batch_size=ROWS, num_workers=2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    return tensors_of(model)


CASES = {
    **{
        f"zero_grad {where}, of {of}, {set_to_none}": zero_grad(where, of, set_to_none)
        for where in ("first", "before backward", "last")
        for of in ("model", "optimizer")
        for set_to_none in (True, False)
    },
    **{
        f"clip by {clip.__name__}{', captured' * capture}{', partly' * partly}": clipping(clip, capture, partly)
        for clip in (clip_norm, clip_value, clip_by_hand)
        for capture in (True, False)
        for partly in (True, False)
    },
    **{f"read {name}": reading(read) for name, read in READERS.items()},
    **{
        case.__name__: case
        for case in (
            no_module_is_called_between, gradients_by_hand, skipped_by_norm, accumulate, without_sync, two_losses,
            gradient_penalty, evaluation, decay_by_hand, penalty, ema, swa, initialised_again, frozen_and_unfrozen, moved,
            exceptions, workers,
        )
    },
}  # fmt: skip
