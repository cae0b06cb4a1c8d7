"""What ranks run for the tests beside this file: many small cases per call, as importing torch takes seconds."""

import torch
from models import Plain, batches, make, train, weights
from torch import nn

import commlib
import commlib.torch as comm

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
STEPS, ROWS = 20, 12  # rows divide among 2, 3 and 4 ranks


def form_overlapped(optimizer, model):
    return comm.DistributedOptimizer(optimizer, model=model)


def form_waiting(optimizer, model):
    return comm.DistributedOptimizer(optimizer, model=model, overlap_forward=False)


def form_horovod(optimizer, model):
    comm.broadcast_parameters(model.state_dict(), root_rank=0)
    comm.broadcast_optimizer_state(optimizer, root_rank=0)
    return comm.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())


FORMS = {"overlapped": form_overlapped, "waiting": form_waiting, "horovod": form_horovod}


def my_rows(data):
    """This rank's rows of every batch."""
    return [(x[comm.rank() :: comm.size()], target[comm.rank() :: comm.size()]) for x, target in data]


def whole_batch(optimizer_name, dtype_name):
    """What one process learns from the whole batches."""
    dtype = DTYPES[dtype_name]
    model = make(Plain, dtype=dtype)
    train(model, OPTIMIZERS[optimizer_name](model.parameters()), batches(STEPS, ROWS, dtype=dtype))
    return weights(model)


def train_all():
    """(optimizer, dtype, form) -> (weights, what overlapped)."""
    results = {}
    for optimizer_name, make_optimizer in OPTIMIZERS.items():
        for dtype_name, dtype in DTYPES.items():
            for form_name, form in FORMS.items():
                # Rank 0's weights are the ones that count.
                model = make(Plain, seed=1 + comm.rank(), dtype=dtype)
                optimizer = form(make_optimizer(model.parameters()), model)
                train(model, optimizer, my_rows(batches(STEPS, ROWS, dtype=dtype)))
                overlap = optimizer.report()["overlap"]
                results[optimizer_name, dtype_name, form_name] = (weights(model), overlap)
    return results


class Branches(nn.Module):
    """Each rank uses one of two branches, and nobody the third."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))

    def forward(self, x):
        return self.branches[comm.rank() % 2](x)


def train_branches():
    """form -> (initial weights, final weights)."""
    results = {}
    for form_name, form in FORMS.items():
        model = make(Branches)
        before = weights(model)
        optimizer = form(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1), model)
        train(model, optimizer, my_rows(batches(5, ROWS)))
        results[form_name] = (before, weights(model))
    return results


def train_channels_last():
    """form -> weights of convolutions whose gradients are not contiguous."""
    results = {}
    for form_name, form in FORMS.items():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3)).to(memory_format=torch.channels_last)
        optimizer = form(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
        generator = torch.Generator().manual_seed(comm.rank())
        for _ in range(3):
            optimizer.zero_grad()
            images = torch.randn(2, 3, 8, 8, generator=generator).to(memory_format=torch.channels_last)
            model(images).square().mean().backward()
            optimizer.step()
        results[form_name] = weights(model)
    return results


def state_of_rank_0():
    """A state that only rank 0 has, after the broadcast: Python types and tensors."""
    model = make(Plain)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5 if comm.rank() == 0 else 0.1, betas=(0.8, 0.9))
    if comm.rank() == 0:
        train(model, optimizer, batches(2, 4))
    comm.broadcast_optimizer_state(optimizer, root_rank=0)
    group = optimizer.param_groups[0]
    return optimizer.state_dict()["state"], group["lr"], group["betas"], type(group["betas"]).__name__


def reduce_all_dtypes():
    """dtype name -> [sum, min, max, average of rank + 1 and rank + 2]."""
    integers = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
    dtypes = [*integers, torch.float16, torch.bfloat16, torch.float32, torch.float64]
    return {
        str(dtype): [
            comm.allreduce(torch.tensor([comm.rank() + 1, comm.rank() + 2], dtype=dtype), op=op).tolist()
            for op in (comm.Sum, comm.Min, comm.Max, comm.Average)
        ]
        for dtype in dtypes
    }


def move_tensors():
    """Every other collective once, in a form that can be compared."""
    rank, size = comm.rank(), comm.size()
    in_place = torch.full((2, 3), float(rank)).t()  # not contiguous
    comm.allreduce_(in_place, op=comm.Sum, name="in place")
    handle = comm.allreduce_async(torch.ones(3), name="handle", op=comm.Product, prescale_factor=2.0)
    product = comm.synchronize(handle)
    assert comm.poll(handle)
    rows, received = comm.alltoall(torch.arange(size * (size + 1) // 2) + 100 * rank, splits=list(range(1, size + 1)))
    return {
        "in place": in_place.tolist(),
        "product": product.tolist(),
        "bool": comm.allreduce(torch.tensor([rank == 0, True, False]), op=comm.Max).tolist(),
        "broadcast": comm.broadcast(torch.tensor([rank]), root_rank=size - 1).tolist(),
        "allgather": comm.allgather(torch.full((rank + 1, 1), rank)).tolist(),
        "empty": list(comm.allgather(torch.zeros(0, 2)).shape),
        "scalar": comm.allreduce(torch.tensor(2.0 * rank)).item(),
        "reducescatter": comm.reducescatter(torch.arange(5.0), op=comm.Sum).tolist(),
        "alltoall": (rows.tolist(), received.tolist()),
        "object": comm.broadcast_object({"rank": rank}, root_rank=1),
        "objects": comm.allgather_object("x" * rank),
    }


def differentiate():
    """Gradients of sums over each collective's result, weighted by this rank's number + 1."""
    weight, size = comm.rank() + 1.0, comm.size()

    def gradient_of(function, rows):
        x = torch.ones(rows, requires_grad=True)
        (function(x).sum() * weight).backward()
        return x.grad.tolist()

    return {
        "sum": gradient_of(lambda x: comm.allreduce(x, op=comm.Sum), 1),
        "average": gradient_of(lambda x: comm.allreduce(x), 1),
        "broadcast": gradient_of(lambda x: comm.broadcast(x, root_rank=0), 1),
        "allgather": gradient_of(lambda x: comm.allgather(x), comm.rank() + 1),
        "reducescatter": gradient_of(lambda x: comm.reducescatter(x, op=comm.Sum), size),
        "alltoall": gradient_of(lambda x: comm.alltoall(x), size),
        "alltoall with splits": gradient_of(lambda x: comm.alltoall(x, splits=[1] * size)[0], size + 1),
    }


def mismatched_parameter():
    """The error of a model whose layer has another width on the last rank, and whether the next operation works."""
    width = 4 if comm.rank() == comm.size() - 1 else 3
    model = nn.Linear(2, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = comm.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
    model(torch.ones(1, 2)).sum().backward()
    try:
        optimizer.step()
    except commlib.MismatchError as error:
        message = str(error)
    return message, comm.allreduce(torch.ones(1), op=comm.Sum).item()


def step_left_out_by_one_rank():
    """The errors of all ranks when rank 1 drops the gradients of a step that the others make; None: there was none."""
    messages = {}
    for form_name, form in FORMS.items():
        model = make(Plain)
        optimizer = form(torch.optim.SGD(model.parameters(), lr=0.1), model)
        messages[form_name] = None
        try:
            for step, (x, target) in enumerate(my_rows(batches(8, ROWS))):
                nn.functional.cross_entropy(model(x), target).backward()
                if step == 3 and comm.rank() == 1:
                    optimizer.synchronize()
                else:
                    optimizer.step()
                optimizer.zero_grad()
        except RuntimeError as error:
            messages[form_name] = str(error)
    return messages
