"""Speed-up over the number of hosts: emulated accelerators, real messages over real (rate-limited) links.

    sudo python benchmarks/scaling.py --model alexnet --shrink 50 --rate-mbit 100 --compute-s 31 --strong --hosts 1 2 4 8 16
    sudo python benchmarks/scaling.py --model alexnet vgg16 resnet50 bert_base --shrink 4 --rate-mbit 1000 --balanced --hosts 8

Each host is a network namespace with a link of its own (cluster.py) and runs one rank; the accelerators are timed waits over
the model's real layer table (emulated.py), one in `--shrink` elements of every tensor travels. Beside the times stand the
ideal schedule at the link's payload rate, with the algorithm's 2 (N - 1) / N bytes and no latency, and the bounds of
overlapping backward only and nothing.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

from cluster import Cluster
from environments import versions
from movers import MOVERS
from peers import HERE
from record import add_run

from commlib import models
from commlib.messages import SCHEDULES
from commlib.secret import new_secret
from commlib.schedule import LayerTime, backward_overlap_step_time, ideal_step_time, no_overlap_step_time

PORTS = (29621, 29622)
SECRET = new_secret()
BOUNDS = {"ours": ideal_step_time, "backward": backward_overlap_step_time, "none": no_overlap_step_time}
START_S = 120.0  # 64 interpreters on two cores, and torch in each


def communication_s(nbytes, hosts, bytes_per_s):
    """Seconds in which a link carries what an all-reduce must send: 2 (N - 1) / N of the message."""
    return 2 * (hosts - 1) / hosts * nbytes / bytes_per_s


def compute_s(arguments, nbytes, hosts, cluster):
    """Seconds of compute in a step of one accelerator."""
    if arguments.balanced:
        return communication_s(nbytes, hosts, cluster.payload_bytes_per_s)
    return arguments.compute_s / hosts if arguments.strong else arguments.compute_s


def bounds(layers, counts, step_s, hosts, cluster, forward_share):
    """Each layer's times, and the step's length by each of BOUNDS."""
    flops = sum(layer.forward_flops for layer in layers)
    times = [
        LayerTime(step_s * forward_share * layer.forward_flops / flops, step_s * (1 - forward_share) * layer.forward_flops / flops,
                  communication_s(4 * sum(tensors), hosts, cluster.payload_bytes_per_s))
        for layer, tensors in zip(layers, counts)
    ]  # fmt: skip
    return times, {name: bound(times).step_s for name, bound in BOUNDS.items()}


def train(cluster, hosts, mover, schedules, counts, times, arguments):
    """Runs one training of a mover on the first hosts. Returns what each rank wrote."""
    with tempfile.TemporaryDirectory() as folder:
        order = pathlib.Path(folder, "order")
        order.write_text(json.dumps({"mover": mover, "schedules": schedules, "counts": counts, "times_s": times,
                                    "shrink": arguments.shrink, "steps": arguments.steps}))
        results = [pathlib.Path(folder, f"rank{rank}") for rank in range(hosts)]
        command = [sys.executable, str(HERE / "scaling_rank.py"), str(order)]
        ranks = [cluster.start(rank, [*command, str(result)], environment(cluster, rank, hosts)) for rank, result in
                 enumerate(results)]  # fmt: skip
        limit_s = START_S + len(schedules) * (arguments.steps + 2) * 4 * sum(sum(layer) for layer in times)
        wait_for(ranks, limit_s)
        return [json.loads(result.read_text()) for result in results]


def environment(cluster, rank, hosts):
    """Variables of a rank: where it is and where all meet."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COMMLIB_")}
    return {
        **inherited, "COMMLIB_RANK": str(rank), "COMMLIB_SIZE": str(hosts), "COMMLIB_LOCAL_RANK": "0", "COMMLIB_LOCAL_SIZE": "1",
        "COMMLIB_CROSS_RANK": str(rank), "COMMLIB_CROSS_SIZE": str(hosts), "COMMLIB_STORE": f"{cluster.address(0)}:{PORTS[0]}",
        "COMMLIB_STORE_OWNER": "rank 0", "COMMLIB_JOB": "scaling", "COMMLIB_SECRET": SECRET,
        "COMMLIB_START_TIMEOUT_S": str(START_S),
        "BENCHMARK_STORE": f"tcp://{cluster.address(0)}:{PORTS[1]}", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }  # fmt: skip


def wait_for(ranks, limit_s):
    """Until all have ended; the first failure, or the end of the time, ends the others."""
    end_s = time.monotonic() + limit_s
    while any(rank.poll() is None for rank in ranks):
        failed = [number for number, rank in enumerate(ranks) if rank.poll()]
        if failed or time.monotonic() > end_s:
            for rank in ranks:
                rank.kill()
            raise SystemExit(f"rank {failed[0]} failed" if failed else f"the ranks did not end within {limit_s:.0f} s")
        time.sleep(0.05)
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed")


def show(entry):
    """One run as lines of text."""
    ideal_s = entry["bounds_s"]["ours"]
    print(f"{entry['model']} on {entry['hosts']} hosts, {entry['rate_mbit']} Mbit/s, compute {entry['compute_s']:.3f} s, "
          f"{entry['nbytes'] / 1e6:.1f} MB of gradients")  # fmt: skip
    for name, bound_s in entry["bounds_s"].items():
        print(f"  {'bound: ' + name:<24} {bound_s:8.3f} s  {bound_s / ideal_s:6.3f}  speed-up "
              f"{entry['speed_up_of_1_s'] / bound_s:6.2f}")  # fmt: skip
    for mover, schedules in entry["steps_s"].items():
        for name, by_rank in schedules.items():
            step_s = median_step_s(by_rank)
            cpu_s = statistics.mean(entry["cpu_share"][mover][name])
            print(f"  {mover + ' ' + name:<24} {step_s:8.3f} s  {step_s / ideal_s:6.3f}  speed-up "
                  f"{entry['speed_up_of_1_s'] / step_s:6.2f}  cpu {100 * cpu_s:4.1f} %")  # fmt: skip


def median_step_s(by_rank):
    """The slowest rank's median; ranks that wait for each other differ little."""
    return max(map(statistics.median, by_rank))


def run(arguments, name, hosts, cluster):
    """All movers and schedules of one model on that many hosts: an entry of the results."""
    layers = models.MODELS[name]()
    counts = [[max(1, tensor.parameters // arguments.shrink) for tensor in layer.tensors] for layer in layers]
    nbytes = 4 * sum(map(sum, counts))
    step_s = compute_s(arguments, nbytes, hosts, cluster)
    times, bounds_s = bounds(layers, counts, step_s, hosts, cluster, arguments.forward_share)
    entry = {"model": name, "hosts": hosts, "rate_mbit": arguments.rate_mbit, "shrink": arguments.shrink, "nbytes": nbytes,
             "compute_s": step_s, "versions": versions("commlib"), "bounds_s": bounds_s, "steps_s": {}, "cpu_share": {},
             "speed_up_of_1_s": step_s * hosts}  # fmt: skip
    for mover in arguments.movers:
        schedules = [schedule for schedule in arguments.schedules if schedule in MOVERS[mover].schedules]
        by_rank = train(cluster, hosts, mover, schedules, counts, times, arguments)
        entry["steps_s"][mover] = {schedule: [rank["steps_s"][schedule] for rank in by_rank] for schedule in schedules}
        entry["cpu_share"][mover] = {schedule: [rank["cpu_s"][schedule] / rank["wall_s"][schedule] for rank in by_rank]
                                     for schedule in schedules}  # fmt: skip
    show(entry)
    return entry


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4, 8], metavar="N")
    parser.add_argument("--model", nargs="+", choices=models.MODELS, default=["alexnet"])
    parser.add_argument("--shrink", type=int, default=1, help="one in so many elements of every tensor travels")
    parser.add_argument("--rate-mbit", type=int, default=1000, help="of each link and direction")
    parser.add_argument("--forward-share", type=float, default=0.39, help="of compute; the rest is backward")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--compute-s", type=float, help="of one accelerator in a step; with --strong, in all of them together")
    amount.add_argument("--balanced", action="store_true", help="compute as long as the link needs for all gradients")
    parser.add_argument("--strong", action="store_true", help="a fixed global batch: N accelerators share the compute")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--movers", nargs="+", choices=MOVERS, default=["commlib"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--name", default="commlib", help="prefix of the namespaces")
    parser.add_argument("--congestion", metavar="NAME", help="TCP's congestion control, such as cubic; else this machine's default")
    parser.add_argument("--output", metavar="FILE", help="raw data, as JSON")
    arguments = parser.parse_args()
    for hosts in arguments.hosts:
        with Cluster(hosts, arguments.rate_mbit, arguments.name, arguments.congestion) as cluster:
            for name in arguments.model:
                load = os.getloadavg()
                entry = run(arguments, name, hosts, cluster)
                if arguments.output:
                    add_run(arguments.output, f"{name} on {hosts}, {arguments.rate_mbit} Mbit/s", arguments, load, entry)


if __name__ == "__main__":
    main()
