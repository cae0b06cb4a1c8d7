"""What ranks run for test_sync_batch_norm.py: each case beside torch's own module on the rows of all ranks."""

import itertools

import torch
from torch import nn

import commlib.torch as comm

SHAPES = {2: (4,), 3: (4, 5), 4: (4, 3, 2)}
REFERENCES = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}


def rows_of(rank):
    """Uneven numbers of rows; rank 1 has none."""
    return (3, 0, 5)[rank]


def check(process_set, dims, dtype, affine, momentum, offset):
    counts = [rows_of(rank) for rank in process_set.ranks]
    generator = torch.Generator().manual_seed(dims)
    batches = [torch.randn(sum(counts), *SHAPES[dims], generator=generator, dtype=dtype) * 3 + offset for _ in range(3)]
    weights = torch.randn(sum(counts), *SHAPES[dims], generator=generator, dtype=dtype)
    first = sum(counts[: process_set.rank()])
    mine = slice(first, first + counts[process_set.rank()])
    options = {"eps": 1e-4, "momentum": momentum, "affine": affine}
    whole, part = REFERENCES[dims](4, **options).to(dtype), comm.SyncBatchNorm(4, **options).to(dtype)
    part.process_set = process_set
    if affine:
        for module in (whole, part):
            module.weight.data.copy_(torch.arange(1, 5))
            module.bias.data.fill_(0.5)
    for batch in batches:
        x, y = batch.clone().requires_grad_(), batch[mine].clone().requires_grad_()
        wanted, got = whole(x), part(y)
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {}
        if offset:
            tolerance = {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(got, wanted[mine], **tolerance)
        (wanted * weights).sum().backward()
        (got * weights[mine]).sum().backward()
        torch.testing.assert_close(y.grad, x.grad[mine], **tolerance)
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(dict(part.named_buffers())[name], buffer, **tolerance)
    for name, parameter in whole.named_parameters():
        gradient = comm.allreduce(dict(part.named_parameters())[name].grad, op=comm.Sum, process_set=process_set)
        torch.testing.assert_close(gradient, parameter.grad, **tolerance)
    whole.eval(), part.eval()
    torch.testing.assert_close(part(batches[0]), whole(batches[0]), **tolerance)


def all_cases():
    """Every dimension, dtype and option; far from zero, too, where sums of squares would cancel."""
    pair = comm.add_process_set([0, 2])
    for process_set in (comm.global_process_set, pair):
        if not process_set.included():
            continue
        for case in itertools.product((2, 3, 4), (torch.float32, torch.float64), (True, False), (0.2, None), (0,)):
            check(process_set, *case)
        check(process_set, 4, torch.float32, True, 0.1, 1000)
    comm.remove_process_set(pair)


def too_few():
    """One value per channel on all ranks together."""
    try:
        comm.SyncBatchNorm(2)(torch.ones(int(comm.rank() == 0), 2))
    except ValueError as error:
        return str(error)
    return None


def trained():
    """Weights of a model with two such layers, and those of one process on all rows."""
    generator = torch.Generator().manual_seed(5)
    data = torch.randn(4, 6, 3, generator=generator)
    results = []
    for norm, rows in ((comm.SyncBatchNorm, slice(comm.rank(), None, comm.size())), (nn.BatchNorm1d, slice(None))):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), norm(4), nn.Tanh(), nn.Linear(4, 2), norm(2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if norm is comm.SyncBatchNorm:
            optimizer = comm.DistributedOptimizer(optimizer, model=model)
        for batch in data:
            optimizer.zero_grad()
            (model(batch[rows])[:, 0] * batch[rows, 0]).mean().backward()
            optimizer.step()
        results.append(dict(model.state_dict()))
    return results
