"""How the ranks of a job meet: a rank's side of the key-value store, and where to look for it.

`join` connects a rank to the store (and makes the store, on rank 0, when no launcher serves one); the `Store` that it
returns sets, gets and gathers small values until the rank leaves. Every wait ends: with the value, at the time-out, or
as soon as the store reports that some rank was lost. Both sides prove first that they hold the job's secret. Knows nothing
of what the values mean.
"""
from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import select
import socket
import time
from typing import List, Optional, Sequence

from commlib.bootstrap import Placement, StartError
from commlib.dial import OUT_OF_DESCRIPTORS, dial, resolve
from commlib.proof import ANSWER_NBYTES, NONCE_NBYTES, REFUSAL, THE_STORE, Calling, Claim
from commlib.rendezvous_server import Server, peer_uid, store_key
from commlib.rendezvous_wire import MAX_VALUE_NBYTES, PROTOCOL, Decoder, Hello, Message, WireError, encode, values_of

_LINGER_S = 2.0        # after a failure rank 0 stays this long, to tell it to ranks that come late
_ANSWER_SLACK_S = 5.0  # the store itself keeps the time of a wait; a store this much later is taken for dead
_RETRY_S = (0.005, 0.1)  # the first and the longest pause between two attempts to reach the store
_READ_NBYTES = 1 << 16


def join(placement: Placement, generation: int, version: str, timeout_s: Optional[float] = None) -> "Store":
    """Meets the other ranks: returns a store that is shared with them.

    Args:
        placement: this process's place, from `bootstrap.discover`.
        generation: how many times this process has begun to initialise, this time included; 1 at first.
        version: commlib's version, compared between ranks.
        timeout_s: how long to wait for the store and, later, for each value; None: the placement's own.
    Raises:
        StartError: the store cannot be served or reached in time, or this rank does not fit to the others.
    Example:
        >>> with join(discover({}), 1, "0.1") as store:
        ...     store.gather("names", b"me")
        [b'me']
    """
    timeout_s = placement.start_timeout_s if timeout_s is None else timeout_s
    hello = Hello(PROTOCOL, version, placement.size, placement.rank, generation, socket.gethostname(), os.getpid())
    if placement.size == 1:
        return Store(None, hello, timeout_s)
    check_protection(placement)
    address, key = placement.store, store_key(placement.secret, placement.job)
    serves_here = placement.store_owner == "rank 0"
    if serves_here and address.startswith("unix:"):
        address = f"{address}-{generation}"
    server = None
    try:
        if serves_here and placement.rank == 0:
            server = Server(listen(address), placement.job, "rank 0", generation, secret=placement.secret)
        return Store(_reach(address, placement.store_owner, hello, key, timeout_s), hello, timeout_s, server)
    except BaseException:
        if server is not None:
            server.close()
        raise


def check_protection(placement: Placement) -> None:
    """Refuses to meet over a network where anybody could join.

    Raises:
        StartError: the ranks have no secret, their store is reached over a network, and nobody has allowed that.
    """
    if placement.secret or placement.options.get("allow_unauthenticated") == "1" or is_local(placement.store):
        return
    raise StartError(
        f"the ranks meet at {placement.store} over the network, and {placement.launcher} gave them no secret, so anybody who "
        "reaches that port could join or disturb the job: make a file that only you can read, on every host or on a file "
        "system that all share, (umask 077; python -c 'import secrets; print(secrets.token_hex(32))' > FILE), and set "
        "COMMLIB_SECRET_FILE=FILE on every rank; or, on a network where you trust everybody, COMMLIB_ALLOW_UNAUTHENTICATED=1"
    )


def is_local(address: str) -> bool:
    """Whether a store's address can be reached from its own host only.

    Example:
        >>> is_local("localhost:1"), is_local("[::1]:1"), is_local("unix:@x"), is_local("10.0.0.1:1")
        (True, True, True, False)
    """
    family, where = parse(address)
    if family == socket.AF_UNIX or where[0] == "localhost":
        return True
    try:
        return ipaddress.ip_address(where[0]).is_loopback
    except ValueError:
        return False


def listen(address: str) -> socket.socket:
    """A listening socket at ``unix:@name`` or ``host:port``.

    Raises:
        StartError: the address is taken or malformed.
    """
    family, where = parse(address)
    try:
        if family == socket.AF_UNIX:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.bind(where)
                sock.listen(512)
            except OSError:
                sock.close()
                raise
            return sock
        host, port = where
        family = resolve(host, port)[0].family
        if is_local(address):
            return socket.create_server((host, port), family=family, backlog=512)
        # Its own name can mean 127.0.1.1 here, and the others may prefer the other family: all addresses, then.
        both = socket.has_dualstack_ipv6()
        return socket.create_server(("", port), family=socket.AF_INET6 if both else family, backlog=512, dualstack_ipv6=both)
    except OSError as error:
        if error.errno in OUT_OF_DESCRIPTORS:
            raise
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                f"rank 0 cannot listen at {address}, which another process uses: set COMMLIB_STORE=HOST:PORT with a "
                "free port to the same value on every rank, or end the other process"
            ) from None
        raise StartError(
            f"rank 0 cannot listen at {address}: {error}; set COMMLIB_STORE=HOST:PORT to an address of rank 0's host "
            "on every rank"
        ) from None


def parse(address: str) -> tuple:
    """(socket family, address for connect) of ``unix:@name`` (abstract) or ``host:port``; ``[host]:port`` for IPv6."""
    if address.startswith("unix:@") and 6 < len(address.encode()) <= 6 + 107:
        return socket.AF_UNIX, "\0" + address[6:]
    host, colon, port = address.rpartition(":")
    if colon and host and port.isdigit() and 0 < int(port) < 65536:
        return socket.AF_INET, (host.strip("[]"), int(port))
    raise StartError(f"COMMLIB_STORE is {address!r}: it must be HOST:PORT, or unix:@NAME (NAME of at most 107 bytes)")


def _reach(address: str, owner: str, hello: Hello, key: bytes, timeout_s: float) -> "_Channel":
    """Connects and says hello; tries again while the store is not there yet, or is that of an earlier generation."""
    deadline = time.monotonic() + timeout_s
    pause_s = _RETRY_S[0]
    while True:
        try:
            return _enter(address, owner, hello, key, deadline)
        except (OSError, WireError, _Gone) as error:
            if isinstance(error, OSError) and error.errno in OUT_OF_DESCRIPTORS:
                raise
            reason = str(error)
        if time.monotonic() + pause_s >= deadline:
            raise StartError(
                f"rank {hello.rank} waited {timeout_s:.3g} s for the store of {owner} at {address} ({reason}): is "
                f"{owner} running, and can this host reach it? Give slow starts more time with "
                "COMMLIB_START_TIMEOUT_S, or set COMMLIB_STORE=HOST:PORT to an address of rank 0's host on every rank",
                rank=0 if owner == "rank 0" else None,
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _RETRY_S[1])


def _enter(address: str, owner: str, hello: Hello, key: bytes, deadline: float) -> "_Channel":
    """One attempt. Raises StartError if it was refused for good; else OSError, WireError or _Gone."""
    channel = _Channel(_connect(address, deadline), owner, address)
    try:
        _prove(channel, Calling(key, Claim(hello.rank, THE_STORE)), hello.rank, deadline)
        channel.send(hello.header())
        answer = channel.receive(deadline)
        if answer is None:
            raise _Gone("it does not answer")
        if answer.header["op"] == "refused":
            raise StartError(f"rank {hello.rank} was refused at {address}: {answer.header.get('text')}")
        if answer.header["op"] != "welcome":
            raise _Gone(str(answer.header.get("text")))
        return channel
    except BaseException:
        channel.close()
        raise


def _prove(channel: "_Channel", calling: Calling, rank: int, deadline: float) -> None:
    """Proves to the store that this rank belongs to the job, and has it prove the same."""
    channel.send_bytes(calling.greeting)
    channel.send_bytes(calling.prove(channel.receive_bytes(NONCE_NBYTES, deadline)))
    answer = channel.receive_bytes(ANSWER_NBYTES, deadline)
    if answer == REFUSAL:
        raise StartError(
            f"rank {rank} was refused at {channel.address}: that store belongs to another job or has another secret; give all "
            "ranks of a job the same COMMLIB_SECRET_FILE, and jobs that run at once different COMMLIB_STORE=HOST:PORT"
        )
    if not calling.accepts(answer):
        raise _Gone("what answers there has not this job's secret")


def _connect(address: str, deadline: float) -> socket.socket:
    family, where = parse(address)
    if family != socket.AF_UNIX:
        return dial(resolve(*where), max(deadline, time.monotonic() + 0.1))
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.settimeout(max(0.1, deadline - time.monotonic()))
        sock.connect(where)
        if peer_uid(sock) not in (0, os.getuid()):  # abstract names belong to whoever comes first
            raise OSError(errno.EACCES, f"user {peer_uid(sock)} listens there")
        return sock
    except BaseException:
        sock.close()
        raise


class _Gone(Exception):
    """The other end closed the connection, or does not take us yet."""


class _Channel:
    """Messages over one socket, with deadlines."""

    def __init__(self, sock: socket.socket, owner: str, address: str):
        self.sock, self.owner, self.address = sock, owner, address
        self._decoder = Decoder()

    def send(self, header: dict, payload: bytes = b"") -> None:
        self.sock.settimeout(_ANSWER_SLACK_S)  # the server always reads
        self.sock.sendall(encode(header, payload))

    def send_bytes(self, data: bytes) -> None:
        self.sock.settimeout(_ANSWER_SLACK_S)
        self.sock.sendall(data)

    def receive(self, deadline: float) -> Optional[Message]:
        """The next message, or None at the deadline. Raises _Gone, WireError, OSError."""
        message = self._decoder.next()
        while message is None:
            data = self._read(_READ_NBYTES, deadline)
            if data is None:
                return None
            self._decoder.feed(data)
            message = self._decoder.next()
        return message

    def receive_bytes(self, nbytes: int, deadline: float) -> bytes:
        """So many bytes that are no message. Raises _Gone, also at the deadline, and OSError."""
        received = b""
        while len(received) < nbytes:
            data = self._read(nbytes - len(received), deadline)
            if data is None:
                raise _Gone("it does not answer")
            received += data
        return received

    def _read(self, most_nbytes: int, deadline: float) -> Optional[bytes]:
        """What has come, waiting for it; None at the deadline."""
        remaining_s = max(0.0, deadline - time.monotonic())
        readable = select.poll()  # not select(): descriptors beyond 1024 are common in data loaders
        readable.register(self.sock, select.POLLIN)
        if not readable.poll(remaining_s * 1000.0 + 0.5):
            return None
        data = self.sock.recv(most_nbytes)
        if not data:
            raise _Gone("it closed the connection")
        return data

    def close(self) -> None:
        self.sock.close()


class Store:
    """A rank's connection to the store; made by `join`. A context manager: an exception inside is told to all ranks.

    All values are bytes of at most 1 MiB. Not for several threads at once.
    """

    def __init__(self, channel: Optional[_Channel], hello: Hello, timeout_s: float, server: Optional[Server] = None):
        self.rank, self.size, self.timeout_s = hello.rank, hello.size, timeout_s
        self.owner = "" if channel is None else channel.owner
        self._channel, self._server = channel, server
        self._alone: dict = {}  # the values of a job of one rank, which has no store
        self._failed = False

    def set(self, key: str, value: bytes) -> None:
        """Publishes a value under a key; the last one set counts."""
        if len(value) > MAX_VALUE_NBYTES:
            raise ValueError(f"a value of {len(value)} bytes; the store takes at most {MAX_VALUE_NBYTES}")
        if self._channel is None:
            self._alone[key] = bytes(value)
        else:
            self._ask({"op": "set", "key": key}, bytes(value))

    def get(self, key: str, timeout_s: Optional[float] = None) -> bytes:
        """The value of a key, waiting until it is set. Raises StartError at the time-out or when a rank is lost."""
        return self.get_all([key], timeout_s)[0]

    def get_all(self, keys: Sequence[str], timeout_s: Optional[float] = None) -> List[bytes]:
        """The values of several keys, waiting until all are set. Raises StartError as `get` does."""
        if self._channel is None:
            return [self._alone[key] for key in keys]
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        self._ask({"op": "get", "keys": list(keys), "timeout_s": timeout_s})
        message = self._receive(timeout_s + _ANSWER_SLACK_S)
        if message is None:
            raise StartError(f"the store of {self._channel.owner} at {self._channel.address} does not answer")
        try:
            return values_of(message, len(keys))
        except WireError as error:
            self._lost(error)

    def gather(self, name: str, value: bytes, timeout_s: Optional[float] = None) -> List[bytes]:
        """Every rank's value, in rank order. Each name serves once.

        Args:
            name: what is gathered, equal on all ranks.
            value: this rank's contribution, at most 1 MiB.
            timeout_s: how long to wait for the others, None for the store's own time-out.
        Raises:
            StartError: a rank did not come in time, was lost, or gave up.
        """
        self.set(f"{name}/{self.rank}", value)
        return self.get_all([f"{name}/{rank}" for rank in range(self.size)], timeout_s)

    def fileno(self) -> int:
        """Readable when there is bad news, for `check`; -1 if this rank is alone."""
        return -1 if self._channel is None else self._channel.sock.fileno()

    def route(self) -> tuple:
        """(this host's address, the store's address) on the way between them; (None, None) if that is no network."""
        if self._channel is None or self._channel.sock.family == socket.AF_UNIX:
            return None, None
        sock = self._channel.sock
        return sock.getsockname()[0].partition("%")[0], sock.getpeername()[0].partition("%")[0]

    def check(self, wait_s: float = 0.0) -> None:
        """Raises StartError if the start has failed on some rank, or does so within `wait_s`."""
        if self._channel is not None:
            self._receive(wait_s)

    def abort(self, text: str) -> None:
        """Fails the start on every rank, with this rank's reason."""
        if self._channel is not None and not self._failed:
            self._failed = True
            self._send({"op": "fail", "text": text})

    def close(self) -> None:
        """Leaves the store. Rank 0, where it serves the store, first waits for the others to leave. Idempotent."""
        if self._channel is None:
            return
        self._send({"op": "bye"})
        self._channel.close()
        self._channel = None
        if self._server is not None:
            self._server.settled.wait(_LINGER_S if self._failed else self.timeout_s)
            self._server.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None:
            self.abort(str(error) if kind is StartError else f"{kind.__name__}: {error}")
        self.close()

    def _ask(self, header: dict, payload: bytes = b"") -> None:
        try:
            self._channel.send(header, payload)
        except OSError as error:
            self.check()  # the store may have said why before it closed
            self._lost(error)

    def _send(self, header: dict) -> None:
        """Tells what nobody needs to hear: the store may be gone already."""
        with contextlib.suppress(OSError):
            self._channel.send(header)

    def _receive(self, timeout_s: float) -> Optional[Message]:
        """The next good message, None at the time-out."""
        try:
            message = self._channel.receive(time.monotonic() + timeout_s)
        except (OSError, WireError, _Gone) as error:
            self._lost(error)
        if message is None or message.header["op"] == "values":
            return message
        self._failed = message.header["op"] != "late"  # a late rank is still to tell the others that it gives up
        rank = message.header.get("rank")
        raise StartError(str(message.header.get("text")), rank if type(rank) is int else None)

    def _lost(self, error: Exception) -> None:
        owner = self._channel.owner
        raise StartError(f"{owner} was lost while the job started: its store at {self._channel.address} is gone "
                         f"({error}); see its own output", rank=0 if owner == "rank 0" else None) from None
