"""How true is `commlib simulate`? Steps and all-reduces on an emulated cluster, beside what the simulation predicts of them.

    sudo python benchmarks/truth.py measure --hosts 2 --rate-mbit 1000 --output benchmarks/results/truth.json
    sudo python benchmarks/truth.py measure --hosts 4 8 --rate-mbit 1000 --output benchmarks/results/truth.json
    python benchmarks/truth.py compare benchmarks/results/truth.json

`measure` runs, on hosts that are network namespaces (cluster.py), a ping-pong between two of them, all-reduces one at a time, and
emulated training (emulated.py) of every model under every schedule, and keeps the raw times. `compare` takes bandwidth from the
ping-pong of the run on two hosts with the same links, and what a message costs the processor, which all hosts share, from all
ping-pongs of two hosts, and nothing else; simulates all runs with the settings that they had; and prints both times and how far
they are apart.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile

from cluster import Cluster
from peers import HERE
from record import add_run
from scaling import environment, wait_for

from commlib import models
from commlib.cluster import Processor
from commlib.cost import Link
from commlib.messages import SCHEDULES
from commlib.plan import Shape
from commlib.selection import select
from commlib.settings import Settings
from commlib.simulated_training import TrainingLayer, simulate_training
from commlib.simulation import EventKind, Simulation

# One in so many elements travels, so that a step of each model moves about 25 MB.
SHRINK = {"alexnet": 10, "vgg16": 22, "resnet50": 4, "bert_base": 17}
SMALL_NBYTES = 64
# Longer than what a token bucket lets through unshaped after idle (70 kB), many times.
LARGE_NBYTES = (4 << 20, 16 << 20)
ALLREDUCE_NBYTES = (1 << 20, 4 << 20, 16 << 20)
FORWARD_SHARE = 1 / 3
LONGEST_S = 230
MOST_HOSTS = 250  # all are on one machine


# ---- measuring ----------------------------------------------------------------------------------------------------

def counts_of(model):
    """Elements that travel of each tensor of each layer."""
    return [[max(1, tensor.parameters // SHRINK[model]) for tensor in layer.tensors] for layer in models.MODELS[model]()]


def trainings(arguments, hosts, payload_bytes_per_s):
    """What is trained: compute as long as the links need for all gradients."""
    return [{"model": model, "schedule": schedule, "shrink": SHRINK[model],
             "compute_s": 2 * (hosts - 1) / hosts * 4 * sum(map(sum, counts_of(model))) / payload_bytes_per_s}
            for model in arguments.models for schedule in arguments.schedules]  # fmt: skip


def detailed(work):
    """A training with each layer's tensors and times."""
    layers = models.MODELS[work["model"]]()
    share = work["compute_s"] / sum(layer.forward_flops for layer in layers)
    times_s = [(FORWARD_SHARE * share * layer.forward_flops, (1 - FORWARD_SHARE) * share * layer.forward_flops) for layer in layers]
    return {**work, "counts": counts_of(work["model"]), "times_s": times_s}


def measure(arguments):
    for hosts in arguments.hosts:
        load = os.getloadavg()
        with Cluster(hosts, arguments.rate_mbit, arguments.name) as cluster, tempfile.TemporaryDirectory() as folder:
            order = {"ping_pong": [SMALL_NBYTES, *LARGE_NBYTES], "rounds": 9, "repeats": 5,
                     "allreduce": ALLREDUCE_NBYTES if arguments.models else (), "steps": arguments.steps,
                     "trainings": trainings(arguments, hosts, cluster.payload_bytes_per_s)}  # fmt: skip
            path = pathlib.Path(folder, "order")
            path.write_text(json.dumps({**order, "trainings": [detailed(work) for work in order["trainings"]]}))
            results = [pathlib.Path(folder, f"rank{rank}") for rank in range(hosts)]
            program = [sys.executable, str(HERE / "truth_rank.py"), str(path)]
            wait_for([cluster.start(rank, [*program, str(result)], environment(cluster, rank, hosts))
                      for rank, result in enumerate(results)], LONGEST_S)  # fmt: skip
            found = [json.loads(result.read_text()) for result in results]
        record = {"hosts": hosts, "rate_mbit": arguments.rate_mbit, "order": order, "settings": found[0]["settings"],
                  "ping_pong": found[0]["ping_pong"], "busy": [one["busy"] for one in found[:2]],
                  "allreduce": [one["allreduce"] for one in found], "steps": [one["steps"] for one in found]}  # fmt: skip
        name = f"{hosts} hosts, {arguments.rate_mbit} Mbit/s" + ("" if arguments.models else ", ping-pong")
        add_run(arguments.output, name, arguments, load, record)
        print(f"{hosts} hosts measured", flush=True)


# ---- comparing ----------------------------------------------------------------------------------------------------

def fitted(pairs, rate_mbit):
    """(link, processor) as ping-pongs of two hosts show them.

    Between namespaces nothing is on its way: the latency of a small message is its sender's and its receiver's processor time. What
    each byte takes of that is told by the processes' own clocks, half of it for sending.

    Args:
        pairs: runs on two hosts; what takes longer on a machine that is busy comes from those that measured all.
        rate_mbit: of the links.
    """
    whole = [one for one in pairs if one["order"]["allreduce"]]
    low, high = map(str, LARGE_NBYTES)
    run = next(one for one in whole if one["rate_mbit"] == rate_mbit)
    beta_s = (run["ping_pong"][high] - run["ping_pong"][low]) / (LARGE_NBYTES[1] - LARGE_NBYTES[0])
    small_s = statistics.median(one["ping_pong"][str(SMALL_NBYTES)] for one in whole)
    busy_s = [(rank[high] - rank[low]) / (LARGE_NBYTES[1] - LARGE_NBYTES[0]) for one in pairs for rank in one.get("busy", ())]
    return Link(0.0, beta_s), Processor(run["machine"]["cores"], MOST_HOSTS, small_s / 2, statistics.median(busy_s) / 2)


def simulated_allreduce_s(simulation, nbytes):
    choice = select("allreduce", nbytes, simulation.shape, simulation.settings)
    for rank in range(simulation.shape.size):
        simulation.allreduce(rank, 1, nbytes // 4, choice=choice)
    while simulation.next().kind is not EventKind.IDLE:
        end_s = simulation.now_s
    simulation.close()
    return end_s


def simulated_step_s(simulation, work, steps):
    layers = [TrainingLayer(*times_s, tuple(counts)) for times_s, counts in zip(work["times_s"], work["counts"])]
    schedule = SCHEDULES[work["schedule"]]
    times_s = simulate_training(layers, simulation, steps, schedule, schedule.messages(work["counts"], work["shrink"]))
    simulation.close()
    return statistics.median(times_s)


def rows(runs, run):
    """(what, measured seconds, simulated seconds) of all that one run measured."""
    link, processor = fitted([one for one in runs if one["hosts"] == 2], run["rate_mbit"])
    shape, settings = Shape((1,) * run["hosts"]), Settings.from_json(run["settings"])

    def fresh():
        return Simulation(shape, link, link, settings, processor=processor)

    for nbytes in run["order"]["allreduce"]:
        measured_s = max(statistics.median(rank[str(nbytes)]) for rank in run["allreduce"])
        yield f"all-reduce of {nbytes >> 20} MiB", measured_s, simulated_allreduce_s(fresh(), nbytes)
    for work in run["order"]["trainings"]:
        name = f"{work['model']} {work['schedule']}"
        measured_s = max(statistics.median(rank[name]) for rank in run["steps"])
        yield name, measured_s, simulated_step_s(fresh(), detailed(work), run["order"]["steps"])


def compare(arguments):
    runs = list(json.loads(pathlib.Path(arguments.file).read_text())["runs"].values())
    if not any(run["hosts"] == 2 and run["rate_mbit"] == one["rate_mbit"] for run in runs for one in runs):
        raise SystemExit("the links are fitted on two hosts: measure them, too")
    runs.sort(key=lambda run: (run["hosts"], -run["rate_mbit"]))
    errors = {}
    print("| hosts, links | what | measured ms | simulated ms | simulated / measured |\n| --- | --- | ---: | ---: | ---: |")
    for run in runs:
        if run["hosts"] not in arguments.hosts or not run["order"]["allreduce"]:
            continue
        where = f"{run['hosts']}, {run['rate_mbit']} Mbit/s"
        for what, measured_s, simulated_s in rows(runs, run):
            errors.setdefault(where, []).append(abs(simulated_s / measured_s - 1))
            print(f"| {where} | {what} | {1e3 * measured_s:.1f} | {1e3 * simulated_s:.1f} | {simulated_s / measured_s:.3f} |",
                  flush=True)  # fmt: skip
    print("\n| hosts, links | compared | median apart | within 10 % | at most |\n| --- | ---: | ---: | ---: | ---: |")
    for where, found in {**errors, "all": sum(errors.values(), [])}.items():
        print(f"| {where} | {len(found)} | {100 * statistics.median(found):.1f} % | {sum(error <= 0.1 for error in found)} "
              f"| {100 * max(found):.1f} % |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--hosts", type=int, nargs="+", required=True, metavar="N")
    measuring.add_argument("--rate-mbit", type=int, default=1000, help="of each link and direction")
    measuring.add_argument("--models", nargs="*", choices=SHRINK, default=list(SHRINK), help="none: the ping-pong alone")
    measuring.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    measuring.add_argument("--steps", type=int, default=5)
    measuring.add_argument("--name", default="truth", help="prefix of the namespaces")
    measuring.add_argument("--output", required=True, metavar="FILE", help="raw data, as JSON; other runs in it stay")
    comparing = commands.add_parser("compare")
    comparing.add_argument("file")
    comparing.add_argument("--hosts", type=int, nargs="+", default=[2, 4, 8, 16], metavar="N")
    arguments = parser.parse_args()
    {"measure": measure, "compare": compare}[arguments.command](arguments)


if __name__ == "__main__":
    main()
