"""What the hard cases share: optimizers, forms, and a trainer that hides which form a case runs in.

Form "alone" is one process that sees every rank's rows, with a plain optimizer: what all other forms must learn. The
cases (hard_models.py, hard_loops.py, ...) are functions of a Trainer and return tensors by name; they run on ranks.
"""

import contextlib
from collections import namedtuple

import torch
from lion_pytorch import Lion
from torch import nn

import commlib.torch as comm

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "lion": lambda p: Lion(p, lr=0.003, weight_decay=0.01),  # from PyPI
}
FORMS = ("overlapped", "waiting", "horovod", "alone")
ROWS, INPUTS, CLASSES = 4, 6, 3

Batch = namedtuple("Batch", "x target step rank")


class Trainer:
    """One run of one case.

    Attributes:
        form: a name out of FORMS.
        ranks: whose rows this process sees.
        optimizers: all that were wrapped, for what they report.
    """

    def __init__(self, form, optimizer="sgd", dtype=torch.float64):
        self.form = form
        self.dtype = dtype
        self.alone = form == "alone"
        self.ranks = range(comm.size()) if self.alone else (comm.rank(),)
        self.make_optimizer = OPTIMIZERS[optimizer]
        self.optimizers = []

    def model(self, model_class, seed=1):
        """A model from a seed that differs between ranks unless they broadcast: rank 0's is the one that counts."""
        torch.manual_seed(seed if self.alone else seed + comm.rank())
        return model_class().to(self.dtype)

    def wrap(self, optimizer, model, named=None, **options):
        """The optimizer in this trainer's form; `named` are the (name, parameter) of Horovod's form, None: the model's."""
        if self.alone:
            return optimizer
        if self.form == "horovod":
            named = list(named or model.named_parameters())
            comm.broadcast_parameters([*named, *model.named_buffers()], root_rank=0)
            comm.broadcast_optimizer_state(optimizer, root_rank=0)
            optimizer = comm.DistributedOptimizer(optimizer, named, **options)
        else:
            overlap = self.form == "overlapped"
            optimizer = comm.DistributedOptimizer(optimizer, model=model, overlap_forward=overlap, **options)
        self.optimizers.append(optimizer)
        return optimizer

    def start(self, model_class, **options):
        """(model, optimizer), wrapped."""
        model = self.model(model_class)
        return model, self.wrap(self.make_optimizer(model.parameters()), model, **options)

    def batches(self, step, rows=ROWS):
        """This process's rows of a step: one Batch per rank that it stands for."""
        for rank in self.ranks:
            generator = torch.Generator().manual_seed(1000 * step + rank)
            x = torch.randn(rows, INPUTS, generator=generator, dtype=torch.float64).to(self.dtype)
            yield Batch(x, torch.randint(0, CLASSES, (rows,), generator=generator), step, rank)

    def loss(self, model, step, loss_of=None):
        """The mean over ranks of their losses; a rank of many sees its own only."""
        loss_of = loss_of or classify
        return sum(loss_of(model, batch) for batch in self.batches(step)) / len(self.ranks)

    def train(self, model, optimizer, steps=range(5), loss_of=None, each_step=lambda step: None):
        """The usual loop; each_step(step) comes after step()."""
        for step in steps:
            optimizer.zero_grad()
            self.loss(model, step, loss_of).backward()
            optimizer.step()
            each_step(step)

    def no_sync(self, optimizer):
        """optimizer.no_sync(), which a plain optimizer does not have."""
        return contextlib.nullcontext() if self.alone else optimizer.no_sync()

    def synchronize(self, optimizer):
        """optimizer.synchronize(), which a plain optimizer does not have."""
        if not self.alone:
            optimizer.synchronize()

    def skip_synchronize(self, optimizer):
        """optimizer.skip_synchronize(), which Horovod's form needs after synchronize()."""
        return optimizer.skip_synchronize() if self.form == "horovod" else contextlib.nullcontext()


class Small(nn.Module):
    """Three layers, registered in the opposite order of use."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, CLASSES)
        self.middle = nn.Linear(8, 8)
        self.first = nn.Linear(INPUTS, 8)

    def forward(self, x):
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


def classify(model, batch):
    """The loss of most cases."""
    return nn.functional.cross_entropy(model(batch.x), batch.target)


def tensors_of(model, prefix=""):
    """Copies of all parameters, by name. Buffers such as running means are each rank's own."""
    return {prefix + name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def run(module, case, optimizers, forms):
    """On a rank: (optimizer, form) -> (tensors by name, what overlapped in each wrapped optimizer, fallbacks)."""
    function = getattr(__import__(module), "CASES")[case]
    results = {}
    for optimizer in optimizers:
        for form in forms:
            trainer = Trainer(form, optimizer)
            tensors = function(trainer)
            reports = [wrapped.report() for wrapped in trainer.optimizers]
            results[optimizer, form] = tensors, [r["overlap"] for r in reports], sum((r["fallbacks"] for r in reports), [])
    return results
