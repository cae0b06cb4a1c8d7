"""Models that are hard for an overlapped step: sharing, branches, hidden uses, and everything torch lets a module be.

Each case trains one model with the usual loop (hard_support.Trainer.train).
"""

import torch
from hard_support import CLASSES, INPUTS, classify, tensors_of
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

WIDTH = 8


class Tied(nn.Module):
    """The output layer's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(INPUTS, WIDTH)
        self.embedding = nn.Embedding(5, WIDTH)
        self.output = nn.Linear(WIDTH, 5, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, x):
        tokens = (x[:, 0].abs() * 7).long() % 5
        return self.output(torch.tanh(self.read(x)) + self.embedding(tokens))[:, :CLASSES]


class Shared(nn.Module):
    """One module in two places, under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(INPUTS, WIDTH)
        self.block = nn.Linear(WIDTH, WIDTH)
        self.again = nn.Sequential(nn.Tanh(), self.block)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.last(self.again(self.block(self.first(x))))


class Unrolled(nn.Module):
    """A cell called once per input."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(WIDTH, CLASSES)
        self.cell = nn.GRUCell(1, WIDTH)

    def forward(self, x):
        hidden = x.new_zeros(len(x), WIDTH)
        for column in x.split(1, dim=1):
            hidden = self.cell(column, hidden)
        return self.last(hidden)


class Recurrent(nn.Module):
    """nn.LSTM keeps a list of its weights beside its dict of them."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(WIDTH, CLASSES)
        self.lstm = nn.LSTM(1, WIDTH, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.last(self.lstm(x.unsqueeze(2))[0][:, -1])


class Attention(nn.Module):
    """Attention's output layer is never called: its weights are read by attribute."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(WIDTH, CLASSES)
        # Without biases: softmax cancels that of the keys, whose gradient is rounding alone, and Lion takes its sign.
        self.block = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, bias=False)
        self.first = nn.Linear(1, WIDTH)

    def forward(self, x):
        return self.last(self.block(self.first(x.unsqueeze(2))).mean(1))


class ByAttribute(nn.Module):
    """Weights used without their module's forward, one by attribute and some by the root's own forward."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.shifts = nn.ParameterList([torch.zeros(WIDTH), torch.zeros(CLASSES)])
        self.named = nn.ParameterDict({"gain": torch.ones(WIDTH)})
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.inner = nn.Linear(INPUTS, WIDTH)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        hidden = nn.functional.linear(x, self.inner.weight, self.inner.bias) * self.named["gain"] + self.shifts[0]
        return self.last(torch.tanh(hidden)) * self.scale + self.shifts[1] + self.nothing.sum()


class Captured(nn.Module):
    """The middle weight is used through a list made at construction, before anything else."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(INPUTS, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, CLASSES)
        self.__dict__["captured"] = [self.middle.weight, self.first.weight]

    def forward(self, x):
        penalty = self.captured[1].square().mean()  # read before its module's forward
        return self.last(torch.tanh(self.first(x)) @ self.captured[0]) + penalty


class Hidden(nn.Module):
    """A layer that the model does not know of, as it is in a list."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(INPUTS, WIDTH)
        self.layers = [nn.Linear(WIDTH, CLASSES)]

    def forward(self, x):
        return self.layers[0].to(x.dtype)(torch.tanh(self.first(x)))


class Branches(nn.Module):
    """One of three branches, chosen by the batch; `choose(batch)` says which."""

    choose = None

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(INPUTS, WIDTH) for _ in range(3))
        self.last = nn.Linear(WIDTH, CLASSES)
        self.never = nn.Linear(2, 2)

    def forward(self, batch):
        return self.last(torch.tanh(self.branches[type(self).choose(batch)](batch.x)))


class ByRank(Branches):
    """Each rank has its own branch; some branches get no gradient anywhere."""

    choose = staticmethod(lambda batch: batch.rank % 2)


class ByStep(Branches):
    """All ranks change branch from step to step."""

    choose = staticmethod(lambda batch: batch.step % 3)


class ByBoth(Branches):
    """Ranks change branch at different times."""

    choose = staticmethod(lambda batch: (batch.step * (batch.rank + 1)) % 3)


class Frozen(nn.Module):
    """Some parts do not learn, in a module that does and in one that does not."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(INPUTS, WIDTH).requires_grad_(False)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.middle.bias.requires_grad_(False)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


class Checkpointed(nn.Module):
    """Activations of the middle are computed again in backward."""

    use_reentrant = False

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(WIDTH, CLASSES)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
        self.first = nn.Linear(INPUTS, WIDTH)

    def forward(self, x):
        hidden = self.first(x)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=self.use_reentrant)
        return self.last(hidden)


class Reentrant(Checkpointed):
    """As above, in the older way, which runs backward inside of backward."""

    use_reentrant = True


class Repeated(nn.Module):
    """One block in several reentrant checkpoints and once outside of them: its gradient comes in pieces."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(WIDTH, CLASSES)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.first = nn.Linear(INPUTS, WIDTH)

    def forward(self, x):
        hidden = self.block(self.first(x))
        for _ in range(3):
            hidden = checkpoint(self.block, hidden, use_reentrant=True)
        return self.last(self.block(hidden))


class Parametrized(nn.Module):
    """Weights computed from other parameters at every read, in all the ways torch has."""

    def __init__(self):
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(INPUTS, WIDTH))
        self.middle = parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))
        self.turned = parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))
        self.last = nn.utils.spectral_norm(nn.Linear(WIDTH, CLASSES))

    def forward(self, x):
        return self.last(torch.tanh(self.turned(torch.tanh(self.middle(torch.tanh(self.first(x)))))))


class Images(nn.Module):
    """Convolutions and norms; running means are each rank's own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.ConvTranspose1d(4, 2, 2), nn.Flatten(), nn.LayerNorm(10),
            nn.Linear(10, CLASSES), nn.PReLU(),
        )  # fmt: skip

    def forward(self, x):
        return self.layers(x.unsqueeze(1))


class Lazy(nn.Module):
    """Lazy modules that have seen their first input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.LazyLinear(WIDTH), nn.Tanh(), nn.LazyLinear(CLASSES))
        self.layers(torch.zeros(1, INPUTS))

    def forward(self, x):
        return self.layers(x)


class Complex(nn.Module):
    """A complex weight, as in spectral layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(INPUTS, WIDTH)
        self.spectrum = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.complex128))
        self.last = nn.Linear(WIDTH, CLASSES)

    def _apply(self, fn, recurse=True):
        """module.to(float64) would make it real."""
        return super()._apply(lambda tensor: tensor if tensor.is_complex() else fn(tensor), recurse)

    def forward(self, x):
        return self.last(torch.fft.irfft(torch.fft.rfft(self.first(x)) * self.spectrum, n=WIDTH))


class Overlaid(nn.Module):
    """Two parameters that lie in the same memory."""

    def __init__(self):
        super().__init__()
        memory = torch.randn(INPUTS, CLASSES, dtype=torch.float64)
        self.whole = nn.Parameter(memory)
        self.row = nn.Parameter(memory[0])

    def forward(self, x):
        return x @ self.whole + self.row


class HalfPrecision(nn.Module):
    """bfloat16 in the middle."""

    half = torch.bfloat16

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(INPUTS, WIDTH)
        self.middle = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.last = nn.Linear(WIDTH, CLASSES)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.middle.data = self.middle.data.to(self.half)
        return self

    def forward(self, x):
        hidden = torch.tanh(self.first(x)).to(self.half) @ self.middle
        return self.last(hidden.to(x.dtype))


class Float16(HalfPrecision):
    """float16 in the middle."""

    half = torch.float16


class Transposed(nn.Module):
    """A parameter and a gradient whose elements do not lie in order."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.randn(WIDTH, INPUTS, dtype=torch.float64).t())
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.last(torch.tanh(x @ self.first))


def whole_batch(model, batch):
    """A loss whose model looks at the batch, not only at its inputs."""
    return nn.functional.cross_entropy(model(batch), batch.target)


def trained(model_class, loss_of=classify):
    """A case that trains the model with the usual loop."""

    def case(trainer):
        model, optimizer = trainer.start(model_class)
        before = tensors_of(model)
        trainer.train(model, optimizer, range(6), loss_of)
        after = tensors_of(model)
        assert any(not torch.equal(before[name], after[name]) for name in after), "nothing was learnt"
        return after

    return case


def hidden(trainer):
    """A layer that is in the optimizer and not in the model."""
    model = trainer.model(Hidden)
    layer = model.layers[0].to(trainer.dtype)
    torch.manual_seed(5)
    layer.reset_parameters()
    named = [*model.named_parameters(), *((f"hidden.{name}", parameter) for name, parameter in layer.named_parameters())]
    optimizer = trainer.wrap(trainer.make_optimizer([parameter for _, parameter in named]), model, named)
    trainer.train(model, optimizer)
    return {name: parameter.detach().clone() for name, parameter in named}


def loose(trainer):
    """A plain tensor in the optimizer beside the model's parameters."""
    model = trainer.model(lambda: nn.Linear(CLASSES, CLASSES))
    weight = torch.linspace(-1, 1, INPUTS * CLASSES, dtype=trainer.dtype).reshape(INPUTS, CLASSES).requires_grad_()
    named = [("loose", weight), *model.named_parameters()]
    optimizer = trainer.wrap(trainer.make_optimizer([parameter for _, parameter in named]), model, named)
    trainer.train(model, optimizer, loss_of=lambda model, batch: nn.functional.cross_entropy(
        model(batch.x @ weight), batch.target))  # fmt: skip
    return {name: parameter.detach().clone() for name, parameter in named}


# Cases in which one process with all rows learns the same up to rounding.
CASES = {
    **{model.__name__: trained(model) for model in (
        Tied, Shared, Unrolled, Recurrent, Attention, ByAttribute, Captured, Frozen, Checkpointed, Reentrant, Repeated, Images,
        Lazy, Parametrized, Complex, Overlaid, HalfPrecision, Float16, Transposed,
    )},
    **{model.__name__: trained(model, whole_batch) for model in (ByRank, ByStep, ByBoth)},
    "hidden": hidden,
    "loose": loose,
}  # fmt: skip
