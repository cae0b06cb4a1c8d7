"""What DistributedOptimizer costs beside the plain optimizer, where there is nothing to communicate.

    python benchmarks/torch_overhead.py --output benchmarks/results/torch_overhead.json

Copies of a model train on the same batch in turn, two steps each, of which the second counts: with the plain optimizer;
wrapped, with one rank; wrapped, as one of two ranks whose communication costs nothing. Medians of the interleaved steps are
printed, and how much the wrapped ones take longer per parameter. `--width 4` makes compute short, so that small
differences show.
"""

import argparse
import os
import statistics
import time

import torch
from record import add_run
from torch_models import resnet50

import commlib
import commlib.torch as comm
from commlib.torch.gradients import GradientExchange
from commlib.torch.naming import Names
from commlib.torch.optimizer import wrap
from commlib.torch.tensors import tensor_of


class DoneHandle:
    """An operation that was done before it began."""

    times = (0.0, 0.0, 0.0)

    def wait(self, timeout_s=None):
        """Nothing to wait for."""

    def done(self):
        """It always is."""
        return True


class FreeCommunicator:
    """One of two ranks that have the same gradients; communication takes no time, and averages need none at all."""

    size, ranks = 2, (0, 1)
    timeline = None
    _handle = DoneHandle()

    def __init__(self):
        self._tensors = {}

    def allreduce_async_(self, buffer, **options):
        """A handle that is done."""
        if options["op"] is commlib.Sum:
            if buffer not in self._tensors:
                self._tensors[buffer] = tensor_of(buffer)
            self._tensors[buffer].mul_(self.size)
        return self._handle

    def exchange(self, payload, name, without_joined=False):
        """Everybody says what I say."""
        return [payload] * self.size


def plain(model, optimizer):
    """The optimizer as it is."""
    return optimizer


def one_rank(model, optimizer):
    """Wrapped, with nobody to communicate with."""
    return comm.DistributedOptimizer(optimizer, model=model)


def free(model, optimizer):
    """Wrapped, with communication of zero cost."""
    exchange = GradientExchange(FreeCommunicator(), op=commlib.Average, presence=True)
    return wrap(optimizer, exchange, Names(model), model)


def horovod(model, optimizer):
    """Horovod's form, with communication of zero cost."""
    exchange = GradientExchange(FreeCommunicator(), op=commlib.Average)
    return wrap(optimizer, exchange, Names(None, model.named_parameters()))


FORMS = {"plain": plain, "one rank": one_rank, "zero cost": free, "zero cost, Horovod's form": horovod}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


def make_stepper(form, arguments):
    """A function that makes one whole training step."""
    torch.manual_seed(1)
    model = resnet50(arguments.width, classes=1000 * arguments.width // 64)
    optimizer = FORMS[form](model, OPTIMIZERS[arguments.optimizer](model.parameters()))
    images = torch.randn(arguments.batch, 3, arguments.pixels, arguments.pixels)

    def step():
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    return model, step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="64: ResNet-50 as published; 4: tiny tensors")
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd")
    parser.add_argument("--output", metavar="FILE", help="every step's time, as JSON; a run beside those that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load_before = os.getloadavg()
    comm.init()
    steppers = {}
    for form in FORMS:
        model, steppers[form] = make_stepper(form, arguments)
    count = len(list(model.parameters()))
    times_s, cpu_s = ({form: [] for form in FORMS} for _ in range(2))
    for _ in range(3):  # the first step measures, the second probes
        for step in steppers.values():
            step()
    for repeat in range(arguments.repeats):
        # Every form is measured after every other equally often, and behind a step of its own, which fills the caches.
        forms = list(FORMS)[repeat % len(FORMS):] + list(FORMS)[:repeat % len(FORMS)]
        for form in forms:
            steppers[form]()
            begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
            steppers[form]()
            times_s[form].append(time.perf_counter() - begin_s)
            cpu_s[form].append(time.process_time() - begin_cpu_s)
    print(f"{count} parameters, {arguments.repeats} steps of each form; extra: median of differences to the plain step")
    report("elapsed", times_s, count)
    report("CPU", cpu_s, count)  # steadier on a machine that others use
    if arguments.output:
        add_run(arguments.output, f"width {arguments.width}, {arguments.optimizer}", arguments, load_before,
                {"versions": {"torch": torch.__version__}, "parameters": count, "times_s": times_s, "cpu_s": cpu_s})  # fmt: skip
    comm.shutdown()


def report(clock, times_s, count):
    """Prints medians, and the medians of differences to the plain step beside it."""
    plain_s = statistics.median(times_s["plain"])
    for form, own_s in times_s.items():
        extra_s = statistics.median(own - plain for own, plain in zip(own_s, times_s["plain"]))
        print(f"{clock:<7} {form:<26} median {statistics.median(own_s) * 1e3:8.3f} ms, fastest {min(own_s) * 1e3:8.3f} ms, "
              f"extra {extra_s / plain_s:+7.2%} {extra_s / count * 1e6:+7.2f} us per parameter")  # fmt: skip


if __name__ == "__main__":
    main()
