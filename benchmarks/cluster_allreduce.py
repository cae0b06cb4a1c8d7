"""Blocking all-reduce between the hosts of an emulated cluster: commlib beside every peer, over links of a limited rate.

    sudo python benchmarks/cluster_allreduce.py --hosts 2 4 8 --rate-mbit 1000 --output benchmarks/results/cluster_allreduce.json
    sudo python benchmarks/cluster_allreduce.py --hosts 2 --ranks-per-host 2 --peers commlib commlib_flat_ring commlib_flat_doubling

Every peer's ranks are started once, on their hosts, and take turns. Beside the times stand the share of the link's payload
ceiling that was reached (an all-reduce must send 2 (N - 1) / N of the message from every host), the bytes that left host 0
for each byte of the message (by its interface's counter), and the processor time of all ranks for each GB that they sent.
"""

import argparse
import contextlib
import os
import pathlib
import statistics
import tempfile
import time

from cluster import Cluster
from environments import bin_folder, install_missing, versions
from groups import Absent, Group
from peers import PEERS
from record import add_run
from scaling import SECRET, communication_s

SIZES = (4 << 10, 25 << 20, 100 << 20)
PORT = 29631
LARGE_NBYTES = 1 << 20  # from here on processor time is known well enough
REPEATS = {4 << 10: 100}  # of a size; others: OTHER_REPEATS
OTHER_REPEATS = 5
# Ranks that poll would starve those of other hosts, which here share the cores.
YIELDING = {"I_MPI_THREAD_YIELD": "2", "I_MPI_PIN": "0", "CCL_YIELD": "sched_yield"}
# Shared memory would be found across the network namespaces of one machine.
NETWORK_ONLY = {"UCX_TLS": "tcp,self", "FI_PROVIDER": "tcp", "I_MPI_FABRICS": "ofi", "MPIR_CVAR_NOLOCAL": "1",
                "FI_TCP_IFACE": "eth0", "UCX_NET_DEVICES": "eth0"}  # fmt: skip


def _hydra(agent, hosts, ranks_per_host):
    return ["-ppn", str(ranks_per_host), "-launcher", "ssh", "-launcher-exec", agent, "-iface", "eth0", "-hosts", ",".join(hosts)]


def _intel(agent, hosts, ranks_per_host):
    return ["-ppn", str(ranks_per_host), "-bootstrap", "ssh", "-bootstrap-exec", agent, "-iface", "eth0", "-hosts", ",".join(hosts)]


def _open_mpi(agent, hosts, ranks_per_host):
    return ["--prtemca", "plm_ssh_agent", agent, "--prtemca", "plm_ssh_no_tree_spawn", "1", "--allow-run-as-root",
            "--mca", "mpi_yield_when_idle", "1", "--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--bind-to", "none",
            "--host", ",".join(f"{host}:{ranks_per_host}" for host in hosts)]  # fmt: skip


LAUNCHERS = {"mpich": _hydra, "openmpi": _open_mpi, "intelmpi": _intel, "oneccl": _intel}
# commlib with algorithms that do not know of hosts, for comparison.
VARIANTS = {f"commlib_flat_{short}": ("commlib", {"COMMLIB_ALGORITHMS": f"allreduce={name}"})
            for short, name in (("ring", "ring"), ("doubling", "recursive_doubling"), ("halving", "halving_doubling"))}


class ClusterGroup(Group):
    """The ranks of one peer on the hosts of a cluster, as many on each."""

    def __init__(self, name, cluster, ranks_per_host, folder):
        self.cluster, self.ranks_per_host = cluster, ranks_per_host
        self.peer, self.extra = VARIANTS.get(name, (name, {}))
        super().__init__(self.peer, cluster.hosts * ranks_per_host, folder)
        self.shown = name

    def start(self, program, environment):
        environment = {**environment, **self.extra, **YIELDING, **NETWORK_ONLY, "GLOO_SOCKET_IFNAME": "eth0"}
        if self.peer in LAUNCHERS:
            agent = self.cluster.agent(pathlib.Path(self.folder, f"{self.peer}.agent"))
            hosts = [self.cluster.address(host) for host in range(self.cluster.hosts)]
            words = [*LAUNCHERS[self.peer](agent, hosts, self.ranks_per_host), "-n", str(self.size)]
            return [self.cluster.start(0, [str(bin_folder(self.peer) / "mpirun"), *words, *program], environment)]
        return [self.cluster.start(rank // self.ranks_per_host, program, {**environment, **self._place(rank)})
                for rank in range(self.size)]  # fmt: skip

    def _place(self, rank):
        host, local = divmod(rank, self.ranks_per_host)
        return {
            "COMMLIB_RANK": str(rank), "COMMLIB_SIZE": str(self.size), "COMMLIB_LOCAL_RANK": str(local),
            "COMMLIB_LOCAL_SIZE": str(self.ranks_per_host), "COMMLIB_CROSS_RANK": str(host),
            "COMMLIB_CROSS_SIZE": str(self.cluster.hosts), "COMMLIB_STORE": f"{self.cluster.address(0)}:{PORT}",
            "COMMLIB_STORE_OWNER": "rank 0", "COMMLIB_JOB": "cluster", "COMMLIB_SECRET": SECRET,
        }  # fmt: skip


def measure(group, nbytes):
    """Seconds of each repeat, bytes that left host 0 in each, and processor seconds of all hosts in each."""
    repeats = REPEATS.get(nbytes, OTHER_REPEATS)
    group.order("blocking", nbytes=nbytes, repeats=2)  # memory is touched, windows open
    before_s, before_nbytes = group.cluster.cpu_s(), group.cluster.sent_nbytes(0)
    times_s = group.order("blocking", nbytes=nbytes, repeats=repeats)
    cpu_s = group.cluster.cpu_s() - before_s
    return times_s, (group.cluster.sent_nbytes(0) - before_nbytes) / repeats, cpu_s / repeats


def show(name, cluster, nbytes, times_s, sent_nbytes, cpu_s):
    median_s = statistics.median(times_s)
    ceiling_s = communication_s(nbytes, cluster.hosts, cluster.payload_bytes_per_s)
    cpu = f"  {cpu_s / cluster.hosts / sent_nbytes * 1e9:6.2f} CPU s/GB" if nbytes >= LARGE_NBYTES else ""
    print(f"  {name:<14}{nbytes:>11} B  {median_s * 1e3:9.3f} ms  {ceiling_s / median_s:6.3f} of the ceiling  "
          f"{sent_nbytes / nbytes:5.2f} sent per byte{cpu}", flush=True)  # fmt: skip


def run(arguments, cluster, absent):
    """{peer: {bytes: [seconds, bytes sent, processor seconds]}}; each peer alone, from its start to its end."""
    results = {}
    print(f"{cluster.hosts} hosts x {arguments.ranks_per_host}, {cluster.rate_mbit} Mbit/s")
    for name in arguments.peers:
        with tempfile.TemporaryDirectory() as folder:
            try:
                group = ClusterGroup(name, cluster, arguments.ranks_per_host, folder)
                with contextlib.closing(group):
                    results[name] = {}
                    for nbytes in arguments.sizes:
                        results[name][nbytes] = measure(group, nbytes)
                        show(name, cluster, nbytes, *results[name][nbytes])
            except Absent as error:
                absent[name] = str(error)
                print(f"  {name}: {error}")
        time.sleep(0.2)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4, 8], metavar="N")
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--rate-mbit", type=int, default=1000)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="BYTES")
    parser.add_argument("--peers", nargs="+", choices=["commlib", *VARIANTS, "gloo", *LAUNCHERS],
                        default=["commlib", "gloo", *LAUNCHERS])  # fmt: skip
    parser.add_argument("--name", default="commlib", help="prefix of the namespaces")
    parser.add_argument("--congestion", metavar="NAME", help="TCP's congestion control, such as cubic; else this machine's default")
    parser.add_argument("--output", metavar="FILE", help="raw data, as JSON")
    arguments = parser.parse_args()
    missing = install_missing([name for name in arguments.peers if name in PEERS])
    arguments.peers = [name for name in arguments.peers if name not in missing]
    for hosts in arguments.hosts:
        load, absent = os.getloadavg(), dict(missing)
        with Cluster(hosts, arguments.rate_mbit, arguments.name, arguments.congestion) as cluster:
            results = run(arguments, cluster, absent)
        if arguments.output:
            add_run(arguments.output, f"{hosts} x {arguments.ranks_per_host}, {arguments.rate_mbit} Mbit/s", arguments, load,
                    {"allreduce": results, "absent": absent, "cpu_of": "all ranks",
                     "versions": {name: versions(name) for name in results if name in PEERS}})  # fmt: skip


if __name__ == "__main__":
    main()
