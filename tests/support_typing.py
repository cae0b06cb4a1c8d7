"""What a user's type checker says of commlib, and which files a wheel would hold; for the tests of each adapter's types."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def strict_mypy(folder, adapters, others=""):
    """mypy(program) -> (status, text) of mypy --strict, where commlib lies as an installation has it.

    Args:
        folder: an empty one.
        adapters: names under frameworks/.
        others: more sections of mypy.ini.
    """
    installed = folder / "site" / "commlib"
    installed.mkdir(parents=True)
    for path in (ROOT / "commlib").iterdir():
        (installed / path.name).symlink_to(path)
    for name in adapters:
        (installed / name).symlink_to(ROOT / "frameworks" / name)
    (folder / "mypy.ini").write_text(f"[mypy]\nstrict = True\n{others}[mypy-commlib.*]\nfollow_imports = silent\n")

    def run(program):
        command = [sys.executable, "-m", "mypy", "--config-file", folder / "mypy.ini", "--cache-dir", folder / "cache", program]
        ran = subprocess.run(command, cwd=folder, env={"MYPYPATH": str(folder / "site")}, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, timeout=110)  # fmt: skip
        return ran.returncode, ran.stdout

    return run


def check_revealed(mypy, program, spelled=()):
    """A program is accepted, and what it asks by reveal_type has the words behind each; `spelled` as mypy spells them."""
    status, printed = mypy(program)
    assert status == 0, printed
    revealed = {int(line): text for line, text in re.findall(r"\.py:(\d+): note: Revealed type is \"(.*)\"", printed)}
    asked = {number: line.partition("  # ")[2].split() for number, line in enumerate(program.read_text().splitlines(), 1)
             if line.lstrip().startswith("reveal_type(")}  # fmt: skip
    assert revealed.keys() == asked.keys(), printed
    for number, words in asked.items():
        assert words and all(dict(spelled).get(word, word) in revealed[number] for word in words), (number, words, revealed[number])


def shipped_files():
    """The data files that setuptools would put into a wheel."""
    text = (
        "import setuptools; d = setuptools.Distribution(); d.parse_config_files(); c = d.get_command_obj('build_py');"
        "c.ensure_finalized(); c.manifest_files = {};"
        "print(*(file for package in c.packages for file in c.find_data_files(package, c.get_package_dir(package))))"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", text], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return set(ran.stdout.split())
