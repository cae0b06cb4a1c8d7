"""All-reduces of lists: the same values as one by one, whatever lies in the list, and one error for all where lists differ."""

import numpy as np
import pytest
from test_collectives import NUMPY_DTYPES, numbers, reduced

import commlib

SIZES = (1, 2, 3, 4)
OPS = [commlib.Sum, commlib.Average, commlib.Max]
LISTS = 12


def drawn_list(seed):
    """(dtype, shape) of each of a list: mostly small, some empty or without dimensions, a few that travel alone."""
    rng = np.random.default_rng(seed)
    shapes = [(), (0,), (1,), (3, 5), (1024,), (2, 0), (17_000,), (70_001,)]
    count = int(rng.integers(0, 40))
    averaged = OPS[seed % len(OPS)] is commlib.Average  # bool has none
    dtypes = rng.choice([dtype for dtype in NUMPY_DTYPES if not (averaged and dtype == "bool")], size=3)
    return [(str(rng.choice(dtypes)), shapes[int(rng.integers(len(shapes)))]) for _ in range(count)]


def inputs_of(seed, rank):
    return [numbers((seed, place), rank, shape, dtype) for place, (dtype, shape) in enumerate(drawn_list(seed))]


def check_list(seed, got, op, scales=(1.0, 1.0)):
    size, wanted = commlib.size(), drawn_list(seed)
    assert len(got) == len(wanted)
    inputs = [inputs_of(seed, rank) for rank in range(size)]
    for place, (dtype, _) in enumerate(wanted):
        expected = reduced(op, [inputs[rank][place] for rank in range(size)], dtype, *scales)
        assert got[place].dtype == expected.dtype and got[place].shape == expected.shape, (seed, place)
        np.testing.assert_array_equal(got[place], expected, err_msg=f"list {seed}, place {place}")


def lists():
    rank = commlib.rank()
    for seed in range(LISTS):
        op = OPS[seed % len(OPS)]
        arrays = inputs_of(seed, rank)
        untouched = [array.copy() for array in arrays]
        check_list(seed, commlib.grouped_allreduce(arrays, op=op), op)
        for array, before in zip(arrays, untouched):
            np.testing.assert_array_equal(array, before)
        returned = commlib.grouped_allreduce_(arrays, name=f"list {seed}", op=op)
        assert all(one is other for one, other in zip(returned, arrays))
        check_list(seed, arrays, op)
    arrays = [np.full(5, rank + 1.0), np.full(70_000, rank + 1.0)]
    for array in commlib.grouped_allreduce(arrays, op=commlib.Sum, prescale_factor=0.5, postscale_factor=4.0):
        assert (array == 2.0 * sum(range(1, commlib.size() + 1))).all()


def many_in_flight():
    """Of one list, under several names and unnamed, waited for in another order, some twice."""
    handles = [commlib.grouped_allreduce_async(inputs_of(5, commlib.rank()), name=name, op=commlib.Sum)
               for name in ("a", "b", None, "c", None)]  # fmt: skip
    for handle in reversed(handles):
        check_list(5, handle.wait(30), commlib.Sum)
        assert handle.done()
        check_list(5, handle.wait(0), commlib.Sum)


def other_memory():
    """Whatever has the buffer protocol, arrays that are only parts, and frameworks' Buffers."""
    whole, raw = np.arange(12, dtype="float32").reshape(3, 4), bytearray(b"\x01\x02")
    foreign = np.ones(3, "float32")
    buffer = commlib.Buffer(foreign.ctypes.data, (3,), "float32", foreign, True)
    commlib.grouped_allreduce_([whole[1], raw, buffer], op=commlib.Sum)
    assert (whole[1] == np.arange(4, 8) * commlib.size()).all() and (whole[0] == np.arange(4)).all()
    assert list(raw) == [commlib.size(), 2 * commlib.size()] and (foreign == commlib.size()).all()


def refusals():
    fixed = np.ones(3)
    fixed.flags.writeable = False
    for arrays, kind, words in (([np.ones(2), fixed], ValueError, "read-only"), ([np.ones((4, 4))[:, 1]], ValueError, "contiguous"),
                                ([np.ones(2), [1, 2]], TypeError, "list"), ([np.array(["x"])], TypeError, "dtype")):  # fmt: skip
        with pytest.raises(kind, match=words):
            commlib.grouped_allreduce_(arrays)
    with pytest.raises(TypeError, match="op"):
        commlib.grouped_allreduce([np.ones(2)], op="sum")
    if commlib.rank() == 0:  # the other rank has not begun it, so it cannot be over
        first = commlib.grouped_allreduce_async([np.ones(2), np.ones(3)], name="twice")
        with pytest.raises(ValueError, match="in flight"):
            commlib.grouped_allreduce_async([np.ones(2), np.ones(3)], name="twice")
        with pytest.raises(TimeoutError):
            first.wait(0.01)
        assert not first.done()
    commlib.barrier()
    if commlib.rank() == 1:
        first = commlib.grouped_allreduce_async([np.ones(2), np.ones(3)], name="twice")
    assert [array.tolist() for array in first.wait(30)] == [[1.0] * 2, [1.0] * 3]


def differing_lists():
    """Of equal length in all, so that nothing but the shapes tells them apart. Returns what this rank was told."""
    arrays = [np.ones(3), np.ones(5)] if commlib.rank() % 2 else [np.ones(5), np.ones(3)]
    try:
        commlib.grouped_allreduce(arrays, name="list", op=commlib.Sum)
    except commlib.MismatchError as error:
        check_list(3, commlib.grouped_allreduce(inputs_of(3, commlib.rank()), name="list", op=commlib.Sum), commlib.Sum)
        return str(error)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("size", SIZES)
def test_lists(size, transport, ranks_of):
    ranks = ranks_of(size, transport=transport)
    ranks.call(lists)
    ranks.call(many_in_flight)
    ranks.call(other_memory)


def test_wrong_arguments(ranks_of):
    ranks_of(2, transport="shm").call(refusals)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_lists_that_differ_fail_on_every_rank_and_name_both(transport, ranks_of):
    for text in ranks_of(3, transport=transport).call(differing_lists):
        assert text.count("2 arrays (") >= 2 and "(3,), (5,)" in text and "(5,), (3,)" in text, text
