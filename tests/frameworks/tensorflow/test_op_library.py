"""The op library: it compiles without warnings and without TensorFlow, and refuses what it cannot work with."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Wno-sign-conversion", "-Werror")


@pytest.mark.parametrize("source", sorted((ROOT / "native").glob("*.cc")), ids=lambda path: path.name)
def test_no_warnings(source):
    compiler = shutil.which("g++") or shutil.which("c++")
    if not compiler:
        pytest.skip("no C++ compiler")
    subprocess.run([compiler, "-std=c++17", "-O2", *WARNINGS, "-fsyntax-only", source], check=True)


def test_what_it_cannot_work_with(tensorflow_ranks):
    old, lost = tensorflow_ranks(1).call("library_cases:refusals")[0]
    assert "commlib.tensorflow needs TensorFlow 2.16 or newer, and this is 2.15.1: pip install -U tensorflow" in old
    assert "cannot load commlib's op library" in lost and "It was tried with 2.16 to 2.21" in lost


def test_horovods_name(tensorflow_ranks):
    assert tensorflow_ranks(1).call("library_cases:as_horovod") == [True]
