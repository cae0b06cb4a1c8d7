"""The store: values, time-outs, ranks that do not fit together, strangers, generations, leaks. Ranks are threads."""
import os
import secrets
import socket
import threading
import time

import pytest

from commlib.bootstrap import Placement, StartError
from commlib.rendezvous import join, listen, parse
from commlib.rendezvous_server import Server
from commlib.rendezvous_wire import PROTOCOL, Decoder, Hello, WireError, encode, hello_of, spell_ranks

TIMEOUT_S = 10.0


def new_name():
    return f"commlib-test-{secrets.token_hex(6)}"


def placement_of(rank, size, address, owner="rank 0", job="job"):
    return Placement("test", rank, size, None, None, None, None, address, owner, job)


def together(*bodies):
    """Runs bodies in threads; returns their results, exceptions included."""
    results = [None] * len(bodies)

    def run(index):
        try:
            results[index] = bodies[index]()
        except Exception as error:  # the assertion is the caller's
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3 * TIMEOUT_S)
        assert not thread.is_alive()
    return results


def member(rank, size, address, body=lambda store: store.gather("all", b"%d" % store.rank), generation=1, version="1",
           timeout_s=TIMEOUT_S, **placement):
    def run():
        with join(placement_of(rank, size, address, **placement), generation, version, timeout_s) as store:
            return body(store)
    return run


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def exactly(sock, nbytes):
    """So many bytes, in however many pieces they come."""
    data = b""
    while len(data) < nbytes:
        piece = sock.recv(nbytes - len(data))
        assert piece
        data += piece
    return data


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def addresses():
    return {"unix": f"unix:@{new_name()}", "tcp": f"127.0.0.1:{free_port()}"}


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_gather(kind, size):
    address = addresses()[kind]
    results = together(*[member(rank, size, address) for rank in range(size)])
    assert results == [[b"%d" % rank for rank in range(size)]] * size


def test_rank_0_may_come_last():
    address = f"unix:@{new_name()}"
    started = threading.Event()

    def late():
        assert started.wait(TIMEOUT_S)
        return member(0, 2, address)()

    def early():
        started.set()
        return member(1, 2, address)()

    assert together(late, early) == [[b"0", b"1"]] * 2


def test_get_waits_and_large_values_pass():
    value = os.urandom(1 << 20)

    def body(store):
        if store.rank == 0:
            store.gather("ready", b"")
            store.set("late", value)
        else:
            store.gather("ready", b"")
        return store.get("late") == value

    address = f"unix:@{new_name()}"
    assert together(member(0, 2, address, body), member(1, 2, address, body)) == [True, True]


def test_a_value_over_the_limit_is_refused():
    with join(placement_of(0, 1, ""), 1, "1") as store:
        with pytest.raises(ValueError, match="1048576"):
            store.set("big", b"x" * ((1 << 20) + 1))


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_missing_ranks_are_named_everywhere(kind):
    address = addresses()[kind]
    began = time.monotonic()
    results = together(*[member(rank, 5, address, timeout_s=0.3) for rank in (0, 3)])
    assert time.monotonic() - began < 5.0
    for result in results:
        assert isinstance(result, StartError)
        assert "rank 1-2, 4 of 5 has not come" in str(result) and "COMMLIB_START_TIMEOUT_S" in str(result)


def test_without_rank_0_the_others_say_so():
    result = together(member(1, 2, f"unix:@{new_name()}", timeout_s=0.3))[0]
    assert isinstance(result, StartError) and result.rank == 0
    assert "rank 0" in str(result) and "0.3 s" in str(result)


MISFITS = [
    (dict(version="1"), dict(version="2"), ("commlib version", "has 1", "has 2", "install")),
    (dict(size=3), dict(size=4), ("number of ranks", "has 3", "has 4", "one launcher command")),
    (dict(rank=1), dict(rank=1), ("two processes", "rank 1 of 3", "start every rank once")),
]


@pytest.mark.parametrize("one, other, words", MISFITS)
@pytest.mark.parametrize("owner", ["rank 0", "commrun"])
def test_ranks_that_do_not_fit_together_fail_everywhere(one, other, words, owner):
    name = new_name()
    first = dict(dict(rank=1, size=3), **one)
    second = dict(dict(rank=2, size=3), **other)
    server = Server(listen(f"unix:@{name}"), "job", owner) if owner == "commrun" else None
    try:
        results = together(*[member(address=f"unix:@{name}", owner=owner, **arguments)
                             for arguments in (dict(first, rank=0), first, second)])
    finally:
        if server is not None:
            server.close()
    for result in results:
        assert isinstance(result, StartError), result
        for word in words:
            assert word in str(result)


def test_a_rank_that_gives_up_tells_why():
    def body(store):
        if store.rank == 1:
            raise MemoryError("no memory for 3 rings")
        store.gather("never", b"")

    address = f"unix:@{new_name()}"
    results = together(*[member(rank, 3, address, body) for rank in range(3)])
    assert isinstance(results[1], MemoryError)
    for result in (results[0], results[2]):
        assert isinstance(result, StartError) and result.rank == 1
        assert "rank 1" in str(result) and "no memory for 3 rings" in str(result)


def test_a_broken_connection_is_bad_news_at_once():
    everybody_is_ready = threading.Barrier(3)

    def body(store):
        store.gather("ready", b"")
        everybody_is_ready.wait(TIMEOUT_S)  # else the news may reach a rank that still asks who is ready
        if store.rank == 1:
            store._channel.sock.shutdown(socket.SHUT_RDWR)  # as the kernel does for a dead process
            return None
        began = time.monotonic()
        with pytest.raises(StartError, match=r"rank 1 \(pid \d+ on .*\) was lost"):
            store.gather("never", b"")
        return time.monotonic() - began

    address = f"unix:@{new_name()}"
    results = together(*[member(rank, 3, address, body) for rank in range(3)])
    assert results[0] < 2.0 and results[2] < 2.0


def test_the_launcher_explains_a_death():
    name = new_name()
    server = Server(listen(f"unix:@{name}"), "job", "commrun", explain_s=TIMEOUT_S)
    try:
        def body(store):
            store.gather("ready", b"")
            if store.rank == 1:
                server.rank_ended(1, "rank 1 (pid 7) was killed by signal 9 (SIGKILL)")
            return store.get("never")

        results = together(*[member(rank, 2, f"unix:@{name}", body, owner="commrun") for rank in range(2)])
        assert "rank 1 (pid 7) was killed by signal 9 (SIGKILL) while the job started" in str(results[0])
        late = together(member(0, 2, f"unix:@{name}", generation=2, owner="commrun"))[0]
        assert isinstance(late, StartError) and "SIGKILL" in str(late)
    finally:
        server.close()


def test_an_end_after_the_goodbye_is_no_failure():
    """The launcher's word may overtake the goodbye that still lies in the socket."""
    for _ in range(20):
        assert one_leaves_early() == [b"well", None]


def one_leaves_early():
    name, told = new_name(), threading.Event()
    server = Server(listen(f"unix:@{name}"), "job", "commrun")

    def stays(store):
        store.get("done")
        assert told.wait(TIMEOUT_S)
        store.set("after", b"well")
        return store.get("after")

    def leaves():
        member(1, 2, f"unix:@{name}", lambda store: store.set("done", b""), owner="commrun")()
        server.rank_ended(1, "rank 1 exited with code 0")
        told.set()

    try:
        return together(member(0, 2, f"unix:@{name}", stays, owner="commrun"), leaves)
    finally:
        server.close()


def test_a_taken_port_names_the_variable():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(StartError, match="COMMLIB_STORE=HOST:PORT"):
            join(placement_of(0, 2, address), 1, "1", TIMEOUT_S)


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:65536", "unix:@", "unix:/run/x",
                                     "unix:@" + "x" * 108])
def test_a_malformed_address_is_an_error(address):
    with pytest.raises(StartError, match="HOST:PORT"):
        parse(address)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_many_generations_leak_nothing(kind):
    address = addresses()[kind]
    cycles = 100

    def cycle(rank):
        def run():
            for generation in range(1, cycles + 1):
                result = member(rank, 2, address, generation=generation)()
                assert result == [b"0", b"1"]
            return "done"
        return run

    assert together(member(0, 2, address), member(1, 2, address))[0] == [b"0", b"1"]
    before, threads = descriptors(), threading.active_count()
    assert together(cycle(0), cycle(1)) == ["done", "done"]
    assert (descriptors(), threading.active_count()) == (before, threads)


def test_a_rank_greets_before_it_is_challenged():
    """Into a connection that only the caller's side knows any more something must be sent, or nobody learns of it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "127.0.0.1:%d" % listener.getsockname()[1]

        def silent():
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(TIMEOUT_S)
                return len(sock.recv(4096))

        heard, error = together(silent, member(1, 2, address, timeout_s=0.2))
    assert heard > 0 and isinstance(error, StartError)


def test_a_rank_ahead_waits_for_the_next_generation():
    """Over TCP all generations share one address: whoever comes too early tries again."""
    address = f"127.0.0.1:{free_port()}"
    tried = threading.Event()

    def first(store):
        store.gather("all", b"")
        assert tried.wait(TIMEOUT_S)

    def rank_0():
        member(0, 2, address, first)()
        return member(0, 2, address, generation=2)()

    def rank_1():
        member(1, 2, address, lambda store: store.gather("all", b""))()
        timer = threading.Timer(0.05, tried.set)  # only lengthens the overlap; the test holds without it
        timer.start()
        return member(1, 2, address, generation=2)()

    assert together(rank_0, rank_1) == [[b"0", b"1"]] * 2


def test_a_rank_behind_is_told():
    name = new_name()
    server = Server(listen(f"unix:@{name}"), "job", "commrun")
    try:
        together(*[member(rank, 2, f"unix:@{name}", generation=2, owner="commrun") for rank in range(2)])
        result = together(member(1, 2, f"unix:@{name}", generation=1, owner="commrun"))[0]
        assert isinstance(result, StartError) and "initialisation 1 of this job is over" in str(result)
    finally:
        server.close()


def test_failures_leak_nothing():
    def fail_once():
        address = f"unix:@{new_name()}"
        return together(member(0, 2, address, version="1"), member(1, 2, address, version="2"))

    fail_once()
    before, threads = descriptors(), threading.active_count()
    for _ in range(10):
        assert all(isinstance(result, StartError) for result in fail_once())
    assert (descriptors(), threading.active_count()) == (before, threads)


# ---- the wire ----------------------------------------------------------------------------------------------------

def test_messages_survive_any_cutting():
    stream = encode({"op": "a"}, b"payload") + encode({"op": "b", "x": [1, "y"]})
    for step in range(1, len(stream) + 1):
        decoder, messages = Decoder(), []
        for start in range(0, len(stream), step):
            decoder.feed(stream[start:start + step])
            message = decoder.next()
            while message is not None:
                messages.append(message)
                message = decoder.next()
        assert messages == [({"op": "a"}, b"payload"), ({"op": "b", "x": [1, "y"]}, b"")]


@pytest.mark.parametrize("data", [b"x", b"clrx" + bytes(8), b"clrv" + b"\xff" * 8, b"clrv" + bytes(8),
                                  b"clrv\0\0\0\x02\0\0\0\0[]", b"clrv\0\0\0\x02\0\0\0\0{}",
                                  b"clrv\0\0\x0f\xa0\0\0\0\0" + b"[" * 4000])
def test_bytes_of_others_are_refused(data):
    decoder = Decoder(1 << 16)
    decoder.feed(data)
    with pytest.raises(WireError):
        decoder.next()


@pytest.mark.parametrize("field, value", [("size", 0), ("size", 1 << 30), ("rank", -1), ("rank", 2), ("rank", True),
                                          ("generation", 0), ("version", 1), ("pid", "x")])
def test_an_absurd_hello_is_refused(field, value):
    header = dict(Hello(PROTOCOL, "1", 2, 1, 1, "host", 1).header(), **{field: value})
    with pytest.raises(WireError):
        hello_of(header)


@pytest.mark.parametrize("ranks, text", [([], ""), ([3], "3"), ([2, 1], "1-2"), ([0, 2, 3, 4, 9], "0, 2-4, 9")])
def test_spelling_of_ranks(ranks, text):
    assert spell_ranks(ranks) == text
