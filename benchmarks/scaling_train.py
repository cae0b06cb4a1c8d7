"""Samples per second of real models over the number of ranks, on the hosts that you have.

    python benchmarks/scaling_train.py --output train.json                          one rank: what the others are compared with
    commrun -np 8 -H a:4,b:4 python benchmarks/scaling_train.py --output train.json
    torchrun --nproc-per-node 4 benchmarks/scaling_train.py --output train.json     also under mpirun or srun

Every rank trains the same model on a batch of its own (weak scaling), in each way in turn: commlib overlapped, commlib
waiting in step(), DDP over gloo, and alone, without communication. Rank 0 adds the run to the file and prints every run of
that case in it, with the speed-up over one rank. The cases and ways are those of torch_training.py.
"""

import argparse
import json
import os
import pathlib
import statistics
import tempfile

import torch
import torch.distributed as dist
from record import add_run
from torch_training import CASES, WAYS, Trainer, rounds

import commlib.torch as comm


def join_gloo():
    """torch.distributed on the ranks that commlib has found, for DDP."""
    leads, host = comm.rank() == 0, os.uname().nodename if comm.cross_size() > 1 else "localhost"
    store = dist.TCPStore(host, 0, comm.size(), is_master=True, wait_for_workers=False) if leads else None
    host, port = comm.broadcast_object((host, store.port) if leads else None)
    store = store or dist.TCPStore(host, port, comm.size(), is_master=False)
    dist.init_process_group("gloo", store=store, rank=comm.rank(), world_size=comm.size())


def measure(name, ways, seconds):
    """{way: [seconds per step of each round]}, of the slowest rank."""
    trainers = {way: Trainer(CASES[name], way, f"{way} {name}") for way in ways}
    for trainer in trainers.values():
        trainer.seconds_per_step()  # the first steps measure, probe and touch memory
    turns = rounds({way: trainer.seconds_per_step for way, trainer in trainers.items()}, seconds)
    of_ranks = comm.allgather_object({way: [step_s for step_s, _ in turn] for way, turn in turns.items()})
    return {way: [max(times_s) for times_s in zip(*(one[way] for one in of_ranks))] for way in trainers}


def show(path, case):
    """Every run of a case in the file: steps per second of all ranks, beside one rank alone."""
    runs = [run for run in json.loads(path.read_text())["runs"].values() if run["case"] == case]
    runs.sort(key=lambda run: run["ranks"])
    single = next((statistics.median(run["steps_s"]["alone"]) for run in runs if run["ranks"] == 1), None)
    print(case)
    for run in runs:
        for way, times_s in run["steps_s"].items():
            step_s = statistics.median(times_s)
            speed_up = "" if single is None else f"  speed-up {run['ranks'] * single / step_s:6.2f}"
            print(f"  {run['ranks']:>3} ranks on {run['hosts']} hosts  {way:<16} {step_s * 1e3:9.2f} ms per step{speed_up}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default=list(CASES)[-1])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--threads", type=int, default=1, help="of each rank's compute")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir(), "scaling_train.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    load = os.getloadavg()
    comm.init()
    ways = arguments.ways if comm.size() > 1 else ["alone"]
    if "ddp" in ways:
        join_gloo()
    steps_s = measure(arguments.case, ways, arguments.seconds)
    if comm.rank() == 0:
        arguments.output = str(arguments.output)
        add_run(arguments.output, f"{arguments.case} on {comm.size()} ranks", arguments, load,
                {"case": arguments.case, "ranks": comm.size(), "hosts": comm.cross_size(), "steps_s": steps_s,
                 "versions": {"torch": torch.__version__}})  # fmt: skip
        show(pathlib.Path(arguments.output), arguments.case)
    comm.barrier()
    if dist.is_initialized():
        dist.destroy_process_group()
    comm.shutdown()


if __name__ == "__main__":
    main()
