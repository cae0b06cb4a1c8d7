"""Horovod's questions about how it was built and started, answered for commlib; for the adapters of frameworks.

What a framework itself brings (gloo is torch's) its adapter answers.
"""

import importlib.util
import sys

import commlib


def mpi_threads_supported():
    """Whether this process's MPI, which mpi4py has loaded, lets all threads call it; False without MPI.

    Raises:
        ValueError: commlib is not initialized.
    """
    commlib.communicator()
    MPI = sys.modules.get("mpi4py.MPI")
    return MPI is not None and MPI.Is_initialized() and MPI.Query_thread() == MPI.THREAD_MULTIPLE


def mpi_enabled():
    """Whether bytes travel over MPI, between some ranks at least; False before init."""
    return commlib.is_initialized() and "mpi" in commlib.communicator().transports.values()


def mpi_built():
    """Whether MPI can be used: commlib needs mpi4py for it, at run time."""
    return "mpi4py" in sys.modules or importlib.util.find_spec("mpi4py") is not None


def gloo_enabled():
    """Whether gloo moves the bytes (`commlib.torch.init(backend="gloo")`); False before init."""
    return commlib.is_initialized() and commlib.communicator().backend == "gloo"


def nccl_built():
    """0, where Horovod gives the version of NCCL: commlib does not use it yet."""
    return 0


def ddl_built():
    """False: commlib does not use it."""
    return False


ccl_built = cuda_built = rocm_built = ddl_built
