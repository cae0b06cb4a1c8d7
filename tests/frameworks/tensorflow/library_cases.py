"""What a rank runs for test_op_library.py."""

import importlib

import tensorflow as tf

import commlib.tensorflow as comm
from commlib.tensorflow import library


def refusals():
    """What users of a TensorFlow that is too old are told, and those whose TensorFlow cannot load the library."""
    texts, version = [], tf.__version__
    tf.__version__ = "2.15.1"
    try:
        library._check_version()
    except ImportError as error:
        texts.append(str(error))
    finally:
        tf.__version__ = version
    try:
        library._load("/no/such/library.so")
    except ImportError as error:
        texts.append(str(error))
    return texts


def as_horovod():
    """Whether `import horovod.tensorflow` is commlib's, and what is inside it, and horovod.keras."""
    import commlib.horovod
    import commlib.keras

    commlib.horovod.install()
    hvd = importlib.import_module("horovod.tensorflow")
    functions = importlib.import_module("horovod.tensorflow.functions")
    keras = [importlib.import_module(name) for name in ("horovod.tensorflow.keras", "horovod.keras")]
    callbacks = [importlib.import_module(f"{module}.callbacks") for module in ("horovod.tensorflow.keras", "horovod.keras")]
    return (hvd is comm and functions.broadcast_variables is comm.broadcast_variables and callbacks[0] is callbacks[1]
            and keras[0].DistributedOptimizer is keras[1].DistributedOptimizer is commlib.keras.DistributedOptimizer)
