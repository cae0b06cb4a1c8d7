"""Adasum against the published algorithm in NumPy, fp64, over numbers of ranks, dtypes, sizes and groups of arrays."""

import numpy as np
import pytest
from support import Ranks

import commlib

TOLERANCES = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-12}


def combine(a, b):
    """Maleki et al.: what is orthogonal is added, what is parallel averaged."""
    dot, aa, bb = float((a * b).sum()), float((a * a).sum()), float((b * b).sum())
    return (1 - dot / (2 * aa) if aa else 1.0) * a + (1 - dot / (2 * bb) if bb else 1.0) * b


def reference(vectors):
    """Over 2^k + r ranks: the first r pairs, then the tree of pairs."""
    levels = len(vectors).bit_length() - 1
    rest = len(vectors) - (1 << levels)
    nodes = [combine(vectors[2 * i], vectors[2 * i + 1]) for i in range(rest)] + vectors[2 * rest :]
    while len(nodes) > 1:
        nodes = [combine(nodes[i], nodes[i + 1]) for i in range(0, len(nodes), 2)]
    return nodes[0]


def contribution(rank, shape, seed, parallel):
    """Of ranks that agree or not: a common part, and one of their own."""
    common = np.random.default_rng(seed).normal(size=shape)
    own = np.random.default_rng((seed, rank)).normal(size=shape)
    return parallel * common + (1 - parallel) * own


def as_dtype(array, dtype):
    """The array in a dtype, as the memory that travels and in fp64; bfloat16 as its bits, cut."""
    if dtype != "bfloat16":
        array = np.asarray(array, dtype)
        return array, array.astype(np.float64)
    bits = (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def wide(memory, dtype):
    if dtype == "bfloat16":
        memory = (memory.astype(np.uint32) << 16).view(np.float32)
    return memory.astype(np.float64)


def buffer_over(memory, dtype):
    return commlib.Buffer(memory.ctypes.data, memory.shape, dtype, memory, True)


SHAPES = ((), (0,), (1,), (5, 3), (1000,), (257, 33), (120_001,))


def check_all(dtype):
    """Returns (dtype, shape, how far it is from the reference, its bits) of everything that is not as it should be."""
    communicator, wrong = commlib.communicator(), []
    handles = []
    for number, shape in enumerate(SHAPES):
        for parallel in (0.0, 0.6, 1.0):
            pairs = [as_dtype(contribution(rank, shape, number, parallel), dtype) for rank in range(communicator.size)]
            mine = pairs[communicator.rank][0].copy()
            handle = communicator.allreduce_async_(buffer_over(mine, dtype), name=f"{shape} {parallel}", op=commlib.Adasum)
            handles.append((shape, parallel, mine, [exact for _, exact in pairs], handle))
    for shape, parallel, mine, exact, handle in reversed(handles):
        handle.wait()
        wanted = reference(exact)
        scale = np.abs(wanted).max() if wanted.size else 1.0
        distance = np.abs(wide(mine, dtype) - wanted).max() / scale if wanted.size else 0.0
        same = len(set(communicator.exchange(mine.tobytes(), name="bits"))) == 1
        if distance > TOLERANCES[dtype] or not same:
            wrong.append((shape, parallel, distance, same))
    return wrong


@pytest.mark.parametrize("size, transport", [(1, "shm"), (2, "shm"), (3, "shm"), (4, "tcp"), (5, "shm"), (6, "shm"), (8, "shm")])
def test_published_algorithm(size, transport):
    with Ranks(size, transport=transport) as ranks:
        for dtype in TOLERANCES:
            assert ranks.call(check_all, dtype) == [[]] * size


def check_grouped():
    """Every array of a list has coefficients of its own; dtypes may differ; scales and groups hold."""
    communicator = commlib.communicator()
    rank, size = communicator.rank, communicator.size
    shapes = [(3,), (40_000,), (0,), (7, 11), (20_000,)]
    dtypes = ["float32", "float64", "float64", "float32", "float32"]
    contributions = [[contribution(r, shape, place, 0.5).astype(dtype) for place, (shape, dtype) in enumerate(zip(shapes, dtypes))]
                     for r in range(size)]  # fmt: skip
    results = communicator.grouped_allreduce(contributions[rank], name="list", op=commlib.Adasum, prescale_factor=2.0,
                                             postscale_factor=0.5)  # fmt: skip
    for place, result in enumerate(results):
        wanted = 0.5 * reference([2.0 * one[place].astype(np.float64) for one in contributions])
        assert result.dtype == dtypes[place] and result.shape == shapes[place]
        assert np.allclose(result, wanted, rtol=1e-4, atol=1e-5)
    members = list(range(size))[::-1][: max(1, size - 1)]
    if rank in members:
        mine = communicator.group(members).allreduce(contributions[rank][1], op=commlib.Adasum)
        assert np.allclose(mine, reference([contributions[member][1] for member in members]), rtol=1e-9, atol=1e-12)
    unnamed = [communicator.allreduce_async(contributions[rank][1] * (i + 1), op=commlib.Adasum) for i in range(4)]
    for i, handle in enumerate(unnamed):
        assert np.allclose(handle.wait(), reference([(i + 1) * one[1] for one in contributions]), rtol=1e-9, atol=1e-12)


def check_errors():
    communicator = commlib.communicator()
    rank = communicator.rank
    with pytest.raises(ValueError, match="not int32"):
        communicator.allreduce(np.ones(3, np.int32), op=commlib.Adasum)
    with pytest.raises(ValueError, match="no reducescatter"):
        communicator.reducescatter(np.ones(4), op=commlib.Adasum)
    with pytest.raises(ValueError, match="cannot be prepared"):
        communicator.prepare_allreduce_(np.ones(4), name="p", op=commlib.Adasum)
    with pytest.raises(commlib.MismatchError, match="ranks disagree: rank 0 has arrays"):
        communicator.allreduce(np.ones(3 + (rank == communicator.size - 1)), name="shape", op=commlib.Adasum)
    if rank:
        communicator.barrier()
    handle = communicator.allreduce_async(np.ones(5), name="twice", op=commlib.Adasum)
    if rank == 0:  # it waits for all others
        with pytest.raises(ValueError, match="still in flight"):
            communicator.allreduce_async(np.ones(5), name="twice", op=commlib.Adasum)
        communicator.barrier()
    assert np.allclose(handle.wait(), np.ones(5))
    array = np.ones(5)
    for op, value in ((commlib.Sum, communicator.size), (commlib.Adasum, 1.0), (commlib.Sum, communicator.size)):
        array[:] = 1.0  # one name with one op after the other
        assert communicator.allreduce_(array, name="same", op=op)[0] == value


def join_with_adasum():
    """What is in flight at the join ends; what comes after a rank has joined fails on every rank."""
    communicator = commlib.communicator()
    handle = communicator.allreduce_async(np.full(50_000, 2.0), name="flying", op=commlib.Adasum)
    if communicator.rank:
        while communicator.allreduce(np.ones(1), op=commlib.Sum)[0] == communicator.size:
            pass
        with pytest.raises(commlib.JoinedError, match="rank 0 has joined"):
            communicator.allreduce(np.ones(3), name="late", op=commlib.Adasum)
    communicator.join()
    again = communicator.allreduce(np.ones(3), name="late", op=commlib.Adasum)
    return handle.wait()[0], again.tolist()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_lists_groups_errors_and_joins(size):
    with Ranks(size, transport="shm") as ranks:
        ranks.call(check_grouped)
        ranks.call(check_errors)
        assert ranks.call(join_with_adasum) == [(2.0, [1.0] * 3)] * size
