"""The examples in the docstrings of the package are run, as a single rank."""

import doctest
import importlib
import pkgutil

import pytest

import commlib

MODULES = [module.name for module in pkgutil.iter_modules(commlib.__path__, "commlib.")
           if not module.ispkg and not module.name.endswith(("_native", "rendezvous"))]  # fmt: skip


@pytest.mark.parametrize("name", ["commlib", *MODULES])
def test_examples(name, monkeypatch):
    for variable in ("COMMLIB_RANK", "COMMLIB_SIZE", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    module = importlib.import_module(name)
    commlib.shutdown()
    try:
        result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    finally:
        commlib.shutdown()
    assert result.failed == 0


def test_every_public_function_says_what_it_does():
    for name in commlib.__all__:
        assert (getattr(commlib, name).__doc__ or name == "__version__"), name
    for name, member in vars(commlib.Communicator).items():
        assert name.startswith("_") or member.__doc__, name
