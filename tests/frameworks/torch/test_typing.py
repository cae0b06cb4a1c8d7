"""The types of the public modules as a user's type checker sees them, and that they are shipped."""

import pathlib

import pytest
from support_typing import check_revealed, shipped_files, strict_mypy

PROGRAM = pathlib.Path(__file__).resolve().parent / "typed_program.py"


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    return strict_mypy(tmp_path_factory.mktemp("typing"), ["torch"])


def test_a_strict_program_is_accepted_and_its_types_are_known(mypy):
    check_revealed(mypy, PROGRAM, {"float32": "floating", "int32": "signedinteger"})


@pytest.mark.parametrize("line, words", [
    ("commlib.allreduce([1.0, 2.0])", 'Value of type variable "_Array"'),
    ("commlib.allreduce(numpy.ones(1), op='sum')", 'expected "ReduceOp"'),
    ("commlib.torch.broadcast(torch.ones(1))", 'Missing positional argument "root_rank"'),
    ("commlib.torch.allreduce(torch.ones(1), name=3)", 'incompatible type "int"'),
    ("commlib.init(3)", "Too many positional arguments"),
])  # fmt: skip
def test_mistakes_are_found(mypy, tmp_path, line, words):
    program = tmp_path / "mistaken.py"
    program.write_text(f'"""A mistake."""\nimport numpy\nimport torch\nimport commlib\nimport commlib.torch\n{line}\n')
    status, printed = mypy(program)
    assert status == 1 and words in printed, printed


def test_types_are_installed():
    pytest.importorskip("setuptools")
    pages = ("commlib/py.typed", "commlib/__init__.pyi", "commlib/process_sets.pyi", "frameworks/torch/py.typed",
             "frameworks/torch/__init__.pyi", "frameworks/torch/distributed/__init__.pyi")  # fmt: skip
    assert set(pages) <= shipped_files()
