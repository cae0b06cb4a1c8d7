"""gloo under commlib's scheduler does what the native engine does: the core's own tests, run on it, and what is its own.

Functions of the core's tests work on the default communicator, whatever moves its bytes.
"""

import random

import pytest
import torch
import torch.distributed
from starting import start

import commlib
import commlib.torch as comm
from commlib.torch.gloo import GlooMover
from commlib.torch.gloo_group import listening_place


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request):
    """Ranks on gloo whose segments are small, so that most operations have several tickets."""
    with start(request.param, backend="gloo", segment_nbytes=16384) as ranks:
        yield ranks


CORE_TESTS = [
    "test_collectives:allreduce_cases", "test_collectives:scale_cases", "test_collectives:broadcast_cases",
    "test_collectives:rows_cases", "test_collectives:control_cases", "test_collectives:bfloat16_cases",
    "test_collectives:protocol_cases", "test_communicator:submit_from_threads",
    "test_session:time_out_and_go_on", "test_session:interrupted_wait", "test_session:fork_in_the_middle",
    "test_session:fork_pool",
]  # fmt: skip


@pytest.mark.parametrize("function", CORE_TESTS)
def test_as_the_native_engine(ranks, function):
    ranks.call(function)


def test_random_programs_in_orders_of_their_own(ranks):
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    ranks.call("test_collectives_mixed:mixed", seed, 80, 40)


@pytest.mark.parametrize("reverse_odd", [False, True])
def test_opposite_orders(ranks, reverse_odd):
    ranks.call("test_collectives:order_cases", reverse_odd)


def group_of_some():
    """The bytes of a group are moved by commlib's own engine, with its bits."""
    communicator = commlib.communicator()
    assert communicator.backend == "gloo"
    group = communicator.group([0, 1] if communicator.rank < 2 else [2])
    assert group.backend == "native"
    tensor = torch.full((5000,), communicator.rank + 1.0)
    group.allreduce_(comm.tensors.buffer_of(tensor), name="of some", op=comm.Sum)
    assert tensor.unique().tolist() == [3.0]


def test_groups_move_their_own_bytes(ranks):
    ranks.call("test_gloo:group_of_some")


def overtake():
    """A small urgent operation behind a big one is done long before it."""
    big, small = torch.ones(30_000_000), torch.ones(10)
    queued = comm.allreduce_async_(big, name="big", op=comm.Sum)
    commlib.communicator().exchange(b"", name="all have posted the big one")
    urgent = commlib.communicator().allreduce_async_(comm.tensors.buffer_of(small), name="small", op=comm.Sum, priority=-1)
    urgent.wait(20)
    assert not queued.done()
    assert queued.wait(60)[-1] == comm.size() and small.tolist() == [comm.size()] * 10


def test_the_urgent_overtake_the_queued():
    with start(2, backend="gloo") as ranks:
        ranks.call(overtake)


def same_bits():
    """Sums whose order shows in the last bits."""
    generator = torch.Generator().manual_seed(comm.rank())
    numbers = torch.randn(100_000, generator=generator)
    return [comm.allreduce(numbers, op=comm.Sum) for _ in range(2)]


def test_all_ranks_and_runs_have_the_same_bits(ranks):
    results = [result for results in ranks.call(same_bits) for result in results]
    assert all(torch.equal(result, results[0]) for result in results)


def beside_torch_distributed(port):
    """The user's own default group may exist, before init and after shutdown, and is not touched."""
    address = f"tcp://127.0.0.1:{port}"
    comm.shutdown()
    assert not torch.distributed.is_initialized()
    comm.init()
    torch.distributed.init_process_group("gloo", init_method=address, rank=comm.rank(), world_size=comm.size())
    theirs, ours = torch.ones(1000), torch.ones(1000)
    work = torch.distributed.all_reduce(theirs, async_op=True)
    comm.allreduce_(ours, op=comm.Sum)
    work.wait()
    assert torch.equal(ours, theirs)
    comm.shutdown()
    torch.distributed.all_reduce(theirs)
    assert theirs[0] == torch.distributed.get_world_size() ** 2
    torch.distributed.destroy_process_group()
    comm.init()


def test_beside_torch_distributed(ranks):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    del store
    ranks.call(beside_torch_distributed, port)


# ---- which backend -----------------------------------------------------------------------------------------------


@pytest.fixture
def alone():
    """No communicator before the test, none after it."""
    yield
    comm.shutdown()


def test_one_rank(alone):
    comm.init(backend="gloo")
    assert commlib.communicator().backend == "gloo"
    assert comm.allreduce(torch.tensor([3.0, 4.0])).tolist() == [3.0, 4.0]
    assert comm.allgather(torch.zeros(2, 3)).shape == (2, 3)


def test_another_backend_is_in_use(alone):
    comm.init()
    comm.init(backend="native")
    with pytest.raises(ValueError, match="initialized with backend='native': call shutdown"):
        comm.init(backend="gloo")


def test_unknown_backend():
    with pytest.raises(ValueError, match="no backend 'nccl' here, only gloo, native"):
        comm.init(backend="nccl")


def test_the_core_alone_knows_no_gloo(monkeypatch):
    monkeypatch.setenv("COMMLIB_BACKEND", "gloo")
    with pytest.raises(ValueError, match="call commlib.torch.init"):
        commlib.init()


def test_ranks_that_differ_are_told():
    with start(2, initialize=False, per_rank={1: {"backend": "gloo"}}) as ranks:
        for outcome in ranks.outcomes("starting:initialize"):
            assert isinstance(outcome.error, commlib.MismatchError)
            assert "backend" in str(outcome.error) and '"gloo"' in str(outcome.error)


# ---- where gloo listens ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts, interfaces, store, place", [
    ((0, 0), "lo", "10.1.2.3:4", {"hostname": "127.0.0.1"}),
    ((0, 1), "127.0.0.0/8", "10.1.2.3:4", {"hostname": "127.0.0.1"}),
    ((0, 1), "", "127.0.0.1:9", None),
    ((0, 1), "", "no address", None),
])  # fmt: skip
def test_where_gloo_listens(hosts, interfaces, store, place):
    assert listening_place(hosts, interfaces, store) == place


class LateWork:
    """A collective that completes between the end of a wait and the question whether it has."""

    def __init__(self, error=None):
        self.error, self.waits = error, 0

    def is_completed(self):
        return True

    def wait(self, timeout=None):
        self.waits += 1
        if self.waits == 1:
            raise RuntimeError("Operation timed out!")
        if self.error is not None:
            raise RuntimeError(self.error)


def test_a_collective_that_completes_at_the_end_of_a_slice_is_no_failure():
    mover = GlooMover(0, 2, None, 1.0)
    mover._finish(LateWork(), lambda: False)
    with pytest.raises(RuntimeError, match="reset by peer"):
        mover._finish(LateWork("reset by peer"), lambda: False)
