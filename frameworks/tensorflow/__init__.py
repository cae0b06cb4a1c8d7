"""commlib for TensorFlow."""

import commlib
from commlib import Average, CommlibError, Max, Min, Product, Sum, rank, size, shutdown, is_initialized
from commlib.tensorflow import native as _native
from commlib.tensorflow.operations import make


def init():
    commlib.init()
    _native.attach()
