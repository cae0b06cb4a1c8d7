"""An environment per peer: made where it is missing, and why it is missing where it cannot be made.

    python benchmarks/environments.py [NAME ...]     installs peers, also those that could not be installed before

Each lives in .peers/NAME, since the files of MPI libraries collide. A peer that cannot be installed leaves the reason in
.peers/NAME/absent, so that it is tried once and then reported.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import venv

from peers import HERE, PEERS

ENVIRONMENTS = HERE.parent / ".peers"
CONSTRAINTS = HERE.parent / "constraints.txt"
INSTALL_S = 900.0  # Horovod builds from source


def folder_of(name):
    """A peer's environment: .peers/NAME, or this one."""
    return ENVIRONMENTS / name if PEERS[name].needs is None else pathlib.Path(sys.prefix)


def bin_folder(name):
    """Where a peer's programs are."""
    return folder_of(name) / "bin" if PEERS[name].needs is None else pathlib.Path(sys.executable).parent


def absence(name):
    """Why a peer cannot run here; None: it can."""
    needs = PEERS[name].needs
    if needs is not None:
        return None if importlib.util.find_spec(needs) else f"{needs} is not installed in this environment"
    reason = folder_of(name) / "absent"
    if reason.exists():
        return reason.read_text().strip()
    return None if (folder_of(name) / "complete").exists() else "not installed: run benchmarks/environments.py"


def install(name):
    """Makes a peer's environment, or writes down why that is not possible."""
    peer, folder = PEERS[name], folder_of(name)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"installing {name}: {' '.join(word for words in peer.pip for word in words)}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    try:
        for words in peer.pip:
            subprocess.run([*pip, *words], env={**os.environ, **peer.building}, check=True, text=True, timeout=INSTALL_S,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        peer.build(folder)
    except (OSError, subprocess.SubprocessError) as error:
        (folder / "log").write_text(output_of(error))
        (folder / "absent").write_text(reason_of(error) + "\n")
        print(f"{name} is absent: {reason_of(error)}", file=sys.stderr)
    else:
        (folder / "complete").touch()


def output_of(error):
    """What the program of a failed call has printed; of one that ran out of time, bytes."""
    pieces = [piece for piece in (getattr(error, "stdout", None), getattr(error, "stderr", None)) if piece]
    return "".join(piece if isinstance(piece, str) else piece.decode(errors="replace") for piece in pieces)


def reason_of(error):
    """One line for a table: the first error of a compiler, else of pip, without paths of this machine.

    Example:
        >>> reason_of(OSError("no compiler"))
        'cannot be installed: no compiler'
    """
    lines = [line.strip() for line in output_of(error).splitlines()]
    of_compiler = [line for line in lines if re.search(r"\berror: (?!subprocess-exited)", line)]
    of_pip = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    text = [*of_compiler, *of_pip, str(error)][0]
    return f"{'does not build' if of_compiler else 'cannot be installed'}: {re.sub('(/[^/ :]+)+/', '', text)}"


def install_missing(names=PEERS):
    """Installs what was not tried before; returns {name: why it is absent} of those that cannot run."""
    for name in names:
        if PEERS[name].needs is None and not any((folder_of(name) / file).exists() for file in ("complete", "absent")):
            install(name)
    return {name: absence(name) for name in names if absence(name) is not None}


def versions(name):
    """{package: version} of what a peer consists of."""
    if PEERS[name].needs is not None:
        return {package: importlib.metadata.version(package) for package in PEERS[name].shows}
    listed = subprocess.run([bin_folder(name) / "python", "-m", "pip", "list", "--format", "json"], check=True,
                            capture_output=True, text=True).stdout  # fmt: skip
    return {entry["name"]: entry["version"] for entry in json.loads(listed) if entry["name"] in PEERS[name].shows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *(name for name, peer in PEERS.items() if peer.needs is None)])
    names = parser.parse_args().names
    for name in names:
        install(name)
    install_missing()


if __name__ == "__main__":
    main()
