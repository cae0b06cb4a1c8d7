"""How the ranks of a process group meet: in the store that torch.distributed has for them.

A `Meeting` is that store as `commlib.connect` wants one. It asks nobody who he is: whoever reaches the store may join, as
with every backend of torch.distributed (docs/security.md).
"""

import contextlib
import socket
import time

import torch.distributed as dist

from commlib import StartError

_PAUSE_S = (0.0005, 0.02)  # the first and the longest pause between two looks at the store
_FAILURE = "failure"


class Meeting:
    """The ranks of a group that is being made; a context manager: an exception inside is told to all ranks.

    Args:
        store: a torch.distributed store that all ranks of the group share, and nobody else.
        rank, size: this rank within the group, and how many it has.
        timeout_s: how long to wait for each value of another rank.
    """

    owner = "torch.distributed"

    def __init__(self, store, rank, size, timeout_s):
        self.rank, self.size, self.timeout_s = rank, size, timeout_s
        # One store may serve many groups of one name, one after the other: what an earlier one left there is not for us.
        attempt = self._ask(store.add, f"attempt/{rank}", 1)
        self._store = dist.PrefixStore(f"commlib/{attempt}/", store)
        self._where = _address_of(store)

    def set(self, key, value):
        """Publishes a value."""
        self._ask(self._store.set, key, value)

    def get_all(self, keys, timeout_s=None):
        """The values of several keys, waiting until all are set.

        Raises:
            StartError: they are not in time, or the start has failed on some rank.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        end_s, pause_s = time.monotonic() + timeout_s, _PAUSE_S[0]
        missing = list(keys)
        while missing and not self._ask(self._store.check, missing):
            self.check()
            if time.monotonic() >= end_s:
                missing = [key for key in missing if not self._ask(self._store.check, [key])]
                self._late(missing, timeout_s)
                break
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _PAUSE_S[1])
        return [self._ask(self._store.get, key) for key in keys]

    def gather(self, name, value, timeout_s=None):
        """Every rank's value, in rank order."""
        self.set(f"{name}/{self.rank}", value)
        return self.get_all([f"{name}/{rank}" for rank in range(self.size)], timeout_s)

    def fileno(self):
        """Nothing to sleep on."""
        return -1

    def route(self):
        """(this host's address, the store's address) on the way between them; (None, None): that is no network."""
        return self._where

    def check(self, wait_s=0.0):
        """Raises StartError if the start has failed on some rank, or does so within `wait_s`."""
        end_s = time.monotonic() + wait_s
        while True:
            if self._ask(self._store.check, [_FAILURE]):
                rank, _, text = self._ask(self._store.get, _FAILURE).decode().partition(" ")
                raise StartError(text, int(rank))
            if time.monotonic() >= end_s:
                return
            time.sleep(_PAUSE_S[1])

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and not (kind is StartError and error.rank not in (None, self.rank)):
            text = str(error) if kind is StartError else f"rank {self.rank} gave up: {kind.__name__}: {error}"
            with contextlib.suppress(RuntimeError):  # the store may be what is lost
                self._store.set(_FAILURE, f"{self.rank} {text}")

    def _ask(self, method, *arguments):
        try:
            return method(*arguments)
        except RuntimeError as error:
            raise StartError(f"the store of torch.distributed was lost while the process group was made ({error}): see the "
                             "output of the process that serves it, which is rank 0 or torchrun") from None  # fmt: skip

    def _late(self, keys, timeout_s):
        late = sorted({int(key.rpartition("/")[2]) for key in keys})
        if late:
            ranks = ", ".join(map(str, late))
            raise StartError(f"rank {self.rank} waited {timeout_s:.3g} s for rank {ranks} of the process group: does every rank "
                             "call init_process_group or new_group? Give slow starts more time with timeout=",
                             late[0] if len(late) == 1 else None)  # fmt: skip


def _address_of(store):
    """(own address, address) of the TCPStore below a store, (None, None) if it is of another kind or on this host."""
    while isinstance(store, dist.PrefixStore) and hasattr(store, "underlying_store"):
        store = store.underlying_store
    host, port = getattr(store, "host", None), getattr(store, "port", None)
    if not host or not port:
        return None, None
    try:
        family, _, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # of a datagram socket: nothing is sent
            own = probe.getsockname()[0].partition("%")[0]
    except OSError:
        return None, None
    return (None, None) if own == "::1" or own.startswith("127.") else (own, target[0])
