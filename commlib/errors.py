"""The errors that a collective can end with, and the one function that makes them of the engine's statuses.

This file knows the status numbers of native/commlib.h and nothing else of the engine. The texts come from C, where rank,
peer and operation are known; nothing here invents another.
"""

from commlib._native import ffi, lib


class CommlibError(RuntimeError):
    """A collective failed. Base class of everything that happens to a correct call."""


class MismatchError(CommlibError):
    """Ranks asked for different things under one name; raised on every rank. The library stays usable."""


class JoinedError(CommlibError):
    """A rank has joined, and the operation cannot do without it; or this rank has, and submitted something. `rank` is that one.
    The library stays usable."""

    def __init__(self, message, rank=-1):
        super().__init__(message)
        self.rank = rank


class StalledError(CommlibError):
    """A rank did not submit an operation that others wait for, within `stall_shutdown_s`; raised on every rank, and on that
    one if it submits it later. The library stays usable; `rank` is the first of those that did not."""

    def __init__(self, message, rank=-1):
        super().__init__(message)
        self.rank = rank


class PeerLostError(CommlibError):
    """A rank died or cannot be reached. The communicator is lost with it; `rank` is the lost one (-1: unknown)."""

    def __init__(self, message, rank=-1):
        super().__init__(message)
        self.rank = rank


class PeerLeftError(CommlibError):
    """A rank shut down while this one still needed it; `rank` is the one that left (-1: unknown)."""

    def __init__(self, message, rank=-1):
        super().__init__(message)
        self.rank = rank


class ShutdownError(CommlibError):
    """This communicator was shut down, now or while the operation was in flight."""


class ForkedError(CommlibError):
    """Called in a forked child, which holds no engine: only the process that called init() communicates."""


def _text_only(error_class):
    return lambda message, peer: error_class(message)


_ERROR_OF_STATUS = {
    lib.CL_INVALID: _text_only(ValueError),
    lib.CL_NO_MEMORY: _text_only(MemoryError),
    lib.CL_SYSTEM: _text_only(CommlibError),
    lib.CL_MISMATCH: _text_only(MismatchError),
    lib.CL_PEER_LOST: PeerLostError,
    lib.CL_PEER_LEFT: PeerLeftError,
    lib.CL_JOINED: JoinedError,
    lib.CL_STALLED: StalledError,
    lib.CL_SHUTDOWN: _text_only(ShutdownError),
    lib.CL_FORKED: _text_only(ForkedError),
}


def error_of(status, text="", peer=-1):
    """The exception for a status of the engine; the caller raises it.

    Args:
        status: a cl_status other than CL_OK and CL_AGAIN.
        text: what the engine says about this case; empty: the general text of the status.
        peer: the rank to blame, -1 if none is.
    """
    message = text or ffi.string(lib.cl_status_text(status)).decode(errors="replace")
    return _ERROR_OF_STATUS.get(status, _text_only(CommlibError))(message, peer)


# Of subclasses first.
_STATUS_OF_ERROR = (
    (MismatchError, lib.CL_MISMATCH), (PeerLostError, lib.CL_PEER_LOST), (PeerLeftError, lib.CL_PEER_LEFT),
    (ShutdownError, lib.CL_SHUTDOWN), (ForkedError, lib.CL_FORKED), (JoinedError, lib.CL_JOINED),
    (StalledError, lib.CL_STALLED), (CommlibError, lib.CL_SYSTEM), (MemoryError, lib.CL_NO_MEMORY), (BaseException, lib.CL_INVALID),
)  # fmt: skip


def status_of(error):
    """(status, rank to blame or -1) of an exception, for code that knows no exceptions; the reverse of `error_of`."""
    status = next(status for error_class, status in _STATUS_OF_ERROR if isinstance(error, error_class))
    return status, getattr(error, "rank", -1)
