"""What the benchmarks say of their raw data: absent peers are named, ratios are right, tables land between their markers."""

import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "benchmarks"))

import environments  # noqa: E402
import plot  # noqa: E402

from commlib.messages import SCHEDULES  # noqa: E402
from commlib.schedule import LayerTime  # noqa: E402

ABOUT = {
    "machine": {"processor": "P", "architecture": "A", "cores": 2}, "versions": {"gloo": {"torch": "2"}}, "commit": "c0ffee",
    "date": "2026-01-02T00:00:00", "load_before": [0.5, 0, 0], "load_after": [1.5, 0, 0],
    "absent": {"horovod": "does not build"},
}  # fmt: skip
ALLREDUCE = {**ABOUT, "allreduce": {
    count: {"commlib": {"8": [1e-6, 2e-6, 3e-6]}, "gloo": {"8": [2e-4]}, "mpich": {"8": [1e-6]}, "openmpi": {"8": []}}
    for count in ("2", "4", "8")}}  # fmt: skip
LATENCY = {
    **ABOUT,
    "orders": {"at_once": {"count": 1000, "nbytes": 4096}, "as_list": {}, "idle": {},
               "urgent": {"nbytes": 65536, "behind_nbytes": 1 << 28}},
    "seconds": {"at_once": {"commlib": [2e-3], "oneccl": [3e-3]}, "as_list": {"commlib": [1e-3], "oneccl": []},
                "idle": {"commlib": [1e-5], "oneccl": [2e-5]},
                "urgent": {"commlib": [1e-4], "oneccl": []}},
}  # fmt: skip


TRAINING = {**ABOUT, "cases": {"GPT": {
    "parameters": 3, "nbytes": 27_000_000, "steps_s": {"alone": [0.1], "ddp": [0.14], "commlib": [0.11], "commlib_waiting": [0.12]},
    "cpu_s": {"alone": [0.1], "ddp": [0.13], "commlib": [0.105], "commlib_waiting": [0.105]},
    "compute_s": {"alone": [0.08], "gloo": [0.1], "commlib": [0.084]}}}}  # fmt: skip


def test_training_table():
    table = plot.training_table({"torch_training": TRAINING})
    row = "| GPT (27 MB) | 100.0 | 140.0 | 110.0 | 120.0 | 40.0 | 10.0 | 20.0 | 30.0 | 5.0 | +25% | +5% |"
    assert row in table


def test_allreduce_table():
    table = plot.allreduce_table({"allreduce": ALLREDUCE})
    assert "| 8 B | 2.0 | 200 | 1.0 | absent | mpich | 0.50x |" in table
    assert "Not measured: horovod: does not build." in table and "load average 0.5 before and 1.5 after" in table


def test_crowded_and_latency_tables():
    assert "| 8 B | 2.0 | 200 | 100.00x | 2.0 | 200 | 100.00x |" in plot.crowded_table({"allreduce": ALLREDUCE})
    table = plot.latency_table({"latency": LATENCY})
    assert "| commlib | 2.0 | 1.0 | 10.0 | 100 |" in table and "| oneccl | 3.0 |  | 20.0 |  |" in table


def test_tables_of_training_steps():
    about = {**ABOUT, "versions": {"torch": "2"}}
    ways = {"plain": 0.1, "overlapped": 0.21, "waiting": 0.24, "ddp": 0.3, "beside": 0.15}
    link = {**about, "bounds_s": {"both passes": 0.2}, "medians_s": ways, "nbytes": 4_000_000, "parameters": 7}
    table = plot.torch_link_table({"torch_link": {"runs": {"gpt, cpu": link}}})
    assert "| gpt, cpu | 4 MB in 7 tensors | 200 | 210 (1.05x) | 240 (1.20x) | 300 (1.50x) | 150 (0.75x) | 100 (0.50x) |" in table
    assert "P, 2 cores; torch 2. Load average before and after, commit and day: gpt, cpu: 0.5, 1.5, c0ffee" in table
    overhead = {**about, "parameters": 10, "times_s": {"plain": [0.010, 0.012], "one rank": [0.010, 0.0122]}}
    table = plot.torch_overhead_table({"torch_overhead": {"runs": {"width 4": overhead}}})
    assert "| width 4 | 11.0 ms | +0.9%, +10.0 us per parameter |" in table


def test_scaling_table():
    about = {**ABOUT, "versions": {}}
    steps = {"commlib": {"ours": [[1.1, 1.0, 1.1], [1.2, 0.9, 1.0]]}}
    run = {**about, "compute_s": 0.8, "bounds_s": {"ours": 1.0}, "steps_s": steps}
    table = plot.scaling_table({"scaling": {"runs": {"alexnet on 2, 100 Mbit/s": run}}})
    assert "| alexnet on 2, 100 Mbit/s | 800.0 | 1,000.0 | 1,100.0 (1.10x) |" in table


@pytest.mark.parametrize("name", SCHEDULES)
def test_emulated_training_starts_every_message_once_a_step_and_waits_for_it(name):
    import emulated

    class Mover:
        def __init__(self):
            self.started, self.waiting = [], set()

        array = staticmethod(lambda count: count)

        def barrier(self):
            pass

        def start(self, array, name, priority):
            assert name not in self.waiting, "started again before it was awaited"
            self.started.append(array)
            self.waiting.add(name)
            return lambda: self.waiting.remove(name)

    mover, counts = Mover(), [[100, 5], [200_000], [], [7], [30_000_000, 9]]
    training = emulated.Training(counts, [LayerTime(0, 0, 0)] * len(counts), SCHEDULES[name], mover, name)
    assert len(training.run(3)) == 2
    assert sum(mover.started) == 3 * sum(map(sum, counts)) and not mover.waiting


def test_tables_land_between_their_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- table: latency -->\nold\n<!-- end -->\nb\n")
    said = plot.write_tables({"latency": LATENCY}, [readme])
    text = readme.read_text()
    assert text.startswith("a\n<!-- table: latency -->\nMicroseconds") and text.endswith("\n<!-- end -->\nb\n")
    assert "old" not in text and "table latency: 1 in README.md" in said
    assert any("run benchmarks/allreduce.py first" in line for line in said)


@pytest.mark.parametrize("error, reason", [
    (subprocess.CalledProcessError(1, "pip", "x\n  /usr/a.h:5: error: #error C++17\nERROR: Failed"),
     "does not build: a.h:5: error: #error C++17"),
    (subprocess.CalledProcessError(1, "pip", "ERROR: No matching distribution\n"), "cannot be installed: No matching distribution"),
    (subprocess.TimeoutExpired("pip", 9, b"x"), "cannot be installed: Command 'pip' timed out after 9 seconds"),
    (FileNotFoundError(2, "No such file", "g++"), "cannot be installed: [Errno 2] No such file: 'g++'"),
])  # fmt: skip
def test_reasons_are_one_line_without_paths(error, reason):
    assert environments.reason_of(error) == reason


def test_fujitsus_curve_is_fitted_to_the_conventional_schedule_alone():
    import fujitsu_curve

    found = fujitsu_curve.curve("halving_doubling", [2, 16])
    two, sixteen = found["rows"]
    assert sixteen["conventional"] == pytest.approx(10.1, rel=1e-3)
    assert two["conventional"] < two["ours"] <= two["bound"] <= 2
    # Its time grows by lg p in latency and bandwidth alike, and the published one does not.
    assert fujitsu_curve.fit("recursive_doubling") is None
    text = fujitsu_curve.table({"halving_doubling": found, "recursive_doubling": None})
    assert "| halving_doubling | 16 | 10.1 |" in text and "| 10.1, 14.7 |" in text and "recursive" not in text
