"""Collectives on tensors by property: dtype x shape (also empty and of no dimension) x op x group x 1 to 4 ranks x transport,
each result against plain NumPy; and many lives of one process between them."""

import importlib.util
import pathlib
import random
import subprocess
import sys

import pytest
from starting import start
from support import environment_of

TRANSPORTS = {"shm": {"transport": "shm"}, "tcp": {"transport": "tcp"}, "gloo": {"backend": "gloo"}}
PARTS = 8  # of all cases; each is a call with a deadline of its own


def drawn_seed():
    """A seed, which is printed."""
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    return seed


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_case_is_as_numpy_says(size):
    """On the transport that is quickest."""
    seed = drawn_seed()
    with start(size, **TRANSPORTS["shm"]) as ranks:
        for part in range(PARTS):
            for count, faults in ranks.call("property_cases:check_part", seed, part, PARTS):
                assert faults == []
                assert count > 100


@pytest.mark.parametrize("size, transport", [*((size, "tcp") for size in (2, 3, 4)), *((size, "gloo") for size in (1, 2, 3, 4))])
def test_cases_of_all_kinds_are_as_numpy_says(size, transport):
    """A quarter of the cases, in which all values of any two axes meet. A single rank has no transport but gloo's."""
    with start(size, **TRANSPORTS[transport]) as ranks:
        for count, faults in ranks.call("property_cases:check_covering", drawn_seed()):
            assert faults == []
            assert count > 100


@pytest.mark.parametrize("size", [2, 3, 4])
def test_cases_of_all_kinds_over_mpi(size):
    mpirun = pathlib.Path(sys.executable).parent / "mpirun"
    if importlib.util.find_spec("mpi4py") is None or not mpirun.exists():
        pytest.skip("no MPI beside this Python: pip install mpi4py mpich")
    environ = {name: value for name, value in environment_of(0, 1, "").items() if not name.startswith("COMMLIB_")}
    environ["COMMLIB_TRANSPORT"] = "mpi"
    text = f"import property_cases; property_cases.main({drawn_seed()})"
    ran = subprocess.run([mpirun, "-n", str(size), sys.executable, "-c", text], cwd=pathlib.Path(__file__).parent,
                         env=environ, timeout=100, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    assert ran.returncode == 0 and ran.stdout.count("cases are right") == size, ran.stdout


def test_a_hundred_lives():
    seed = drawn_seed()
    with start(2) as ranks:
        for first in range(0, 110, 22):
            for lives, count, faults in ranks.call("property_cases:check_between_cycles", seed, first, 22):
                assert faults == []
                assert lives == 22 and count == 22 * 8
