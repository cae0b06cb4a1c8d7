"""The types of the public modules as a user's type checker sees them, that they are the code's, and that they are shipped."""

import pathlib

import pytest
from support_typing import ROOT, check_revealed, shipped_files, strict_mypy

PROGRAM = pathlib.Path(__file__).resolve().parent / "typed_program_tensorflow.py"
# TensorFlow and Keras have no types of their own.
UNTYPED = "[mypy-tensorflow.*,keras.*]\nignore_missing_imports = True\nfollow_imports = skip\n"
PAGES = {"commlib.tensorflow": "frameworks/tensorflow/__init__.pyi", "commlib.keras": "frameworks/tensorflow/keras/__init__.pyi",
         "commlib.tensorflow.keras.callbacks": "frameworks/tensorflow/keras/callbacks.pyi"}  # fmt: skip


def check_pages():
    """What a rank runs, which has TensorFlow in it."""
    from test_tidy import check_types

    for name, page in PAGES.items():
        check_types(name, ROOT / page)


def test_types_are_those_of_the_code(tensorflow_ranks):
    tensorflow_ranks(1).call("test_typing_tensorflow:check_pages")


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    return strict_mypy(tmp_path_factory.mktemp("typing"), ["tensorflow", "keras"], UNTYPED)


def test_a_strict_program_is_accepted_and_its_types_are_known(mypy):
    check_revealed(mypy, PROGRAM)


@pytest.mark.parametrize("line, words", [
    ("commlib.tensorflow.broadcast(1.0)", 'Missing positional argument "root_rank"'),
    ("commlib.tensorflow.allreduce(1.0, name=3)", 'incompatible type "int"'),
    ("commlib.keras.allreduce(1.0, op='sum')", 'expected "ReduceOp | None"'),
    ("commlib.keras.DistributedOptimizer('sgd', passes=2)", 'Unexpected keyword argument "passes"'),
])  # fmt: skip
def test_mistakes_are_found(mypy, tmp_path, line, words):
    program = tmp_path / "mistaken.py"
    program.write_text(f'"""A mistake."""\nimport commlib.keras\nimport commlib.tensorflow\n{line}\n')
    status, printed = mypy(program)
    assert status == 1 and words in printed.replace("Optional[ReduceOp]", "ReduceOp | None"), printed


def test_types_are_installed():
    pytest.importorskip("setuptools")
    pages = (*PAGES.values(), "frameworks/keras/__init__.pyi", "frameworks/keras/py.typed", "frameworks/tensorflow/py.typed")
    assert set(pages) <= shipped_files()
