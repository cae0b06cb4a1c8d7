"""Links between all pairs of ranks: shared memory where two ranks can map the same memory, TCP or MPI elsewhere.

Called once per initialisation, with the engine's attach functions handed in as an `Endpoint`; knows nothing of the
engine itself. "Same host" is a guess from host identities that only counts once descriptors were passed and mapped; a
pair where that fails takes TCP, and both of its sides know it through the store.
"""
from __future__ import annotations

import contextlib
import functools
import json
import mmap
import os
import secrets
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple

from commlib.bootstrap import Placement, StartError
from commlib.dial import OUT_OF_DESCRIPTORS, Place, Unreachable, dial
from commlib.handshake import Shaken, shake
from commlib.interfaces import Address, addresses, listen_at, offered, parse_ports, reached_from_here
from commlib.mpi import Library
from commlib.rendezvous import Store
from commlib.rendezvous_wire import spell_ranks
from commlib.secret import Secret
from commlib.told import facts_of, name_of, offers_of, ranks_of

TRANSPORTS = ("auto", "shm", "tcp", "mpi")

_SO_PEERPIDFD = 77      # Linux 6.5; Python has no name for it
_STRANGERS = 64         # room in the queue of callers for some that are none of us
_NONCE_NBYTES = 32


class SharedPeer(NamedTuple):
    """What a rank needs to attach a peer's shared memory; the descriptors are owned by whoever holds this."""

    memfd: int
    doorbell: int
    pidfd: int      # -1 if the kernel gives none
    my_slot: int    # this rank's slot in the peer's memory
    peer_slot: int  # the peer's slot in this rank's memory

    def close(self) -> None:
        for descriptor in (self.memfd, self.doorbell, self.pidfd):
            if descriptor >= 0:
                os.close(descriptor)


class Endpoint(Protocol):
    """What `connect` needs of an engine. The attach methods own the descriptors given to them, also when they raise."""

    def create_shared(self, npeers: int) -> Tuple[int, int]:
        """Makes this rank's shared memory for `npeers` peers; returns (memfd, doorbell), which stay the engine's."""

    def attach_shared(self, peer: int, shared: SharedPeer) -> None:
        """Links a peer of this host."""

    def attach_tcp(self, peer: int, descriptor: int) -> None:
        """Links a peer by a connected, non-blocking socket."""

    def attach_mpi(self, peers: Sequence[int], library: Library) -> None:
        """Links peers by MPI; called once."""


@dataclass(frozen=True)
class Topology:
    """Who lives where.

    Args:
        hosts: host index of every rank; hosts are numbered by their lowest rank.
        names: host name of every rank.
        transports: "shm", "tcp" or "mpi" for every peer of this rank.
        local_rank, local_size, cross_rank, cross_size: as the launcher gave them, else derived from `hosts`.
    """

    hosts: Tuple[int, ...]
    names: Tuple[str, ...]
    transports: Dict[int, str]
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int

    @property
    def is_homogeneous(self) -> bool:
        """Whether all hosts have equally many ranks."""
        return len({self.hosts.count(host) for host in set(self.hosts)}) == 1

    def of(self, ranks: Sequence[int], rank: int) -> Topology:
        """The topology of some of the ranks, in this order, as the one of them at place `rank` sees it."""
        facts = [{"host": self.hosts[r], "name": self.names[r]} for r in ranks]
        transports = {place: self.transports[r] for place, r in enumerate(ranks) if r in self.transports}
        return _derived(facts, transports, rank)


def connect(placement: Placement, store: Store, endpoint: Endpoint, transport: str = "auto",
            library: Optional[Library] = None) -> Topology:
    """Links this rank with every other.

    Args:
        placement: this process's place in the job.
        store: joined by all ranks; every rank must call connect on it once.
        endpoint: the engine's attach functions.
        transport: "auto" (shared memory where possible), "shm" (or an error), "tcp" or "mpi"; equal on all ranks.
        library: the MPI library that links what shares no memory; None: TCP does.
    Raises:
        StartError: a rank was lost or cannot be reached. The links attached so far are the endpoint's to close.
    """
    if transport not in TRANSPORTS:
        raise StartError(f"transport is {transport!r}: it must be one of {', '.join(TRANSPORTS)}")
    if transport == "mpi" and library is None:
        raise StartError("transport is mpi, but these ranks have met without MPI: use auto, or commlib.init(comm=...)")
    if transport == "tcp" and library is not None:
        raise StartError("transport is tcp, but the ranks are those of an MPI communicator, which has no addresses: use auto "
                         "or mpi, or call init() without comm")
    facts = survey(store, transport)
    key = link_key(placement.secret, placement.job, facts)
    local = [] if transport in ("tcp", "mpi") else local_peers(store.rank, [fact["host"] for fact in facts])
    shared = _attach_shared(store, key, local, endpoint)
    others = [peer for peer in range(store.size) if peer != store.rank and peer not in shared]
    if others and transport == "shm":
        raise StartError(
            f"rank {store.rank} shares no memory with rank {spell_ranks(others)}, but the transport is shm: use auto, "
            "or start all ranks on one host and in one network namespace"
        )
    if library is None:
        interfaces, ports = placement.options.get("network_interfaces", ""), placement.options.get("port_range", "")
        _attach_tcp(connect_tcp(store, key, others, facts, interfaces, ports), endpoint)
    else:
        endpoint.attach_mpi(others, library)
    store.gather("connect/done", b"")
    elsewhere = "tcp" if library is None else "mpi"
    transports = {peer: "shm" if peer in shared else elsewhere for peer in range(store.size) if peer != store.rank}
    return _topology(placement, facts, transports)


def survey(store: Store, transport: str) -> List[dict]:
    """Every rank's host identity, host name and choice of transport, and a random number."""
    mine = {"host": host_identity(), "name": socket.gethostname(), "transport": transport,
            "nonce": secrets.token_hex(_NONCE_NBYTES)}
    facts = [facts_of(text, rank) for rank, text in enumerate(store.gather("connect/facts", json.dumps(mine).encode()))]
    for rank, fact in enumerate(facts):
        if fact["transport"] != facts[0]["transport"]:
            raise StartError(f"the ranks differ in transport: rank 0 has {facts[0]['transport']}, rank {rank} has "
                             f"{fact['transport']}; give all ranks the same")
    return facts


def link_key(secret: Secret, job: str, facts: Sequence[dict]) -> bytes:
    """What all ranks of this initialisation hold, and nobody else.

    Over a network the secret keeps it. Ranks of one host that have none hold what went through the store's Unix socket, which
    the kernel opens to their own user only: rank 0's random number.
    """
    return secret.key("links", job, facts[0]["nonce"])


def host_identity() -> str:
    """Equal for processes that can reach each other's abstract sockets: same kernel, same network namespace.

    Mount and pid namespaces are left out: containers started once per rank differ there and still share memory.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot_id:
            kernel = boot_id.read().strip()
    except OSError:
        kernel = socket.gethostname()  # some sandboxes hide it
    try:
        return f"{kernel}/{os.readlink('/proc/self/ns/net')}"
    except OSError:
        return kernel


def local_peers(rank: int, identities: Sequence[str]) -> List[int]:
    """The other ranks with this rank's host identity, in order; a peer's index here is its slot."""
    return [peer for peer, identity in enumerate(identities) if peer != rank and identity == identities[rank]]


# ---- shared memory -----------------------------------------------------------------------------------------------

def exchange_shared(store: Store, key: bytes, peers: Sequence[int], memfd: int,
                    doorbell: int) -> Dict[int, SharedPeer]:
    """Swaps shared memory and doorbells with local peers.

    Args:
        store: joined by all ranks.
        key: from `link_key`.
        peers: sorted local peers; each of them must call this with its own.
        memfd, doorbell: this rank's; they stay the caller's.
    Returns:
        The peers whose memory was received and can be mapped, and that say the same of ours.
    Raises:
        StartError: a rank was lost meanwhile.
    """
    deadline = time.monotonic() + store.timeout_s
    received: Dict[int, Shaken] = {}
    shared: Dict[int, SharedPeer] = {}
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            outgoing, incoming = _call_local(store, peers, listener)
            dials = {peer: functools.partial(_take, outgoing, peer) for peer in outgoing}
            try:
                received = shake(store, key, [listener], dials, incoming, deadline, (memfd, doorbell))
            finally:
                for sock in outgoing.values():
                    sock.close()
        for peer in sorted(received):
            usable = _usable(store.rank, peer, peers, received.pop(peer))
            if usable is not None:
                shared[peer] = usable
        verdicts = _tell_each_other(store, "shm/mapped", sorted(shared), peers, ranks_of)
        for peer in list(shared):
            if store.rank not in verdicts[peer]:
                shared.pop(peer).close()
        return shared
    except BaseException:
        for held in list(received.values()) + list(shared.values()):
            held.close()
        raise


def _take(connected: Dict[int, socket.socket], peer: int) -> socket.socket:
    if peer not in connected:
        raise Unreachable("it closed its Unix socket")
    return connected.pop(peer)


def _call_local(store: Store, peers: Sequence[int], listener: socket.socket) -> tuple:
    """Connects to all lower peers. Returns (those connected, the higher ones that have connected to us)."""
    listener.bind("")  # the kernel picks a free abstract name
    listener.listen(max(1, len(peers)))
    name = listener.getsockname()[1:].decode()
    names = _tell_each_other(store, "shm/name", name, peers, name_of)
    outgoing: Dict[int, socket.socket] = {}
    try:
        for peer in [peer for peer in peers if peer < store.rank]:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)  # the peer's queue has room for all: there is nothing to wait for
                sock.connect("\0" + names[peer])
                outgoing[peer] = sock
            except OSError:
                sock.close()
        calls = _tell_each_other(store, "shm/called", sorted(outgoing), peers, ranks_of)
    except BaseException:
        for sock in outgoing.values():
            sock.close()
        raise
    return outgoing, {peer for peer in peers if peer > store.rank and store.rank in calls[peer]}


def _tell_each_other(store: Store, name: str, value: object, peers: Sequence[int], read: Callable[[bytes, int], Any]) -> dict:
    """A gather among local peers only."""
    store.set(f"{name}/{store.rank}", json.dumps(value).encode())
    values = store.get_all([f"{name}/{peer}" for peer in peers])
    return {peer: read(text, peer) for peer, text in zip(peers, values)}


def _usable(rank: int, peer: int, peers: Sequence[int], shaken: Shaken) -> Optional[SharedPeer]:
    """The peer's shared memory, or None if it did not come whole or cannot be mapped."""
    try:
        memfd, doorbell = shaken.descriptors
        with mmap.mmap(memfd, 0, flags=mmap.MAP_SHARED):  # the whole of it, untouched: costs address space only
            pass
        slots = {"my_slot": _slot(rank, peer, peers), "peer_slot": peers.index(peer)}
        usable = SharedPeer(memfd, doorbell, _pidfd(shaken.sock), **slots)
    except (ValueError, OSError) as error:
        shaken.close()
        if isinstance(error, OSError) and error.errno in OUT_OF_DESCRIPTORS:
            raise
        return None
    shaken.sock.close()
    return usable


def _slot(rank: int, peer: int, peers: Sequence[int]) -> int:
    """This rank's index among the peer's local peers: these are ours, with us in place of the peer."""
    return sorted([other for other in peers if other != peer] + [rank]).index(rank)


def _pidfd(sock: socket.socket) -> int:
    """A descriptor of the process at the other end of a Unix socket, -1 if the kernel cannot tell."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        pass  # before Linux 6.5
    pid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))[0]
    try:
        return os.pidfd_open(pid) if pid > 0 else -1  # pid 0: in another pid namespace
    except OSError as error:
        if error.errno in OUT_OF_DESCRIPTORS:
            raise
        return -1


def _attach_shared(store: Store, key: bytes, local: Sequence[int], endpoint: Endpoint) -> List[int]:
    if not local:
        return []
    shared = exchange_shared(store, key, local, *endpoint.create_shared(len(local)))
    attached = sorted(shared)
    try:
        for peer in attached:
            endpoint.attach_shared(peer, shared.pop(peer))
    finally:
        for rest in shared.values():
            rest.close()
    return attached


# ---- tcp ---------------------------------------------------------------------------------------------------------

def connect_tcp(store: Store, key: bytes, peers: Sequence[int], facts: Sequence[dict], interfaces: str = "",
                ports: str = "") -> Dict[int, socket.socket]:
    """Connects to all `peers`: the higher rank calls the lower. Listens only while it lasts.

    Args:
        store: joined by all ranks.
        key: from `link_key`.
        peers: each of them must call this with this rank among its peers.
        facts: from `survey`.
        interfaces: where peers shall reach this rank, as `interfaces.offered` takes it.
        ports: to listen on, as `interfaces.parse_ports` takes it.
    Returns:
        A connected, non-blocking socket for each peer.
    Raises:
        StartError: a rank was lost or cannot be reached.
    """
    if not peers:
        return {}
    deadline = time.monotonic() + store.timeout_s
    inside = all(facts[peer]["host"] == facts[store.rank]["host"] for peer in peers)
    with contextlib.ExitStack() as stack:
        listeners = _listen(_own_addresses(store, interfaces, inside), parse_ports(ports), len(peers) + _STRANGERS, stack)
        mine = [[address.interface, str(address.ip), sock.getsockname()[1]] for address, sock in listeners]
        store.set(f"tcp/{store.rank}", json.dumps(mine).encode())
        lower = [peer for peer in peers if peer < store.rank]
        answers = store.get_all([f"tcp/{peer}" for peer in lower])
        own = {tuple(offer) for offer in mine}
        dials = {}
        for peer, answer in zip(lower, answers):
            offers = [offer for offer in offers_of(answer, peer) if offer not in own]  # equal addresses on two hosts: that's us
            dials[peer] = functools.partial(_call, _places(store, peer, offers, facts, bool(interfaces)), store, deadline)
        incoming = {peer for peer in peers if peer > store.rank}
        shaken = shake(store, key, [sock for _, sock in listeners], dials, incoming, deadline)
    return {peer: connection.sock for peer, connection in shaken.items()}


def _own_addresses(store: Store, interfaces: str, inside: bool) -> List[Address]:
    """Where this rank shall be called. Ranks of one host need no network."""
    known = addresses()
    if inside and not interfaces:
        return [address for address in known if address.is_loopback][:1] or known[:1]
    return offered(interfaces, store.route()[0], known)


def _listen(own: Sequence[Address], ports: Optional[Tuple[int, int]], backlog: int,
            stack: contextlib.ExitStack) -> List[Tuple[Address, socket.socket]]:
    """A listening socket at each address that can be bound: an address may have gone since it was looked up."""
    listeners, reasons = [], []
    for address in own:
        try:
            listeners.append((address, stack.enter_context(listen_at(address, ports, backlog))))
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:
                raise
            reasons.append(f"{address.ip}: {error.strerror}")
    if not listeners:
        raise StartError(f"this host has no address where other ranks could reach it ({'; '.join(reasons) or 'none at all'}): "
                         "bring up a network interface, or name one with COMMLIB_NETWORK_INTERFACES")
    return listeners


def _places(store: Store, peer: int, published: Sequence[Sequence], facts: Sequence[dict], chosen: bool) -> List[Place]:
    """Where a peer may be reached, best first. A loopback address means something only on its own host."""
    same_host = facts[peer]["host"] == facts[store.rank]["host"]
    offers = [(interface, ip, port) for interface, ip, port in published if same_host or not _is_loopback(ip)]
    store_ip = store.route()[1] if peer == 0 and store.owner == "rank 0" and not chosen else None
    offers.sort(key=lambda offer: offer[1] != store_ip)  # where the store answered, rank 0 lives
    if store_ip and offers and offers[0][1] != store_ip and not _is_loopback(store_ip):
        offers.append(("", store_ip, offers[0][2]))  # a host that does not know its own outer address
    return [address.place(port) for interface, ip, port in offers for address in reached_from_here(interface, ip)]


def _call(places: List[Place], store: Store, deadline: float) -> socket.socket:
    """Connects to a peer. The place goes to the end: if that was not the peer, the others come before it next time."""
    sock = dial(places, deadline, store, store.check)
    for place in [place for place in places if place.address[:2] == sock.getpeername()[:2]]:
        places.remove(place)
        places.append(place)
    return sock


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _attach_tcp(sockets: Dict[int, socket.socket], endpoint: Endpoint) -> None:
    try:
        for peer in sorted(sockets):
            endpoint.attach_tcp(peer, sockets.pop(peer).detach())
    finally:
        for rest in sockets.values():
            rest.close()


# ---- topology ----------------------------------------------------------------------------------------------------

def _topology(placement: Placement, facts: Sequence[dict], transports: Dict[int, str]) -> Topology:
    return _derived(facts, transports, placement.rank, placement.local_rank, placement.local_size, placement.cross_rank,
                    placement.cross_size)


def _derived(facts: Sequence[dict], transports: Dict[int, str], rank: int, local_rank: Optional[int] = None,
             local_size: Optional[int] = None, cross_rank: Optional[int] = None,
             cross_size: Optional[int] = None) -> Topology:
    identities = [fact["host"] for fact in facts]
    order = list(dict.fromkeys(identities))
    hosts = tuple(order.index(identity) for identity in identities)
    local_rank = _given(local_rank, hosts[:rank].count(hosts[rank]))
    sizes = [hosts.count(host) for host in range(len(order))]
    having = [host for host, size in enumerate(sizes) if size > local_rank] or [hosts[rank]]
    return Topology(
        hosts, tuple(fact["name"] for fact in facts), transports, local_rank,
        _given(local_size, sizes[hosts[rank]]),
        _given(cross_rank, having.index(hosts[rank]) if hosts[rank] in having else 0),
        _given(cross_size, len(having)),
    )


def _given(value: Optional[int], derived: int) -> int:
    return derived if value is None else value
