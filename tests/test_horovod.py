"""Programs written for Horovod run as they are: python -m commlib.horovod."""

import subprocess
import sys

import pytest

PROGRAM = '''
import pickle, sys
import torch
import horovod.torch as hvd
from horovod.torch.mpi_ops import allreduce_async, synchronize
from horovod.torch.compression import Compression
from horovod.common.exceptions import HorovodInternalError
import commlib.horovod
import helper  # beside this script
commlib.horovod.install()  # for processes that are spawned; here it was done

class Defined:
    pass

if __name__ == "__main__":
    hvd.init()
    assert pickle.loads(pickle.dumps(Defined())).__class__ is Defined
    assert sys.argv == [__file__, "--lr", "0.1"], sys.argv
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=float(sys.argv[2]) * hvd.size())
    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters(), compression=Compression.fp16)
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(1, 2) * (hvd.rank() + 1)).sum().backward()
        optimizer.step()
    weights = hvd.allgather(model.weight.detach())
    assert all(torch.equal(weights[0], row) for row in weights)
    total = synchronize(allreduce_async(torch.ones(1), op=hvd.Sum))
    sys.stdout.write(f"total {total.item()} by {helper.NAME} {issubclass(HorovodInternalError, RuntimeError)}\\n")  # at once
    hvd.shutdown()
'''


@pytest.fixture
def script(tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "helper.py").write_text("NAME = 'helper'\n")
    path = tmp_path / "train.py"
    path.write_text(PROGRAM)
    return path


def run(*words):
    return subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=100)


def test_an_unmodified_program_on_two_ranks(script):
    result = run("commlib.launch", "-np", "2", sys.executable, "-m", "commlib.horovod", str(script), "--lr", "0.1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("total 2.0 by helper True") == 2


def test_what_is_not_answered_says_so(tmp_path):
    path = tmp_path / "other.py"
    path.write_text("import horovod.mxnet")
    result = run("commlib.horovod", str(path))
    assert result.returncode != 0 and "commlib does not answer for horovod.mxnet: it knows horovod.torch" in result.stderr
    result = run("commlib.horovod")
    assert result.returncode != 0 and "usage: python -m commlib.horovod" in result.stderr


def test_horovod_itself_came_first(tmp_path):
    text = "import sys, types; sys.modules['horovod'] = types.ModuleType('horovod'); import commlib.horovod as c; c.install()"
    result = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=60)
    assert "Horovod itself was imported already" in result.stderr
