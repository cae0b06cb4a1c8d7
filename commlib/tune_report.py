"""What `commlib tune` shows: a table of measured and predicted times, where choices change and why, and a plot.

It knows a `tune.Result` and how to draw it; rich and matplotlib make it prettier and are not needed.
"""
from __future__ import annotations

import os
from typing import Callable, List, Optional

from commlib.fit import UNKNOWNS

_RIGHT_ENOUGH = 1.005  # measured times that differ by less are printed alike


def show(result, output: str, plot: Optional[str]) -> None:
    """Prints everything and draws the plot.

    Args:
        result: a commlib.tune.Result.
        output: where its settings were saved.
        plot: the file to draw into; None: beside the output.
    """
    _print_table(header(result), rows(result))
    for line in summary(result):
        print(line)
    print(f"settings written to {output}: use it by commrun --settings {output}, or COMMLIB_SETTINGS={output}")
    print(draw(result, plot or f"{os.path.splitext(output)[0]}.svg"))


def header(result) -> List[str]:
    """The columns."""
    return ["bytes", *result.same, "chosen", "why"]


def rows(result) -> List[List[str]]:
    """For each size: measured / predicted microseconds of each algorithm, the choice and its reason."""
    return [
        [f"{nbytes:,}",
         *(f"{result.times[name, nbytes] * 1e6:,.1f} / {result.predicted_s(name, nbytes) * 1e6:,.1f}" for name in result.same),
         result.choice(nbytes), why(result, nbytes)]
        for nbytes in result.sizes
    ]  # fmt: skip


def why(result, nbytes: int) -> str:
    """Why a size gets its algorithm."""
    chosen, closed = result.choice(nbytes), result.closed_form_choice(nbytes)
    if chosen == closed:
        reason = "closed form"
    else:
        reason = f"table: closed form's {closed} takes {result.times[closed, nbytes] / result.times[chosen, nbytes]:.2f}x"
    excess = result.times[chosen, nbytes] / min(result.times[name, nbytes] for name in result.same)
    return reason if excess < _RIGHT_ENOUGH else f"{reason}; {(excess - 1) * 100:.0f} % above the best"


def summary(result) -> List[str]:
    """Constants and crossovers, a line each."""
    lines = [f"{name} = {getattr(result.settings, name):.3g}" for name in UNKNOWNS if hasattr(result.settings, name)
             and getattr(result.settings, name)]  # fmt: skip
    hosts = "+".join(map(str, result.shape.ranks_per_host))
    twins = [f"on {hosts} ranks {name} is the same as {', '.join(others)}" for name, others in result.same.items() if others]
    return [
        *twins,
        f"fitted on {hosts} ranks: " + ", ".join(lines) + f"; a call costs {result.call_s * 1e6:.1f} us beside it",
        "the closed form would choose: " + changes(result.closed_form_choice, result.sizes),
        "chosen from the table:        " + changes(result.choice, result.sizes),
    ]


def changes(choice: Callable[[int], str], sizes: List[int]) -> str:
    """The crossovers of a choice, each found to the byte between two measured sizes.

    Example:
        >>> changes(lambda nbytes: "ring" if nbytes > 99 else "direct", [8, 512])
        'direct up to 99 bytes, then ring'
    """
    words = [choice(sizes[0])]
    for low, high in zip(sizes, sizes[1:]):
        if choice(low) != choice(high):
            last, first = low, high
            while first - last > 1:
                middle = (first + last) // 2
                last, first = (middle, first) if choice(middle) == choice(low) else (last, middle)
            words.append(f"up to {last:,} bytes, then {choice(high)}")
    return " ".join(words)


def draw(result, path: str) -> str:
    """Measured times as points, predicted ones as lines, the choice shaded. Returns what there is to say about it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: pip install matplotlib, and tune again"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(result.same):
        colour = f"C{index}"
        axes.plot(result.sizes, [result.times[name, nbytes] for nbytes in result.sizes], "o", color=colour, label=name)
        axes.plot(result.sizes, [result.predicted_s(name, nbytes) for nbytes in result.sizes], "--", color=colour)
    axes.plot(result.sizes, [result.times[result.choice(nbytes), nbytes] for nbytes in result.sizes], color="black",
              linewidth=6, alpha=0.15, label="chosen")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="bytes", ylabel="seconds",
             title=f"all-reduce on {'+'.join(map(str, result.shape.ranks_per_host))} ranks: measured (points), "
                   "predicted (lines)")  # fmt: skip
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)
    return f"plot written to {path}"


def _print_table(columns: List[str], lines: List[List[str]]) -> None:
    """By rich on a terminal if it is installed, else aligned by hand: other programs read whole lines."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        console = None
    else:
        console = Console()
    title = "all-reduce: measured / predicted us of each algorithm"
    if console is None or not console.is_terminal:
        widths = [max(map(len, column)) for column in zip(columns, *lines)]
        print(title)
        for line in [columns, *lines]:
            print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))
        return
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == "why" else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print(table)
