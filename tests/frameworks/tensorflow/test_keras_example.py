"""The digits example for Keras, as a newcomer runs it: it learns, and its timeline shows all ranks."""

import json
import os
import re
import subprocess
import sys

import commlib

EXAMPLE = os.path.join(os.path.dirname(os.path.dirname(commlib.__file__)), "examples", "keras_digits.py")


def test_two_ranks_learn_the_digits_and_write_a_timeline(tmp_path):
    trace = tmp_path / "trace.json"
    command = [sys.executable, "-m", "commlib.launch", "-np", "2", sys.executable, EXAMPLE, "--timeline", str(trace)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"held-out images: ([\d.]+)%", done.stdout)[1]) > 95.0
    events = json.loads(trace.read_text())
    for rank in (0, 1):
        names = {event["name"] for event in events if event["pid"] == rank}
        assert {"allreduce.DistributedOptimizer.0.0-1", "ALLREDUCE"} <= names
