"""join() with uneven work, against NumPy: what every rank gets, whatever is in flight, whoever joins when; and how it fails.

A program is made from a printed seed: how many steps each rank makes in each of several rounds, and what a step reduces.
"""

import os
import pathlib
import random
import signal
import threading
import time

import numpy as np
import pytest
from support import Died, Ranks

import commlib

OPS = {"Sum": np.add, "Min": np.minimum, "Max": np.maximum, "Product": np.multiply, "Average": np.add}
DTYPES = ("int8", "int32", "int64", "uint8", "float16", "float32", "float64")


class Program:
    """What ranks do: `rounds` of steps, each round ended by join(); every rank makes the same one of a seed."""

    def __init__(self, seed, size):
        self.rng = random.Random(f"{seed} {size}")
        self.size = size
        self.rounds = [[self.rng.choice((0, 1, 2, 5)) for _ in range(size)] for _ in range(3)]
        members = sorted(self.rng.sample(range(size), max(1, size - 1)))
        self.tensors = [
            (f"tensor {number}", self.rng.choice(DTYPES), self.rng.choice((0, 1, 7, 1000, 70_000)), self.rng.choice(sorted(OPS)),
             self.rng.choice((1.0, 2.0)), self.rng.random() < 0.5, members if self.rng.random() < 0.3 else list(range(size)))
            for number in range(8)
        ]  # fmt: skip

    @staticmethod
    def contribution(rank, step, dtype, count):
        return (np.arange(count) % 3 + rank + step % 2 + 1).astype(dtype)

    def expected(self, steps, step, tensor):
        """What a step gives: who has joined contributes nothing."""
        _, dtype, count, op, prescale, _, members = tensor
        wide = np.float64 if np.dtype(dtype).kind == "f" else np.int64
        present = [self.contribution(rank, step, dtype, count).astype(wide) for rank in members if step < steps[rank]]
        total = present[0] * wide(prescale)
        for one in present[1:]:
            total = OPS[op](total, one * wide(prescale))
        if op == "Average":
            total = total / len(members) if wide is np.float64 else np.trunc(total / len(members))
        return total.astype(dtype)


def run_program(seed):
    """Returns [(round, step, name) whose result is wrong], the ranks that joined last."""
    communicator = commlib.communicator()
    rank = communicator.rank
    program, wrong, lasts = Program(seed, communicator.size), [], []
    groups = {}
    for members in {tuple(tensor[-1]): None for tensor in program.tensors}:  # in one order, on every member, work or not
        if rank in members:
            groups[members] = communicator if len(members) == communicator.size else communicator.group(members)
    for number, steps in enumerate(program.rounds):
        flying = []
        for step in range(steps[rank]):
            order = list(program.tensors)
            random.Random(f"{seed} {rank} {step}").shuffle(order)
            for tensor in order:
                name, dtype, count, op, prescale, overlapped, members = tensor
                if rank not in members:
                    continue
                array = program.contribution(rank, step, dtype, count)
                handle = groups[tuple(members)].allreduce_async_(
                    array, name=f"{name} of {step % 2}", op=getattr(commlib, op), prescale_factor=prescale, priority=step,
                    overlapped=overlapped)  # fmt: skip
                flying.append((handle, step, tensor))
            while len(flying) > program.rng.randrange(24):  # some of the last steps are in flight at the join
                wrong += _land(program, number, steps, *flying.pop(0))
            while any(tensor[0] == other[0] and step % 2 == (at + 1) % 2 for _, at, tensor in flying for other in program.tensors):
                wrong += _land(program, number, steps, *flying.pop(0))  # names come again
        lasts.append(communicator.join())
        for entry in flying:
            wrong += _land(program, number, steps, *entry)
    total = communicator.allreduce(np.ones(3), op=commlib.Sum)  # all count alike again
    return wrong, lasts, total.tolist()


def _land(program, number, steps, handle, step, tensor):
    result, expected = handle.wait(), program.expected(steps, step, tensor)
    close = np.allclose(result, expected, rtol=2e-3) if result.dtype.kind == "f" else np.array_equal(result, expected)
    return [] if close else [(number, step, tensor[0], tensor[3], result.tolist()[:3], expected.tolist()[:3])]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_uneven_work(size, transport):
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"seed {seed}")
    with Ranks(size, transport=transport) as ranks:
        for number in range(4):
            results = ranks.call(run_program, seed + number)
            for wrong, lasts, total in results:
                assert wrong == []
                assert lasts == results[0][1] and all(0 <= last < size for last in lasts)
                assert total == [float(size)] * 3


def join_last(who):
    """Rank `who` joins when it has heard, by what they still reduce, that all others have."""
    communicator = commlib.communicator()
    if communicator.rank != who:
        return communicator.join()
    while communicator.allreduce(np.ones(1), op=commlib.Sum)[0] != 1.0 if communicator.size > 1 else False:
        pass
    return communicator.join()


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_the_last_rank_is_told(transport):
    with Ranks(3, transport=transport) as ranks:
        for who in (0, 1, 2, 2, 0):
            assert ranks.call(join_last, who) == [who] * 3


KINDS = {
    "broadcast": lambda c: c.broadcast(np.ones(3), 0, name="x"),
    "allgather": lambda c: c.allgather(np.ones(3), name="x"),
    "alltoall": lambda c: c.alltoall(np.ones(c.size), name="x"),
    "reducescatter": lambda c: c.reducescatter(np.ones(c.size), name="x", op=commlib.Sum),
    "barrier": lambda c: c.barrier(),
    "exchange": lambda c: c.exchange(b"", name="x"),
}  # fmt: skip


def others_fail(who, timeout_s=None):
    """Rank `who` joins at once; the others learn that nothing but all-reduces goes on, and join."""
    communicator, texts = commlib.communicator(), []
    if communicator.rank != who:
        while communicator.allreduce(np.ones(1), op=commlib.Sum)[0] == communicator.size:
            pass
        for kind, call in KINDS.items():
            with pytest.raises(commlib.JoinedError) as caught:
                call(communicator)
            assert caught.value.rank == who
            texts.append((kind, str(caught.value)))
        assert communicator.exchange(b"here", name="y", without_joined=True).count(b"") == 1
    communicator.join()
    for call in KINDS.values():
        call(communicator)
    return texts


@pytest.mark.parametrize("size, transport", [(2, "shm"), (3, "shm"), (4, "tcp")])
def test_what_needs_every_rank_fails_on_every_rank(size, transport):
    with Ranks(size, transport=transport) as ranks:
        for who in range(size):
            for rank, texts in enumerate(ranks.call(others_fail, who)):
                assert len(texts) == (len(KINDS) if rank != who else 0)
                for kind, text in texts:
                    assert f"rank {who} has joined" in text and kind in text, text


def submit_while_joined(seen):
    """Another thread submits on a rank that has joined; the other rank joins when the file `seen` tells that it was refused."""
    communicator, texts = commlib.communicator(), []
    if communicator.rank == 0:
        while not os.path.exists(seen):
            time.sleep(0.01)
        communicator.join()
    else:
        thread = threading.Thread(target=communicator.join)
        thread.start()
        while communicator._engine.is_open:
            time.sleep(0.001)
        array = np.ones(1)
        for call in (communicator.allreduce, communicator.allreduce_, communicator.allreduce_async_):
            with pytest.raises(commlib.JoinedError) as caught:
                call(array, name="same", op=commlib.Sum)
            texts.append(str(caught.value))
        assert communicator.health is None
        pathlib.Path(seen).touch()
        thread.join()
    return texts, communicator.allreduce(np.ones(1), name="same", op=commlib.Sum)[0]


def test_a_rank_that_has_joined_submits_nothing(tmp_path):
    with Ranks(2, transport="shm") as ranks:
        results = ranks.call(submit_while_joined, str(tmp_path / "seen"))
    assert len(results[1][0]) == 3 and all("this rank has joined" in text for text in results[1][0])
    assert [result[1] for result in results] == [2.0, 2.0]


def reduce_in_a_group():
    """Rank 0 joins without having made the group of which it is a member."""
    communicator, results = commlib.communicator(), []
    if communicator.rank == 1:
        group = communicator.group([1, 0])
        results = [group.allreduce(np.full(9, 4.0), op=op)[0] for op in (commlib.Sum, commlib.Average, commlib.Min)]
    communicator.join()
    return results


def test_a_group_that_the_joined_rank_never_made():
    with Ranks(3, transport="shm") as ranks:
        assert ranks.call(reduce_in_a_group) == [[], [4.0, 2.0, 4.0], []]


def join_of_a_group():
    communicator = commlib.communicator()
    with pytest.raises(ValueError, match="all ranks"):
        communicator.group(range(communicator.size)).join()


def join_in_vain():
    with pytest.raises((commlib.PeerLostError, commlib.PeerLeftError)) as caught:
        commlib.join()
    return type(caught.value).__name__, caught.value.rank, str(caught.value)


def test_refusals():
    with Ranks(2, transport="shm") as ranks:
        ranks.call(join_of_a_group)


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_a_rank_that_dies_or_leaves_ends_the_join_of_all(transport):
    with Ranks(3, transport=transport) as ranks:
        ranks.processes[2].send_signal(signal.SIGSTOP)
        ranks.begin(join_in_vain)
        ranks.processes[2].kill()
        outcomes = ranks.collect()
    assert isinstance(outcomes[2], Died)
    assert [outcome[:2] for outcome in outcomes[:2]] == [("PeerLostError", 2)] * 2
    with Ranks(3, transport=transport) as ranks:
        results = ranks.call(leave_or_join)
    assert [result[:2] for result in results if result] == [("PeerLeftError", 1)] * 2
    assert all("rank 1 has shut down" in result[2] for result in results if result)


def leave_or_join():
    if commlib.rank() == 1:
        return commlib.shutdown()
    return join_in_vain()


def prepared_after_join():
    """A prepared operation and names without one count alike after a join, however often they were used before."""
    communicator = commlib.communicator()
    array = np.zeros(2)
    call = communicator.prepare_allreduce_(array, name="prepared", op=commlib.Sum)
    results = []
    for _ in range(3):
        for _ in range(communicator.rank * 2 + 1):
            array[:] = 1
            call()
        communicator.join()
        array[:] = 1
        results.append(call()[0])
    return results


def test_prepared_operations():
    with Ranks(3, transport="shm") as ranks:
        assert ranks.call(prepared_after_join) == [[3.0] * 3] * 3


def interrupted_once(folder):
    """Rank 0 joins; when the other has seen that, it presses rank 0's Ctrl-C, and joins when rank 0 has got it."""
    communicator, mark = commlib.communicator(), pathlib.Path(folder) / "interrupted"
    if communicator.rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        communicator.exchange(str(os.getpid()).encode(), name="process")
        with pytest.raises(KeyboardInterrupt):
            communicator.join()
        mark.touch()
    else:
        process = int(communicator.exchange(b"", name="process")[0])
        while communicator.allreduce(np.ones(1), op=commlib.Sum)[0] != 1.0:
            pass
        os.kill(process, signal.SIGINT)
        while not mark.exists():
            time.sleep(0.01)
    last = communicator.join()
    return last, communicator.allreduce(np.ones(1), op=commlib.Sum)[0]


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_ctrl_c_ends_a_wait_in_join_which_may_go_on(transport, tmp_path):
    with Ranks(2, transport=transport) as ranks:
        assert ranks.call(interrupted_once, str(tmp_path)) == [(1, 2.0)] * 2
