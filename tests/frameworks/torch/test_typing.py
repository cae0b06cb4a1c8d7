"""The types of the public modules as a user's type checker sees them, and that they are shipped."""

import pathlib
import re
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
PROGRAM = HERE / "typed_program.py"
CONFIGURATION = "[mypy]\nstrict = True\n[mypy-commlib.*]\nfollow_imports = silent\n"


@pytest.fixture(scope="module")
def mypy(tmp_path_factory):
    """mypy(program) -> what mypy --strict says; commlib lies there as an installation has it."""
    folder = tmp_path_factory.mktemp("typing")
    installed = folder / "site" / "commlib"
    installed.mkdir(parents=True)
    for path in (ROOT / "commlib").iterdir():
        (installed / path.name).symlink_to(path)
    (installed / "torch").symlink_to(ROOT / "frameworks" / "torch")
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
    revealed = {int(line): text for line, text in re.findall(r"typed_program.py:(\d+): note: Revealed type is \"(.*)\"", printed)}
    asked = {number: line.partition("  # ")[2].split() for number, line in enumerate(PROGRAM.read_text().splitlines(), 1)
             if line.lstrip().startswith("reveal_type(")}  # fmt: skip
    assert revealed.keys() == asked.keys(), printed
    for number, words in asked.items():
        parts = {"float32": "floating", "int32": "signedinteger"}
        assert words and all(parts.get(word, word) in revealed[number] for word in words), (number, words, revealed[number])


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
    """What setuptools would put into a wheel."""
    pytest.importorskip("setuptools")
    text = (
        "import setuptools; d = setuptools.Distribution(); d.parse_config_files(); c = d.get_command_obj('build_py');"
        "c.ensure_finalized(); c.manifest_files = {};"
        "print(*(file for package in c.packages for file in c.find_data_files(package, c.get_package_dir(package))))"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", text], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    pages = ("commlib/py.typed", "commlib/__init__.pyi", "commlib/process_sets.pyi", "frameworks/torch/py.typed",
             "frameworks/torch/__init__.pyi", "frameworks/torch/distributed/__init__.pyi")  # fmt: skip
    assert set(pages) <= set(ran.stdout.split())
