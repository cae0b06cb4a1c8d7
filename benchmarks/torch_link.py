"""A training step of two ranks over a slow link: commlib overlapped and waiting, DDP, and the ideal schedule.

    sudo python benchmarks/torch_link.py --model resnet50 --output benchmarks/results/torch_link.json

Two network namespaces stand for two hosts, joined by a link with a limited rate (tbf on both ends); each runs one rank.

--compute cpu: real models train on real cores; the batch is chosen so that forward and backward take about as long as
the link needs for all gradients (C = f + b). --compute waits: the models have the real tensors, one in `--shrink`
elements of each, and an accelerator's compute is emulated by timed waits, spread over the layers by their work, so that
f + b = C; optimizer updates are real. All ways take turns in one run.

Beside them stands commlib.schedule's ideal: free preemption, no latency, and as its inputs what was measured in the same
run: the link's rate (the fastest of large all-reduces), and when every layer of the plain step, which communicates
nothing, began its forward and had its gradients. What can be reached on these cores at all shows in "beside": plain steps,
while as many bytes are reduced by an operation that has nothing to do with them. Raw data goes into the output, a model
beside those that are there.
"""

import argparse
import os
import pathlib
import secrets
import subprocess
import sys
import tempfile

NAMES = ("commlib-bench-0", "commlib-bench-1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORTS = (29611, 29612)  # of commlib's store, and of torch.distributed's
# 70 kB at once keep segmented packets cheap, and a message of megabytes does not notice them.
BURST_NBYTES = 70_000


def make_hosts(rate_mbit):
    """Two namespaces and the link between them."""
    remove_hosts()
    run("ip link add c0 type veth peer name c1")
    for index, (name, address) in enumerate(zip(NAMES, ADDRESSES)):
        run(f"ip netns add {name}")
        run(f"ip link set c{index} netns {name} name eth0")
        inside = f"ip netns exec {name}"
        run(f"{inside} ip addr add {address}/24 dev eth0")
        run(f"{inside} ip link set eth0 up")
        run(f"{inside} ip link set lo up")
        run(f"{inside} tc qdisc add dev eth0 root tbf rate {rate_mbit}mbit burst {BURST_NBYTES} latency 50ms")


def remove_hosts():
    """Undoes make_hosts, wholly or partly done."""
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)


def run(command):
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"`{command}` failed: {done.stderr.strip()} (namespaces, veth and tbf are needed, and root)")


def make_secret():
    """A file with a secret of this job, which only we can read; ranks that meet over a network need one."""
    file = tempfile.NamedTemporaryFile("w", prefix="torch_link")  # readable by its owner alone, and deleted with the object
    file.write(secrets.token_hex(32))
    file.flush()
    return file


def start_rank(rank, arguments, secret_path):
    """A rank in its namespace; it talks over the link only."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("COMMLIB_")}
    environ.update(
        COMMLIB_RANK=str(rank), COMMLIB_SIZE="2", COMMLIB_LOCAL_RANK="0", COMMLIB_LOCAL_SIZE="1",
        COMMLIB_CROSS_RANK=str(rank), COMMLIB_CROSS_SIZE="2", COMMLIB_STORE=f"{ADDRESSES[0]}:{PORTS[0]}",
        COMMLIB_STORE_OWNER="rank 0", COMMLIB_JOB="torch_link", COMMLIB_TRANSPORT="tcp", GLOO_SOCKET_IFNAME="eth0",
        OMP_NUM_THREADS="1", TORCH_CPP_LOG_LEVEL="ERROR",
        COMMLIB_SECRET_FILE=secret_path,
    )  # fmt: skip
    command = ["ip", "netns", "exec", NAMES[rank], sys.executable, os.path.abspath(__file__), *arguments, "--rank", str(rank)]
    return subprocess.Popen(command, env=environ)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="cpu: vgg16, resnet50, gpt; waits: alexnet, vgg16, resnet50, bert_base")
    parser.add_argument("--compute", choices=("cpu", "waits"), default="cpu")
    parser.add_argument("--shrink", type=int, default=16, help="waits: one in so many elements of every tensor")
    parser.add_argument("--rate-mbit", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="steps of every way in each round")
    parser.add_argument("--ways", nargs="*", help="plain, and some of: beside, overlapped, waiting, ddp; all unless given")
    parser.add_argument("--timeline", help="write the last steps' timeline of commlib overlapped to this file")
    parser.add_argument("--output", metavar="FILE", type=pathlib.Path, help="raw data, as JSON")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        import torch_link_rank  # torch is imported by the ranks only

        torch_link_rank.main(arguments, f"tcp://{ADDRESSES[0]}:{PORTS[1]}")
        return
    if os.geteuid() != 0:
        raise SystemExit("torch_link.py makes network namespaces: run it as root")
    if arguments.steps < 4:
        raise SystemExit("--steps must be at least 4: the first and the last are left out")
    try:
        make_hosts(arguments.rate_mbit)
        with make_secret() as secret:
            ranks = [start_rank(rank, sys.argv[1:], secret.name) for rank in (0, 1)]
            if any([rank.wait() for rank in ranks]):
                raise SystemExit("a rank failed")
    finally:
        remove_hosts()


if __name__ == "__main__":
    main()
