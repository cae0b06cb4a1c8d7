"""The engine with several ranks in one process, as C programs: real threads and links, and the simulated network.

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
ARGUMENTS = {"engine_test": [], "sim_test": ["1", "600"], "faults_test": [], "memory_test": [],
             "shared_test": [], "ticket_test": [], "queue_test": [], "hostile_test": ["1", "150"]}
LINKED_WITH = {"memory_test": ["-Wl," + ",".join(f"--wrap={name}" for name in ("malloc", "calloc", "realloc", "free"))]}


@pytest.fixture(scope="module", params=BUILDS)
def build(request, tmp_path_factory):
    """(folder with the objects of the engine and of the tests' world, command they were built with)."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("engine")
    command = [compiler, "-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-pthread", *BUILDS[request.param]]
    sources = [*sorted((ROOT / "native").glob("*.c")), PROGRAMS / "world.c"]
    subprocess.run([*command, "-c", *sources], check=True, cwd=folder)
    return folder, command


@pytest.mark.parametrize("name", ARGUMENTS)
def test_engine(build, name):
    folder, command = build
    objects = sorted(folder.glob("*.o"))
    libraries = [*LINKED_WITH.get(name, []), "-lm"]
    subprocess.run([*command, "-o", folder / name, PROGRAMS / f"{name}.c", *objects, *libraries], check=True)
    result = subprocess.run([folder / name, *ARGUMENTS[name]], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            timeout=LONGEST_S)  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "passed" in result.stdout
