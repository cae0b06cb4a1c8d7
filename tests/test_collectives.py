"""Every collective against NumPy: dtype x op x shape x size x transport x algorithm.

One set of ranks runs all cases of a size and transport. Inputs are whole numbers so small that every sum is exact in every
dtype: then any order of reduction gives the same bits, and results are compared for equality. Rank r's input of a case is a
function of (seed, case, r), so every rank can compute what must come out.
"""

import itertools
import zlib

import numpy as np
import pytest

import commlib
from commlib import algorithms
from commlib.buffer import DTYPES

SEED = 20240607
SETS = [(size, transport) for transport in ("shm", "tcp") for size in (1, 2, 3, 4)]
NUMPY_DTYPES = [dtype for dtype in DTYPES if dtype != "bfloat16"]
SHAPES = [(), (0,), (1,), (7,), (2, 3), (5, 0, 2), (64,), (1001,), (65, 33)]
OPS = [commlib.Average, commlib.Sum, commlib.Min, commlib.Max, commlib.Product]


@pytest.fixture(params=SETS, ids=lambda pair: f"{pair[1]}-{pair[0]}")
def ranks(request, ranks_of):
    size, transport = request.param
    return ranks_of(size, transport=transport)


def numbers(case, rank, shape, dtype):
    """Rank's input of a case: whole numbers in [-3, 3], or [0, 3] for unsigned ones."""
    rng = np.random.default_rng([SEED, zlib.crc32(repr(case).encode()), rank])
    low = 0 if np.dtype(dtype).kind in "ub" else -3
    return rng.integers(low, 4, size=shape).astype(dtype)


def reduced(op, inputs, dtype, prescale=1.0, postscale=1.0):
    """What a reduction must give, in plain NumPy."""
    kind = np.dtype(dtype).kind
    if kind == "b":
        function = np.logical_or if op in (commlib.Sum, commlib.Max) else np.logical_and
        return np.array(function.reduce(np.stack(inputs), axis=0))
    scaled = [np.array(x * prescale if kind == "f" else np.trunc(x * prescale)).astype(dtype) for x in inputs]
    functions = {"sum": np.add, "average": np.add, "min": np.minimum, "max": np.maximum, "product": np.multiply}
    result = functions[op.word].reduce(np.stack(scaled), axis=0, dtype=dtype)
    if op is commlib.Average and kind != "f":
        result = np.trunc(np.asarray(result, np.float64) * postscale / len(inputs) + np.sign(result) * 1e-9)
    elif op is commlib.Average:
        wide = np.float64 if np.dtype(dtype).itemsize == 8 else np.float32
        result = np.asarray(result, wide) * wide(postscale / len(inputs))
    elif postscale != 1.0:
        result = np.asarray(result, np.float64) * postscale
        result = result if kind == "f" else np.trunc(result)
    return np.asarray(result).astype(dtype)


def check(case, got, wanted):
    assert got.dtype == wanted.dtype and got.shape == wanted.shape, f"{case}: {got.dtype}{got.shape}"
    np.testing.assert_array_equal(got, wanted, err_msg=f"seed {SEED}, case {case}")


# ---- allreduce ---------------------------------------------------------------------------------------------------


def allreduce_cases():
    communicator = commlib.communicator()
    size, rank = communicator.size, communicator.rank
    for dtype, op, shape in itertools.product(NUMPY_DTYPES, OPS, SHAPES):
        if dtype == "bool" and op is commlib.Average:
            continue
        case = ("allreduce", dtype, op.word, shape)
        inputs = [numbers(case, r, shape, dtype) for r in range(size)]
        wanted = reduced(op, inputs, dtype)
        before = inputs[rank].copy()
        check(case, communicator.allreduce(inputs[rank], op=op, timeout_s=20), wanted)
        check(case, inputs[rank], before)
        in_place = inputs[rank].copy()
        assert communicator.allreduce_(in_place, op=op, name=f"{case}", timeout_s=20) is in_place
        check(case, in_place, wanted)


def test_allreduce(ranks):
    ranks.call(allreduce_cases)


def scale_cases():
    communicator = commlib.communicator()
    size, rank = communicator.size, communicator.rank
    scales = [(0.5, 1.0), (2.0, 1.0), (1.0, 0.5), (2.0, 0.25)]
    for dtype, op, (prescale, postscale) in itertools.product(("int32", "float16", "float32", "float64"), OPS, scales):
        case = ("scale", dtype, op.word, prescale, postscale)
        inputs = [numbers(case, r, (37,), dtype) for r in range(size)]
        got = communicator.allreduce(inputs[rank], op=op, prescale_factor=prescale, postscale_factor=postscale)
        check(case, got, reduced(op, inputs, dtype, prescale, postscale))


def test_scales(ranks):
    ranks.call(scale_cases)


def algorithm_cases(kinds):
    """Every applicable algorithm of the tables, with segments from tiny to whole."""
    communicator = commlib.communicator()
    record, size, rank = communicator.settings, communicator.size, communicator.rank
    done = 0
    for kind, count, segment_nbytes in itertools.product(kinds, (0, 1, 5, 1000, 40000), (256, 65536, 1 << 20)):
        for name in applicable(kind):
            communicator.settings = record.replace(algorithms=((kind, name),), segment_nbytes=segment_nbytes)
            case = (kind, name, count, segment_nbytes)
            inputs = [numbers(case, r, (count,), "float32") for r in range(size)]
            ROUND_OF_KIND[kind](communicator, case, inputs, rank, size)
            done += 1
    communicator.settings = record
    return done


def applicable(kind):
    from commlib.plan import Shape

    communicator = commlib.communicator()
    return algorithms.applicable(kind, Shape(communicator.host_sizes)) if communicator.size > 1 else ()


def round_of_allreduce(communicator, case, inputs, rank, size):
    check(case, communicator.allreduce(inputs[rank], op=commlib.Sum), reduced(commlib.Sum, inputs, "float32"))


def round_of_broadcast(communicator, case, inputs, rank, size):
    for root in range(size):
        check(case, communicator.broadcast(inputs[rank], root), inputs[root])


def round_of_allgather(communicator, case, inputs, rank, size):
    parts = [x[: len(x) * (r + 1) // size] for r, x in enumerate(inputs)]
    check(case, communicator.allgather(parts[rank]), np.concatenate(parts))


def round_of_reducescatter(communicator, case, inputs, rank, size):
    wanted = np.array_split(reduced(commlib.Sum, inputs, "float32"), size)[rank]
    check(case, communicator.reducescatter(inputs[rank], op=commlib.Sum), wanted)


def round_of_alltoall(communicator, case, inputs, rank, size):
    splits = [[len(inputs[0]) * ((a + b) % size) // (size * size) for b in range(size)] for a in range(size)]
    pieces = [np.split(inputs[a], np.cumsum(splits[a]))[rank] for a in range(size)]
    got, received = communicator.alltoall(inputs[rank], splits[rank])
    check(case, got, np.concatenate(pieces))
    assert received.tolist() == [len(piece) for piece in pieces]


def round_of_barrier(communicator, case, inputs, rank, size):
    communicator.barrier(timeout_s=20)


ROUND_OF_KIND = {
    "allreduce": round_of_allreduce, "broadcast": round_of_broadcast, "allgather": round_of_allgather,
    "reducescatter": round_of_reducescatter, "alltoall": round_of_alltoall, "barrier": round_of_barrier,
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(algorithms.KINDS))
def test_algorithms(ranks, kind):
    done = ranks.call(algorithm_cases, [kind])
    assert len(set(done)) == 1 and (done[0] > 0 or ranks.size == 1)


# ---- the other kinds ---------------------------------------------------------------------------------------------


def broadcast_cases():
    communicator = commlib.communicator()
    size, rank = communicator.size, communicator.rank
    for dtype, shape, root in itertools.product(NUMPY_DTYPES, SHAPES, range(size)):
        case = ("broadcast", dtype, shape, root)
        inputs = [numbers(case, r, shape, dtype) for r in range(size)]
        array = inputs[rank].copy()
        check(case, communicator.broadcast(array, root), inputs[root])
        check(case, array, inputs[rank])
        assert communicator.broadcast_(array, root, name=f"{case}") is array
        check(case, array, inputs[root])


def test_broadcast(ranks):
    ranks.call(broadcast_cases)


def rows_cases():
    """All-gather, reduce-scatter and all-to-all of rows, even and uneven, also of rows without elements."""
    communicator = commlib.communicator()
    size, rank = communicator.size, communicator.rank
    rests = [(), (3,), (2, 2), (0,), (129,)]
    for dtype, rest, rows in itertools.product(NUMPY_DTYPES, rests, (0, 1, 2, 5, 12)):
        case = ("rows", dtype, rest, rows)
        counts = [(rows * (r + 1)) % 7 for r in range(size)]
        gathered = [numbers(case, r, (counts[r], *rest), dtype) for r in range(size)]
        check(case, communicator.allgather(gathered[rank], timeout_s=20), np.concatenate(gathered))

        inputs = [numbers(case, r, (rows, *rest), dtype) for r in range(size)]
        op = commlib.Max if dtype == "bool" else commlib.Average
        wanted = np.array_split(reduced(op, inputs, dtype), size)[rank]
        check(case, communicator.reducescatter(inputs[rank], op=op, timeout_s=20), wanted)

        even = [numbers(case, r, (rows * size, *rest), dtype) for r in range(size)]
        wanted = np.concatenate([even[r][rows * rank : rows * (rank + 1)] for r in range(size)])
        check(case, communicator.alltoall(even[rank], timeout_s=20), wanted)
        round_of_alltoall(communicator, case, [numbers(case, r, (rows * size, *rest), dtype) for r in range(size)], rank, size)


def test_rows(ranks):
    ranks.call(rows_cases)


def control_cases():
    communicator = commlib.communicator()
    for length in (0, 1, 100, 70000):
        mine = bytes([communicator.rank]) * (length * (communicator.rank + 1))
        got = communicator.exchange(mine, name="bytes")
        assert got == [bytes([r]) * (length * (r + 1)) for r in range(communicator.size)]
    control = communicator.control
    control.agree("colour", {"name": "red"})
    assert control.broadcast_bytes(b"x" * communicator.rank, communicator.size - 1, name="b") == b"x" * (communicator.size - 1)
    gathered = control.gather(str(communicator.rank).encode(), name="g")
    assert gathered == ([str(r).encode() for r in range(communicator.size)] if communicator.rank == 0 else None)


def test_exchange_and_control(ranks):
    ranks.call(control_cases)


# ---- kinds of memory ---------------------------------------------------------------------------------------------


def bfloat16_cases():
    """A dtype that NumPy lacks, as commlib.Buffer over 16-bit integers: the upper half of float32."""
    communicator = commlib.communicator()
    size, rank = communicator.size, communicator.rank
    for count in (0, 1, 63, 5000):
        inputs = [numbers(("bfloat16", count), r, (count,), "float32") for r in range(size)]
        bits = (inputs[rank].view(np.uint32) >> 16).astype(np.uint16)
        buffer = commlib.Buffer(bits.ctypes.data, (count,), "bfloat16", bits, True)
        new = communicator.allreduce(buffer, op=commlib.Sum)
        assert type(new) is commlib.Buffer and (new.dtype, new.shape) == ("bfloat16", (count,))
        wanted = reduced(commlib.Sum, inputs, "float32")
        check("bfloat16", values_of(new), wanted)
        assert communicator.allreduce_(buffer, op=commlib.Sum) is buffer
        check("bfloat16", values_of(buffer), wanted)
        check("bfloat16", values_of(communicator.allgather(buffer)), np.concatenate([wanted] * size))
        check("bfloat16", values_of(communicator.broadcast(buffer, size - 1)), wanted)
        check("bfloat16", values_of(communicator.reducescatter(buffer, op=commlib.Max)), np.array_split(wanted, size)[rank])


def values_of(buffer):
    """A bfloat16 Buffer as float32."""
    bits = np.frombuffer(buffer.owner, dtype=np.uint16, count=buffer.count)
    return (bits.astype(np.uint32) << 16).view(np.float32).reshape(buffer.shape)


def test_bfloat16_buffers(ranks):
    ranks.call(bfloat16_cases)


def protocol_cases():
    import array

    communicator = commlib.communicator()
    size = communicator.size
    numbers_ = array.array("f", [1, 2, 3])
    assert communicator.allreduce_(numbers_, op=commlib.Sum) is numbers_
    assert list(numbers_) == [size, 2 * size, 3 * size]
    assert communicator.allgather(bytearray(b"ab")).tobytes() == b"ab" * size
    assert communicator.broadcast(b"xyz", 0).tobytes() == b"xyz"
    assert communicator.allreduce(np.float64(2.0), op=commlib.Sum) == 2 * size


def test_buffer_protocol(ranks):
    ranks.call(protocol_cases)


# ---- order, size, equality of bits -------------------------------------------------------------------------------


def order_cases(reverse_odd):
    """Hundreds of operations in flight, submitted in opposite order on odd ranks; then once more at random priorities."""
    communicator = commlib.communicator()
    size, rank = communicator.size, communicator.rank
    lengths = [(17 * i) % 5000 + 1 for i in range(300)]
    order = list(range(len(lengths)))
    if reverse_odd and rank % 2:
        order.reverse()
    arrays = {i: numbers(("order", i), rank, (lengths[i],), "float32") for i in order}
    handles = {
        i: communicator.allreduce_async_(arrays[i], name=f"order {i}", op=commlib.Sum, priority=(31 * i) % 101) for i in order
    }
    for i in order:
        inputs = [numbers(("order", i), r, (lengths[i],), "float32") for r in range(size)]
        check(("order", i), handles[i].wait(30), reduced(commlib.Sum, inputs, "float32"))


def test_opposite_orders(ranks):
    ranks.call(order_cases, True)


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_opposite_orders_with_tiny_budgets(ranks_of, transport):
    ranks = ranks_of(3, transport=transport, eager_nbytes=4096, eager_budget_nbytes=4096, inflight_nbytes=1024,
                     segment_nbytes=2048, shm_ring_nbytes=4096)  # fmt: skip
    ranks.call(order_cases, True)
    ranks.call(algorithm_cases, ["allreduce", "alltoall"])


def random_bits(count):
    """Bytes of a sum of numbers that no order of addition leaves alone."""
    communicator = commlib.communicator()
    rng = np.random.default_rng([SEED, count, communicator.rank])
    array = (rng.standard_normal(count) * 10.0 ** rng.integers(-6, 6, count)).astype(np.float32)
    exact = np.zeros(count)
    for r in range(communicator.size):
        rng = np.random.default_rng([SEED, count, r])
        exact += (rng.standard_normal(count) * 10.0 ** rng.integers(-6, 6, count)).astype(np.float32)
    result = communicator.allreduce(array, op=commlib.Sum)
    assert np.linalg.norm(result - exact) <= 1e-6 * np.linalg.norm(exact)
    return result.tobytes()


@pytest.mark.parametrize("count", (3, 1000, 300_000))
def test_all_ranks_and_runs_have_the_same_bits(ranks, count):
    results = ranks.call(random_bits, count) + ranks.call(random_bits, count)
    assert len(set(results)) == 1
