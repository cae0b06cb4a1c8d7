"""A plugin of pytest: commlib.torch's private.py finds nothing in torch that begins with an underscore.

`pytest -p without_private`, also in every rank that the tests start. Torch itself keeps its names, as it needs them.
"""

import builtins
import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent.parent
NAME = "commlib.torch.private"


def _hidden_getattr(owner, name, *default):
    is_private = name.startswith("_") and not name.startswith("__")
    return builtins.getattr(None if is_private else owner, name, *default)


def _hidden_hasattr(owner, name):
    return name.startswith("__") or not name.startswith("_") and builtins.hasattr(owner, name)


def _load():
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "frameworks" / "torch" / "private.py")
    module = importlib.util.module_from_spec(spec)
    module.__builtins__ = {**vars(builtins), "getattr": _hidden_getattr, "hasattr": _hidden_hasattr}
    sys.modules[NAME] = module
    spec.loader.exec_module(module)


_load()


def pytest_report_header():
    """Says that it is at work."""
    return "without private names"
