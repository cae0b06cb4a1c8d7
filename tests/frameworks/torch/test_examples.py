"""The examples beside the README's, as a newcomer runs them: they learn."""

import contextlib
import os
import re
import signal
import subprocess
import sys

import pytest

import commlib

EXAMPLES = os.path.join(os.path.dirname(os.path.dirname(commlib.__file__)), "examples")
COMMRUN = [sys.executable, "-m", "commlib.launch", "-np", "2", sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
HOROVOD = [*COMMRUN, "-m", "commlib.horovod", f"{EXAMPLES}/horovod_digits.py", "--epochs", "6"]
DISTRIBUTED = f"{EXAMPLES}/torch_distributed.py"


@pytest.mark.parametrize("command, words", [
    ([*TORCHRUN, DISTRIBUTED], "2 ranks by commlib"),
    ([*COMMRUN, DISTRIBUTED, "--fsdp"], "2 ranks by commlib"),
    ([*HOROVOD, "--fp16-allreduce", "--batches-per-allreduce", "2"], "2 ranks"),
    ([*COMMRUN, f"{EXAMPLES}/torch_accumulation.py"], "2 ranks, 4 batches a step"),
    ([*COMMRUN, f"{EXAMPLES}/torch_uneven.py"], "958 on an even rank"),
], ids=["DDP by torchrun", "FSDP2 by commrun", "Horovod's", "accumulation", "uneven"])  # fmt: skip
def test_it_learns(command, words):
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ,
                               start_new_session=True)  # fmt: skip
    try:
        printed, errors = process.communicate(timeout=100)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's own children, where it hangs
    assert process.returncode == 0, errors
    assert words in printed
    assert float(re.search(r"held-out images: ([\d.]+)%", printed)[1]) > 93.0, printed
