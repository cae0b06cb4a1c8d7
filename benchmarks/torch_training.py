"""Training on two ranks of one machine, a core each: commlib beside DDP over gloo, and beside no communication at all.

    python benchmarks/torch_training.py --output benchmarks/results/torch_training.json

Real models with real forward, backward and updates. All ways take turns: in each round every way makes a few steps, which
begin together on both ranks and end when the last weight is updated. Two measures:

- steps: seconds per step of each way and round, of the slower rank. What a way takes beyond "alone", the same step
  without communication, is its exposed communication. Beside it stands CPU time per step and rank, which a machine that
  others use disturbs less.
- compute: seconds of forward and backward beside an all-reduce of as many bytes as the model has gradients, begun
  just before; of the slower rank. What it takes beyond "alone" is what hidden communication steals from compute.

The raw data goes to the file; plot.py makes the README's table of it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial

import torch
import torch.distributed as dist
from environments import absence
from record import recorded
from torch import nn
from torch_models import GPT, alexnet, resnet50

import commlib.torch as comm

BUCKET_NBYTES = 25 << 20  # DDP's default
SMALL_ELEMENTS = 16 << 10  # the adapter sends smaller tensors together


class Case:
    """What is trained.

    Args:
        make: makes the model.
        batch: makes one rank's inputs and targets.
        steps: of one way in one round: many enough that what only the first and the last one cost does not count.
    """

    def __init__(self, make, batch, steps, optimizer):
        self.make, self.batch, self.steps, self.optimizer = make, batch, steps, optimizer

    def loss(self, model, inputs, targets):
        """Cross entropy, over the last dimension."""
        return nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def images(count, pixels, classes):
    """A batch of noise, with labels."""
    return torch.randn(count, 3, pixels, pixels), torch.randint(classes, (count,))


def text(count, length, vocabulary):
    """A batch of random tokens, with those that follow."""
    tokens = torch.randint(vocabulary, (count, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=1e-4)
CASES = {
    "ResNet-50, half width, 64 x 64, batch 8": Case(
        partial(resnet50, 32, 1000), partial(images, 8, 64, 1000), 6, SGD),
    "AlexNet, 224 x 224, batch 8": Case(alexnet, partial(images, 8, 224, 1000), 4, SGD),
    "GPT, 6 blocks of 256, 4 x 128 tokens": Case(partial(GPT, 256, 6, 4, 8192, 128), partial(text, 4, 128, 8192), 6, ADAMW),
    "ResNet-50, quarter width, 32 x 32, batch 2": Case(
        partial(resnet50, 16, 100), partial(images, 2, 32, 100), 20, SGD),
}  # fmt: skip


# ---- ways to train


def alone(model, optimizer, name):
    """No communication."""
    return model, optimizer, lambda: None


def ddp(model, optimizer, name):
    """DistributedDataParallel over gloo, with its defaults."""
    return nn.parallel.DistributedDataParallel(model), optimizer, lambda: None


def overlapping(model, optimizer, name):
    """commlib, hidden behind backward and forward."""
    optimizer = comm.DistributedOptimizer(optimizer, model=model, name=name)
    return model, optimizer, optimizer.synchronize


def waiting(model, optimizer, name):
    """commlib in Horovod's form: step() waits."""
    optimizer = comm.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), name=name)
    return model, optimizer, lambda: None


WAYS = {"alone": alone, "ddp": ddp, "commlib": overlapping, "commlib_waiting": waiting}


class Trainer:
    """A model that is trained in one way."""

    def __init__(self, case, way, name):
        torch.manual_seed(1)
        self.case, model = case, case.make()
        optimizer = case.optimizer(model.parameters())
        self.batch = case.batch()
        self.model, self.optimizer, self.finish = WAYS[way](model, optimizer, name)

    def seconds_per_step(self):
        """Elapsed, and of CPU time: of a visit, some steps that begin together and end when all weights are updated."""
        comm.barrier()
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        for _ in range(self.case.steps):
            self.optimizer.zero_grad()
            self.case.loss(self.model, *self.batch).backward()
            self.optimizer.step()
        self.finish()
        return (time.perf_counter() - begin_s) / self.case.steps, (time.process_time() - begin_cpu_s) / self.case.steps


# ---- compute beside communication


def nothing(sizes):
    """No communication: nothing to begin, nothing to wait for."""
    return list


def gloo(sizes):
    """torch.distributed's gloo, in buckets as DDP makes them."""
    count = sum(sizes)
    buckets = torch.zeros(count).split(BUCKET_NBYTES // 4)
    return lambda: [dist.all_reduce(bucket, async_op=True) for bucket in buckets]


def private(sizes):
    """commlib, as its adapter sends them: large tensors by themselves, the small ones together."""
    large = [size for size in sizes if size > SMALL_ELEMENTS]
    tensors = [torch.zeros(size) for size in (*large, sum(sizes) - sum(large)) if size]
    return lambda: [Waitable(comm.allreduce_async_(tensor, name=f"beside {i}")) for i, tensor in enumerate(tensors)]


class Waitable:
    """A handle of the adapter, waited for as the others are."""

    def __init__(self, handle):
        self.wait = partial(comm.synchronize, handle)


BESIDE = {"alone": nothing, "gloo": gloo, "commlib": private}


class Beside:
    """Forward and backward of a model, with communication beside it."""

    def __init__(self, case, way):
        self.case, self.model, self.batch = case, case.make(), case.batch()
        self.begin = BESIDE[way]([parameter.numel() for parameter in self.model.parameters()])

    def seconds(self):
        """Of the compute, and until the communication is done too."""
        self.model.zero_grad()
        comm.barrier()
        begin_s = time.perf_counter()
        begun = self.begin()
        self.case.loss(self.model, *self.batch).backward()
        compute_s = time.perf_counter() - begin_s
        for handle in begun:
            handle.wait()
        return compute_s, time.perf_counter() - begin_s


# ---- measuring


def rounds(visits, seconds, least=3):
    """{way: [result of each round]} of {way: function}; in every round each way has one turn, and another one begins."""
    results = {way: [] for way in visits}
    names, end_s, count = list(visits), time.perf_counter() + seconds, 0
    while comm.allreduce(torch.tensor(float(count < least or time.perf_counter() < end_s)), op=comm.Min):
        for way in names[count % len(names):] + names[:count % len(names)]:
            results[way].append(visits[way]())
        count += 1
    return results


def both(results, join):
    """{way: [(a, b) of each round]} of this rank as two dicts, {way: [value]}, joined over ranks by join(values)."""
    of_ranks = comm.allgather_object(results)
    return [{way: [join(turn[index] for turn in turns) for turns in zip(*(one[way] for one in of_ranks))] for way in results}
            for index in (0, 1)]  # fmt: skip


def measure_case(name, seconds):
    """One rank's part of one case: what the file says of it, and reports."""
    case = CASES[name]
    trainers = {way: Trainer(case, way, f"{way} {name}") for way in WAYS}
    for trainer in trainers.values():
        trainer.seconds_per_step()  # the first step measures, the second probes
    steps = rounds({way: trainer.seconds_per_step for way, trainer in trainers.items()}, seconds * 3 / 4)
    sizes = [parameter.numel() for parameter in trainers["alone"].model.parameters()]
    reports = {way: str(trainers[way].optimizer.report()) for way in WAYS if way.startswith("commlib")}
    del trainers
    beside = {way: Beside(case, way) for way in BESIDE}
    for one in beside.values():
        one.seconds()
    compute = rounds({way: one.seconds for way, one in beside.items()}, seconds / 4)
    compute_s, all_s = both(compute, max)
    return {
        "parameters": len(sizes), "nbytes": 4 * sum(sizes), "steps_s": both(steps, max)[0],
        "cpu_s": both(steps, statistics.mean)[1], "compute_s": compute_s, "compute_and_communication_s": all_s,
    }, reports  # fmt: skip


def rank_main(arguments):
    """One of the two ranks; rank 0 writes."""
    torch.set_num_threads(1)
    comm.init()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{arguments.folder}/meeting", rank=comm.rank(), world_size=2)
    cases = {}
    for name in arguments.cases:
        cases[name], reports = measure_case(name, arguments.seconds)
        if comm.rank() == 0:
            show(name, cases[name])
            if arguments.reports:
                print("\n".join(f"{way}: {report}" for way, report in reports.items()))
    if comm.rank() == 0:
        with open(f"{arguments.folder}/cases", "w", encoding="utf-8") as file:
            json.dump(cases, file)
    comm.barrier()
    dist.destroy_process_group()
    comm.shutdown()


def show(name, case):
    """For whoever looks on."""
    print(f"{name}: {case['parameters']} parameters, {case['nbytes'] / 1e6:.1f} MB, {len(case['steps_s']['alone'])} rounds")
    for what in ("steps_s", "cpu_s", "compute_s"):
        alone_s = statistics.median(case[what]["alone"])
        for way, times_s in case[what].items():
            median_s = statistics.median(times_s)
            print(f"  {what:<10} {way:<16} {median_s * 1e3:8.2f} ms  {(median_s - alone_s) * 1e3:+8.2f} ms"
                  f" {median_s / alone_s - 1:+8.1%}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=40.0, help="about how long to measure each case")
    parser.add_argument("--output", required=True, metavar="FILE", help="raw data, as JSON")
    parser.add_argument("--reports", action="store_true", help="also print optimizer.report()")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        rank_main(arguments)
        return
    absent = {"horovod": absence("horovod") or "lives in an environment of its own: see benchmarks/allreduce.py"}
    with recorded(arguments.output, ["commlib", "gloo"], absent) as results, tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "commlib.launch", "-np", "2", sys.executable, os.path.abspath(__file__),
                        *sys.argv[1:], "--folder", folder], check=True)  # fmt: skip
        with open(f"{folder}/cases", encoding="utf-8") as file:
            results["cases"] = json.load(file)


if __name__ == "__main__":
    main()
