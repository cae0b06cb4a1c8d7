"""Sets of ranks with TensorFlow in them, which takes seconds to import: so they are kept, and run many cases each.

The folder above must never be on the path: it would hide TensorFlow.
"""

import os

import pytest
from support import Ranks

_HERE = os.path.dirname(os.path.abspath(__file__))


def start(size, initialize=True, **options):
    """A support.Ranks; options become COMMLIB_* variables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [_HERE, os.environ.get("PYTHONPATH", "")])))
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
        patch.setenv("TF_NUM_INTRAOP_THREADS", "1")  # as many ranks as cores at least
        ranks = Ranks(size, initialize=False, **options)
    if initialize:
        ranks.call("tensorflow_starting:initialize")
    return ranks


def initialize():
    """The first call of most sets of ranks."""
    import commlib.tensorflow as comm

    comm.init()
