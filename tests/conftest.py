"""Fixtures for every test: sets of ranks that live for a whole test run."""

import os
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from support import Ranks  # noqa: E402

# Unbuffered, print() writes a line and its end apart, and the lines of ranks that share a pipe could come out mixed.
os.environ.pop("PYTHONUNBUFFERED", None)


@pytest.fixture(scope="session")
def ranks_of():
    """ranks_of(size, **options): a set of initialized ranks, started once per (size, options) and kept."""
    sets = {}

    def get(size, **options):
        key = (size, tuple(sorted(options.items())))
        if key in sets and any(process.poll() is not None for process in sets[key].processes):
            sets.pop(key).__exit__(RuntimeError, None, None)
        if key not in sets:
            sets[key] = Ranks(size, **options)
        return sets[key]

    yield get
    for ranks in sets.values():
        ranks.__exit__(None, None, None)
