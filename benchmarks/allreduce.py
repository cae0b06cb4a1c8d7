"""Blocking all-reduce on one machine: commlib beside every peer, in one run, repeats interleaved.

    python benchmarks/allreduce.py --ranks 2 4 8 --output benchmarks/results/allreduce.json

Peers that are not there are installed first (environments.py). All peers' ranks are started once and wait; in every round
each peer in turn does a few repeats of each size, so that a machine that is slower for a while is slower for all. The raw
data goes to the file; plot.py draws it.
"""

import argparse
import statistics
import sys
import time

from environments import install_missing
from groups import Absent, groups
from peers import PEERS
from record import recorded

SIZES = (8, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20)
VISIT_S = 0.05  # of one peer at one size in one round
FIRST_REPEATS, LEAST_REPEATS, MOST_REPEATS = 3, 3, 200


def measure(started, sizes, budget_s, absent):
    """{peer: {bytes: [the median of each round]}}, in seconds; one round at least, then until the time is over."""
    results = {group.name: {nbytes: [] for nbytes in sizes} for group in started}
    end_s, rounds = time.monotonic() + budget_s, 0
    while rounds == 0 or time.monotonic() < end_s:
        for nbytes in sizes:
            if rounds and time.monotonic() > end_s:
                break
            for group in started:
                try:
                    if group.name not in absent:
                        results[group.name][nbytes].append(visit(group, nbytes, results[group.name][nbytes]))
                except Absent as error:
                    absent[group.name] = f"{group.size} ranks: {error}"
        rounds += 1
    print(f"{rounds} rounds", file=sys.stderr)
    return results


def visit(group, nbytes, medians_s):
    """The median of a few repeats, as many as fit; the first ones, in which memory is touched, are not counted."""
    repeats = FIRST_REPEATS
    if medians_s:
        repeats = max(LEAST_REPEATS, min(MOST_REPEATS, int(VISIT_S / medians_s[-1])))
    times_s = group.order("blocking", nbytes=nbytes, repeats=repeats)
    return statistics.median(times_s[1 + len(times_s) // 5 :])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], metavar="N")
    parser.add_argument("--seconds", type=float, default=70.0, help="about how long to measure for each number of ranks")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="BYTES")
    parser.add_argument("--output", required=True, help="raw data, as JSON")
    arguments = parser.parse_args()
    absent = install_missing(arguments.peers)
    with recorded(arguments.output, arguments.peers, absent) as results:
        results["allreduce"] = {}
        for size in arguments.ranks:
            with groups([name for name in arguments.peers if name not in absent], size, absent) as started:
                results["allreduce"][size] = measure(started, arguments.sizes, arguments.seconds, absent)


if __name__ == "__main__":
    main()
