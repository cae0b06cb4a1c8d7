"""Fixtures of the adapter's tests: sets of ranks, for every backend."""

import pytest
from starting import start

# What moves the bytes -> options of the ranks (COMMLIB_* variables). Every test on real ranks runs with each.
BACKENDS = {"native": {}, "gloo": {"backend": "gloo"}}


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request):
    """The name of what moves the bytes."""
    return request.param


@pytest.fixture(scope="session")
def torch_ranks(backend):
    """torch_ranks(size): initialized ranks that can import the test modules here, started once per size and kept."""
    yield from _kept(backend)


@pytest.fixture(scope="module")
def own_torch_ranks(backend):
    """As torch_ranks, for one file: other files' tests leave operations in flight that no other rank will ever submit."""
    yield from _kept(backend)


def _kept(backend):
    sets = {}

    def get(size):
        if size in sets and any(process.poll() is not None for process in sets[size].processes):
            sets.pop(size).__exit__(RuntimeError, None, None)
        if size not in sets:
            sets[size] = start(size, **BACKENDS[backend])
            sets[size].backend = backend
        return sets[size]

    yield get
    for ranks in sets.values():
        ranks.__exit__(None, None, None)
