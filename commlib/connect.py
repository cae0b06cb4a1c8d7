"""Links between all pairs of ranks: shared memory where two ranks can map the same memory, TCP elsewhere.

Called once per initialisation, with the engine's attach functions handed in as an `Endpoint`; knows nothing of the
engine itself. "Same host" is a guess from host identities that only counts once descriptors were passed and mapped; a
pair where that fails takes TCP, and both of its sides know it through the store.
"""
from __future__ import annotations

import fcntl
import json
import mmap
import os
import secrets
import socket
import struct
import time
from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Optional, Protocol, Sequence, Tuple

from commlib.bootstrap import Placement, StartError
from commlib.handshake import NEWS_S, TOKEN_NBYTES, Shaken, shake
from commlib.rendezvous import Store
from commlib.rendezvous_wire import spell_ranks

TRANSPORTS = ("auto", "shm", "tcp")

_SO_PEERPIDFD = 77      # Linux 6.5; Python has no name for it
_SIOCGIFADDR = 0x8915   # netdevice(7)
_STRANGERS = 64         # room in the queue of callers for some that are none of us
_CONNECT_S = 10.0       # for one address of a peer that may have several


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


@dataclass(frozen=True)
class Topology:
    """Who lives where.

    Args:
        hosts: host index of every rank; hosts are numbered by their lowest rank.
        names: host name of every rank.
        transports: "shm" or "tcp" for every peer of this rank.
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


def connect(placement: Placement, store: Store, endpoint: Endpoint, transport: str = "auto") -> Topology:
    """Links this rank with every other.

    Args:
        placement: this process's place in the job.
        store: joined by all ranks; every rank must call connect on it once.
        endpoint: the engine's attach functions.
        transport: "auto" (shared memory where possible), "shm" (or an error) or "tcp"; equal on all ranks.
    Raises:
        StartError: a rank was lost or cannot be reached. The links attached so far are the endpoint's to close.
    """
    if transport not in TRANSPORTS:
        raise StartError(f"transport is {transport!r}: it must be one of {', '.join(TRANSPORTS)}")
    facts = survey(store, transport)
    token = bytes.fromhex(facts[0]["token"])
    local = [] if transport == "tcp" else local_peers(store.rank, [fact["host"] for fact in facts])
    shared = _attach_shared(store, token, local, endpoint)
    others = [peer for peer in range(store.size) if peer != store.rank and peer not in shared]
    if others and transport == "shm":
        raise StartError(
            f"rank {store.rank} shares no memory with rank {spell_ranks(others)}, but the transport is shm: use auto, "
            "or start all ranks on one host and in one network namespace"
        )
    interface = placement.options.get("interface", "")
    _attach_tcp(connect_tcp(store, token, others, facts, interface), endpoint)
    store.gather("connect/done", b"")
    transports = {peer: "shm" if peer in shared else "tcp" for peer in range(store.size) if peer != store.rank}
    return _topology(placement, facts, transports)


def survey(store: Store, transport: str) -> List[dict]:
    """Every rank's host identity, host name and choice of transport. Rank 0's token becomes the job's."""
    mine = {"host": host_identity(), "name": socket.gethostname(), "transport": transport,
            "token": secrets.token_hex(TOKEN_NBYTES)}
    facts = [json.loads(value) for value in store.gather("connect/facts", json.dumps(mine).encode())]
    for rank, fact in enumerate(facts):
        if fact["transport"] != facts[0]["transport"]:
            raise StartError(f"the ranks differ in transport: rank 0 has {facts[0]['transport']}, rank {rank} has "
                             f"{fact['transport']}; give all ranks the same")
    return facts


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

def exchange_shared(store: Store, token: bytes, peers: Sequence[int], memfd: int,
                    doorbell: int) -> Dict[int, SharedPeer]:
    """Swaps shared memory and doorbells with local peers.

    Args:
        store: joined by all ranks.
        token: the job's secret.
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
            received = shake(store, token, listener, outgoing, incoming, deadline, (memfd, doorbell))
        for peer in sorted(received):
            usable = _usable(store.rank, peer, peers, received.pop(peer))
            if usable is not None:
                shared[peer] = usable
        verdicts = _tell_each_other(store, "shm/mapped", sorted(shared), peers)
        for peer in list(shared):
            if store.rank not in verdicts[peer]:
                shared.pop(peer).close()
        return shared
    except BaseException:
        for held in list(received.values()) + list(shared.values()):
            held.close()
        raise


def _call_local(store: Store, peers: Sequence[int], listener: socket.socket) -> tuple:
    """Connects to all lower peers. Returns (those connected, the higher ones that have connected to us)."""
    listener.bind("")  # the kernel picks a free abstract name
    listener.listen(max(1, len(peers)))
    name = listener.getsockname()[1:].decode()
    names = _tell_each_other(store, "shm/name", name, peers)
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
        calls = _tell_each_other(store, "shm/called", sorted(outgoing), peers)
    except BaseException:
        for sock in outgoing.values():
            sock.close()
        raise
    return outgoing, {peer for peer in peers if peer > store.rank and store.rank in calls[peer]}


def _tell_each_other(store: Store, name: str, value: object, peers: Sequence[int]) -> dict:
    """A gather among local peers only."""
    store.set(f"{name}/{store.rank}", json.dumps(value).encode())
    values = store.get_all([f"{name}/{peer}" for peer in peers])
    return {peer: json.loads(text) for peer, text in zip(peers, values)}


def _usable(rank: int, peer: int, peers: Sequence[int], shaken: Shaken) -> Optional[SharedPeer]:
    """The peer's shared memory, or None if it did not come whole or cannot be mapped."""
    try:
        memfd, doorbell = shaken.descriptors
        with mmap.mmap(memfd, 0, flags=mmap.MAP_SHARED):  # the whole of it, untouched: costs address space only
            pass
        slots = {"my_slot": _slot(rank, peer, peers), "peer_slot": peers.index(peer)}
        usable = SharedPeer(memfd, doorbell, _pidfd(shaken.sock), **slots)
    except (ValueError, OSError):
        shaken.close()
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
    except OSError:
        return -1


def _attach_shared(store: Store, token: bytes, local: Sequence[int], endpoint: Endpoint) -> List[int]:
    if not local:
        return []
    shared = exchange_shared(store, token, local, *endpoint.create_shared(len(local)))
    attached = sorted(shared)
    try:
        for peer in attached:
            endpoint.attach_shared(peer, shared.pop(peer))
    finally:
        for rest in shared.values():
            rest.close()
    return attached


# ---- tcp ---------------------------------------------------------------------------------------------------------

def connect_tcp(store: Store, token: bytes, peers: Sequence[int], facts: Sequence[dict],
                interface: str = "") -> Dict[int, socket.socket]:
    """Connects to all `peers`: the higher rank calls the lower.

    Args:
        store: joined by all ranks.
        token: the job's secret.
        peers: each of them must call this with this rank among its peers.
        facts: from `survey`.
        interface: network interface whose address peers shall use, such as "eth0"; "": the one that leads to the store.
    Returns:
        A connected, non-blocking socket for each peer.
    Raises:
        StartError: a rank was lost or cannot be reached.
    """
    if not peers:
        return {}
    deadline = time.monotonic() + store.timeout_s
    on_this_host = [facts[peer]["host"] == facts[store.rank]["host"] for peer in peers]
    mine = interface_address(interface) if interface else store.route()[0]
    family = socket.AF_INET6 if mine and ":" in mine else socket.AF_INET
    bound = "127.0.0.1" if all(on_this_host) and not interface else ""
    with socket.create_server((bound, 0), family=family, backlog=len(peers) + _STRANGERS) as listener:
        value = {"address": mine, "port": listener.getsockname()[1]}
        store.set(f"tcp/{store.rank}", json.dumps(value).encode())
        lower = [peer for peer in peers if peer < store.rank]
        answers = store.get_all([f"tcp/{peer}" for peer in lower])
        outgoing: Dict[int, socket.socket] = {}
        try:
            for peer, answer in zip(lower, answers):
                there = json.loads(answer)
                addresses = _addresses(store, peer, there["address"], facts)
                outgoing[peer] = _call(store, peer, addresses, there["port"], deadline)
        except BaseException:
            for sock in outgoing.values():
                sock.close()
            raise
        shaken = shake(store, token, listener, outgoing, {peer for peer in peers if peer > store.rank}, deadline)
    return {peer: connection.sock for peer, connection in shaken.items()}


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface. Raises StartError if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            request = struct.pack("256s", name.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(sock, _SIOCGIFADDR, request)[20:24])
        except OSError as error:
            known = ", ".join(found for _, found in socket.if_nameindex())
            raise StartError(
                f"COMMLIB_INTERFACE is {name!r}, which has no IPv4 address ({error.strerror}): this host has {known}"
            ) from None


def _addresses(store: Store, peer: int, published: Optional[str], facts: Sequence[dict]) -> List[str]:
    """Where a peer may be reached, best first. A loopback address means something only on its own host."""
    same_host = facts[peer]["host"] == facts[store.rank]["host"]
    candidates = [published] if published else []
    if peer == 0 and store.owner == "rank 0":
        candidates.append(store.route()[1])  # where the store answered, rank 0 lives
    if same_host:
        candidates.append("127.0.0.1")
    usable = [address for address in candidates if address and (same_host or not _is_loopback(address))]
    return list(dict.fromkeys(usable))


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _call(store: Store, peer: int, addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
    reasons = []
    for address in addresses:
        store.check()
        try:
            return socket.create_connection((address, port), max(0.1, min(_CONNECT_S, deadline - time.monotonic())))
        except OSError as error:
            reasons.append(f"{address} port {port}: {error}")
    store.check(NEWS_S)
    raise StartError(
        f"rank {store.rank} cannot connect to rank {peer} ({'; '.join(reasons) or 'it has no address'}): open the "
        "firewall between the hosts, or name a network with COMMLIB_INTERFACE=NAME on every rank",
        peer,
    )


def _attach_tcp(sockets: Dict[int, socket.socket], endpoint: Endpoint) -> None:
    try:
        for peer in sorted(sockets):
            endpoint.attach_tcp(peer, sockets.pop(peer).detach())
    finally:
        for rest in sockets.values():
            rest.close()


# ---- topology ----------------------------------------------------------------------------------------------------

def _topology(placement: Placement, facts: Sequence[dict], transports: Dict[int, str]) -> Topology:
    identities = [fact["host"] for fact in facts]
    order = list(dict.fromkeys(identities))
    hosts = tuple(order.index(identity) for identity in identities)
    rank = placement.rank
    local_rank = _given(placement.local_rank, hosts[:rank].count(hosts[rank]))
    sizes = [hosts.count(host) for host in range(len(order))]
    having = [host for host, size in enumerate(sizes) if size > local_rank] or [hosts[rank]]
    return Topology(
        hosts, tuple(fact["name"] for fact in facts), transports, local_rank,
        _given(placement.local_size, sizes[hosts[rank]]),
        _given(placement.cross_rank, having.index(hosts[rank]) if hosts[rank] in having else 0),
        _given(placement.cross_size, len(having)),
    )


def _given(value: Optional[int], derived: int) -> int:
    return derived if value is None else value
