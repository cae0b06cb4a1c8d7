"""Many small tensors at once, and an urgent one behind a large one: commlib beside every peer, repeats interleaved.

    python benchmarks/latency.py --output benchmarks/results/latency.json

At once: 1,000 tensors of 4 KB are submitted, then waited for; as a list: given to one call. Urgent: 64 KB are submitted while
256 MB of low priority are moving, and by themselves; only commlib has priorities, the others show what it is to have none. The
raw data goes to the file; plot.py draws it.
"""

import argparse
import sys
import time

from environments import install_missing
from groups import Absent, groups
from peers import PEERS
from record import recorded

TENSORS, TENSOR_NBYTES = 1000, 4 << 10
URGENT_NBYTES, BEHIND_NBYTES = 64 << 10, 256 << 20


VISIT_S = 1.5  # of one peer with one order in one round
FIRST_REPEATS, LEAST_REPEATS, MOST_REPEATS = 3, 3, 30


def orders_of(behind_nbytes):
    """What is measured: name -> order."""
    return {
        "at_once": {"do": "at_once", "count": TENSORS, "nbytes": TENSOR_NBYTES},
        "as_list": {"do": "as_list", "count": TENSORS, "nbytes": TENSOR_NBYTES},
        "idle": {"do": "blocking", "nbytes": URGENT_NBYTES},
        "urgent": {"do": "urgent", "nbytes": URGENT_NBYTES, "behind_nbytes": behind_nbytes},
    }


class Visits:
    """One peer with one order: as many repeats as fit into a visit; the first of each is not counted."""

    def __init__(self, group, order):
        self.group, self.order = group, order
        self.repeats, self.times_s = FIRST_REPEATS, []

    def visit(self):
        begin_s = time.monotonic()
        self.times_s += self.group.order(**self.order, repeats=self.repeats)[1:]
        pace_s = (time.monotonic() - begin_s) / self.repeats
        self.repeats = max(LEAST_REPEATS, min(MOST_REPEATS, int(VISIT_S / pace_s)))


def measure(started, orders, budget_s, absent):
    """{order: {peer: [seconds]}}, empty where the peer cannot do it; one round at least, then until the time is over."""
    cells = {what: {group.name: Visits(group, order) for group in started} for what, order in orders.items()}
    end_s, rounds = time.monotonic() + budget_s, 0
    while rounds == 0 or time.monotonic() < end_s:
        for of_peers in cells.values():
            for name, cell in of_peers.items():
                try:
                    if name not in absent:
                        cell.visit()
                except Absent as error:
                    absent[name] = str(error)
        rounds += 1
    print(f"{rounds} rounds", file=sys.stderr)
    return {what: {name: cell.times_s for name, cell in of_peers.items()} for what, of_peers in cells.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45.0, help="about how long to measure")
    asynchronous = [name for name in PEERS if name != "commlib_prepared"]  # there are no prepared asynchronous calls
    parser.add_argument("--peers", nargs="+", choices=asynchronous, default=asynchronous)
    parser.add_argument("--behind", type=int, default=BEHIND_NBYTES, metavar="BYTES", help="size of the large operation")
    parser.add_argument("--output", required=True, help="raw data, as JSON")
    arguments = parser.parse_args()
    absent, orders = install_missing(arguments.peers), orders_of(arguments.behind)
    with recorded(arguments.output, arguments.peers, absent) as results:
        results["orders"] = orders
        with groups([name for name in arguments.peers if name not in absent], 2, absent) as started:
            results["seconds"] = measure(started, orders, arguments.seconds, absent)


if __name__ == "__main__":
    main()
