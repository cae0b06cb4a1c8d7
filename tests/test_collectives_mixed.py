"""Random programs: hundreds of operations of all kinds, sizes and priorities in flight, each rank in an order of its own.

Every rank makes the same program of the same seed, submits it in its own shuffled order, waits in another, and compares
each result with NumPy. The seed is printed; give it to `mixed` to run the same program again.
"""

import random

import numpy as np
import pytest
from test_collectives import check, numbers, reduced

import commlib

TINY = {"eager_nbytes": 4096, "eager_budget_nbytes": 4096, "inflight_nbytes": 1024, "segment_nbytes": 2048,
        "shm_ring_nbytes": 4096}  # fmt: skip


def count_of(rng):
    """Mostly small, some beyond every eager limit, segment and ring."""
    return rng.choice([0, 1, 3, rng.randrange(100), rng.randrange(5000), rng.randrange(200_000)])


def allreduce(communicator, rng, case):
    op, count = rng.choice([commlib.Sum, commlib.Max, commlib.Average]), count_of(rng)
    inputs = [numbers(case, r, (count,), "float32") for r in range(communicator.size)]
    wanted = reduced(op, inputs, "float32")
    return lambda **options: communicator.allreduce_async_(inputs[communicator.rank], op=op, **options), wanted


def broadcast(communicator, rng, case):
    root, count = rng.randrange(communicator.size), count_of(rng)
    inputs = [numbers(case, r, (count,), "int16") for r in range(communicator.size)]
    return lambda **options: communicator.broadcast_async(inputs[communicator.rank], root, **options), inputs[root]


def allgather(communicator, rng, case):
    inputs = [numbers(case, r, (count_of(rng) // 8, 2), "float64") for r in range(communicator.size)]
    return lambda **options: communicator.allgather_async(inputs[communicator.rank], **options), np.concatenate(inputs)


def reducescatter(communicator, rng, case):
    rows = count_of(rng)
    inputs = [numbers(case, r, (rows, 3), "int32") for r in range(communicator.size)]
    wanted = np.array_split(reduced(commlib.Sum, inputs, "int32"), communicator.size)[communicator.rank]
    return lambda **options: communicator.reducescatter_async(inputs[communicator.rank], op=commlib.Sum, **options), wanted


def alltoall(communicator, rng, case):
    size, rank = communicator.size, communicator.rank
    splits = [[count_of(rng) // 10 for _ in range(size)] for _ in range(size)]
    inputs = [numbers(case, r, (sum(splits[r]),), "uint8") for r in range(size)]
    wanted = np.concatenate([np.split(inputs[r], np.cumsum(splits[r]))[rank] for r in range(size)])
    return lambda **options: Received(communicator.alltoall_async(inputs[rank], splits[rank], **options)), wanted


class Received:
    """A handle whose result is the array alone."""

    def __init__(self, handle):
        self.handle = handle

    def wait(self, timeout_s):
        return self.handle.wait(timeout_s)[0]


KINDS = (allreduce, allreduce, allreduce, broadcast, allgather, reducescatter, alltoall)


def mixed(seed, noperations, in_flight):
    communicator = commlib.communicator()
    shared, own = random.Random(seed), random.Random(seed * 1000 + communicator.rank)
    program = []
    for number in range(noperations):
        case = (seed, number)
        submit, wanted = shared.choice(KINDS)(communicator, shared, case)
        program.append((case, submit, wanted, shared.randrange(10)))
    for first in range(0, noperations, in_flight):
        batch = program[first : first + in_flight]
        own.shuffle(batch)
        handles = [(case, submit(name=f"{case}", priority=priority), wanted) for case, submit, wanted, priority in batch]
        own.shuffle(handles)
        for case, handle, wanted in handles:
            check(case, handle.wait(40), wanted)
    communicator.barrier(timeout_s=20)


@pytest.mark.parametrize("options", ({}, TINY), ids=("ordinary", "tiny"))
@pytest.mark.parametrize("size, transport", [(2, "shm"), (3, "shm"), (4, "shm"), (2, "tcp"), (3, "tcp")])
def test_mixed(ranks_of, size, transport, options):
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    ranks_of(size, transport=transport, **options).call(mixed, seed, 120, 40)
