"""Is the algorithm that is chosen the fastest? Tunes, and then measures every algorithm anew, which the tuning has not seen.

    python benchmarks/choices.py --ranks 2 3 4 8 --output benchmarks/results/choices.json

For each number of ranks and each size: medians of every all-reduce algorithm in a few parts of one run, calls interleaved;
the choice of the record that `commlib tune` would write, of its closed form alone, and of the record that init makes by itself.
`python benchmarks/choices.py --show FILE` prints the table of docs/tuning.md.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

from record import add_run

PARTS = 5  # the spread of their medians says what noise is
SIZES = tuple(8 << (2 * power) for power in range(12))  # to 32 MiB


def on_rank(seconds, sizes):
    """One rank's part; rank 0 prints what was found, as JSON."""
    import commlib
    from commlib import tune
    from commlib.selection import select

    communicator = commlib.init()
    at_init = communicator.settings
    result = tune.tune(communicator, sizes, seconds / 2)
    parts = [tune.measure(communicator, result.settings, list(result.same), sizes, seconds / 2 / PARTS) for _ in range(PARTS)]

    def name_of(choice):
        return next((name for name, others in result.same.items() if choice in others), choice)

    if communicator.rank == 0:
        answer = {str(nbytes): {
            "times_s": {name: [part[name, nbytes] for part in parts] for name in result.same},
            "tuned": result.choice(nbytes),
            "closed_form": result.closed_form_choice(nbytes),
            "at_init": name_of(select("allreduce", nbytes, result.shape, at_init).algorithm),
        } for nbytes in sizes}  # fmt: skip
        sys.stdout.write(json.dumps({"sizes": answer, "settings": result.settings.as_dict(), "at_init": at_init.as_dict()}) + "\n")
    commlib.shutdown()


def ratio(entry, which):
    """Median time of the chosen algorithm over that of the best."""
    medians_s = {name: statistics.median(times_s) for name, times_s in entry["times_s"].items()}
    return medians_s[entry[which]] / min(medians_s.values())


def show(path):
    """Prints a table: per number of ranks and size the best algorithm, its time, and what each choice takes of it."""
    print("| ranks | bytes | best | us | spread | tuned | closed form, fitted | closed form, init |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, run in json.loads(pathlib.Path(path).read_text())["runs"].items():
        for nbytes, entry in run["sizes"].items():
            best, times_s = min(entry["times_s"].items(), key=lambda item: statistics.median(item[1]))
            spread = max(times_s) / min(times_s)
            choices = " | ".join(f"{entry[which]} {ratio(entry, which):.2f}x" for which in ("tuned", "closed_form", "at_init"))
            print(f"| {name} | {int(nbytes):,} | {best} | {statistics.median(times_s) * 1e6:,.1f} | {spread:.2f}x | {choices} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 8], metavar="N")
    parser.add_argument("--seconds", type=float, default=20.0, help="about how long for each number of ranks")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="BYTES")
    parser.add_argument("--output", metavar="FILE", help="raw data, as JSON; runs are added to it")
    parser.add_argument("--show", metavar="FILE", help="print the table of a file")
    parser.add_argument("--on-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.show:
        return show(arguments.show)
    if arguments.on_rank:
        return on_rank(arguments.seconds, arguments.sizes)
    for size in arguments.ranks:
        load_before = os.getloadavg()
        commrun = pathlib.Path(sys.executable).parent / "commrun"
        command = [commrun, "--bind-to-cores", "-np", str(size), sys.executable, __file__, "--on-rank",
                   "--seconds", str(arguments.seconds), "--sizes", *map(str, arguments.sizes)]  # fmt: skip
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
        add_run(arguments.output, str(size), arguments, load_before, found)
    return show(arguments.output)


if __name__ == "__main__":
    main()
