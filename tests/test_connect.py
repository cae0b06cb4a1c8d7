"""Links between ranks: who gets shared memory, who gets TCP, that both ends are the right ones, and that nothing leaks.

Ranks are threads here, with a store of their own; deaths of real processes are in test_rendezvous_failures.py.
"""
import contextlib
import mmap
import os
import secrets
import socket
import threading

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

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
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
        assert (topology.local_rank, topology.local_size, topology.cross_rank, topology.cross_size) == (rank, size, 0, 1)
        assert topology.is_homogeneous
