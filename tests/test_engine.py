"""The engine with several ranks in one process, as C programs: real threads and links, and simulated networks.

Each program is built plain and under each sanitizer. What it prints last before it fails names the test, or the seed to
run it with.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "native"
LONGEST_S = 100  # it takes seconds, also under a sanitizer; a hang is what this is for
BUILDS = {
    "plain": ["-O2"],
    "address and undefined behaviour": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"],
    "threads": ["-O1", "-g", "-fsanitize=thread"],
}
ARGUMENTS = {"engine_test": [], "faults_test": [], "memory_test": [], "shared_test": [], "ticket_test": [],
             "queue_test": [], "stall_test": [], "join_test": [], "hostile_test": ["1", "150"]}
HELPERS = ["world.c", "storm.c", "storm_end.c", "tasks.c"]
SEEDS = {"plain": (10000, 5), "address and undefined behaviour": (600, 1), "threads": (50, 1)}  # in all, in so many parts
PROCESSES = {"plain": 500, "address and undefined behaviour": 60, "threads": 60}
LINKED_WITH = {"memory_test": ["-Wl," + ",".join(f"--wrap={name}" for name in ("malloc", "calloc", "realloc", "free"))]}


@pytest.fixture(scope="module", params=BUILDS)
def build(request, tmp_path_factory):
    """(folder with the objects of the engine and of the tests' world, command they were built with)."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("engine")
    command = [compiler, "-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-pthread", *BUILDS[request.param]]
    sources = [*sorted((ROOT / "native").glob("*.c")), *(PROGRAMS / name for name in HELPERS)]
    subprocess.run([*command, "-c", *sources], check=True, cwd=folder)
    return folder, command, request.param


def linked(build, name):
    folder, command, _ = build
    objects = sorted(folder.glob("*.o"))
    libraries = [*LINKED_WITH.get(name, []), "-lm"]
    subprocess.run([*command, "-o", folder / name, PROGRAMS / f"{name}.c", *objects, *libraries], check=True)
    return folder / name


def run_to_success(program, *arguments):
    result = subprocess.run([program, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            errors="replace", timeout=LONGEST_S)  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout


@pytest.mark.parametrize("name", ARGUMENTS)
def test_engine(build, name):
    run_to_success(linked(build, name), *ARGUMENTS[name])


def test_random_runs_with_random_faults(build):
    program = linked(build, "seeds_test")
    count, parts = SEEDS[build[2]]
    for first in range(1, count + 1, count // parts):
        run_to_success(program, first, count // parts)


def test_random_runs_between_processes(build):
    run_to_success(linked(build, "processes_test"), 1, PROCESSES[build[2]])
