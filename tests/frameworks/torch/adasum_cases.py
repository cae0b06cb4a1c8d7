"""What ranks run for test_adasum_torch.py."""

import numpy as np
import torch
from test_adasum import reference
from torch import nn

import commlib.torch as comm


def tensor_of(rank, seed, shape, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng((seed, rank)).normal(size=shape)).to(dtype)


def wanted(seed, shape, dtype):
    return reference([tensor_of(rank, seed, shape, dtype).double().numpy() for rank in range(comm.size())])


def collectives():
    """New, in place, asynchronous, grouped, bfloat16, of any layout; against the reference."""
    rank = comm.rank()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        tensor = tensor_of(rank, 1, (40, 3), dtype)
        for result in (comm.allreduce(tensor, op=comm.Adasum), comm.synchronize(comm.allreduce_async(tensor, op=comm.Adasum)),
                       comm.allreduce_(tensor.clone(), op=comm.Adasum), comm.allreduce_(tensor.t().clone(), op=comm.Adasum).t(),
                       comm.grouped_allreduce([tensor, tensor * 3], op=comm.Adasum)[1] / 3):  # fmt: skip
            assert result.dtype is dtype
            assert np.abs(result.double().numpy() - wanted(1, (40, 3), dtype)).max() < tolerance * 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last = nn.Linear(3, 20), nn.Linear(20, 2)
        self.double()

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def optimizer_of(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def step(model, optimizer, rank, number):
    optimizer.zero_grad()
    model(tensor_of(rank, number, (4, 3), torch.float64)).square().mean().backward()
    optimizer.step()


def by_hand(size, steps):
    """Every rank's own step, and Adasum of the changes, parameter by parameter."""
    models = [Net() for _ in range(size)]
    optimizers = [optimizer_of(model) for model in models]
    for number in range(steps):
        before = [one.detach().clone() for one in models[0].parameters()]
        for rank in range(size):
            step(models[rank], optimizers[rank], rank, number)
        with torch.no_grad():
            for start, *ends in zip(before, *(model.parameters() for model in models)):
                change = torch.from_numpy(reference([(end - start).numpy() for end in ends]))
                for end in ends:
                    end.copy_(start + change)
    return models[0]


def train(form):
    """How far each parameter is from those by hand."""
    model = Net()
    named = {"model": model} if form == "overlapped" else {"named_parameters": model.named_parameters()}
    optimizer = comm.DistributedOptimizer(optimizer_of(model), op=comm.Adasum, **named)
    for number in range(5):
        step(model, optimizer, comm.rank(), number)
    assert "Adasum" in str(optimizer.report()["overlap"])
    pairs = zip(model.parameters(), by_hand(comm.size(), 5).parameters())
    return [float((one.detach() - other.detach()).abs().max()) for one, other in pairs]
