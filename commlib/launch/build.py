"""commrun --check-build: what this commlib can do, for a bug report or before a job. Asks files and packages, starts nothing."""
from __future__ import annotations

import importlib.util
import platform
from importlib import metadata

from commlib.settings import KINDS, TRANSPORTS
from commlib.version import VERSION

# adapter of ours -> the package that it needs
_FRAMEWORKS = {"commlib.torch": "torch", "commlib.tensorflow": "tensorflow", "commlib.keras": "keras"}
_HELPERS = {"cloudpickle": "commlib.run takes functions of __main__", "rich": "tables", "mpi4py": "init(comm=...)"}


def report() -> int:
    """Prints it; returns the exit code."""
    print(f"commlib {VERSION}, Python {platform.python_version()}, {platform.machine()}")
    adapters = {ours: theirs for ours, theirs in _FRAMEWORKS.items() if _has(ours)}
    lines = {"Frameworks": [(_mark(_has(theirs)), f"{theirs}{_version(theirs)}") for theirs in adapters.values()],
             "Transports": [("X", name) for name in TRANSPORTS if name != "auto"],
             "Collectives": [("X", name) for name in KINDS],
             "Helpers": [(_mark(_has(name)), f"{name}{_version(name)}: {use}") for name, use in _HELPERS.items()]}
    for title, items in lines.items():
        print(f"\n{title}:")
        for mark, text in items:
            print(f"    [{mark}] {text}")
    return 0


def _mark(present: bool) -> str:
    return "X" if present else " "


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _version(package: str) -> str:
    try:
        return " " + metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
