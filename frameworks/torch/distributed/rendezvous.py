"""`init_method="commlib://"`: torch.distributed's ranks under commrun, mpirun and srun, with nothing to configure.

torch.distributed wants a store, which torchrun serves and other launchers do not. Here `commlib.init()` finds the ranks, and
rank 0 makes the store: a file where all ranks are on one host, else a TCPStore at an address that the others reach.
"""

import json
import shutil
import tempfile

import torch.distributed as dist

import commlib
from commlib.interfaces import offered
from commlib.torch.launching import job_secret

SCHEME = "commlib"


def meet(url, timeout=dist.default_pg_timeout, **_):
    """As torch.distributed.register_rendezvous_handler wants it: yields (store, rank, size) once.

    Raises:
        StartError: a rank did not come within the timeout.
    """
    communicator = commlib.init(timeout_s=timeout.total_seconds(), secret=job_secret)
    store, place = _make(communicator, timeout) if communicator.rank == 0 else (None, None)
    told = communicator.control.broadcast_bytes(json.dumps(place).encode(), name="torch.distributed's store",
                                                timeout_s=timeout.total_seconds())  # fmt: skip
    store = store or _reach(json.loads(told), communicator.size, timeout)
    communicator.barrier(timeout.total_seconds())  # a rank that ends takes its store along: not before all have reached it
    yield store, communicator.rank, communicator.size
    raise RuntimeError("commlib:// cannot meet again: a process group of another size needs another job")


def _make(communicator, timeout):
    """Rank 0's store, and where it is."""
    if len(communicator.host_sizes) == 1:
        folder = tempfile.mkdtemp(prefix="commlib-")  # only this user can look into it
        communicator.on_close(lambda: shutil.rmtree(folder, ignore_errors=True))
        place = [f"{folder}/store", 0]
        return _reach(place, communicator.size, timeout), place
    host = str(offered("", None)[0].ip)
    store = dist.TCPStore(host, 0, communicator.size, True, timeout=timeout, wait_for_workers=False)
    return store, [host, store.port]


def _reach(place, size, timeout):
    where, port = place
    return dist.FileStore(where, size) if port == 0 else dist.TCPStore(where, port, size, False, timeout=timeout)
