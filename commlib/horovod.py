"""Runs programs written for Horovod: `import horovod.torch as hvd` gets commlib.torch, without a change to the program.

    commrun -np 2 python -m commlib.horovod train.py --its own arguments
    commrun -np 2 python -m commlib.horovod -m package.train

What it answers is a table; whatever is not in it is an ImportError that says so. Processes that a program starts with
multiprocessing's "spawn" begin without it: there, call commlib.horovod.install() before the import.
"""

import importlib
import importlib.abc
import importlib.machinery
import os
import runpy
import sys
import types

# Horovod's module -> ours; frameworks are imported when a program asks for them.
_ANSWERS = {
    "horovod.torch": "commlib.torch",
    "horovod.torch.mpi_ops": "commlib.torch",
    "horovod.torch.functions": "commlib.torch.state",
    "horovod.torch.optimizer": "commlib.torch.optimizer",
    "horovod.torch.compression": "commlib.torch.compression",
    "horovod.torch.sync_batch_norm": "commlib.torch.sync_batch_norm",
    "horovod.tensorflow": "commlib.tensorflow",
    "horovod.tensorflow.mpi_ops": "commlib.tensorflow",
    "horovod.tensorflow.functions": "commlib.tensorflow.variables",
    "horovod.tensorflow.compression": "commlib.tensorflow.compression",
    "horovod.tensorflow.sync_batch_norm": "commlib.tensorflow.sync_batch_norm",
    "horovod.tensorflow.keras": "commlib.tensorflow.keras",
    "horovod.tensorflow.keras.callbacks": "commlib.tensorflow.keras.callbacks",
    "horovod.keras": "commlib.keras",
    "horovod.keras.callbacks": "commlib.keras.callbacks",
    "horovod.common.process_sets": "commlib.process_sets",
}

_USAGE = "usage: python -m commlib.horovod [-m MODULE | SCRIPT] [ARGUMENTS...]"


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers every import of Horovod and of what is inside it."""

    def find_spec(self, name, path=None, target=None):
        """As MetaPathFinder.find_spec."""
        if name.partition(".")[0] != "horovod":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=name in ("horovod", "horovod.common"))

    def create_module(self, spec):
        """As Loader.create_module."""
        return None

    def exec_module(self, module):
        """Puts our module in the place of Horovod's, which is all that the importer looks at afterwards."""
        name = module.__name__
        if name == "horovod":
            _fill_package(module)
        elif name == "horovod.common.exceptions":
            module.HorovodInternalError = importlib.import_module("commlib").CommlibError
        elif name in _ANSWERS:
            sys.modules[name] = importlib.import_module(_ANSWERS[name])
        elif name != "horovod.common":
            raise ImportError(f"commlib does not answer for {name}: it knows {', '.join(_ANSWERS)}", name=name)


def _fill_package(package):
    commlib = importlib.import_module("commlib")
    package.run, package.__version__ = commlib.run, commlib.__version__


def install():
    """From now on `import horovod...` gets commlib, in this process; more than once does no harm.

    Raises:
        ImportError: Horovod itself was imported before.

    Example:
        >>> import commlib.horovod
        >>> commlib.horovod.install()
        >>> from horovod.common.exceptions import HorovodInternalError
        >>> HorovodInternalError.__name__
        'CommlibError'
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if "horovod" in sys.modules:
        raise ImportError("Horovod itself was imported already: call commlib.horovod.install() before")
    sys.meta_path.insert(0, _Finder())


def main(arguments):
    """Runs a script or a module as the main program, with the rest of the arguments as its own."""
    if not arguments or arguments[0] in ("-h", "--help") or arguments == ["-m"]:
        sys.exit(_USAGE)
    importlib.import_module("commlib.horovod").install()  # not this module, __main__: a program may import that one, too
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    _run_script(arguments[0])


def _run_script(path):
    """As Python does: the module __main__ is the script's for good, so that what it defines can be pickled until the end."""
    module = types.ModuleType("__main__")
    module.__file__, module.__builtins__ = path, __builtins__
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    sys.modules["__main__"] = module
    exec(code, module.__dict__)


if __name__ == "__main__":
    main(sys.argv[1:])
