"""Collectives on tensors by property: dtype x shape (also empty and of no dimension) x op x group x 1 to 4 ranks x transport,
each result against plain NumPy; and many lives of one process between them."""

import random

import pytest
from starting import start

TRANSPORTS = {"shm": {"transport": "shm"}, "tcp": {"transport": "tcp"}, "gloo": {"backend": "gloo"}}


PARTS = 8  # of all cases; each is a call with a deadline of its own


# All cases on the transport that is quickest; one part, drawn by chance, on the others.
@pytest.mark.parametrize("size, transport", [
    (1, "shm"), (2, "shm"), (3, "shm"), (4, "shm"), (2, "tcp"), (4, "tcp"), (2, "gloo"), (3, "gloo"),
])  # fmt: skip
def test_every_case_is_as_numpy_says(size, transport):
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    parts = range(PARTS) if transport == "shm" else [seed % PARTS]
    with start(size, **TRANSPORTS[transport]) as ranks:
        for part in parts:
            for count, faults in ranks.call("property_cases:check_part", seed, part, PARTS):
                assert faults == []
                assert count > 100


def test_a_hundred_lives():
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    with start(2) as ranks:
        for first in range(0, 110, 22):
            for lives, count, faults in ranks.call("property_cases:check_between_cycles", seed, first, 22):
                assert faults == []
                assert lives == 22 and count == 22 * 8
