"""What ranks run for test_optimizer_arguments.py: Horovod's arguments of DistributedOptimizer, against plain references."""

import torch
from models import Plain, batches, make, train, weights
from torch import nn

import commlib.torch as comm

ROWS, STEPS = 12, 4


def mine(data):
    return [(x[comm.rank() :: comm.size()], target[comm.rank() :: comm.size()]) for x, target in data]


def distributed(model, form, **options):
    named = {"model": model} if form == "overlapped" else {"named_parameters": model.named_parameters()}
    return comm.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **named, **options)


def by_hand(compression, rows):
    """Horovod's own way: every gradient compressed, reduced and decompressed, and then a plain step."""
    model = make(Plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, target in rows:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        for parameter in model.parameters():
            parameter.grad = comm.allreduce(parameter.grad, compression=compression)
        optimizer.step()
    return weights(model)


class Halves:
    """A compressor of a user's own: fp64 travels as fp32, everything else as fp16."""

    @staticmethod
    def compress(tensor):
        return tensor.to(torch.float32 if tensor.dtype is torch.float64 else torch.float16), tensor.dtype

    @staticmethod
    def decompress(tensor, ctx):
        return tensor.to(ctx)


def compressed():
    """(form, compressor) -> (weights, those by hand, dtypes of the operations, bytes of them)."""
    rows, results = mine(batches(STEPS, ROWS)), {}
    for name, compression in (("fp16", comm.Compression.fp16), ("bf16", comm.Compression.bf16), ("own", Halves)):
        wanted = by_hand(compression, rows)
        for form in ("horovod", "overlapped"):
            model = make(Plain)
            optimizer = distributed(model, form, compression=compression)
            train(model, optimizer, rows)
            groups = optimizer.report()["groups"]
            results[form, name] = (weights(model), wanted, {group["dtype"] for group in groups},
                                   sum(group["nbytes"] for group in groups))  # fmt: skip
    return results


def chosen_groups():
    """What was chosen -> (names of tensors that travel together, whether the weights are those of ungrouped training)."""
    rows = mine(batches(STEPS, ROWS))
    plain = make(Plain)
    train(plain, distributed(plain, "horovod"), rows)
    results = {}
    for what in ("two", "deprecated", "lists", "many"):
        for form in ("horovod", "overlapped"):
            model = make(Plain)
            options = {
                "two": {"groups": 2}, "deprecated": {"num_groups": 2}, "many": {"groups": 100},
                "lists": {"groups": [[model.last.weight, model.first.bias], [model.middle.bias, model.middle.weight]]},
            }[what]  # fmt: skip
            optimizer = distributed(model, form, **options)
            train(model, optimizer, rows)
            groups = sorted(sorted(group["tensors"]) for group in optimizer.report()["groups"])
            pairs = zip(weights(model).values(), weights(plain).values())
            equal = all(torch.allclose(one, other, atol=1e-6) for one, other in pairs)
            results[what, form] = (groups, equal)
    return results


def accumulated():
    """form -> weights after steps of two backward passes each, then of one; with an average that is divided in two parts."""
    data = batches(2 * STEPS + 2, ROWS)
    results = {}
    for form in ("horovod", "overlapped"):
        model = make(Plain)
        optimizer = distributed(model, form, backward_passes_per_step=2, gradient_predivide_factor=2.0)
        passes = mine(data)
        for step in range(STEPS):
            optimizer.zero_grad()
            for x, target in passes[2 * step : 2 * step + 2]:
                nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
        optimizer.set_backward_passes_per_step(1)
        train(model, optimizer, passes[2 * STEPS :])
        results[form] = weights(model)
    model = make(Plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for x, target in data[2 * step : 2 * step + 2]:
            nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    train(model, optimizer, data[2 * STEPS :])
    return results, weights(model)


def sparse_as_dense():
    """(as dense or not, compression) -> rows of an embedding after training, and the layout of its gradient."""
    results = {}
    for as_dense in (True, False):
        for name in ("none", "fp16"):
            torch.manual_seed(4)
            model = nn.Embedding(8, 2, sparse=True)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            optimizer = comm.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), sparse_as_dense=as_dense,
                                                  compression=getattr(comm.Compression, name))  # fmt: skip
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.tensor([comm.rank(), 5])).sum().backward()
                optimizer.step()
            results[as_dense, name] = (weights(model)["weight"], model.weight.grad.is_sparse)
    return results
