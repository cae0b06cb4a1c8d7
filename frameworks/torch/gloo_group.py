"""A gloo process group of our own: how its ranks find each other, and how it is ended.

It is made directly and registered nowhere, so a default group of torch.distributed, if there is one, is not touched.
Gloo cannot be interrupted: its abort() and shutdown() do nothing. What does end a collective, here and on the peers, is
to shut the connections down; so they are remembered.
"""

import ctypes
import json
import os
import socket
from datetime import timedelta

import torch.distributed

from commlib import CommlibError
from commlib.interfaces import offered
from commlib.torch.private import gloo_group

_LOOPBACK = "127.0.0.1"

# Of a collective, which begins on all ranks at once: it is our control plane that notices who does not live any more.
_NEVER = timedelta(days=1)


class GlooGroup:
    """The connected ranks, and the `ProcessGroupGloo` that moves their bytes.

    Args:
        rank, size: this rank and the number of ranks.
        place: where gloo listens, as create_device takes it; None: as torch.distributed would choose (GLOO_SOCKET_IFNAME).
        timeout_s: how long to wait for the other ranks.
        exchange: tells everybody's bytes to all.
    """

    def __init__(self, rank, size, place, timeout_s, exchange):
        store = _ExchangeStore(exchange, timeout_s)
        before = set(_open_sockets())
        self.process_group = gloo_group(store, rank, size, place, timedelta(seconds=timeout_s), _NEVER)
        candidates = [_duplicate(descriptor) for descriptor in set(_open_sockets()) - before]
        self._connections = _mirrored(candidates, exchange, timeout_s)

    def abort(self):
        """Ends what runs, on this rank and its peers, with an error. Idempotent, from any thread."""
        for connection in self._connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the peer was first

    def close(self):
        """Frees the group; nothing runs on it."""
        for connection in self._connections:
            connection.close()
        self._connections = []
        self.process_group = None

    def leave_to_process(self):
        """Never frees the group: its destructor would wait for threads, which are stuck, or another process's."""
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.process_group))


class _ExchangeStore(torch.distributed.Store):
    """The store in which gloo's ranks look up each other's addresses: all are told at once, through our control plane."""

    def __init__(self, exchange, timeout_s):
        super().__init__()
        self._exchange = exchange
        self._timeout_s = timeout_s
        self._values = {}
        self._rounds = 0

    def set(self, key, value):
        """Remembers what this rank has to tell."""
        self._values[key] = bytes(value)

    def get(self, key):
        """The value of any rank."""
        self.wait([key])
        return self._values[key]

    def wait(self, keys, timeout=None):
        """Every rank sets its own keys before it waits for others', so one exchange tells them all."""
        if any(key not in self._values for key in keys):
            mine = json.dumps({key: value.hex() for key, value in self._values.items()}).encode()
            for told in self._exchange(mine, name=f"gloo addresses {self._rounds}", timeout_s=self._timeout_s):
                self._values.update((key, bytes.fromhex(value)) for key, value in json.loads(told).items())
            self._rounds += 1
        missing = [key for key in keys if key not in self._values]
        if missing:
            raise CommlibError(f"no rank has told gloo's {', '.join(missing)}: do all ranks have the same torch?")


def listening_place(hosts, interfaces, store):
    """Where gloo shall listen, as create_device takes it; None: only torch.distributed can tell.

    Args:
        hosts: the host index of every rank.
        interfaces: the network interfaces that the user named, as `commlib.interfaces.offered` takes them, or "".
        store: where the ranks have met, as "host:port": the address that leads there is one that the others reach.
    """
    if len(set(hosts)) == 1:
        return {"hostname": _LOOPBACK}
    if interfaces:
        return {"hostname": str(offered(interfaces, None)[0].ip)}
    address = _address_towards(store)
    return None if address in ("", "::1") or address.startswith("127.") else {"hostname": address}


def _address_towards(store):
    host, _, port = store.rpartition(":")
    try:
        family, kind, _, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # of a datagram socket: nothing is sent
            return probe.getsockname()[0]
    except (OSError, ValueError):
        return ""


def _open_sockets():
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                yield int(name)
        except OSError:
            pass  # closed meanwhile


def _duplicate(descriptor):
    return socket.socket(fileno=os.dup(descriptor))


def _ends(connection):
    try:
        return [list(connection.getsockname()[:2]), list(connection.getpeername()[:2])]
    except OSError:
        return None  # listening


def _mirrored(candidates, exchange, timeout_s):
    """Of the sockets that came into being meanwhile, those whose other end a rank has among its own; the rest are closed.

    Another thread of this process may have opened a socket that is no business of ours.
    """
    ends = {connection: _ends(connection) for connection in candidates}
    mine = json.dumps([pair for pair in ends.values() if pair is not None]).encode()
    told = [pair for payload in exchange(mine, name="gloo connections", timeout_s=timeout_s) for pair in json.loads(payload)]
    found = []
    for connection, pair in ends.items():
        if pair is not None and pair[::-1] in told:
            found.append(connection)
        else:
            connection.close()
    return found
