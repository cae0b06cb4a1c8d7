"""commlib: collectives that hide behind compute.

    import commlib
    communicator = commlib.init()
    total = commlib.allreduce(array, op=commlib.Sum)

Start one process per rank with `commrun -np N python program.py`. The functions of this module work on the default
communicator, which `init` makes; frameworks have modules of their own, such as `commlib.torch`.
"""

from commlib.bootstrap import StartError
from commlib.buffer import Buffer
from commlib.communicator import Communicator
from commlib.errors import (
    CommlibError, ForkedError, JoinedError, MismatchError, PeerLeftError, PeerLostError, ShutdownError, StalledError,
)  # fmt: skip
from commlib.handle import Handle
from commlib.memory import Pieces
from commlib.reduction import Adasum, Average, Max, Min, Product, ReduceOp, Sum
from commlib.run import RunError, run
from commlib.session import Session, forwarded
from commlib.settings import Settings
from commlib.version import VERSION as __version__

_session = Session()


def init(*, settings=None, timeout_s=None, environ=None, backend=None, backends=None, secret=None, comm=None,
         network_interfaces=None, port_range=None):  # fmt: skip
    """Meets the other ranks and makes the default communicator; while there is one, returns it.

    Args:
        settings: a commlib.Settings record, equal on all ranks; None: the file named by COMMLIB_SETTINGS, or the defaults.
        timeout_s: how long to wait for the other ranks, in seconds; None: COMMLIB_START_TIMEOUT_S, or 60.
        environ: the variables in which the launcher left rank and size; None: os.environ.
        backend: who moves the bytes; None: COMMLIB_BACKEND, or "native", commlib's own engine.
        backends: for adapters of frameworks: backends beside the native one, name -> function that makes the Communicator;
            see `commlib.session.open_communicator`.
        secret: for adapters of frameworks: where ranks of several hosts find the job's secret if the launcher gave them none,
            function(placement) -> text; see docs/security.md.
        comm: an mpi4py communicator, or a list of ranks of MPI_COMM_WORLD: its ranks meet by MPI, and MPI moves the bytes
            between hosts. None: the launcher's ranks; MPI_COMM_WORLD if the transport is "mpi".
        network_interfaces: where other hosts shall reach this rank: names of interfaces, addresses or networks, the best first,
            as a list or as text ("eth0,10.1.0.0/16"); None: COMMLIB_NETWORK_INTERFACES, or those on the route between the hosts.
        port_range: the ports that this rank may listen on while it starts, as (first, last) or "first-last"; None:
            COMMLIB_PORT_RANGE, or any free port.

    Returns:
        The Communicator.

    Raises:
        StartError: a rank did not come in time, died, or cannot be reached.
        MismatchError: the ranks' settings differ.
        ForkedError: called in a forked child of a process that is initialized.

    Example:
        >>> import commlib
        >>> commlib.init().size  # started without a launcher
        1
        >>> commlib.shutdown()
    """
    network = {"network_interfaces": network_interfaces, "port_range": port_range}
    return _session.init(settings, timeout_s, environ, backend, backends, secret, comm, network)


def shutdown():
    """Leaves the group and forgets the default communicator; `init` may make another. Done at exit by itself."""
    _session.shutdown()


def is_initialized():
    """True between init and shutdown."""
    return _session.is_initialized


def communicator():
    """The default Communicator.

    Raises:
        ValueError: commlib is not initialized.
    """
    return _session.communicator()


def rank():
    """This process's rank, in [0, size())."""
    return _session.communicator().rank


def size():
    """The number of ranks."""
    return _session.communicator().size


def local_rank():
    """This process's rank among those of its host."""
    return _session.communicator().local_rank


def local_size():
    """The number of ranks on this host."""
    return _session.communicator().local_size


def cross_rank():
    """The index of this host."""
    return _session.communicator().cross_rank


def cross_size():
    """The number of hosts."""
    return _session.communicator().cross_size


def is_homogeneous():
    """True if all hosts have equally many ranks."""
    return _session.communicator().is_homogeneous


def _forward(name):
    return forwarded(getattr(Communicator, name), _session)


allreduce, allreduce_ = _forward("allreduce"), _forward("allreduce_")
allreduce_async, allreduce_async_ = _forward("allreduce_async"), _forward("allreduce_async_")
grouped_allreduce, grouped_allreduce_ = _forward("grouped_allreduce"), _forward("grouped_allreduce_")
grouped_allreduce_async, grouped_allreduce_async_ = _forward("grouped_allreduce_async"), _forward("grouped_allreduce_async_")
broadcast, broadcast_ = _forward("broadcast"), _forward("broadcast_")
broadcast_async, broadcast_async_ = _forward("broadcast_async"), _forward("broadcast_async_")
allgather, allgather_async = _forward("allgather"), _forward("allgather_async")
reducescatter, reducescatter_async = _forward("reducescatter"), _forward("reducescatter_async")
alltoall, alltoall_async = _forward("alltoall"), _forward("alltoall_async")
barrier, empty, join = _forward("barrier"), _forward("empty"), _forward("join")
prepare_allreduce_ = _forward("prepare_allreduce_")
start_timeline, stop_timeline = _forward("start_timeline"), _forward("stop_timeline")

__all__ = [
    "Adasum", "Average", "Buffer", "CommlibError", "Communicator", "ForkedError", "Handle", "JoinedError", "Max", "Min",
    "MismatchError", "PeerLeftError", "PeerLostError", "Pieces", "Product", "ReduceOp", "RunError", "Settings",
    "ShutdownError", "StalledError", "StartError", "Sum", "__version__", "allgather", "allgather_async", "allreduce",
    "allreduce_", "allreduce_async", "allreduce_async_", "alltoall", "alltoall_async", "barrier", "broadcast", "broadcast_",
    "broadcast_async", "broadcast_async_", "communicator", "cross_rank", "cross_size", "empty", "grouped_allreduce",
    "grouped_allreduce_", "grouped_allreduce_async", "grouped_allreduce_async_", "init", "is_homogeneous", "is_initialized",
    "join", "local_rank", "local_size", "prepare_allreduce_", "rank", "reducescatter", "reducescatter_async", "run",
    "shutdown", "size", "start_timeline", "stop_timeline",
]  # fmt: skip
