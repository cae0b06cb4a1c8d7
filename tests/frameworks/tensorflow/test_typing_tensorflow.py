"""The types of the public modules as a user's type checker sees them, that they are the code's, and that they are shipped."""

import pathlib
import re
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
PROGRAM = HERE / "typed_program_tensorflow.py"
# TensorFlow and Keras have no types of their own.
CONFIGURATION = """[mypy]
strict = True
[mypy-tensorflow.*,keras.*]
ignore_missing_imports = True
follow_imports = skip
[mypy-commlib.*]
follow_imports = silent
"""
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
    """mypy(program) -> what mypy --strict says; commlib lies there as an installation has it."""
    folder = tmp_path_factory.mktemp("typing")
    installed = folder / "site" / "commlib"
    installed.mkdir(parents=True)
    for path in (ROOT / "commlib").iterdir():
        (installed / path.name).symlink_to(path)
    for name in ("tensorflow", "keras"):
        (installed / name).symlink_to(ROOT / "frameworks" / name)
    (folder / "mypy.ini").write_text(CONFIGURATION)

    def run(program):
        command = [sys.executable, "-m", "mypy", "--config-file", folder / "mypy.ini", "--cache-dir", folder / "cache", program]
        ran = subprocess.run(command, cwd=folder, env={"MYPYPATH": str(folder / "site")}, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, timeout=110)  # fmt: skip
        return ran.returncode, ran.stdout

    return run


def test_a_strict_program_is_accepted_and_its_types_are_known(mypy):
    status, printed = mypy(PROGRAM)
    assert status == 0, printed
    revealed = {int(line): text for line, text in re.findall(r"\.py:(\d+): note: Revealed type is \"(.*)\"", printed)}
    asked = {number: line.partition("  # ")[2].split() for number, line in enumerate(PROGRAM.read_text().splitlines(), 1)
             if line.lstrip().startswith("reveal_type(")}  # fmt: skip
    assert revealed.keys() == asked.keys(), printed
    for number, words in asked.items():
        assert words and all(word in revealed[number] for word in words), (number, words, revealed[number])


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
    """What setuptools would put into a wheel."""
    pytest.importorskip("setuptools")
    text = (
        "import setuptools; d = setuptools.Distribution(); d.parse_config_files(); c = d.get_command_obj('build_py');"
        "c.ensure_finalized(); c.manifest_files = {};"
        "print(*(file for package in c.packages for file in c.find_data_files(package, c.get_package_dir(package))))"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", text], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert {*PAGES.values(), "frameworks/keras/__init__.pyi", "frameworks/keras/py.typed", "frameworks/tensorflow/py.typed"} <= \
        set(ran.stdout.split())  # fmt: skip
