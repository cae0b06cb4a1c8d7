"""Fixtures of the adapter's tests: sets of ranks."""

import pytest
from tensorflow_starting import start


@pytest.fixture(scope="session")
def tensorflow_ranks():
    """tensorflow_ranks(size): initialized ranks that can import the test modules here, started once per size and kept."""
    sets = {}

    def get(size):
        if size in sets and any(process.poll() is not None for process in sets[size].processes):
            sets.pop(size).__exit__(RuntimeError, None, None)
        if size not in sets:
            sets[size] = start(size)
        return sets[size]

    yield get
    for ranks in sets.values():
        # Killed: TensorFlow takes seconds to end. How ranks end by themselves test_failures_tensorflow.py tries.
        ranks.__exit__(RuntimeError, None, None)
