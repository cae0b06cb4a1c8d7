"""Where gradients lie: whatever memory they are reduced in, the bits are the same, and nobody's tensor changes behind his back."""

import json

import pytest
import torch
from starting import start
from storage_cases import LOOPS
from torch_cases import FORMS

LARGE = ("middle.weight", "last.weight")


@pytest.fixture(scope="module")
def ranks():
    with start(2) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def results(ranks):
    return ranks.call("storage_cases:all_loops")


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loop", LOOPS)
def test_shared_memory_changes_no_bit(results, loop, form):
    private, _ = results[0][loop, form, "private"]
    for of_rank in results:
        weights, _ = of_rank[loop, form, "shared"]
        assert same_bits(weights, private)
        assert same_bits(of_rank[loop, form, "private"][0], private)


def test_the_report_says_where_gradients_were_reduced(results):
    for form in FORMS:
        assert set(results[0]["plain", form, "private"][1].values()) == {"private"}
        paths = results[0]["plain", form, "shared"][1]
        assert {name: path for name, path in paths.items() if path != "copied"} == dict.fromkeys(LARGE, "private")
    for loop, path in (("zeroed", "shared"), ("alternating", "shared"), ("owned", "private")):
        paths = results[0][loop, "horovod", "shared"][1]
        assert [paths[name] for name in LARGE] == [path] * 2, loop


def test_without_room_in_the_heap_gradients_stay_private(ranks, results):
    private, _ = results[0]["plain", "overlapped", "private"]
    for weights, paths in ranks.call("storage_cases:without_memory"):
        assert same_bits(weights, private) and set(paths.values()) == {"private"}


def test_gradients_outlive_the_communicator(ranks, results):
    private, _ = results[0]["plain", "overlapped", "private"]
    for weights, paths in ranks.call("storage_cases:again"):
        assert same_bits(weights, private) and "copied" in paths.values()


@pytest.mark.parametrize("options", [{"local_size": 1}, {"backend": "gloo"}], ids=str)
def test_ranks_that_share_no_memory(results, options):
    private, _ = results[0]["plain", "overlapped", "private"]
    with start(2, **options) as ranks:
        for weights, paths in ranks.call("storage_cases:trained", "plain", "overlapped", "shared"):
            assert set(paths.values()) == {"private"}
            assert options.get("backend") == "gloo" or same_bits(weights, private)


def test_the_timeline_shows_memory_and_copies(ranks, tmp_path):
    ranks.call("storage_cases:traced", str(tmp_path / "trace.json"))
    events = [event for event in json.loads((tmp_path / "trace.json").read_text()) if event["pid"] == 1]
    of_one = [event for event in events if event["name"].startswith("allreduce.") and event["name"].endswith("middle.weight")]
    assert [event["args"]["memory"] for event in of_one] == ["private", "copied", *["shared"] * 3]
    copies = [event["name"] for event in events if event.get("cat") == "copy"]
    assert copies.count("copy middle.weight") == 1
