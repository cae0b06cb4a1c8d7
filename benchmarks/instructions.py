"""Counts the instructions of the engine's hot paths with callgrind, and compares them with what was recorded.

    python benchmarks/instructions.py            compares; a path that costs more than it did ends the program with 1
    python benchmarks/instructions.py --record   writes benchmarks/results/instructions.json

Counts do not hang on how loaded a machine is, as times do, but on the compiler: record again when that changes. valgrind
runs AVX2 at most, so wide kernels are counted in that form.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "instructions.json"
TOLERANCE = 0.03  # layouts of code and memory move a count by less
FLAGS = ["-std=gnu11", "-O3", "-g", "-pthread"]  # as native/build.py, which also hides symbols


def build(folder):
    """Returns the program."""
    program = folder / "instructions"
    sources = [*sorted((ROOT / "native").glob("*.c")), ROOT / "tests/native/world.c", ROOT / "benchmarks/instructions.c"]
    subprocess.run(["gcc", *FLAGS, *sources, "-o", program, "-lm"], check=True)
    return program


def count(program, path):
    """Instructions of both ranks per operation."""
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=counted", program, path]
    result = subprocess.run(command, capture_output=True, text=True)
    collected = re.search(r"Collected : (\d+)", result.stderr)
    operations = re.search(r"operations: (\d+)", result.stdout)
    if result.returncode != 0 or collected is None or operations is None:
        raise SystemExit(f"callgrind failed on {path!r}:\n{result.stderr}{result.stdout}")
    return int(collected[1]) / int(operations[1])


def compiler():
    """What the counts hang on."""
    return subprocess.run(["gcc", "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the counts instead of comparing with them")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = build(pathlib.Path(folder))
        paths = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
        counts = {path: round(count(program, path)) for path in paths}
    if arguments.record:
        RECORD.write_text(json.dumps({"compiler": compiler(), "instructions": counts}, indent=1) + "\n")
    record = json.loads(RECORD.read_text())
    if record["compiler"] != compiler():
        print(f"recorded with {record['compiler']}, and this is {compiler()}: counts differ for that alone")
    worse = False
    print(f"{'instructions per operation, both ranks':<40}{'recorded':>12}{'now':>12}")
    for path, now in counts.items():
        before = record["instructions"].get(path)
        is_worse = before is not None and now > before * (1 + TOLERANCE)
        worse |= is_worse
        print(f"{path:<40}{'-' if before is None else before:>12}{now:>12}{'  more' if is_worse else ''}")
    sys.exit(worse)


if __name__ == "__main__":
    main()
