"""Strangers: whoever calls a job's ports without its secret changes nothing and learns nothing, whatever he sends.

The store and the ranks' listeners are attacked while ranks start; a running job must have no port that answers at all.
"""
import contextlib
import logging
import os
import random
import secrets
import socket
import threading
import time

import numpy as np
import pytest
from support import Ranks
from test_connect import link_all
from test_connect import run_ranks as run_threads
from test_rendezvous import TIMEOUT_S, exactly, free_port, member, new_name, placement_of, together

import commlib
from commlib import connect as connecting
from commlib import proof
from commlib.bootstrap import StartError
from commlib.proof import ANSWER_NBYTES, NONCE_NBYTES, PROOF_NBYTES, REFUSAL, THE_STORE, Calling, Claim
from commlib.rendezvous import check_protection, join, listen
from commlib.rendezvous_server import Server, store_key
from commlib.rendezvous_wire import Hello, encode
from commlib.secret import Secret, new_secret

HELLO = Hello(2, "1", 2, 1, 1, "host", 1).header()
MALFORMED = [
    b"", b"\0", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"SSH-2.0-x\r\n", b"clrv" + b"\xff" * 8, encode(HELLO),
    encode(HELLO) + encode({"op": "get", "keys": ["connect/facts/0"], "timeout_s": 1}), bytes(PROOF_NBYTES),
    b"\xff" * PROOF_NBYTES, bytes(PROOF_NBYTES - 1), b"\xff\xff\xff\xff" * 100_000, random.Random(1).randbytes(PROOF_NBYTES),
    random.Random(2).randbytes(1 << 20),
]  # fmt: skip


def attack(address, data, patience_s=0.5):
    """Connects, sends, and returns what came back until the other side closed, or nothing came for a while."""
    heard = b""
    with socket.create_connection(address, TIMEOUT_S) as sock, contextlib.suppress(OSError):
        sock.settimeout(patience_s)
        with contextlib.suppress(OSError):
            sock.sendall(data)
        while True:
            piece = sock.recv(4096)
            if not piece:
                break
            heard += piece
    return heard


def assert_nothing_learned(heard):
    """A random challenge, and perhaps a refusal: never twice the same challenge, and no text."""
    challenges = [answer[:NONCE_NBYTES] for answer in heard if answer]
    assert len(set(challenges)) == len(challenges)
    for answer in heard:
        assert len(answer) in (0, NONCE_NBYTES, NONCE_NBYTES + len(REFUSAL))
        assert answer[NONCE_NBYTES:] in (b"", REFUSAL)
        assert socket.gethostname().encode() not in answer


@contextlib.contextmanager
def store_of(secret):
    port = free_port()
    server = Server(listen(f"127.0.0.1:{port}"), "job", "commrun", secret=secret)
    try:
        yield ("127.0.0.1", port)
    finally:
        server.close()


def rank_of(rank, size, address, secret, body=lambda store: store.gather("all", b"%d" % store.rank), timeout_s=TIMEOUT_S):
    placement = placement_of(rank, size, "%s:%d" % address, "commrun")

    def run():
        with join(placement.__class__(**{**vars(placement), "secret": secret}), 1, "1", timeout_s) as store:
            return body(store)
    return run


# ---- the store ---------------------------------------------------------------------------------------------------

def test_garbage_changes_nothing_and_learns_nothing(caplog):
    secret = Secret(new_secret())
    with store_of(secret) as address, caplog.at_level(logging.WARNING, "commlib"):
        came = threading.Event()

        def first(store):
            came.set()
            return store.gather("all", b"0")

        def second():
            assert came.wait(TIMEOUT_S)
            heard = [attack(address, data) for data in MALFORMED]
            return heard, rank_of(1, 2, address, secret)()

        result, (heard, other) = together(rank_of(0, 2, address, secret, first), second)
    assert result == other == [b"0", b"1"]
    assert_nothing_learned(heard)
    assert "refused a connection from 127.0.0.1" in caplog.text and "another secret" in caplog.text


@pytest.mark.parametrize("mine", [Secret(), Secret(new_secret())])
def test_another_secret_is_an_error_at_once_and_says_what_to_do(mine):
    secret = Secret(new_secret())
    with store_of(secret) as address:
        began = time.monotonic()
        with pytest.raises(StartError, match="another secret; give all ranks of a job the same COMMLIB_SECRET_FILE"):
            rank_of(1, 2, address, mine, timeout_s=60.0)()
        assert time.monotonic() - began < 10.0
        assert together(*[rank_of(rank, 2, address, secret) for rank in range(2)]) == [[b"0", b"1"]] * 2


def test_an_impostor_store_is_not_believed():
    """Somebody else has taken the address: it gets a rank's proof, which is of no use to it, and no word more."""
    secret, heard = Secret(new_secret()), []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def impostor():
            listener.settimeout(TIMEOUT_S)
            for reply in (os.urandom(32), b"\xff" * 32, encode({"op": "welcome"}).ljust(32)):
                sock = listener.accept()[0]
                with sock:
                    sock.settimeout(TIMEOUT_S)
                    sock.sendall(os.urandom(NONCE_NBYTES))
                    heard.append(exactly(sock, PROOF_NBYTES))
                    sock.sendall(reply)
                    heard.append(sock.recv(4096))

        _, result = together(impostor, rank_of(1, 2, listener.getsockname(), secret, timeout_s=1.0))
    assert isinstance(result, StartError)
    assert [len(data) for data in heard] == [PROOF_NBYTES, 0] * 3  # whole proofs, and then nothing


def test_a_recorded_rank_cannot_be_replayed():
    """All that a rank said to the store is said again, whole and cut, to the same store while the job starts."""
    secret = Secret(new_secret())
    with store_of(secret) as address, socket.create_server(("127.0.0.1", 0)) as proxy:
        recorded, came = [], threading.Event()

        def between():
            proxy.settimeout(TIMEOUT_S)
            with proxy.accept()[0] as inner, socket.create_connection(address) as outer:
                pump(inner, outer, recorded)

        def first(store):
            came.set()
            values = store.gather("all", b"0")
            heard = [attack(address, b"".join(recorded)[:cut]) for cut in (PROOF_NBYTES, PROOF_NBYTES + 50, 1 << 20)]
            store.gather("still well", b"")
            return values, heard

        def second(store):
            values = store.gather("all", b"1")
            store.gather("still well", b"")
            return values

        (values, heard), other, _ = together(
            rank_of(0, 2, address, secret, first), rank_of(1, 2, proxy.getsockname(), secret, second), between)
    assert values == other == [b"0", b"1"]
    assert len(b"".join(recorded)) > PROOF_NBYTES + 50
    assert_nothing_learned(heard)


def pump(inner, outer, recorded):
    """Passes bytes on both ways until one side closes; what came from inside is recorded."""
    ways = {inner: outer, outer: inner}
    threads = [threading.Thread(target=one_way, args=(source, target, recorded if source is inner else []))
               for source, target in ways.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def one_way(source, target, recorded):
    with contextlib.suppress(OSError):
        while True:
            data = source.recv(1 << 16)
            if not data:
                break
            recorded.append(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def test_who_has_the_secret_still_must_be_who_he_says():
    """A rank proves its number; a hello with another is refused, and so is a proof that was meant for a rank."""
    secret = Secret(new_secret())
    with store_of(secret) as address:
        for claim, hello in ((Claim(1, THE_STORE), dict(HELLO, rank=0)), (Claim(1, 0), HELLO)):
            with socket.create_connection(address, TIMEOUT_S) as sock:
                calling = Calling(store_key(secret, "job"), claim)
                sock.sendall(calling.greeting + calling.prove(exactly(sock, NONCE_NBYTES)))
                assert calling.accepts(exactly(sock, ANSWER_NBYTES))
                sock.sendall(encode(hello))
                assert b"refused" in sock.recv(4096)
        assert together(*[rank_of(rank, 2, address, secret) for rank in range(2)]) == [[b"0", b"1"]] * 2


def test_thousands_of_connections_starve_nobody():
    """They hold at most a few hundred descriptors of the store, the longest-waiting go first, and ranks get through."""
    secret, before = Secret(new_secret()), len(os.listdir("/proc/self/fd"))
    with store_of(secret) as address, contextlib.ExitStack() as stack:
        most = 0

        def flood():
            nonlocal most
            for number in range(3000):
                sock = socket.socket()
                sock.setblocking(False)
                sock.connect_ex(address)
                stack.callback(sock.close)
                if number % 500 == 499:
                    most = max(most, len(os.listdir("/proc/self/fd")) - number)

        results = together(flood, *[rank_of(rank, 8, address, secret) for rank in range(8)])
        assert results[1:] == [[b"%d" % rank for rank in range(8)]] * 8
        assert most < before + 256 + 200
    with store_of(secret) as address:
        assert together(rank_of(0, 1, address, secret)) == [[b"0"]]


def test_slow_callers_are_closed(monkeypatch):
    monkeypatch.setattr(proof, "_LONGEST_S", 0.3)
    with store_of(Secret(new_secret())) as address, socket.create_connection(address, TIMEOUT_S) as slow:
        slow.settimeout(TIMEOUT_S)
        slow.recv(NONCE_NBYTES, socket.MSG_WAITALL)
        with contextlib.suppress(OSError):
            for _ in range(PROOF_NBYTES - 1):  # a byte now and then does not help
                slow.send(b"x")
                time.sleep(0.01)
        with contextlib.suppress(ConnectionError):
            assert slow.recv(1) == b""


# ---- no secret ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("address, secret, options, fine", [
    ("node7:1234", Secret(), {}, False), ("10.0.0.1:1234", Secret(), {}, False), ("[fe80::1%eth0]:1", Secret(), {}, False),
    ("node7:1234", Secret("x" * 40), {}, True), ("node7:1234", Secret(), {"allow_unauthenticated": "1"}, True),
    ("node7:1234", Secret(), {"allow_unauthenticated": "0"}, False),
    ("127.0.0.1:1", Secret(), {}, True), ("[::1]:1", Secret(), {}, True), ("localhost:1", Secret(), {}, True),
    ("unix:@x", Secret(), {}, True),
])
def test_ranks_without_a_secret_meet_over_no_network(address, secret, options, fine):
    placement = placement_of(0, 2, address)
    placement = placement.__class__(**{**vars(placement), "secret": secret, "options": options})
    if fine:
        check_protection(placement)
        return
    with pytest.raises(StartError, match="COMMLIB_SECRET_FILE=FILE on every rank; or, .*COMMLIB_ALLOW_UNAUTHENTICATED=1"):
        join(placement, 1, "1", TIMEOUT_S)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_a_store_of_another_user_is_not_believed():
    """An abstract name belongs to whoever takes it first."""
    name = new_name()
    reader, writer = os.pipe()
    squatter = os.fork()
    if squatter == 0:
        os.setuid(12345)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"\0{name}-1")
            sock.listen(9)
            os.write(writer, b"x")
            time.sleep(TIMEOUT_S)
        os._exit(0)
    try:
        os.read(reader, 1)
        with pytest.raises(StartError, match="user 12345 listens there"):
            join(placement_of(1, 2, f"unix:@{name}"), 1, "1", 0.3)
    finally:
        os.kill(squatter, 9)
        os.waitpid(squatter, 0)
        os.close(reader)
        os.close(writer)


# ---- links between ranks -----------------------------------------------------------------------------------------

def attacked(monkeypatch, before):
    """Links two ranks; `before(place)` is called with rank 0's address when rank 1 is about to call it."""
    real = connecting.dial

    def dial(places, *arguments):
        before(places[0].address)
        return real(places, *arguments)

    monkeypatch.setattr(connecting, "dial", dial)
    results = run_threads(2, link_all("tcp"))
    assert [result if isinstance(result, Exception) else result[0] for result in results] == [{1: ("tcp", 1)}, {0: ("tcp", 0)}]


def test_garbage_at_a_rank(monkeypatch, caplog):
    heard = []
    with caplog.at_level(logging.WARNING, "commlib"):
        attacked(monkeypatch, lambda address: heard.extend(attack(address, data) for data in MALFORMED))
    assert len(heard) == len(MALFORMED)
    assert_nothing_learned(heard)
    assert "rank 0 refused a connection" in caplog.text


def test_thousands_of_connections_at_a_rank(monkeypatch):
    with contextlib.ExitStack() as stack:
        def flood(address):
            for _ in range(2000):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(address)

        attacked(monkeypatch, flood)


def test_a_recorded_peer_cannot_be_replayed(monkeypatch):
    """What rank 1 said to rank 0 in one initialisation is said again in the next, before rank 1 comes."""
    recorded, heard = [], []

    def proxied(address):
        proxy = socket.create_server(("127.0.0.1", 0))

        def between():
            with proxy, proxy.accept()[0] as inner, socket.create_connection(address) as outer:
                pump(inner, outer, recorded)

        threading.Thread(target=between, daemon=True).start()
        return proxy.getsockname()

    real = connecting.dial
    monkeypatch.setattr(connecting, "dial", lambda places, *rest: real(
        [places[0]._replace(address=proxied(places[0].address))], *rest))
    assert run_threads(2, link_all("tcp"))[0][0] == {1: ("tcp", 1)}
    monkeypatch.setattr(connecting, "dial", real)
    said = b"".join(recorded)
    assert len(said) > PROOF_NBYTES
    attacked(monkeypatch, lambda address: heard.extend(attack(address, said[:cut]) for cut in (PROOF_NBYTES, len(said))))
    assert len(heard) == 2
    assert_nothing_learned(heard)


# ---- a running job -----------------------------------------------------------------------------------------------

def ports_of(pid):
    """{state: local addresses} of a process's TCP sockets; state "0A" is LISTEN."""
    inodes = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(f"/proc/{pid}/fd/{name}").removeprefix("socket:[").removesuffix("]"))
    ports = {}
    for table in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{table}", encoding="ascii") as file:
            for fields in map(str.split, file.readlines()[1:]):
                if fields[9] in inodes:
                    ports.setdefault(fields[3], set()).add(int(fields[1].rpartition(":")[2], 16))
    return ports


def reduce_for(seconds):
    """All-reduces until all ranks have done so for long enough; every result is checked."""
    communicator, end_s, rounds = commlib.communicator(), time.monotonic() + seconds, 0
    while communicator.allreduce(np.array([time.monotonic() < end_s], np.int32), op=commlib.Min)[0]:
        array = np.arange(50_000, dtype=np.float32)
        np.testing.assert_array_equal(communicator.allreduce(array, op=commlib.Sum), array * communicator.size)
        rounds += 1
    return rounds


def test_a_running_job_listens_nowhere_and_minds_nobody():
    with Ranks(3, transport="tcp", secret=secrets.token_hex(32)) as ranks:
        ports = [ports_of(process.pid) for process in ranks.processes]
        assert all("0A" not in found and found["01"] for found in ports), "no listener, and the links are seen"
        ranks.begin(reduce_for, 1.0)
        for port in {port for found in ports for port in found["01"]}:
            for data in MALFORMED:
                with pytest.raises(ConnectionRefusedError):
                    attack(("127.0.0.1", port), data)
        assert min(ranks.collect()) > 0
