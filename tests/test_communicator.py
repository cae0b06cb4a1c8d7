"""What a communicator does beside its collectives: names, threads, many in flight, settings, statistics, timeline."""

import json
import os
import threading

import numpy as np
import pytest
from support import Ranks, run_script

import commlib
from commlib.collective import share_of
from commlib.names import Names, Use, base_key, key_of_use
from commlib.timeline import joined


def test_keys_differ():
    keys = {base_key(group, kind, name) for group in ("world", "half") for kind in ("allreduce", "broadcast")
            for name in (None, "", "a", "=a", "a\0b")}  # fmt: skip
    assert len(keys) == 20
    use = Use("world", "allreduce", "a", 1)
    assert [use.next_key() for _ in range(3)] == [key_of_use(use.base, n) for n in range(3)]
    assert len({key_of_use(use.base, n) for n in range(100_000)}) == 100_000
    assert Names("world", ["allreduce"], 1).use("allreduce", "a").base == use.base


@pytest.mark.parametrize("dtype", ("int8", "uint8", "int32", "int64"))
def test_average_of_equal_integers_is_that_integer(dtype):
    """The engine multiplies in fp64 and truncates; 49 * (1 / 49.) is below 1."""
    for size in range(1, 513):
        factor = share_of(commlib.Average, dtype, size)
        values = np.array([-7, -1, 0, 1, 2, 3, 100, 12345, 2**31, 2**42], np.float64)
        assert np.array_equal(np.trunc(values * size * factor), values), size
        assert np.array_equal(np.trunc((values * size + size - 1) * factor), np.trunc(values + (size - 1) / size)), size


def submit_from_threads():
    """Four threads at once, each with names of its own; ranks start them in different order."""
    communicator = commlib.communicator()
    failures = []

    def work(thread):
        try:
            for i in range(60):
                array = np.full(200 + i, float(communicator.rank + thread))
                result = communicator.allreduce_(array, name=f"thread {thread} {i % 3}", op=commlib.Sum, timeout_s=30)
                wanted = sum(range(communicator.size)) + thread * communicator.size
                assert (result == wanted).all(), (result[0], wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads[:: -1 if communicator.rank else 1]:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_threads(ranks_of, transport):
    ranks_of(2, transport=transport).call(submit_from_threads)


def many_names():
    """What is kept of names beside their number of uses is bounded, and their operations still match."""
    import commlib.collective

    communicator = commlib.communicator()
    most, commlib.collective._MOST_REQUESTS = commlib.collective._MOST_REQUESTS, 7
    for i in list(range(30)) + list(range(30)):
        assert communicator.allreduce(np.full(i, 1.0), name=f"name {i}", op=commlib.Sum, timeout_s=20).sum() == i * 2
    commlib.collective._MOST_REQUESTS = most


def test_many_names(ranks_of):
    ranks_of(2, transport="shm").call(many_names)


def count_operations():
    communicator = commlib.communicator()
    before = communicator.stats()
    for _ in range(5):
        communicator.allreduce(np.ones(1000, np.float32), name="counted")
    after = communicator.stats()
    return after["operations"] - before["operations"], after["sent_nbytes"] - before["sent_nbytes"], after["failed"]


def test_stats(ranks_of):
    for operations, sent_nbytes, _ in ranks_of(2, transport="shm").call(count_operations):
        assert operations == 5
        assert 5 * 4000 <= sent_nbytes < 5 * 4000 + 5000


def priorities_matter():
    """Of many operations submitted together, the urgent one, submitted last, is done long before the last."""
    communicator = commlib.communicator()
    arrays = [np.ones(1_000_000, np.float32) for _ in range(12)]
    urgent = np.ones(1_000_000, np.float32)
    communicator.barrier()
    handles = [communicator.allreduce_async_(array, priority=10 + i) for i, array in enumerate(arrays)]
    first = communicator.allreduce_async_(urgent, priority=0)
    first.wait(30)
    for handle in handles:
        handle.wait(30)
    return first.times[2] < max(handle.times[2] for handle in handles[6:])


def test_priorities(ranks_of):
    assert all(ranks_of(2, transport="tcp").call(priorities_matter))


# ---- timeline ----------------------------------------------------------------------------------------------------


def record(path):
    communicator = commlib.communicator()
    communicator.barrier()
    communicator.start_timeline(path)
    timeline = communicator.timeline
    handles = [communicator.allreduce_async(np.ones(1000), name=f"layer{i}.weight") for i in range(5)]
    timeline.span("conv1", "forward", 1.0, 1.5)
    timeline.span('quo"te', "backward", 1.5, 2.0, track="other")
    timeline.instant("CYCLE_START")
    for handle in handles:
        handle.wait(20)
    communicator.allreduce_async(np.ones(10), name="dropped")
    communicator.broadcast(np.ones(10), 0)
    communicator.barrier()
    if communicator.rank == 0:
        with pytest.raises(ValueError, match="stop_timeline"):
            communicator.start_timeline(path)
    communicator.stop_timeline()
    communicator.stop_timeline()  # none is being written: nothing to do
    return os.path.exists(f"{path}.rank{communicator.rank}")


@pytest.mark.parametrize("transport", ("shm", "tcp"))
def test_timeline(ranks_of, tmp_path, transport):
    path = tmp_path / "trace.json"
    assert ranks_of(2, transport=transport).call(record, str(path)) == [False, False]
    events = json.loads(path.read_text())
    for rank in (0, 1):
        mine = [event for event in events if event["pid"] == rank]
        names = [event["name"] for event in mine]
        for i in range(5):
            assert names.count(f"allreduce.layer{i}.weight") == 1
        assert names.count("NEGOTIATE_ALLREDUCE") == names.count("ALLREDUCE") == 6
        for name in ("allreduce.dropped", "BROADCAST", "BARRIER", "conv1", 'quo"te', "CYCLE_START"):
            assert name in names, name
        assert any("start_time_since_epoch_in_micros" in event.get("args", {}) for event in mine)
        assert {event["args"]["name"] for event in mine if event["name"] == "thread_name"} >= {"compute", "other"}
        check_nesting(mine)


def check_nesting(events):
    """On every track spans are inside one another or apart; and all that a span needs is there."""
    tracks = {}
    for event in events:
        if event["ph"] == "X":
            assert event["dur"] >= 0 and event["cat"]
            tracks.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        open_ends = []
        for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_ends and open_ends[-1] <= begin + 0.002:  # times are rounded to a nanosecond
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1] + 0.002, spans
            open_ends.append(end)


def test_clocks_of_other_hosts_are_moved():
    def part(clock, epoch_us, ts):
        header = json.dumps({"clock": clock, "epoch_us": epoch_us}).encode()
        return header + b"\n" + json.dumps([{"name": "x", "ts": ts}]).encode()

    events = json.loads(joined([part("a", 1000, 5), part("a", 1003, 6), part("b", 900, 107)]))
    assert [event["ts"] for event in events] == [5, 6, 7]


def record_and_die(path):
    communicator = commlib.communicator()
    communicator.start_timeline(path)
    communicator.allreduce(np.ones(10), name="alive")
    communicator.timeline.flush()
    if communicator.rank == 1:
        os._exit(3)
    with pytest.raises(commlib.PeerLostError):
        while True:
            communicator.allreduce(np.ones(10), name="dead")
    commlib.shutdown()


def test_timeline_of_a_rank_that_died(tmp_path):
    path = tmp_path / "trace.json"
    with Ranks(2) as ranks:
        ranks.outcomes(record_and_die, str(path))
    for rank in (0, 1):
        events = json.loads((tmp_path / f"trace.json.rank{rank}").read_text())
        assert "allreduce.alive" in [event["name"] for event in events]


def test_timeline_by_environment(tmp_path):
    path = tmp_path / "trace.json"
    program = "import commlib, numpy; commlib.init(); commlib.allreduce(numpy.ones(3), name='one')"
    assert run_script(program, 2, timeline=str(path)) == [(0, ""), (0, "")]
    assert sum(event["name"] == "allreduce.one" for event in json.loads(path.read_text())) == 2
    assert os.listdir(tmp_path) == ["trace.json"]
