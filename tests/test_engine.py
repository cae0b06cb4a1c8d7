"""The engine with real threads and links, several ranks in one process: a C program, plain and under each sanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "native"
LONGEST_S = 100  # it takes a second, a few under a sanitizer; a hang is what this is for
BUILDS = {
    "plain": ["-O2"],
    "address and undefined behaviour": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"],
    "threads": ["-O1", "-g", "-fsanitize=thread"],
}


@pytest.mark.parametrize("build", BUILDS)
def test_engine_over_every_transport(build, tmp_path):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    program = tmp_path / "engine_test"
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-pthread", *BUILDS[build]]
    sources = [*sorted((ROOT / "native").glob("*.c")), PROGRAMS / "world.c", PROGRAMS / "engine_test.c"]
    subprocess.run([compiler, *flags, "-o", program, *sources, "-lm"], check=True)
    result = subprocess.run([program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LONGEST_S)
    assert result.returncode == 0, result.stdout
    assert "all engine tests passed" in result.stdout
