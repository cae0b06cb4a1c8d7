"""Arrays in memory that all ranks of a host map, and prepared operations: the same results, whatever memory and path."""

import os
import subprocess
import sys

import numpy as np
import pytest

import commlib


def sums(seed):
    """Sums of arrays of which every rank has some in shared and some in private memory, prepared and not."""
    communicator = commlib.communicator()
    random = np.random.default_rng(seed)
    for case in range(60):
        count = int(random.integers(0, 1_000_000 if case % 12 == 0 else 70_000))
        dtype = random.choice(["float32", "int64", "uint8", "float16"])
        is_shared = (case + communicator.rank) % 3 != 0
        array = communicator.empty(count, dtype) if is_shared else np.zeros(count, dtype)
        assert array.shape == (count,) and array.dtype == dtype and not array.any()
        values = (np.arange(count) % 7).astype(dtype)
        prepared = communicator.prepare_allreduce_(array, name=f"shared {seed} {case}", op=commlib.Sum)
        want = values * np.dtype(dtype).type(communicator.size) + sum(range(communicator.size))
        for _ in range(2):
            array[:] = values + communicator.rank
            assert prepared() is array
            np.testing.assert_array_equal(array, want.astype(dtype))
        array[:] = values + communicator.rank
        communicator.allreduce_(array, op=commlib.Sum)
        np.testing.assert_array_equal(array, want.astype(dtype))
        array[:] = values * communicator.size
        communicator.allreduce_(array, op=commlib.Average)
        np.testing.assert_array_equal(array, values * communicator.size)
    return True


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sums(ranks_of, size, transport):
    ranks = ranks_of(size, transport=transport)
    assert ranks.call(sums, 1) == [True] * size


def prepared_disagrees():
    communicator = commlib.communicator()
    array = np.zeros(10 + communicator.rank, "float32")
    prepared = communicator.prepare_allreduce_(array, name="of another length", op=commlib.Sum)
    with pytest.raises(commlib.MismatchError, match="of another length"):
        prepared()
    again = communicator.prepare_allreduce_(np.ones(3, "float32"), name="of another length", op=commlib.Sum)
    return again().tolist()


def test_a_prepared_operation_can_fail_and_the_next_works(ranks_of):
    assert ranks_of(2).call(prepared_disagrees) == [[2.0] * 3] * 2


def late():
    communicator = commlib.communicator()
    array = np.ones(5, "float32")
    prepared = communicator.prepare_allreduce_(array, name="late", op=commlib.Sum)
    if communicator.rank == 0:
        with pytest.raises(TimeoutError, match="late"):
            prepared(timeout_s=0.1)
        with pytest.raises(ValueError, match="in flight"):
            prepared()
        communicator.barrier()
    else:
        communicator.barrier()
        assert prepared().tolist() == [2.0] * 5
    communicator.barrier()
    array[:] = 1
    return prepared().tolist()


def test_a_prepared_operation_can_be_late(ranks_of):
    assert ranks_of(2).call(late) == [[2.0] * 5] * 2


OUTLIVES = """
import gc, os, commlib
communicator = commlib.init()
array = communicator.empty(100000)
array[:] = communicator.rank
commlib.shutdown()
del communicator
gc.collect()
assert (array == array[0]).all()
child = os.fork()
if child == 0:
    assert (array == array[0]).all()
    del array
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert (array == array[0]).all()
"""


def test_arrays_outlive_the_communicator_and_are_readable_in_children():
    command = [sys.executable, "-m", "commlib.launch", "-np", "2", sys.executable, "-c", OUTLIVES]
    subprocess.run(command, check=True, timeout=60)


LIMITED = """
import numpy, resource, commlib
communicator = commlib.init()
array = communicator.empty(1000)
array[:] = 1
assert communicator.allreduce_(array, op=commlib.Sum).tolist() == [2.0] * 1000
"""


def test_without_address_space_arrays_are_ordinary():
    limited = f"ulimit -v 8000000; exec {sys.executable} -m commlib.launch -np 2 {sys.executable} -c '{LIMITED}'"
    subprocess.run(["bash", "-c", limited], check=True, timeout=60, env=dict(os.environ, OPENBLAS_NUM_THREADS="1"))
