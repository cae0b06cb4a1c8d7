"""The types of commlib.tensorflow.keras under its other name."""

from commlib.tensorflow.keras import *
from commlib.tensorflow.keras import callbacks as callbacks
