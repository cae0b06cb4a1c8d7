"""A user's mistakes: refused at the call, with what to do; and disagreements between ranks, named on every rank."""

import os
import re

import numpy as np
import pytest

import commlib
from commlib.errors import error_of


@pytest.fixture(scope="module")
def communicator():
    commlib.shutdown()
    yield commlib.init(environ={})
    commlib.shutdown()


def test_before_init_everything_says_so():
    commlib.shutdown()
    calls = [commlib.rank, commlib.size, commlib.local_rank, commlib.local_size, commlib.cross_rank, commlib.cross_size,
             commlib.is_homogeneous, commlib.barrier, commlib.communicator, lambda: commlib.allreduce(np.ones(1))]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=r"not initialized: call commlib.init\(\) first"):
            call()


READ_ONLY = np.zeros(3)
READ_ONLY.flags.writeable = False

MISTAKES = [
    (lambda c: c.allreduce([1, 2]), TypeError, "numpy.asarray"),
    (lambda c: c.allreduce(None), TypeError, "NoneType"),
    (lambda c: c.allreduce(np.array(["a"])), TypeError, "dtype"),
    (lambda c: c.allreduce(np.array([object()])), TypeError, "dtype"),
    (lambda c: c.allreduce(np.zeros(2, np.complex64)), TypeError, "complex64"),
    (lambda c: c.allreduce(np.zeros(2, ">f4")), TypeError, ">f4"),
    (lambda c: c.allreduce(np.zeros((4, 4))[:, ::2]), ValueError, "ascontiguousarray"),
    (lambda c: c.allreduce_(READ_ONLY), ValueError, "read-only: use allreduce,"),
    (lambda c: c.broadcast_(READ_ONLY, 0), ValueError, "read-only: use broadcast,"),
    (lambda c: c.allreduce_(np.float32(1)), ValueError, "read-only"),
    (lambda c: c.allreduce_(b"abc"), ValueError, "read-only"),
    (lambda c: c.allreduce(np.zeros(2), op="sum"), TypeError, "commlib.Average"),
    (lambda c: c.allreduce(np.zeros(2, bool)), ValueError, "average of bool"),
    (lambda c: c.allreduce(np.zeros(2), name=3), TypeError, "string"),
    (lambda c: c.allreduce(np.zeros(2), priority=0.5), TypeError, "priority must be an int, not 0.5"),
    (lambda c: c.allreduce(np.zeros(2), priority=1 << 63), ValueError, "64 bits"),
    (lambda c: c.broadcast(np.zeros(2), 1), ValueError, r"\[0, 1\), not 1"),
    (lambda c: c.broadcast(np.zeros(2), -1), ValueError, "root_rank"),
    (lambda c: c.broadcast(np.zeros(2), 0.0), ValueError, "root_rank"),
    (lambda c: c.allgather(np.float32(1)), ValueError, r"reshape it to \(1,\)"),
    (lambda c: c.reducescatter(np.zeros(())), ValueError, r"reshape it to \(1,\)"),
    (lambda c: c.alltoall(np.zeros(())), ValueError, "scalar"),
    (lambda c: c.alltoall(np.zeros(3), [4]), ValueError, "at most 3"),
    (lambda c: c.alltoall(np.zeros(3), [1, 2]), ValueError, "1 numbers of rows"),
    (lambda c: c.alltoall(np.zeros(3), [-1]), ValueError, "at least 0"),
    (lambda c: c.alltoall(np.zeros(3), 3), TypeError, "sequence of 1 ints"),
    (lambda c: c.allreduce(np.zeros(2), prescale_factor="x"), ValueError, "x"),
    (lambda c: commlib.Buffer(0, (1,), "float128", None, True), TypeError, "float128"),
    (lambda c: commlib.Settings(shm_ring_nbytes=5000), ValueError, "power of two"),
    (lambda c: commlib.Settings(segment_nbytes=0), ValueError, "at least 1"),
    (lambda c: commlib.Settings(spin_us=-1), ValueError, "spin_us"),
    (lambda c: commlib.Settings(transport="ib"), ValueError, "auto, shm, tcp"),
    (lambda c: commlib.Settings(algorithms=(("allsum", "ring"),)), ValueError, "allreduce"),
    (lambda c: commlib.Settings.from_json('{"colour": 1}'), ValueError, "colour"),
    (lambda c: commlib.Settings().overridden({"spin_us": "often"}), ValueError, "often"),
    (lambda c: c.start_timeline("/no/such/folder/x"), OSError, "folder"),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistakes(communicator, number):
    call, error_class, text = MISTAKES[number]
    with pytest.raises(error_class, match=text):
        call(communicator)
    assert communicator.allreduce(np.ones(2), op=commlib.Sum).tolist() == [1, 1]


def test_statuses_become_classes():
    from commlib._native import lib

    classes = {"CL_MISMATCH": commlib.MismatchError, "CL_PEER_LOST": commlib.PeerLostError, "CL_INVALID": ValueError,
               "CL_PEER_LEFT": commlib.PeerLeftError, "CL_SHUTDOWN": commlib.ShutdownError, "CL_NO_MEMORY": MemoryError,
               "CL_FORKED": commlib.ForkedError, "CL_SYSTEM": commlib.CommlibError}  # fmt: skip
    for name, error_class in classes.items():
        error = error_of(getattr(lib, name), "", 3)
        assert type(error) is error_class and str(error)
    assert error_of(lib.CL_PEER_LOST, "rank 3 is gone", 3).rank == 3


# ---- between ranks -----------------------------------------------------------------------------------------------


def same_name_twice():
    communicator = commlib.communicator()
    if communicator.rank == 0:
        handle = communicator.allreduce_async(np.ones(4), name="twice", op=commlib.Sum)
        with pytest.raises(ValueError, match="'twice' is still in flight"):
            communicator.allreduce_async(np.ones(4), name="twice", op=commlib.Sum)
        communicator.broadcast_async(np.ones(4), 0, name="twice")  # another kind is another operation
        communicator.exchange(b"", name="now")
    else:
        communicator.exchange(b"", name="now")
        handle = communicator.allreduce_async(np.ones(4), name="twice", op=commlib.Sum)
        communicator.broadcast_async(np.ones(4), 0, name="twice")
    assert handle.wait(20).tolist() == [2] * 4
    assert communicator.allreduce(np.ones(4), name="twice", op=commlib.Sum, timeout_s=20).tolist() == [2] * 4


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_a_name_in_flight_is_refused(ranks_of, transport):
    ranks_of(2, transport=transport).call(same_name_twice)


# What an odd rank submits and what an even one does, and words of the error for both sides.
DISAGREEMENTS = {
    "dtype": (lambda c: c.allreduce_async(np.ones(6, np.float32), name="t"),
              lambda c: c.allreduce_async(np.ones(6, np.int32), name="t"), ("float32", "int32")),
    "shape": (lambda c: c.allreduce_async(np.ones((2, 3)), name="t"),
              lambda c: c.allreduce_async(np.ones((3, 2)), name="t"), (r"\(2, 3\)", r"\(3, 2\)")),
    "count": (lambda c: c.allreduce_async(np.ones(100_000), name="t"),
              lambda c: c.allreduce_async(np.ones(3), name="t"), (r"\(100000,\)", r"\(3,\)")),
    "op": (lambda c: c.allreduce_async(np.ones(6), name="t", op=commlib.Sum),
           lambda c: c.allreduce_async(np.ones(6), name="t", op=commlib.Max), ("sum", "max")),
    "average": (lambda c: c.allreduce_async(np.ones(6), name="t", op=commlib.Sum),
                lambda c: c.allreduce_async(np.ones(6), name="t", op=commlib.Average), ("sum", "average")),
    "scale": (lambda c: c.allreduce_async(np.ones(6), name="t", op=commlib.Sum),
              lambda c: c.allreduce_async(np.ones(6), name="t", op=commlib.Sum, prescale_factor=0.5), ("sum", "scaled by 0.5")),
    "overlapped": (lambda c: c.allreduce_async(np.ones(6), name="t"),
                   lambda c: c.allreduce_async(np.ones(6), name="t", overlapped=True), ("average", "overlapped")),
    "root": (lambda c: c.broadcast_async(np.ones(6), 0, name="t"),
             lambda c: c.broadcast_async(np.ones(6), 1, name="t"), ("root 0", "root 1")),
    "broadcast shape": (lambda c: c.broadcast_async(np.ones(6), 0, name="t"),
                        lambda c: c.broadcast_async(np.ones(7), 0, name="t"), (r"\(6,\)", r"\(7,\)")),
    "rows": (lambda c: c.allgather_async(np.ones((2, 3)), name="t"),
             lambda c: c.allgather_async(np.ones((2, 4)), name="t"), (r"rows.*3", r"rows.*4")),
    "reducescatter": (lambda c: c.reducescatter_async(np.ones(6), name="t"),
                      lambda c: c.reducescatter_async(np.ones(9), name="t"), (r"\(6,\)", r"\(9,\)")),
    "alltoall": (lambda c: c.alltoall_async(np.ones(12), name="t"),
                 lambda c: c.alltoall_async(np.ones(12, np.uint8), name="t"), ("float64", "uint8")),
}  # fmt: skip


def disagree(name):
    even, odd, words = DISAGREEMENTS[name]
    communicator = commlib.communicator()
    for _ in range(3):
        handle = (odd if communicator.rank % 2 else even)(communicator)
        with pytest.raises(commlib.MismatchError) as caught:
            handle.wait(20)
        text = str(caught.value)
        for word in (*words, "rank [02]", "rank [13]"):
            assert re.search(word, text), f"{word} is not in: {text}"
        with pytest.raises(commlib.MismatchError):
            handle.wait()
        total = communicator.allreduce(np.ones(5, np.float32), name="after", op=commlib.Sum, timeout_s=20)
        assert total.tolist() == [communicator.size] * 5
    assert communicator.health is None


@pytest.mark.parametrize("size, transport", [(2, "shm"), (3, "shm"), (2, "tcp"), (4, "tcp")])
@pytest.mark.parametrize("name", sorted(DISAGREEMENTS))
def test_disagreements(ranks_of, name, size, transport):
    ranks_of(size, transport=transport).call(disagree, name)


def init_and_say():
    try:
        commlib.init(timeout_s=20.0)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        commlib.shutdown()
    return "no error", ""


@pytest.mark.parametrize("option, value", [("segment_nbytes", 4096), ("shm_ring_nbytes", 8192), ("algorithms", "allreduce=ring")])
def test_settings_must_be_equal(option, value):
    from support import Ranks

    with Ranks(3, initialize=False, per_rank={1: {option: value}}) as ranks:
        for name, text in ranks.call(init_and_say):
            assert name == "MismatchError"
            assert option in text and "rank 0" in text and "rank 1" in text and "COMMLIB_" in text


def with_version(version, rank):
    import commlib.session

    placement_rank = int(os.environ["COMMLIB_RANK"])
    if placement_rank == rank:
        commlib.session.VERSION = version
    return init_and_say()


def test_versions_must_be_equal():
    from support import Ranks

    with Ranks(3, initialize=False) as ranks:
        for name, text in ranks.call(with_version, "9.9.9", 2):
            assert name != "no error" and "9.9.9" in text and commlib.__version__ in text


# ---- limits of the system ----------------------------------------------------------------------------------------


def init_with_limit(limit, value, rank):
    import resource

    if int(os.environ["COMMLIB_RANK"]) == rank:
        number = getattr(resource, limit)
        resource.setrlimit(number, (value, resource.getrlimit(number)[1]))
    return init_and_say()


@pytest.mark.parametrize("limit, value, advice", [("RLIMIT_FSIZE", 8192, "shm_ring_nbytes"), ("RLIMIT_NOFILE", 8, "ulimit")])
def test_limits_of_the_system(limit, value, advice):
    """No shared memory, no descriptors: the rank says what is short and what to do, the others that this rank gave up."""
    from support import Ranks

    with Ranks(2, initialize=False) as ranks:
        outcomes = ranks.call(init_with_limit, limit, value, 1)
        assert outcomes[1][0] != "no error" and advice in outcomes[1][1], outcomes
        assert outcomes[0][0] == "StartError" and "rank 1" in outcomes[0][1], outcomes
