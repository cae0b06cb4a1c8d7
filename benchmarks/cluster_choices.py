"""Is the algorithm that is chosen between hosts the fastest? Every algorithm forced in turn, on an emulated cluster.

    sudo python benchmarks/cluster_choices.py --hosts 2 4 8 --rate-mbit 1000 --output benchmarks/results/cluster_choices.json
    python benchmarks/cluster_choices.py --show benchmarks/results/cluster_choices.json

For each number of hosts and each size: the median of every all-reduce algorithm, visits interleaved, a time being that of the
slowest rank; and what the record that init() makes by itself chooses, for one operation alone.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

from cluster import Cluster
from record import add_run
from scaling import environment, wait_for

KIB, MIB = 1 << 10, 1 << 20
SIZES = (4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 25 * MIB, 100 * MIB)
LARGE_NBYTES = 16 * MIB  # of these, one visit to each algorithm
LIMIT_S = 200.0


def on_rank(seconds, sizes, result):
    """One rank's part; rank 0 writes what was found, as JSON."""
    import commlib
    from commlib import tune
    from commlib.plan import Shape
    from commlib.selection import select

    communicator = commlib.init()
    record, shape = communicator.settings, Shape(communicator.host_sizes)
    same = tune.distinct(shape)
    times_s = tune.measure(communicator, record, list(same), [size for size in sizes if size < LARGE_NBYTES] or [4], seconds)
    large = [size for size in sizes if size >= LARGE_NBYTES]
    times_s.update(tune.measure(communicator, record, list(same), large, 0.0) if large else {})
    communicator.settings = record
    if communicator.rank == 0:
        chosen = {size: select("allreduce", size, shape, record).algorithm for size in sizes}
        found = {size: {"times_s": {name: times_s[name, size] for name in same},
                        "chosen": next((name for name in same if name == chosen[size] or chosen[size] in same[name]))}
                 for size in sizes}  # fmt: skip
        pathlib.Path(result).write_text(json.dumps({"sizes": found, "same": same, "settings": record.as_dict()}))
    communicator.barrier()
    commlib.shutdown()


def run(arguments, cluster):
    """What rank 0 has found on all hosts of a cluster."""
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder, "result")
        command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--on-rank", str(result), "--seconds",
                   str(arguments.seconds), "--sizes", *map(str, arguments.sizes)]  # fmt: skip
        ranks = [cluster.start(rank, command, environment(cluster, rank, cluster.hosts)) for rank in range(cluster.hosts)]
        wait_for(ranks, LIMIT_S)
        return json.loads(result.read_text())


def show(path):
    """Prints a table: by hosts and size, the chosen algorithm and the best one, and how many times its time the chosen takes."""
    print("| hosts, links | bytes | chosen | milliseconds | best | chosen / best | all |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, found in json.loads(pathlib.Path(path).read_text())["runs"].items():
        for nbytes, entry in found["sizes"].items():
            times_s, chosen = entry["times_s"], entry["chosen"]
            best = min(times_s, key=times_s.get)
            others = ", ".join(f"{other} {1e3 * time_s:,.3f}" for other, time_s in times_s.items())
            print(f"| {name} | {int(nbytes):,} | {chosen} | {1e3 * times_s[chosen]:,.3f} | {best} | "
                  f"{times_s[chosen] / times_s[best]:.2f} | {others} |")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4, 8], metavar="N")
    parser.add_argument("--rate-mbit", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=6.0, help="of the smaller sizes together")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="BYTES")
    parser.add_argument("--name", default="commlib", help="prefix of the namespaces")
    parser.add_argument("--congestion", metavar="NAME", help="TCP's congestion control, such as cubic; else this machine's default")
    parser.add_argument("--output", metavar="FILE", help="raw data, as JSON; runs are added to it")
    parser.add_argument("--show", metavar="FILE", help="print the table of a file")
    parser.add_argument("--on-rank", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.show:
        return show(arguments.show)
    if arguments.on_rank:
        return on_rank(arguments.seconds, arguments.sizes, arguments.on_rank)
    for hosts in arguments.hosts:
        load = os.getloadavg()
        with Cluster(hosts, arguments.rate_mbit, arguments.name, arguments.congestion) as cluster:
            found = run(arguments, cluster)
        add_run(arguments.output, f"{hosts} x 1, {arguments.rate_mbit} Mbit/s", arguments, load, found)
    return show(arguments.output)


if __name__ == "__main__":
    main()
