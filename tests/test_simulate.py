"""commlib simulate: clusters and models from files, predictions that keep to their bounds, and what it prints and writes."""

import dataclasses
import doctest
import importlib
import json
import pathlib

import pytest

from commlib import commands, simulate_report
from commlib.cluster import Cluster
from commlib.messages import BUCKET_NBYTES, FIRST_BUCKET_NBYTES, FLOAT32_NBYTES, GROUP_NBYTES, SCHEDULES, SMALL_NBYTES
from commlib.models import MODELS
from commlib.settings import Settings
from commlib.simulate import Job, changes, predict
from commlib.workload import Workload

PLAIN = {"ranks_per_host": 1, "between": {"latency_us": 20, "gbit_per_s": 10}}
HOSTS_OF_FOUR = {"ranks_per_host": 4, "nic": "shared", "inside": {"latency_us": 3, "gbit_per_s": 100},
                 "between": {"latency_us": 20, "gbit_per_s": 25}}  # fmt: skip
FULL = {**HOSTS_OF_FOUR, "nic": "per rank", "reduction_gbyte_per_s": 5, "oversubscription": 3, "jitter_us": 7, "seed": 9,
        "stragglers": {"one_in": 4, "slower": 1.5}, "tflops": 2,
        "processor": {"cores": 3, "hosts": 2, "message_us": 4, "gbyte_per_s": 2}}  # fmt: skip


FAST = {"ranks_per_host": 1, "between": {"latency_us": 0.1, "gbit_per_s": 1e5}, "reduction_gbyte_per_s": 1e5}


def job(table=None, model="alexnet", compute_s=0.2, **changes):
    return Job(Workload.of_model(model, compute_s), Cluster.from_dict(table or PLAIN), **changes)


# ---- files ------------------------------------------------------------------------------------------------------------


def test_a_cluster_says_what_its_file_says():
    cluster = Cluster.from_dict(FULL)
    assert dataclasses.astuple(cluster.inside) == pytest.approx((3e-6, 8e-11, 2e-10))
    assert dataclasses.astuple(cluster.between) == pytest.approx((20e-6, 3.2e-10, 2e-10))
    assert cluster == Cluster(4, cluster.inside, cluster.between, shared_nic=False, oversubscription=3, seed=9,
                              jitter_s=pytest.approx(7e-6), straggler_every=4, straggler_slowness=1.5, tflops=2,
                              processor=(3, 2, pytest.approx(4e-6), pytest.approx(5e-10)))  # fmt: skip
    assert cluster.shape(6).ranks_per_host == (4, 2)
    assert cluster.slowness(6) == (1.5, 1, 1, 1, 1.5, 1)
    # Six ports of 25 Gbit/s each have a third of that through the switch.
    assert cluster.switch_beta_s_per_byte(cluster.shape(6)) == pytest.approx(3 * 3.2e-10 / 6)
    assert cluster.switch_beta_s_per_byte(cluster.shape(4)) == 0, "one host sends nothing through it"


def test_ranks_that_share_a_nic_have_a_part_of_it_in_the_settings():
    cluster = Cluster.from_dict(HOSTS_OF_FOUR)
    settings = cluster.settings(cluster.shape(8), Settings())
    assert settings.beta_between_s_per_byte == pytest.approx(4 * 8e-9 / 25)
    apart = dataclasses.replace(cluster, shared_nic=False)
    assert apart.settings(cluster.shape(8), Settings()).beta_between_s_per_byte == pytest.approx(8e-9 / 25)


@pytest.mark.parametrize("table, complaint", [
    ([], "must be an object"),
    ({}, "lacks 'ranks_per_host'"),
    ({**PLAIN, "latency": 3}, "no such key as 'latency'; there are .*oversubscription"),
    ({**PLAIN, "ranks_per_host": 0}, "whole number from 1"),
    ({**PLAIN, "ranks_per_host": 2}, "lacks 'nic'"),
    ({**PLAIN, "ranks_per_host": 2, "nic": "both"}, "'shared' or 'per rank'"),
    ({**PLAIN, "ranks_per_host": 2, "nic": "shared"}, "lacks 'inside'"),
    ({**PLAIN, "between": {"latency_us": 20}}, "lacks 'gbit_per_s'"),
    ({**PLAIN, "between": {"latency_us": 20, "gbit_per_s": 0}}, "number above 0"),
    ({**PLAIN, "between": {"latency_us": "20", "gbit_per_s": 1}}, "between: 'latency_us' must be a number"),
    ({**PLAIN, "between": {"latency_us": 20, "gbit_per_s": 1, "mtu": 9000}}, "'mtu'"),
    ({**PLAIN, "oversubscription": 0.5}, "at least 1"),
    ({**PLAIN, "jitter_us": -1}, "at least 0"),
    ({**PLAIN, "jitter_us": float("nan")}, "must be a number"),
    ({**PLAIN, "processor": {}}, "the processor lacks 'cores'"),
    ({**PLAIN, "processor": {"cores": 0, "message_us": 1, "gbyte_per_s": 1}}, "whole number from 1"),
    ({**PLAIN, "processor": {"cores": 1, "message_us": 1, "gbyte_per_s": 1, "ghz": 3}}, "'ghz'"),
    ({**PLAIN, "stragglers": {"one_in": 2}}, "lacks 'slower'"),
    ({**PLAIN, "stragglers": {"one_in": 2, "slower": 0.5}}, "at least 1"),
])  # fmt: skip
def test_a_cluster_that_is_none_is_refused(table, complaint):
    with pytest.raises(ValueError, match=complaint):
        Cluster.from_dict(table)


LAYERS = [{"name": "a", "tensors": [10, 2], "forward_s": 0.5, "backward_s": 1}, {"forward_s": 0, "backward_s": 0.25}]


def test_a_model_says_what_its_file_says():
    workload = Workload.from_dict({"name": "mine", "layers": LAYERS})
    assert (workload.compute_s, workload.parameters) == (1.75, 12)
    assert [layer.counts for layer in workload.layers] == [(10, 2), ()]


@pytest.mark.parametrize("table, complaint", [
    ({"name": "x", "layers": []}, "at least one layer"),
    ({"name": "x"}, "lacks 'layers'"),
    ({"name": "x", "layers": [{**LAYERS[0], "forward_s": -1}]}, "layer 0: 'forward_s' must be a number of at least 0"),
    ({"name": "x", "layers": [LAYERS[0], {**LAYERS[0], "tensors": [1.5]}]}, "layer 1, tensors: '0' must be a whole"),
    ({"name": "x", "layers": [{**LAYERS[0], "tensors": 3}]}, "must be a list"),
    ({"name": "x", "layers": [{**LAYERS[0], "parameters": 3}]}, "no such key as 'parameters'"),
    ({"name": "x", "layers": [{"forward_s": 0, "backward_s": 0}]}, "must take time"),
])  # fmt: skip
def test_a_model_that_is_none_is_refused(table, complaint):
    with pytest.raises(ValueError, match=complaint):
        Workload.from_dict(table)


# ---- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_messages_carry_every_gradient_once_when_it_is_ready_and_before_it_is_needed(model, schedule):
    counts = [tuple(tensor.parameters for tensor in layer.tensors) for layer in MODELS[model]()]
    messages = SCHEDULES[schedule].messages(counts)
    assert sum(message.count for message in messages) == sum(map(sum, counts))
    sizes = [message.count * FLOAT32_NBYTES for message in messages]
    if schedule in ("none", "backward"):
        largest = 4 * max(max(tensors, default=0) for tensors in counts)
        assert sizes[0] >= FIRST_BUCKET_NBYTES and all(BUCKET_NBYTES <= size < BUCKET_NBYTES + largest for size in sizes[1:-1])
        assert [message.ready for message in messages] == sorted((message.ready for message in messages), reverse=True)
    else:
        assert [message.needed for message in messages] == sorted(message.needed for message in messages)
        large = [4 * count for tensors in counts for count in tensors if 4 * count > SMALL_NBYTES]
        small = list(sizes)
        for size in large:
            small.remove(size)  # each travels by itself
        assert all(size < GROUP_NBYTES + SMALL_NBYTES for size in small)


# ---- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [PLAIN, HOSTS_OF_FOUR, FULL], ids=["plain", "hosts of four", "full"])
@pytest.mark.parametrize("model", ["alexnet", "resnet50"])
def test_schedules_keep_their_order_and_the_bound(table, model):
    result = predict(job(table, model, 0.05), [1, 2, 8, 11], advise=False)
    slack = 1 + 1e-9
    for size in (1, 2, 8, 11):
        points = {point.schedule: point for point in result.points if point.ranks == size}
        step_s = {name: point.step_s for name, point in points.items()}
        assert step_s["ours"] <= step_s["backward"] * slack and step_s["backward"] <= step_s["none"] * slack
        for point in points.values():
            assert point.bound_s <= point.step_s * slack
            assert point.speed_up == pytest.approx(size * 0.05 / point.step_s)
            assert point.efficiency == pytest.approx(point.speed_up / size)


def test_without_communication_to_speak_of_compute_limits_and_ranks_multiply():
    for point in predict(job(FAST), [4], advise=False).points:
        assert point.speed_up == pytest.approx(4, rel=0.01) and point.limit == "compute"


@pytest.mark.parametrize("table, limit", [
    ({"ranks_per_host": 1, "between": {"latency_us": 1, "gbit_per_s": 1}}, "bandwidth"),
    ({**FAST, "between": {"latency_us": 200_000, "gbit_per_s": 1000}}, "latency"),
    ({**FAST, "reduction_gbyte_per_s": 0.1}, "reduction"),
    ({**PLAIN, "stragglers": {"one_in": 3, "slower": 2}}, "stragglers"),
], ids=["bandwidth", "latency", "reduction", "stragglers"])  # fmt: skip
def test_what_limits_has_its_name_and_less_of_it_helps_most(table, limit):
    result = predict(job(table, compute_s=0.5), [4], ["ours"])
    assert result.points[0].limit == limit
    gains = {each.change: each.gain for each in result.advice}
    if limit == "bandwidth":
        assert gains["twice the bandwidth"] == pytest.approx(gains["half the bytes (16-bit wire)"], rel=0.05)
        assert gains["twice the bandwidth"] > 1.5 > gains["half the latency"]
    elif limit == "latency":
        assert gains["half the latency"] > 1.3 > gains["twice the bandwidth"]
    assert gains["twice the batch"] >= 0.99


def test_where_latency_is_all_what_needs_fewest_rounds_is_chosen():
    """0.5 s of compute, and 0.4 s of latency on its way: with rings, which need more rounds, it would be 1.2 s."""
    result = predict(job({**FAST, "between": {"latency_us": 100_000, "gbit_per_s": 1000}}, compute_s=0.5), [4], ["ours"])
    assert result.points[0].limit == "latency" and result.points[0].step_s < 0.95
    gains = {each.change: each.gain for each in result.advice}
    assert gains["half the latency"] > 1.25 > gains["twice the bandwidth"]


def test_a_fixed_batch_leaves_each_rank_its_part_of_the_compute():
    (point,) = predict(job(FAST, compute_s=1.0, fixed_batch=True), [4], ["none"], advise=False).points
    assert point.step_s == pytest.approx(0.25, rel=0.01) and point.speed_up == pytest.approx(4, rel=0.01)


def test_a_processor_that_many_hosts_share_is_what_limits_them():
    """One core for eight hosts: 20 us for each message on either side are far more than its way takes."""
    table = {**FAST, "processor": {"cores": 1, "hosts": 8, "message_us": 20, "gbyte_per_s": 1}}
    shared, own, none = (predict(job(each, compute_s=0.01), [8], ["none"], advise=False).points[0] for each in (
        table, {**table, "processor": {**table["processor"], "hosts": 1}}, FAST))  # fmt: skip
    assert shared.step_s > 3 * own.step_s and own.step_s > 3 * none.step_s
    # Every byte of the gradients leaves each rank 2 x 7 / 8 times and comes in as often, through one core.
    assert shared.exposed_s > 8 * 2 * 2 * 7 / 8 * 4 * 60_965_224 / 1e9


def test_half_the_bytes_are_half_the_communication():
    slow = {"ranks_per_host": 1, "between": {"latency_us": 0, "gbit_per_s": 1}}
    full, half = (predict(job(slow, wire_nbytes=nbytes), [2], ["none"], advise=False).points[0] for nbytes in (4, 2))
    assert half.exposed_s == pytest.approx(full.exposed_s / 2, rel=0.01)
    assert half.bound_s < full.bound_s
    assert not any("bytes" in change for change, _, _ in changes(job(slow, wire_nbytes=2)))


def test_the_same_job_twice_gives_the_same_numbers_and_another_seed_others():
    first, again, other = (predict(job({**FULL, "seed": seed}), [8], ["ours"], advise=False).points for seed in (1, 1, 2))
    assert first == again != other


def test_a_forced_algorithm_moves_everything():
    record = Settings(algorithms=(("allreduce", "recursive_doubling"),))
    (point,) = predict(job(record=record), [4], ["ours"], advise=False).points
    assert list(point.algorithms) == ["recursive_doubling"]


def test_progress_is_told_and_ends_near_one():
    told = []
    predict(job(), [2, 4], ["ours"], progress=lambda what, share: told.append((what, share)))
    assert {what for what, _ in told} == {f"{size} ranks, ours" for size in (2, 4)} | {
        f"4 ranks, {change}" for change, *_ in changes(job())}  # fmt: skip
    shares = [share for what, share in told if what == "4 ranks, ours"]
    assert shares == sorted(shares) and 0.9 < shares[-1] <= 1


@pytest.mark.parametrize("arguments, complaint", [
    (([2], ["DDP"]), "not DDP"), (([], ["ours"]), "at least one number of ranks"), (([0], ["ours"]), "not 0"),
    (([1 << 20], ["ours"]), "can be simulated"),
])  # fmt: skip
def test_what_cannot_be_simulated_is_refused(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        predict(job(), *arguments)


# ---- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    for name, table in {"cluster": PLAIN, "full": FULL, "odd": {**PLAIN, "colour": 3},
                        "model": {"name": "mine", "layers": LAYERS}}.items():  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(table))
    return tmp_path


def call(files, *words, cluster="cluster"):
    return commands.main(["simulate", "--cluster", str(files / f"{cluster}.json"), *words])


def test_the_command_prints_a_table_and_writes_what_it_printed(files, capsys):
    path = files / "all.json"
    assert call(files, "--model", "alexnet", "--compute", "0.2", "--ranks", "2,4", "--json", str(path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("alexnet: 61.0 M parameters, 32 bits")
    assert lines[1].split("  ")[0].strip() == "ranks"
    assert [line.split()[:2] for line in lines[2:12]] == [[ranks, name] for ranks in "24" for name in (*SCHEDULES, "bound")]
    written = json.loads(path.read_text())
    for point, line in zip(written["points"], [line for line in lines[2:12] if "bound" not in line]):
        assert f"{1e3 * point['step_s']:,.1f}" in line
    assert len(written["advice"]) == 4 and written["cluster"]["between"]["alpha_s"] == pytest.approx(20e-6)


def test_the_command_takes_a_file_of_layers_and_a_batch(files, capsys):
    assert call(files, "--model", str(files / "model.json"), "--ranks", "2", "--no-advice") == 0
    assert capsys.readouterr().out.startswith("mine: 0.0 M parameters")
    assert call(files, "--model", "alexnet", "--batch", "64", "--ranks", "1", "--no-advice", cluster="full") == 0
    milliseconds = 1e3 * 64 * 3 * 2 * 724_406_816 / 2e12  # 2 TFLOP/s; forward, and backward twice that
    assert f"{milliseconds:,.1f} ms on one rank" in capsys.readouterr().out


@pytest.mark.parametrize("words, cluster, complaint", [
    (["--model", "alexnet"], "cluster", "either --compute"),
    (["--model", "alexnet", "--compute", "1", "--batch", "2"], "cluster", "either --compute"),
    (["--model", "alexnet", "--batch", "2"], "cluster", '"tflops" in the cluster'),
    (["--model", "alexnet", "--compute", "-1"], "cluster", "more than 0"),
    (["--model", "alexnet", "--compute", "1"], "odd", "odd.json: the cluster: no such key as 'colour'"),
    (["--model", "alexnet", "--compute", "1"], "none", "none.json"),
    (["--model", "{files}/model.json", "--compute", "1"], "cluster", "have their times"),
    (["--model", "alexnets", "--compute", "1"], "cluster", "neither a file nor one of the models alexnet"),
    (["--model", "alexnet", "--compute", "1", "--steps", "1"], "cluster", "at least 2"),
    (["--model", "alexnet", "--compute", "1", "--schedules", "best"], "cluster", "not best"),
    (["--model", "alexnet", "--compute", "1", "--ranks", "3", "--algorithm", "recursive_doubling", "--no-advice", "--json",
      "/nowhere/at/all"], "cluster", "/nowhere/at/all"),
])  # fmt: skip
def test_the_command_says_what_is_wrong(files, capsys, words, cluster, complaint):
    words = [word.format(files=files) for word in words]
    assert call(files, *words, cluster=cluster) == 2
    error = capsys.readouterr().err
    assert error.startswith("commlib simulate: ") and complaint in error


def test_the_plot_has_a_line_for_every_schedule_and_the_bound(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plot.svg"
    assert str(path) in simulate_report.draw(predict(job(), [2, 4], advise=False), str(path))
    drawing = path.read_text()
    assert all(f"<!-- {name} -->" in drawing for name in (*SCHEDULES, "bound"))


def test_a_plot_without_matplotlib_is_a_message(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in simulate_report.draw(predict(job(), [2], advise=False), str(tmp_path / "plot.svg"))


@pytest.mark.parametrize("name", ["messages", "cluster", "json_table", "workload", "simulated_training", "simulation",
                                  "simulate"])  # fmt: skip
def test_examples(name):
    assert doctest.testmod(importlib.import_module(f"commlib.{name}")).failed == 0


def test_the_examples_of_the_documentation_run(capsys):
    root = pathlib.Path(__file__).resolve().parent.parent
    folder = root / "examples" / "simulate"
    words = ["simulate", "--cluster", str(folder / "cluster.json"), "--no-advice"]
    assert commands.main([*words, "--model", "bert_base", "--batch", "192", "--ranks", "4"]) == 0
    text = (root / "docs" / "simulate.md").read_text()
    lines = capsys.readouterr().out.splitlines()
    assert all(" ".join(line.split()) in " ".join(text.split()) for line in lines), "docs/simulate.md shows other numbers"
    assert commands.main([*words, "--model", str(folder / "model.json"), "--ranks", "8"]) == 0
    for name in ("cluster", "model"):
        assert (folder / f"{name}.json").read_text() in text


def test_the_documentation_names_every_key_and_model():
    text = (pathlib.Path(__file__).resolve().parent.parent / "docs" / "simulate.md").read_text()
    assert all(f"`{word}`" in text for word in (*FULL, *MODELS, *SCHEDULES))
