"""DistributedDataParallel and single collectives of torch.distributed, over commlib and over gloo, on two ranks of one machine.

    python benchmarks/torch_distributed.py --output benchmarks/results/torch_distributed.json

Both process groups live in the same two processes and take turns. Steps are those of torch_training.py: seconds per step of
each way and round, of the slower rank; beside it stands CPU time. Collectives: seconds per call of each turn, of rank 0.
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
from record import recorded
from torch import nn
from torch_training import CASES, both, rounds

import commlib.torch as comm
from commlib.torch.distributed import ddp_hook

CALLS = 20  # of a collective in one turn
SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 24)  # bytes


class Way:
    """A model that is trained by DDP over a process group; None: alone.

    Args:
        case: of torch_training.
        group: the process group.
        hook: whether commlib's communication hook moves the buckets.
    """

    def __init__(self, case, group, hook=False):
        torch.manual_seed(1)
        self.case, self.batch, self.model = case, case.batch(), case.make()
        if group is not None:
            self.model = nn.parallel.DistributedDataParallel(self.model, process_group=group)
        if hook:
            self.model.register_comm_hook(None, ddp_hook)
        self.optimizer = case.optimizer(self.model.parameters())

    def seconds_per_step(self):
        """Elapsed, and of CPU time."""
        comm.barrier()
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        for _ in range(self.case.steps):
            self.optimizer.zero_grad()
            self.case.loss(self.model, *self.batch).backward()
            self.optimizer.step()
        return (time.perf_counter() - begin_s) / self.case.steps, (time.process_time() - begin_cpu_s) / self.case.steps


def collectives(nbytes):
    """{name: function(group)} of calls on float32 tensors of about so many bytes."""
    tensor, whole = torch.ones(nbytes // 4), torch.ones(2 * (nbytes // 4))
    first = comm.rank() == 0

    def around(group):
        for call in (dist.send, dist.recv) if first else (dist.recv, dist.send):
            call(tensor, 1 - comm.rank(), group=group)

    return {
        "all_reduce": lambda group: dist.all_reduce(tensor, group=group),
        "broadcast": lambda group: dist.broadcast(tensor, 0, group=group),
        "all_gather_into_tensor": lambda group: dist.all_gather_into_tensor(whole, tensor, group=group),
        "reduce_scatter_tensor": lambda group: dist.reduce_scatter_tensor(tensor, whole, group=group),
        "send and recv": around,
    }


def seconds_per_call(call, group):
    """Of CALLS in a row. Twice, as `rounds` wants pairs."""
    comm.barrier()
    begin_s = time.perf_counter()
    for _ in range(CALLS):
        call(group)
    elapsed_s = (time.perf_counter() - begin_s) / CALLS
    return elapsed_s, elapsed_s


def rank_main(arguments):
    """One of the two ranks; rank 0 writes."""
    torch.set_num_threads(1)
    comm.init()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(f"{arguments.folder}/meeting", 2)
    dist.init_process_group("commlib", store=store, rank=comm.rank(), world_size=2)
    groups = {"commlib": dist.group.WORLD, "gloo": dist.new_group([0, 1], backend="gloo")}
    found = {"steps": {}, "collectives": {}}
    for name in arguments.cases:
        case = CASES[name]
        ways = {"alone": Way(case, None), "gloo": Way(case, groups["gloo"]), "commlib": Way(case, groups["commlib"]),
                "commlib, hook": Way(case, groups["commlib"], hook=True)}  # fmt: skip
        for way in ways.values():
            way.seconds_per_step()  # DDP makes its buckets anew after the first step
        results = rounds({name: way.seconds_per_step for name, way in ways.items()}, arguments.seconds)
        found["steps"][name] = {"seconds": both(results, max)[0], "cpu_s": both(results, statistics.mean)[1]}
        show(name, found["steps"][name])
    for nbytes in SIZES if not arguments.no_collectives else ():
        for name, call in collectives(nbytes).items():
            for group in groups.values():
                call(group)
            results = rounds({way: partial(seconds_per_call, call, group) for way, group in groups.items()}, 0.5)
            key = f"{name}, {nbytes} B"
            found["collectives"][key] = {way: [turn[0] for turn in turns] for way, turns in results.items()}
            medians = {way: statistics.median(times_s) for way, times_s in found["collectives"][key].items()}
            say(f"{key:<34} " + "  ".join(f"{way} {median_s * 1e6:9.1f} us" for way, median_s in medians.items())
                + f"  {medians['gloo'] / medians['commlib']:.2f}x")  # fmt: skip
    if comm.rank() == 0:
        with open(f"{arguments.folder}/found", "w", encoding="utf-8") as file:
            json.dump(found, file)
    comm.barrier()
    dist.destroy_process_group()
    comm.shutdown()


def say(line):
    """Of one rank, for whoever looks on."""
    if comm.rank() == 0:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def show(name, case):
    """Medians beside those of no communication."""
    alone_s = {what: statistics.median(times["alone"]) for what, times in case.items()}
    say(f"{name}: {len(case['seconds']['alone'])} rounds")
    for way in case["seconds"]:
        medians = {what: statistics.median(times[way]) for what, times in case.items()}
        say(f"  {way:<14} " + "  ".join(f"{what} {1e3 * medians[what]:8.2f} ms {1e3 * (medians[what] - alone_s[what]):+8.2f} ms"
                                        for what in case))  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--seconds", type=float, default=30.0, help="about how long to measure each case")
    parser.add_argument("--no-collectives", action="store_true")
    parser.add_argument("--output", required=True, metavar="FILE", help="raw data, as JSON")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        rank_main(arguments)
        return
    with recorded(arguments.output, ["commlib", "gloo"], {}) as results, tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "commlib.launch", "-np", "2", sys.executable, os.path.abspath(__file__),
                        *sys.argv[1:], "--folder", folder], check=True)  # fmt: skip
        with open(f"{folder}/found", encoding="utf-8") as file:
            results.update(json.load(file))


if __name__ == "__main__":
    main()
