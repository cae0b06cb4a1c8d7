"""Two "hosts" under torchrun: the ranks meet over TCP with a secret out of torchrun's own store."""

import os
import socket
import subprocess
import sys

import pytest

PROGRAM = """
import os, torch, commlib, commlib.torch as hvd
from commlib.bootstrap import discover
os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")  # as if the other rank were on another host: they meet over the network
os.environ["COMMLIB_TRANSPORT"] = "tcp"
os.environ["COMMLIB_STORE"] = os.environ["WHERE"]
if os.environ["ORDER"] == "after":
    torch.distributed.init_process_group("gloo")
for _ in range(2):
    hvd.init()
    print(hvd.allreduce(torch.ones(3) * (hvd.rank() + 1), op=hvd.Sum).tolist(), flush=True)
    hvd.shutdown()
if os.environ["ORDER"] == "before":
    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def own_address():
    """An address of this host that counts as a network; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.1", 9))
            return probe.getsockname()[0]
        except OSError:
            pytest.skip("this host has no network")


@pytest.mark.parametrize("agent", (True, False))
@pytest.mark.parametrize("order", ("before", "after"))
def test_the_secret_comes_out_of_the_store(order, agent):
    """With torchrun's agent and without one (as under a cluster's operator); before and after init_process_group."""
    port = free_port()
    environ = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                   WHERE=f"{own_address()}:{free_port()}", ORDER=order, OMP_NUM_THREADS="1")  # fmt: skip
    if agent:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port),
                   "--no-python", sys.executable, "-c", PROGRAM]  # fmt: skip
        ran = subprocess.run(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=90, text=True)
        assert (ran.returncode, ran.stdout.count("[3.0, 3.0, 3.0]")) == (0, 4), ran.stdout
        return
    ranks = [subprocess.Popen([sys.executable, "-c", PROGRAM], env=dict(environ, RANK=str(rank), LOCAL_RANK="0"), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in range(2)]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=90)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [(rank.returncode, text.count("[3.0, 3.0, 3.0]")) for rank, text in zip(ranks, outputs)] == [(0, 2)] * 2, outputs
