"""Small models and data for tests, all from seeds."""

import torch
from torch import nn


class Net(nn.Module):
    """Layers registered in the opposite order of use; one weight is used by attribute only."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.scale = nn.Linear(8, 8, bias=False)  # its forward is never called
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)
        self.first = nn.Linear(6, 8)

    def forward(self, x):
        hidden = torch.relu(self.norm(self.first(x)))
        return self.last(nn.functional.linear(hidden, self.scale.weight))


NET_ORDER = ["first.weight", "first.bias", "norm.weight", "norm.bias", "scale.weight", "last.weight", "last.bias"]


class Plain(nn.Module):
    """As Net, without the norm, which sees the whole batch and so differs between one rank and many."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.first = nn.Linear(6, 8)
        self.middle = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


def make(model_class, seed=1, dtype=torch.float32):
    """A model whose weights come from the seed."""
    torch.manual_seed(seed)
    return model_class().to(dtype)


def batches(steps, rows, seed=2, dtype=torch.float32):
    """(input, target) of every step."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 6, generator=generator, dtype=dtype), torch.randint(0, 3, (rows,), generator=generator))
        for _ in range(steps)
    ]


def train(model, optimizer, data, each_step=lambda: None):
    """The usual loop; each_step() comes after step()."""
    for x, target in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        each_step()


def weights(model):
    """Copies of all weights, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
