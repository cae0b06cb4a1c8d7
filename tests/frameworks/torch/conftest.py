"""Ranks that can import the test modules beside this file; never through the folder above, which would hide torch."""

import os

import pytest
from support import Ranks

_HERE = os.path.dirname(os.path.abspath(__file__))

# What moves the bytes -> options of the ranks (COMMLIB_* variables). Every test on real ranks runs with each.
BACKENDS = {"native": {}, "gloo": {"backend": "gloo"}}


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request):
    """The name of what moves the bytes."""
    return request.param


@pytest.fixture(scope="session")
def torch_ranks(backend):
    """torch_ranks(size): initialized ranks that can import the test modules here, started once per size and kept."""
    sets = {}

    def get(size):
        if size in sets and any(process.poll() is not None for process in sets[size].processes):
            sets.pop(size).__exit__(RuntimeError, None, None)
        if size not in sets:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [_HERE, os.environ.get("PYTHONPATH", "")])))
                sets[size] = Ranks(size, initialize=False, **BACKENDS[backend])
                sets[size].call("starting:initialize")
        return sets[size]

    yield get
    for ranks in sets.values():
        ranks.__exit__(None, None, None)
