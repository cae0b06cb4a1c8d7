"""commlib.keras: another name of commlib.tensorflow.keras, as Keras 3 has TensorFlow below it here."""

import sys

from commlib.tensorflow import keras as _keras
from commlib.tensorflow.keras import *  # noqa: F403
from commlib.tensorflow.keras import callbacks

__all__ = _keras.__all__
sys.modules[f"{__name__}.callbacks"] = callbacks  # one module, and so one class of each name
