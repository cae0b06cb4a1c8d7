"""The transports under one conformance suite, and what only tcp does: C programs, built plainly and with sanitizers.

A new transport is covered by one line in the table of tests/native/transports_test.c; mpi, which needs a library of
others, by a program of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "native"
PROGRAMS = ROOT / "tests" / "native"
SEEDS = (1, 2)
LONGEST_S = 60  # a link that hangs is stopped by poll() in the program; this is for one that spins
BUILDS = {
    "plain": ["-O2"],
    "sanitized": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"],
}


@pytest.fixture(scope="module", params=BUILDS)
def programs(request, tmp_path_factory):
    """Folder with both programs, built in this way."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp(request.param)
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-pthread", *BUILDS[request.param], f"-I{NATIVE}"]
    suite = PROGRAMS / "transport_conformance.c"
    for name, sources in {"transports_test": sorted(NATIVE.glob("*.c")), "tcp_test": [NATIVE / "tcp.c"]}.items():
        command = [compiler, *flags, "-o", folder / name, PROGRAMS / f"{name}.c", suite, *sources, "-lm"]
        subprocess.run(command, check=True)
    return folder


def run(*command, **environ):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LONGEST_S,
                            env={**os.environ, **environ})  # fmt: skip
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.parametrize("seed", SEEDS)
def test_conformance(programs, seed):
    program = programs / "transports_test"
    transports = run(program).split()
    assert {"shm", "tcp", "sim"} <= set(transports)
    for transport in transports:
        run(program, transport, str(seed))


def mpi_prefix():
    """Where the headers and the library of an MPI beside this Python are; None: nowhere."""
    prefix = Path(sys.prefix)
    return prefix if (prefix / "include" / "mpi.h").exists() and (prefix / "lib" / "libmpi.so").exists() else None


@pytest.mark.skipif(mpi_prefix() is None, reason="no MPI beside this Python: pip install mpich")
@pytest.mark.parametrize("build", BUILDS)
def test_mpi(build, tmp_path):
    """One process that is both sides; leaks are the library's own, and are not looked for."""
    prefix = mpi_prefix()
    command = ["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Werror", *BUILDS[build], f"-I{NATIVE}",
               f"-I{prefix / 'include'}", "-o", tmp_path / "mpi_test", PROGRAMS / "mpi_test.c",
               PROGRAMS / "transport_conformance.c", *sorted(NATIVE.glob("mpi*.c")), f"-L{prefix / 'lib'}",
               f"-Wl,-rpath,{prefix / 'lib'}", "-lmpi"]  # fmt: skip
    subprocess.run(command, check=True)
    for seed in SEEDS:
        run(tmp_path / "mpi_test", str(seed), ASAN_OPTIONS="detect_leaks=0")


def test_tcp_alone(programs):
    run(programs / "tcp_test")
