"""The first call of sets of ranks that run tests of the adapter, with whatever backend their environment names."""

import os

import commlib
import commlib.torch as comm


def initialize():
    """As support_rank:initialize, through the adapter."""
    comm.init()
    assert commlib.communicator().backend == os.environ.get("COMMLIB_BACKEND", "native")
