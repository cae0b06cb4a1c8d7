"""The digits example, as a newcomer runs it: it learns, and its timeline shows all ranks."""

import json
import os
import re
import subprocess
import sys

import commlib
from commlib.workload import Workload

EXAMPLE = os.path.join(os.path.dirname(os.path.dirname(commlib.__file__)), "examples", "torch_digits.py")


def test_two_ranks_learn_the_digits_and_write_a_timeline(tmp_path):
    trace = tmp_path / "trace.json"
    program = [sys.executable, EXAMPLE, "--epochs", "4", "--timeline", str(trace)]
    command = [sys.executable, "-m", "commlib.launch", "-np", "2", *program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    accuracy = float(re.search(r"held-out images: ([\d.]+)%", done.stdout)[1])
    assert accuracy > 95.0
    assert re.search(r"2 ranks, \d+ images/s", done.stdout)
    assert "communication overlaps with: backward and forward" in done.stdout
    assert list(tmp_path.iterdir()) == [trace]

    events = json.loads(trace.read_text())
    for rank in (0, 1):
        names = {event["name"] for event in events if event["pid"] == rank}
        assert {"forward 0", "backward 0", "allreduce.0.weight", "ALLREDUCE"} <= names
        assert {"wait 0", "update 0"} <= {name.split(".")[0] for name in names}

    recorded = Workload.load(str(trace))
    assert recorded.name == "trace.json" and sum(len(layer.counts) for layer in recorded.layers) == 8
    assert all(layer.forward_s > 0 and layer.backward_s > 0 for layer in recorded.layers if layer.counts)
