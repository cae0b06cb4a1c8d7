"""What ranks run for test_joins_torch.py: training with different numbers of batches, against all ranks' training by hand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import commlib
import commlib.torch as comm

ROUNDS = ((1, 4, 3, 0), (3, 3, 3, 3), (5, 0, 2, 5))  # batches of each rank, until all join


class Net(nn.Module):
    """Small layers, a large one, one that only some ranks use, a frozen one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.large, self.last = nn.Linear(3, 8), nn.Linear(8, 3000), nn.Linear(3000, 2)
        self.sometimes, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.double()

    def forward(self, x, uses_all):
        out = self.frozen(self.last(torch.tanh(self.large(torch.tanh(self.first(x))))))
        return self.sometimes(out) if uses_all else out


def batch_of(number, rank, step):
    return torch.from_numpy(np.random.default_rng((number, rank, step)).normal(size=(4, 3))), (rank + step) % 2 == 0


def loss_of(model, number, rank, step):
    x, uses_all = batch_of(number, rank, step)
    return model(x, uses_all).square().mean()


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)


def by_hand(size, keeps_none):
    """Every rank's weights after each round; a rank that has no batch stands still, and counts in the divisor.

    Args:
        keeps_none: a gradient that no rank had stays None, as with model=; else it becomes zeros.
    """
    models = [Net() for _ in range(size)]
    optimizers = [optimizer_of(model) for model in models]
    results = []
    for number, steps in enumerate(ROUNDS):
        for step in range(max(steps[:size])):
            active = [rank for rank in range(size) if step < steps[rank]]
            for rank in active:
                optimizers[rank].zero_grad()
                loss_of(models[rank], number, rank, step).backward()
            for parameters in zip(*(models[rank].parameters() for rank in active)):
                present = [one.grad for one in parameters if one.grad is not None]
                if not parameters[0].requires_grad or (not present and keeps_none):
                    continue
                total = sum(present) / size if present else torch.zeros_like(parameters[0])
                for one in parameters:
                    one.grad = total.clone()
            for rank in active:
                optimizers[rank].step()
        results.append([[one.detach().clone() for one in model.parameters()] for model in models])
        last = max(range(size), key=lambda rank: steps[rank])
        for model, optimizer in zip(models, optimizers):
            _copy(models[last], optimizers[last], model, optimizer)
    return results


def _copy(source, source_optimizer, model, optimizer):
    model.load_state_dict(source.state_dict())
    optimizer.load_state_dict(copy.deepcopy(source_optimizer.state_dict()))


def train(form):
    """Returns, for each round, how far this rank's weights are from those by hand."""
    model = Net()
    named = {"model": model} if form == "overlapped" else {"named_parameters": model.named_parameters()}
    optimizer = comm.DistributedOptimizer(optimizer_of(model), **named)
    rank, size, distances = comm.rank(), comm.size(), []
    wanted = by_hand(size, keeps_none=form == "overlapped")
    for number, steps in enumerate(ROUNDS):
        for step in range(steps[rank]):
            optimizer.zero_grad()
            loss_of(model, number, rank, step).backward()
            optimizer.step()
        last = comm.join()
        assert 0 <= last < size
        pairs = zip(model.parameters(), wanted[number][rank])
        distances.append(max(float((one.detach() - other).abs().max()) for one, other in pairs))
        root = max(range(size), key=lambda one: steps[one])  # one of those with the most steps
        comm.broadcast_parameters(model.state_dict(), root)
        comm.broadcast_optimizer_state(optimizer, root)
    return distances


def sparse():
    """Gradients whose rows are gathered need every rank; as dense ones they do not."""
    def run(as_dense):
        model = nn.Embedding(5, 2, sparse=True)
        nn.init.ones_(model.weight)
        optimizer = comm.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), sparse_as_dense=as_dense,
                                              named_parameters=model.named_parameters(), name=f"sparse {as_dense}")  # fmt: skip
        for step in range(1 if comm.rank() else 2):
            optimizer.zero_grad()
            model(torch.tensor([step])).sum().backward()
            try:
                optimizer.step()
            except commlib.JoinedError as error:
                comm.join()
                return str(error)
        comm.join()
        return model.weight[:, 0].tolist()

    return run(True), run(False)


def collectives():
    """Everything but all-reduce fails while rank 0 has joined; grouped ones go on."""
    rank, size = comm.rank(), comm.size()
    grouped = None
    if rank:
        while float(comm.allreduce(torch.ones(()), op=comm.Sum)) == size:
            pass
        grouped = [float(one[0]) for one in comm.grouped_allreduce([torch.ones(2), torch.full((3,), 2.0)], op=comm.Average)]
        for call in (lambda: comm.allgather(torch.ones(1)), lambda: comm.broadcast(torch.ones(1), 0), lambda: comm.barrier(),
                     lambda: comm.alltoall(torch.ones(size)), lambda: comm.reducescatter(torch.ones(size)),
                     lambda: comm.broadcast_object(1), lambda: comm.allgather_object(1)):  # fmt: skip
            with pytest.raises(comm.HorovodInternalError, match="rank 0 has joined"):
                call()
    last = comm.join()
    return grouped, last, comm.allgather(torch.tensor([rank])).tolist()


def process_sets():
    """Ranks of a set go on reducing in it when one of them has joined."""
    chosen = comm.add_process_set([0, 1])
    results = []
    if comm.rank() == 1:
        value = 2.0
        while value == 2.0:
            value = float(comm.allreduce(torch.ones(()), op=comm.Sum, process_set=chosen))
            results.append(value)
    elif comm.rank() == 0:
        comm.allreduce(torch.ones(()), op=comm.Sum, process_set=chosen)
    comm.join()
    comm.remove_process_set(chosen)
    return results
