"""All-reduce on one machine: commlib beside every installed peer, in one run, repeats interleaved.

    python benchmarks/peers.py install                              optional: MPICH, Open MPI, Intel MPI
    python benchmarks/allreduce.py --output benchmarks/results/allreduce.json

All peers' ranks are started once and wait on a socket; in every round each peer in turn does a few repeats of each size,
so that a machine that is slower for a while is slower for all. The table gives medians over rounds; the raw data goes to
the file.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import tempfile

from peers import PEERS, install

HERE = pathlib.Path(__file__).resolve().parent
START_S = 60.0
ROUND_S = 120.0
SIZES = (8, 1 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)


class Group:
    """All ranks of one peer, waiting for orders."""

    def __init__(self, name, size, folder):
        self.name = name
        address = os.path.join(folder, name)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen(size)
        listener.settimeout(START_S)
        peer = PEERS[name]
        bin_folder = peer.folder(name)
        command = [*peer.launch(bin_folder, size), str(bin_folder / "python"), str(HERE / "peers.py"), "rank", name, address]
        environment = {**os.environ, "BENCHMARK_FILE": address + ".store", "OMP_NUM_THREADS": "1",
                       "PATH": f"{bin_folder}:{os.environ['PATH']}"}  # fmt: skip
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        ranks = {}
        for _ in range(size):
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                raise SystemExit(f"{name}: not all {size} ranks came within {START_S:g} s") from None
            connection.settimeout(ROUND_S)
            stream = connection.makefile("rw")
            ranks[json.loads(stream.readline())["rank"]] = stream
        listener.close()
        self.streams = [ranks[rank] for rank in sorted(ranks)]

    def order(self, what):
        for stream in self.streams:
            stream.write(json.dumps(what) + "\n")
            stream.flush()

    def measure(self, nbytes, repeats):
        """Seconds of each repeat on rank 0."""
        self.order({"nbytes": nbytes, "repeats": repeats})
        return [json.loads(stream.readline()) for stream in self.streams][0]

    def close(self):
        with contextlib.suppress(OSError):
            self.order({})
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def repeats_of(nbytes):
    """Enough for a steady median, not so many that a round of large ones takes minutes."""
    return max(5, min(200, (32 << 20) // (nbytes + (64 << 10))))


def measure(names, size, sizes, rounds):
    """{peer: {nbytes: [the median of each round]}}, in seconds."""
    results = {name: {nbytes: [] for nbytes in sizes} for name in names}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        groups = []
        for name in names:
            groups.append(Group(name, size, folder))
            stack.callback(groups[-1].close)
        for turn in range(rounds):
            for nbytes in sizes:
                for group in groups:
                    times_s = group.measure(nbytes, repeats_of(nbytes))
                    results[group.name][nbytes].append(statistics.median(times_s[len(times_s) // 5 :]))
            print(f"round {turn + 1} of {rounds}", file=sys.stderr)
    return results


def table(results):
    """Microseconds, and commlib's speed as a multiple of the fastest other's."""
    others = [name for name in results if name != "commlib"]
    lines = ["| bytes | " + " | ".join(results) + " | commlib against the fastest other |", "|---" * (len(results) + 2) + "|"]
    for nbytes in results["commlib"]:
        medians = {name: statistics.median(results[name][nbytes]) for name in results}
        fastest = min(others, key=medians.get)
        ratio = medians[fastest] / medians["commlib"]
        cells = " | ".join(f"{medians[name] * 1e6:,.1f}" for name in results)
        lines.append(f"| {nbytes:,} | {cells} | {ratio:.2f}x {fastest} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-np", "--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="default: all that are installed")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, metavar="BYTES")
    parser.add_argument("--output", type=pathlib.Path, help="raw data, as JSON")
    arguments = parser.parse_args()
    if arguments.peers:
        install(arguments.peers)
    names = arguments.peers or [name for name, peer in PEERS.items() if peer.is_installed(name)]
    names = ["commlib", *(name for name in names if name != "commlib")]
    if len(names) < 2:
        raise SystemExit("nothing to compare with: install torch, or run benchmarks/peers.py install")
    results = measure(names, arguments.ranks, arguments.sizes, arguments.rounds)
    print(table(results))
    if arguments.output:
        record = {"ranks": arguments.ranks, "cores": os.cpu_count(), "machine": platform.machine(), "seconds": results}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
