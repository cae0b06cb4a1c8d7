"""Tickets in the engine: real threads and links, and the simulated network; a C program under each sanitizer."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT / "tests" / "native"
LONGEST_S = 60  # it takes a second; a hang is what this is for
BUILDS = {
    "address and undefined behaviour": ["-fsanitize=address,undefined", "-fno-sanitize-recover"],
    "threads": ["-fsanitize=thread"],
}


@pytest.mark.parametrize("build", BUILDS)
def test_tickets(build, tmp_path):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    program = tmp_path / "ticket_test"
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-pthread", *BUILDS[build]]
    sources = [*sorted((ROOT / "native").glob("*.c")), PROGRAMS / "world.c", PROGRAMS / "ticket_test.c"]
    subprocess.run([compiler, *flags, "-o", program, *sources, "-lm"], check=True)
    result = subprocess.run([program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LONGEST_S)
    assert result.returncode == 0, result.stdout
    assert "all ticket tests passed" in result.stdout
