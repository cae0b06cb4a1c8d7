"""MPI's own all-reduce as one more algorithm, "mpi": in the order of tickets, for the sizes that the settings give it.

The engine moves everything else, over whatever links it has. Which operations MPI moves is a pure function of the settings
record, as every choice of algorithm is; half-precision floats, which MPI does not know, stay with the engine.
"""

import importlib
import time

from commlib.communicator import Communicator
from commlib.errors import CommlibError
from commlib.layout import Layout
from commlib.mpi import StartError
from commlib.selection import MPI_OWN, select
from commlib.tickets import TicketSubmitter

_KIND = "allreduce"

_DATATYPES = {
    "uint8": "UINT8_T", "int8": "INT8_T", "int16": "INT16_T", "int32": "INT32_T", "int64": "INT64_T", "float32": "FLOAT",
    "float64": "DOUBLE", "bool": "UINT8_T",
}  # fmt: skip
_OPERATIONS = ("SUM", "MIN", "MAX", "PROD")  # by cl_reduction
_OPERATIONS_OF_BOOL = ("MAX", "MIN", "MAX", "MIN")  # on truth values, as bytes: "or" and "and"

_LOOKS = 200  # at a collective before the first pause: tens of microseconds
_PAUSE_S = 50e-6


def is_chosen(settings):
    """Whether a settings record gives any operation to MPI."""
    return settings.forced_algorithm(_KIND) == MPI_OWN or any(line.algorithm == MPI_OWN for line in settings.table)


def mpi_communicator(comm, engine, topology, settings, placement, timeout_s):
    """A Communicator on the ranks of `comm` that gives MPI what the settings give it; see `session.open_communicator`."""
    submitter = MpiSubmitter(engine, topology.hosts, settings, MpiMover(comm))
    communicator = Communicator(engine, topology, settings, submitter)
    submitter.open(communicator.exchange)
    return communicator


class MpiSubmitter(TicketSubmitter):
    """A TicketSubmitter whose mover gets only what the settings give it; the arguments are the same."""

    def __init__(self, engine, hosts, settings, mover):
        self._shape = Layout(hosts).shape(_KIND, 0)
        super().__init__(engine, hosts, settings, mover)
        self.backend = "native"

    def is_moved(self, kind, dtype, nbytes, overlapped):
        """As TicketSubmitter.is_moved."""
        return (kind == _KIND and dtype in _DATATYPES
                and select(kind, nbytes, self._shape, self.settings, overlapped).algorithm == MPI_OWN)  # fmt: skip

    def _plan(self, kind, nbytes, itemsize, root, overlapped):
        if self._moves or kind != _KIND or select(kind, nbytes, self._shape, self.settings).algorithm != MPI_OWN:
            return super()._plan(kind, nbytes, itemsize, root, overlapped)
        mine, self.settings = self.settings, self.settings.replace(algorithms=(), table=())
        try:  # a dtype that MPI does not know
            return super()._plan(kind, nbytes, itemsize, root, overlapped)
        finally:
            self.settings = mine


class MpiMover:
    """A commlib.tickets.Mover for all-reduces.

    Args:
        comm: the user's communicator; the mover works on a duplicate.
    """

    name = "mpi"

    def __init__(self, comm):
        self._mpi = importlib.import_module("mpi4py.MPI")
        if self._mpi.Query_thread() < self._mpi.THREAD_MULTIPLE:
            raise StartError("the settings choose MPI's own all-reduce, which a thread of its own calls, and MPI grants no "
                             "MPI_THREAD_MULTIPLE: set mpi4py.rc.thread_level = 'multiple', or force another algorithm")
        self._parent, self._comm = comm, None
        self._is_broken = False

    def open(self, exchange):
        """Duplicates the communicator."""
        exchange(b"", name="mpi's own collectives")
        self._comm = self._parent.Dup()
        self._comm.Set_errhandler(self._mpi.ERRORS_RETURN)

    def allreduce(self, buffer, reduction, is_over):
        """As Mover.allreduce."""
        MPI = self._mpi
        names = _OPERATIONS_OF_BOOL if buffer.dtype == "bool" else _OPERATIONS
        memory = MPI.buffer.fromaddress(buffer.address, buffer.nbytes)
        request = self._comm.Iallreduce(MPI.IN_PLACE, [memory, buffer.count, getattr(MPI, _DATATYPES[buffer.dtype])],
                                        getattr(MPI, names[reduction]))  # fmt: skip
        looks = 0
        while not request.Test():
            looks += 1
            if looks < _LOOKS:
                continue
            if is_over():
                raise CommlibError("the operation has failed")
            time.sleep(_PAUSE_S)

    def abort(self):
        """MPI has no way to end a collective: what it left is left to it."""
        self._is_broken = True

    def close(self):
        """Frees the duplicate, unless something may still run on it."""
        if self._comm is not None and not self._is_broken and not self._mpi.Is_finalized():
            self._comm.Free()
        self._comm = None

    def after_fork(self):
        """Nothing of MPI's may be touched in a child."""
        self._comm = None
