"""What `commlib simulate` shows: a table of predictions, what would help, a file for programs, and a plot.

It knows a `simulate.Prediction` and how to draw it; rich and matplotlib make it prettier and are not needed, but for a plot.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from typing import Any, Dict, List, Optional, Sequence

COLUMNS = ("ranks", "schedule", "step ms", "speed-up", "efficiency", "exposed ms", "limit", "algorithms")
BOUND = "bound"


def show(prediction, json_path: Optional[str], plot_path: Optional[str]) -> None:
    """Prints everything and writes the files that were asked for.

    Args:
        prediction: a commlib.simulate.Prediction.
        json_path, plot_path: where to; None: not.

    Raises:
        OSError: a file cannot be written.
        ValueError: a plot in a format that matplotlib does not know.
    """
    _print_table(title(prediction), COLUMNS, rows(prediction))
    for line in advice(prediction):
        print(line)
    if json_path:
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump(as_table(prediction), file, indent=1)
            file.write("\n")
        print(f"everything written to {json_path}")
    if plot_path:
        print(draw(prediction, plot_path))


def title(prediction) -> str:
    """What was simulated, in a line."""
    job = prediction.job
    batch = "all ranks together have the batch of one" if job.fixed_batch else "each rank has a batch of its own"
    return (f"{job.workload.name}: {job.workload.parameters / 1e6:,.1f} M parameters, {8 * job.wire_nbytes} bits each on the "
            f"wire; a step computes {1e3 * job.workload.compute_s:,.1f} ms on one rank alone; {batch}")  # fmt: skip


def rows(prediction) -> List[List[str]]:
    """A line for each point, and the bound below those of each number of ranks."""
    lines: List[List[str]] = []
    points = prediction.points
    for index, point in enumerate(points):
        names = ", ".join(f"{name} {count}" for name, count in sorted(point.algorithms.items()))
        lines.append([str(point.ranks), point.schedule, f"{1e3 * point.step_s:,.1f}", f"{point.speed_up:,.2f}",
                      f"{100 * point.efficiency:.0f} %", f"{1e3 * point.exposed_s:,.1f}", point.limit, names])  # fmt: skip
        if index + 1 == len(points) or points[index + 1].ranks != point.ranks:
            share = point.step_s / point.bound_s
            exposed_s = max(0.0, point.bound_s - (point.step_s - point.exposed_s))
            lines.append([str(point.ranks), BOUND, f"{1e3 * point.bound_s:,.1f}", f"{share * point.speed_up:,.2f}",
                          f"{100 * share * point.efficiency:.0f} %", f"{1e3 * exposed_s:,.1f}", "", ""])  # fmt: skip
    return lines


def advice(prediction) -> List[str]:
    """What would help, the best first."""
    if not prediction.advice:
        return []
    best_first = sorted(prediction.advice, key=lambda advice: -advice.gain)
    lines = [f"what would help on {best_first[0].point.ranks} ranks, with the schedule {best_first[0].point.schedule!r}:"]
    return lines + [f"  {each.change:<30}{each.gain:5.2f}x the samples per second (efficiency "
                    f"{100 * each.point.efficiency:.0f} %, limit: {each.point.limit})" for each in best_first]  # fmt: skip


def as_table(prediction) -> Dict[str, Any]:
    """The prediction as JSON has it; times in seconds."""
    job = prediction.job
    return {
        "model": {"name": job.workload.name, "parameters": job.workload.parameters, "compute_s": job.workload.compute_s},
        "cluster": dataclasses.asdict(job.cluster),
        "wire_nbytes": job.wire_nbytes, "fixed_batch": job.fixed_batch, "steps": job.steps, "settings_hash": job.record.hash,
        "points": [point._asdict() for point in prediction.points],
        "advice": [{"change": each.change, "gain": each.gain, "point": each.point._asdict()} for each in prediction.advice],
    }  # fmt: skip


def draw(prediction, path: str) -> str:
    """Speed-up of every schedule and of the bound over the number of ranks. Returns what there is to say about it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: pip install matplotlib, and simulate again"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    points = prediction.points
    sizes = sorted({point.ranks for point in points})
    for schedule in dict.fromkeys(point.schedule for point in points):
        mine = [point for point in points if point.schedule == schedule]
        axes.plot([point.ranks for point in mine], [point.speed_up for point in mine], "o-", label=schedule)
    bounds = {point.ranks: point.speed_up * point.step_s / point.bound_s for point in points}
    axes.plot(sizes, [bounds[size] for size in sizes], "k--", label=BOUND)
    axes.plot(sizes, sizes, color="black", alpha=0.3, label="as many times as ranks")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlabel="ranks", ylabel="speed-up over one rank", title=f"{prediction.job.workload.name}, simulated")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)
    return f"plot written to {path}"


@contextlib.contextmanager
def progress_bar():
    """Gives a function (what, share of it that is done) that draws on a terminal, if rich is installed; else it is silent."""
    console = _console(sys.stderr)
    if console is None:
        yield lambda what, share: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def _console(file):
    """rich's console if it is installed and the file is a terminal, else None."""
    if not file.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=file)


def _print_table(heading: str, columns: Sequence[str], lines: List[List[str]]) -> None:
    """By rich on a terminal if it is installed, else aligned by hand: other programs read whole lines."""
    console = _console(sys.stdout)
    left = {"schedule", "limit", "algorithms"}
    if console is None:
        widths = [max(map(len, column)) for column in zip(columns, *lines)]
        print(heading)
        for line in [list(columns), *lines]:
            cells = [cell.ljust(width) if name in left else cell.rjust(width)
                     for name, cell, width in zip(columns, line, widths)]  # fmt: skip
            print("  ".join(cells).rstrip())
        return
    from rich.table import Table

    table = Table(title=heading)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", overflow="fold")
    for index, line in enumerate(lines):
        table.add_row(*line, style="dim" if line[1] == BOUND else None, end_section=line[1] == BOUND and index + 1 < len(lines))
    console.print(table)
