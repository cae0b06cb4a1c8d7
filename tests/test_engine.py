"""The engine in C: several ranks in one process, real threads and links or the simulated network, under each sanitizer.

Every program of PROGRAMS is linked with the engine, which is compiled once per build; a new one is one more line.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "native"
LONGEST_S = 100  # each takes a second or a few; a hang is what this is for
BUILDS = {
    "plain": ["-O2"],
    "address and undefined behaviour": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"],
    "threads": ["-O1", "-g", "-fsanitize=thread"],
}
# program: its last line
PROGRAMS = {
    "engine_test": "all engine tests passed",
    "shared_test": "all tests of shared memory passed",
    "ticket_test": "all ticket tests passed",
}


class Build:
    """The engine's objects, compiled in one way."""

    def __init__(self, compiler, flags, folder):
        self.command = [compiler, "-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-pthread", *flags]
        self.folder = folder
        sources = [*sorted((ROOT / "native").glob("*.c")), FOLDER / "world.c"]
        subprocess.run([*self.command, "-c", *sources], check=True, cwd=folder)
        self.objects = sorted(folder.glob("*.o"))

    def run(self, name):
        program = self.folder / name
        subprocess.run([*self.command, "-o", program, FOLDER / f"{name}.c", *self.objects, "-lm"], check=True)
        result = subprocess.run([program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LONGEST_S)
        assert result.returncode == 0, result.stdout[-5000:]
        return result.stdout


@pytest.fixture(scope="module", params=BUILDS)
def build(request, tmp_path_factory):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    return Build(compiler, BUILDS[request.param], tmp_path_factory.mktemp("build"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(build, name):
    assert PROGRAMS[name] in build.run(name)
