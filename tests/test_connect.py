"""Links between ranks: who gets shared memory, who gets TCP, that both ends are the right ones, and that nothing leaks.

Ranks are threads here, with a store of their own; deaths of real processes are in test_rendezvous_failures.py.
"""
import contextlib
import mmap
import os
import secrets
import socket
import subprocess
import sys
import threading
import time

import pytest

from commlib import connect as connecting
from commlib.bootstrap import Placement, StartError
from commlib.connect import Endpoint, connect
from commlib.rendezvous import join

TIMEOUT_S = 10.0


def placement_of(rank, size, name, **options):
    return Placement("test", rank, size, None, None, None, None, f"unix:@{name}", "rank 0", name, options)


def run_ranks(size, body, timeout_s=TIMEOUT_S, **options):
    """body(placement, store) in one thread per rank; returns results by rank, exceptions included."""
    name, results = f"commlib-test-{secrets.token_hex(6)}", [None] * size

    def run(rank):
        placement = placement_of(rank, size, name, **options)
        try:
            with join(placement, 1, "test", timeout_s) as store:
                results[rank] = body(placement, store)
        except Exception as error:  # the assertion is the caller's
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * timeout_s)
        assert not thread.is_alive()
    return results


class FakeEngine(Endpoint):
    """Memory whose slots hold a text for each peer; `links` has what came over each link."""

    def __init__(self, rank, size):
        self.rank, self.size, self.links, self.npeers = rank, size, {}, 0
        self.stack = contextlib.ExitStack()

    def create_shared(self, npeers):
        self.npeers = npeers
        memfd = os.memfd_create("test")
        doorbell, other = os.pipe()
        for descriptor in (memfd, doorbell, other):
            self.stack.callback(os.close, descriptor)
        os.truncate(memfd, mmap.PAGESIZE)
        for slot in range(npeers):
            os.pwrite(memfd, f"{self.rank}->{slot};".encode().ljust(32), 32 * slot)
        return memfd, doorbell

    def attach_shared(self, peer, shared):
        for descriptor in (shared.memfd, shared.doorbell, shared.pidfd):
            assert not os.get_inheritable(descriptor)
        text = os.pread(shared.memfd, 32, 32 * shared.my_slot).split(b";")[0].decode()
        assert 0 <= shared.peer_slot < self.npeers
        self.links[peer] = ("shm", text, shared.my_slot, shared.peer_slot)
        shared.close()

    def attach_tcp(self, peer, descriptor):
        assert not os.get_inheritable(descriptor)
        with socket.socket(fileno=descriptor) as sock:
            sock.settimeout(TIMEOUT_S)
            sock.sendall(b"%6d" % self.rank)
            self.links[peer] = ("tcp", int(sock.recv(6, socket.MSG_WAITALL)))


def my_rank():
    return int(threading.current_thread().name.split()[1])


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def link_all(transport):
    def body(placement, store):
        engine = FakeEngine(placement.rank, placement.size)
        with engine.stack:
            topology = connect(placement, store, engine, transport)
        return engine.links, topology
    return body


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_every_pair_is_linked_to_the_right_peer(size, transport):
    results = run_ranks(size, link_all(transport))
    for rank, (links, topology) in enumerate(results):
        assert sorted(links) == [peer for peer in range(size) if peer != rank]
        for peer, link in links.items():
            if transport == "tcp":
                assert link == ("tcp", peer)
                continue
            kind, text, my_slot, peer_slot = link
            assert (kind, text) == ("shm", f"{peer}->{my_slot}")
            assert results[peer][0][rank][2:] == (peer_slot, my_slot)
        place = (topology.local_rank, topology.local_size, topology.cross_rank, topology.cross_size)
        assert place == (rank, size, 0, 1)
        assert topology.is_homogeneous


def test_hosts_are_told_apart(monkeypatch):
    """Ranks 0, 2 and 1, 3, 4 on two hosts: memory inside, TCP between."""
    hosts = [0, 1, 0, 1, 1]
    monkeypatch.setattr(connecting, "host_identity", lambda: f"host {hosts[my_rank()]}")
    monkeypatch.setattr(connecting, "_is_loopback", lambda address: False)  # the two "hosts" share one network
    monkeypatch.setattr("commlib.rendezvous.Store.route", lambda store: ("127.0.0.1", "127.0.0.1"))
    results = run_ranks(5, link_all("auto"))
    for rank, (links, topology) in enumerate(results):
        kinds = {peer: "shm" if hosts[peer] == hosts[rank] else "tcp" for peer in range(5) if peer != rank}
        assert {peer: link[0] for peer, link in links.items()} == kinds == topology.transports
        assert topology.hosts == tuple(hosts) and not topology.is_homogeneous
    places = [(t.local_rank, t.local_size, t.cross_rank, t.cross_size) for _, t in results]
    assert places == [(0, 2, 0, 2), (0, 3, 1, 2), (1, 2, 0, 2), (1, 3, 1, 2), (2, 3, 0, 1)]


@pytest.mark.parametrize("broken", ["mapping", "connecting", "passing"])
def test_a_pair_that_cannot_share_takes_tcp(monkeypatch, broken):
    if broken == "mapping":
        real = connecting._usable

        def usable(rank, peer, peers, shaken):
            if (rank, peer) == (1, 2):
                shaken.close()
                return None
            return real(rank, peer, peers, shaken)
        monkeypatch.setattr(connecting, "_usable", usable)
    elif broken == "connecting":
        real_tell = connecting._tell_each_other

        def tell(store, name, value, peers, read):
            told = real_tell(store, name, value, peers, read)
            if (name, store.rank) == ("shm/name", 2):
                told[1] = "no-such-name"
            return told
        monkeypatch.setattr(connecting, "_tell_each_other", tell)
    else:
        real_shake = connecting.shake

        def shake(store, *arguments):
            done = real_shake(store, *arguments)
            if store.rank == 1:
                while done[2].descriptors:  # as when the limit of open files cuts them off
                    os.close(done[2].descriptors.pop())
            return done
        monkeypatch.setattr(connecting, "shake", shake)
    before = descriptors()
    results = run_ranks(3, link_all("auto"))
    assert [{peer: link[0] for peer, link in sorted(links.items())} for links, _ in results] == [
        {1: "shm", 2: "shm"}, {0: "shm", 2: "tcp"}, {0: "shm", 1: "tcp"}]
    assert descriptors() == before


def test_shm_alone_is_refused_between_hosts(monkeypatch):
    monkeypatch.setattr(connecting, "host_identity", lambda: f"host {my_rank()}")
    for result in run_ranks(2, link_all("shm")):
        assert isinstance(result, StartError) and "use auto" in str(result)


def test_different_choices_are_named():
    def body(placement, store):
        return link_all("auto" if placement.rank else "tcp")(placement, store)

    for result in run_ranks(3, body):
        assert isinstance(result, StartError)
        assert "rank 0 has tcp, rank 1 has auto" in str(result)


def test_an_unknown_transport_is_an_error():
    result = run_ranks(1, link_all("udp"))[0]
    assert isinstance(result, StartError) and "auto, shm, tcp" in str(result)


def test_an_unknown_interface_is_an_error():
    result = run_ranks(2, link_all("tcp"), network_interfaces="none0")[0]
    assert isinstance(result, StartError) and "COMMLIB_NETWORK_INTERFACES" in str(result) and "lo" in str(result)


def test_an_interface_can_be_named():
    results = run_ranks(2, link_all("tcp"), network_interfaces="lo")
    assert [links for links, _ in results] == [{1: ("tcp", 1)}, {0: ("tcp", 0)}]


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_fifty_cycles_leak_nothing(transport):
    run_ranks(2, link_all(transport))
    before, threads = descriptors(), threading.active_count()
    for _ in range(50):
        run_ranks(2, link_all(transport))
    assert (descriptors(), threading.active_count()) == (before, threads)


STAGES = ["connect/facts", "shm/name", "shm/called", "shm/mapped", "tcp", "connect/done"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_at_any_stage_is_noticed_and_leaks_nothing(stage):
    """Rank 1 vanishes when it would publish what belongs to the stage."""
    transport = "tcp" if stage == "tcp" else "auto"

    class Vanished(Exception):
        pass

    def body(placement, store):
        if placement.rank == 1:
            real = store.set

            def publish(key, value):
                if key.startswith(stage):
                    store._channel.sock.shutdown(socket.SHUT_RDWR)
                    raise Vanished
                real(key, value)
            store.set = publish
        return link_all(transport)(placement, store)

    before = descriptors()
    results = run_ranks(3, body)
    assert isinstance(results[1], Vanished)
    for result in (results[0], results[2]):
        assert isinstance(result, StartError) and "rank 1" in str(result) and "was lost" in str(result), result
    assert descriptors() == before


def test_an_engine_that_cannot_attach_leaks_nothing(monkeypatch):
    def attach(engine, peer, shared):
        shared.close()
        raise MemoryError("no room")

    monkeypatch.setattr(FakeEngine, "attach_shared", attach)
    before = descriptors()
    results = run_ranks(3, link_all("auto"))
    assert any(isinstance(result, MemoryError) for result in results)
    assert all(isinstance(result, (MemoryError, StartError)) for result in results)
    assert descriptors() == before


KILLED_IN_THE_HANDSHAKE = """
import os, signal, sys
from commlib import connect as connecting
from commlib.bootstrap import discover
from commlib.rendezvous import join
p = discover()
if p.rank == 1:
    connecting.shake = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with join(p, 1, "1", 15.0) as store:
    facts = connecting.survey(store, "auto")
    connecting.connect_tcp(store, bytes(32), [r for r in range(p.size) if r != p.rank], facts)
"""


def test_a_rank_killed_in_the_handshake_is_named():
    base = {"COMMLIB_SIZE": "3", "COMMLIB_LOCAL_SIZE": "3", "COMMLIB_CROSS_RANK": "0", "COMMLIB_CROSS_SIZE": "1",
            "COMMLIB_STORE": f"unix:@commlib-test-{secrets.token_hex(6)}"}
    began = time.monotonic()
    ranks = [subprocess.Popen([sys.executable, "-c", KILLED_IN_THE_HANDSHAKE], stderr=subprocess.PIPE, text=True,
                              env=dict(os.environ, COMMLIB_RANK=str(rank), COMMLIB_LOCAL_RANK=str(rank), **base))
             for rank in range(3)]
    errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in ranks]
    assert time.monotonic() - began < 5.0
    for rank in (0, 2):
        assert "StartError: rank 1 (pid" in errors[rank] and "was lost" in errors[rank], errors[rank]
