"""Collectives on tensors by property: kind x dtype x shape (also empty and of no dimension) x op x scales x group x 1 to 4 ranks x
transport, in eager mode and in functions, each result against plain NumPy."""

import random

import pytest


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_case_is_as_numpy_says(tensorflow_ranks, size, transport):
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    for count, faults, missing in tensorflow_ranks(size).call("tensorflow_property_cases:check", seed, transport):
        assert not faults and not missing and count == 9 * 10
