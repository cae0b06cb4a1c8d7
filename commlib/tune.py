"""commlib tune: what links cost here, and which all-reduce algorithm is fastest at each size, as a settings record.

Run by all ranks at once, `commrun -np 4 commlib tune --output tuned.json`. Constants are fitted to the times of all
algorithms (`fit`); then all are timed again under these constants, and the table of choices is made so that each size gets
an algorithm within a few percent of the best one measured. A table is for one shape of group: to have several in one file,
tune each with the file so far, `commrun -np 8 --settings tuned.json commlib tune --output tuned.json`. This file measures
and decides; `tune_report` shows it.
"""
from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Dict, List, Mapping, NamedTuple, Sequence, Tuple

import numpy

from commlib import algorithms
from commlib.cost import cost_s, messages
from commlib.fit import CALL_S, Sample, fit
from commlib.plan import Shape
from commlib.reduction import Sum
from commlib.selection import machine_of, select
from commlib.settings import Settings

KIND = "allreduce"  # the one kind whose choice matters in training, and whose end no rank sees before the others' begin

DEFAULT_BUDGET_S = 20.0
DEFAULT_LARGEST_NBYTES = 64 << 20
_SMALLEST_NBYTES, _RATIO = 8, 4  # sizes between which the choice is interpolated: two decades have about three

# Where a choice is this close to the best, noise decides; and a table with fewer lines is worth as much.
_MARGIN = 1.05

# Repeats of a visit: a few milliseconds for each, so that all sizes are seen often within the budget.
_VISIT_NBYTES, _MOST_REPEATS = 4 << 20, 20

Times = Dict[Tuple[str, int], float]  # (algorithm, bytes) -> seconds


class Result(NamedTuple):
    """What tuning found.

    Args:
        shape: of the group.
        settings: the record to save: constants and table are those found, the rest is as it was.
        call_s: what a call costs whatever its algorithm.
        times: the measured times.
        same: algorithm -> others whose plans are the same on this shape, which were not measured again.
    """

    shape: Shape
    settings: Settings
    call_s: float
    times: Times
    same: Mapping[str, Sequence[str]]

    @property
    def sizes(self) -> List[int]:
        """The measured sizes, ascending."""
        return sorted({nbytes for _, nbytes in self.times})

    def predicted_s(self, name: str, nbytes: float) -> float:
        """The closed form's time with the fitted constants."""
        module = algorithms.algorithm(KIND, name)
        return self.call_s + cost_s(module, self.shape, nbytes, machine_of(self.settings))

    def closed_form_choice(self, nbytes: int) -> str:
        """What would be chosen without the table."""
        return self._named(select(KIND, nbytes, self.shape, self.settings.replace(algorithms=(), table=())).algorithm)

    def choice(self, nbytes: int) -> str:
        """What is chosen with the saved record."""
        return self._named(select(KIND, nbytes, self.shape, self.settings).algorithm)

    def _named(self, name):
        return next((first for first, others in self.same.items() if name in others), name)


def add_arguments(parser):
    """The options of `commlib tune`."""
    parser.add_argument("--output", required=True, metavar="FILE", help="the settings record to write; give it to "
                        "commrun --settings, COMMLIB_SETTINGS or init(settings=Settings.load(FILE))")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="the plot to write (default: FILE of --output, as .svg)")
    parser.add_argument("--budget", type=_positive, default=DEFAULT_BUDGET_S, metavar="S",
                        help=f"about how many seconds to measure ({DEFAULT_BUDGET_S:g})")  # fmt: skip
    parser.add_argument("--largest", type=int, default=DEFAULT_LARGEST_NBYTES, metavar="BYTES",
                        help=f"the largest size ({DEFAULT_LARGEST_NBYTES})")  # fmt: skip


def _positive(text: str) -> float:
    value = float(text)
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def run(options) -> int:
    """The command, on one rank; rank 0 writes and prints. Returns the exit code."""
    import commlib

    communicator = commlib.init()
    if communicator.size == 1:
        print("commlib tune: one rank has no links: start it as commrun -np 2 commlib tune --output FILE", file=sys.stderr)
        return 2
    result = tune(communicator, sizes_upto(options.largest), options.budget)
    code = _write(result, options) if communicator.rank == 0 else 0
    commlib.shutdown()
    return code


def _write(result, options) -> int:
    """What was measured for so long is shown where it cannot be kept."""
    from commlib import tune_report

    try:
        result.settings.save(options.output)
        tune_report.show(result, options.output, options.plot)
    except OSError as error:
        print(f"commlib tune: cannot write: {error}. This is the settings record:", file=sys.stderr)
        print(result.settings.to_json())
        return 1
    return 0


def sizes_upto(largest_nbytes: int) -> List[int]:
    """The sizes that are measured: a geometric series."""
    sizes = [_SMALLEST_NBYTES]
    while sizes[-1] * _RATIO <= largest_nbytes:
        sizes.append(sizes[-1] * _RATIO)
    return sizes


def tune(communicator, sizes: Sequence[int], budget_s: float) -> Result:
    """Measures, fits, measures again and decides; every rank of the communicator calls it and gets the same result.

    Args:
        communicator: of at least two ranks, with nothing in flight; its settings are left as they are.
        sizes: in bytes.
        budget_s: of each of the two measurements half; a round of all sizes is the least.
    """
    shape, before = Shape(communicator.host_sizes), communicator.settings
    same = distinct(shape)
    try:
        fitted = fitted_to(measure(communicator, before, list(same), sizes, budget_s / 2), shape)
        call_s = fitted.pop(CALL_S)
        settings = before.replace(**fitted)
        times = measure(communicator, settings, list(same), sizes, budget_s / 2)
    finally:
        communicator.settings = before
    forced = tuple(pair for pair in before.algorithms if pair[0] != KIND)
    result = Result(shape, settings.replace(algorithms=forced, table=()), call_s, times, same)
    lines = staircase(times, {nbytes: result.closed_form_choice(nbytes) for nbytes in sizes})
    table = [line for line in before.table if line[:2] != (KIND, shape.ranks_per_host)]
    table += [(KIND, shape.ranks_per_host, upto_nbytes, name) for upto_nbytes, name in lines]
    return result._replace(settings=settings.replace(table=tuple(table)))


def distinct(shape: Shape) -> Dict[str, List[str]]:
    """Algorithm -> others with the same plans on this shape: on two ranks, a ring is a direct exchange."""
    by_plans: Dict[tuple, List[str]] = {}
    for name in algorithms.applicable(KIND, shape):
        by_plans.setdefault(algorithms.plans_for(KIND, name, shape), []).append(name)
    return {names[0]: names[1:] for names in by_plans.values()}


def fitted_to(times: Times, shape: Shape) -> Dict[str, float]:
    """The constants that explain measured times best."""
    modules = {name: algorithms.algorithm(KIND, name) for name, _ in times}
    counts = {name: messages(module, shape) if shape.hosts == 1 and shape.size > 2 else 0 for name, module in modules.items()}
    return fit([Sample(modules[name].terms(shape), nbytes, seconds, counts[name]) for (name, nbytes), seconds in times.items()])


def staircase(times: Times, preferred: Mapping[int, str]) -> List[Tuple]:
    """The shortest list of (up to bytes, algorithm) whose choices are within a margin of the best at each measured size.

    Args:
        times: of every algorithm at every size.
        preferred: size -> the algorithm that is taken where several would do.

    Returns:
        Ascending; the last line has None: it holds for all larger sizes. Borders lie halfway (geometrically) between sizes.

    Example:
        >>> times = {("a", 8): 1.0, ("b", 8): 2.0, ("a", 32): 1.02, ("b", 32): 1.0, ("a", 128): 4.0, ("b", 128): 2.0}
        >>> staircase(times, {8: "a", 32: "b", 128: "b"})
        [(64, 'a'), (None, 'b')]
    """
    sizes = sorted(preferred)
    names = list(dict.fromkeys(name for name, _ in times))
    best_s = {nbytes: min(times[name, nbytes] for name in names) for nbytes in sizes}
    good = {nbytes: {name for name in names if times[name, nbytes] <= _MARGIN * best_s[nbytes]} for nbytes in sizes}
    runs: List[Tuple[List[int], set]] = []  # neighbouring sizes, and what is good at all of them
    for nbytes in sizes:
        if runs and runs[-1][1] & good[nbytes]:
            runs[-1] = ([*runs[-1][0], nbytes], runs[-1][1] & good[nbytes])
        else:
            runs.append(([nbytes], good[nbytes]))
    lines = []
    for index, (members, candidates) in enumerate(runs):
        votes = [preferred[nbytes] for nbytes in members]
        total_s = {name: sum(times[name, nbytes] / best_s[nbytes] for nbytes in members) for name in candidates}
        name = min(sorted(candidates), key=lambda name: (-votes.count(name), total_s[name]))
        is_last = index + 1 == len(runs)
        lines.append((None if is_last else round((members[-1] * runs[index + 1][0][0]) ** 0.5), name))
    return lines


def measure(communicator, settings: Settings, names: Sequence[str], sizes: Sequence[int], budget_s: float) -> Times:
    """Medians of interleaved repeats: in every round each size sees each algorithm for a few calls.

    Rank 0's clock says when it is enough; a time is that of the slowest rank.
    """
    rounds: Dict[Tuple[str, int], List[float]] = {(name, nbytes): [] for name in names for nbytes in sizes}
    array = numpy.zeros(max(sizes) // 4, numpy.float32)
    end_s = time.monotonic() + budget_s
    goes_on = True
    while goes_on:
        for nbytes in sizes:
            for name in names:
                communicator.settings = settings.replace(algorithms=((KIND, name),))
                rounds[name, nbytes] += _visit(communicator, array[: nbytes // 4])
        answer = json.dumps(time.monotonic() < end_s).encode()
        goes_on = json.loads(communicator.control.broadcast_bytes(answer, name="tune goes on"))
    mine = json.dumps([statistics.median(times_s) for times_s in rounds.values()]).encode()
    of_ranks = [json.loads(payload) for payload in communicator.exchange(mine, name="tune times")]
    return dict(zip(rounds, map(max, zip(*of_ranks))))


def _visit(communicator, array):
    """Seconds of a few calls; one before them is not timed, since plans and requests are made in it."""
    times_s = []
    for _ in range(1 + max(2, min(_MOST_REPEATS, _VISIT_NBYTES // (array.nbytes + 1)))):
        begin_s = time.perf_counter()
        communicator.allreduce_(array, name="tune", op=Sum)
        times_s.append(time.perf_counter() - begin_s)
    return times_s[1:]
