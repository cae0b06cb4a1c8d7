"""Ranks that can import the test modules beside this file; never through the folder above, which would hide torch."""

import os

import pytest
from support import Ranks

_HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(scope="session")
def torch_ranks():
    """torch_ranks(size): a set of initialized ranks with torch imported, started once per size and kept."""
    sets = {}

    def get(size):
        if size not in sets:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [_HERE, os.environ.get("PYTHONPATH", "")])))
                sets[size] = Ranks(size)
        return sets[size]

    yield get
    for ranks in sets.values():
        ranks.__exit__(None, None, None)
