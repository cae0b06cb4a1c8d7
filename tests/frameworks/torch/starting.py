"""Sets of ranks that can import the test modules beside this file, initialized through the adapter with some backend.

The folder above must never be on the path: it would hide torch.
"""

import os

import pytest
from support import Ranks

import commlib

_HERE = os.path.dirname(os.path.abspath(__file__))


def start(size, initialize=True, **options):
    """A support.Ranks; options become COMMLIB_* variables, such as backend="gloo"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [_HERE, os.environ.get("PYTHONPATH", "")])))
        ranks = Ranks(size, initialize=False, **options)
    if initialize:
        ranks.call("starting:initialize")
    return ranks


def initialize():
    """The first call of most sets of ranks."""
    import commlib.torch as comm

    comm.init()
    assert commlib.communicator().backend == os.environ.get("COMMLIB_BACKEND", "native")
