"""What is private to torch is named in one file, and all of it may go away: the adapter still trains, and overlaps."""

import ast
import datetime
import functools
import pathlib
import subprocess
import sys

import pytest
import torch
import torch.distributed
from double import DoubleCommunicator, distribute
from models import Plain, batches, make, train, weights

import commlib.torch
from commlib.torch import gates, overlapping, private

ADAPTER = pathlib.Path(commlib.torch.__file__).resolve().parent
HERE = pathlib.Path(__file__).resolve().parent
PAGES = sorted([*ADAPTER.rglob("*.py"), *ADAPTER.rglob("*.pyi")])

# Those that run in the test's own process, and what is below that depends on what torch has.
SUITE = ("test_overlap.py", "test_hard_errors.py",
         "test_private.py::test_batch_normalisation_of_one_rank_is_torchs", "test_private.py::test_a_gloo_group")  # fmt: skip


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


@functools.lru_cache(None)
def own_names():
    """Names that commlib itself gives: functions, classes, attributes and variables."""
    names = {"_commlib"}
    for path in [*PAGES, *pathlib.Path(commlib.__file__).resolve().parent.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


@pytest.mark.parametrize("path", [path for path in PAGES if path.name != "private.py"],
                         ids=lambda path: str(path.relative_to(ADAPTER)))  # fmt: skip
def test_names_that_are_private_to_torch_are_in_one_file(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            assert node.attr in own_names(), f"{path.name}:{node.lineno}: {node.attr} is not ours: private.py"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not any(map(is_private, parts)), f"{path.name}:{node.lineno}: {parts} is torch's own"


def test_training_without_anything_private():
    """A good part of the adapter's tests, with a private.py that finds none of the names it asks torch for."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "without_private",
               *(str(HERE / name) for name in SUITE)]  # fmt: skip
    ran = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=110)
    assert ran.returncode == 0, ran.stdout[-6000:]
    assert "without private names" in ran.stdout


def test_a_torch_whose_modules_have_no_dict_of_parameters(monkeypatch):
    """Nothing is there for a gate: step() waits, and says so."""
    for module in (private, gates, overlapping):
        monkeypatch.setattr(module, "has_parameter_dicts", False)
    results = []
    for is_wrapped in (False, True):
        model = make(Plain)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if is_wrapped:
            optimizer = distribute(optimizer, DoubleCommunicator(), model)
        train(model, optimizer, batches(6, rows=4))
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any("where no gate can be" in reason for reason in optimizer.report()["fallbacks"])


def test_both_ways_to_tell_where_backward_is(monkeypatch):
    seen = []
    for task in (private._graph_task, None):
        monkeypatch.setattr(private, "_graph_task", task)
        weight = torch.ones(2, requires_grad=True)
        weight.register_hook(lambda _: seen.append(private.in_backward()))
        weight.sum().backward()
        torch.autograd.grad(weight.sum(), weight)
        seen.append(private.in_backward())
    assert seen == [True, True, False] * 2


def test_batch_normalisation_of_one_rank_is_torchs():
    commlib.torch.init()
    try:
        for options in ({}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}):
            ours, torchs = commlib.torch.SyncBatchNorm(3, **options), torch.nn.BatchNorm1d(3, **options)
            for is_training in (True, True, False):
                x = torch.randn(4, 3)
                assert torch.equal(ours.train(is_training)(x), torchs.train(is_training)(x))
            assert ours.state_dict().keys() == torchs.state_dict().keys()
            assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in torchs.state_dict().items())
    finally:
        commlib.torch.shutdown()


def test_a_gloo_group():
    minute = datetime.timedelta(minutes=1)
    for place in (None, {"hostname": "127.0.0.1"}):
        group = private.gloo_group(torch.distributed.HashStore(), 0, 1, place, minute, minute)
        tensor = torch.ones(2)
        group.allreduce([tensor], torch.distributed.ReduceOp.SUM).wait()
        assert tensor.tolist() == [1, 1]
