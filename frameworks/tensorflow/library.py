"""The op library: found, loaded into TensorFlow, and tried once before anybody depends on it.

What cannot work here is refused when this module is imported, with the reason. This file knows TensorFlow's versions and
nothing of communicators.
"""

import ctypes
import importlib.util

import tensorflow as tf

_OLDEST = (2, 16)  # the first with Keras 3
_SELF_TEST_S = 20.0  # a busy machine; it takes a millisecond


def _check_version():
    version = tuple(int(part) for part in tf.__version__.split(".")[:2])
    if version < _OLDEST:
        raise ImportError(f"commlib.tensorflow needs TensorFlow {_OLDEST[0]}.{_OLDEST[1]} or newer, and this is {tf.__version__}: "
                          "pip install -U tensorflow")  # fmt: skip


def _path():
    spec = importlib.util.find_spec("commlib.tensorflow._ops")
    if spec is None:
        raise ImportError("commlib was installed without its op library for TensorFlow, for want of a C++ compiler: install one "
                          "(g++), and pip install --force-reinstall --no-binary commlib commlib")  # fmt: skip
    return spec.origin


def _load(path):
    try:
        return tf.load_op_library(path), ctypes.CDLL(path)
    except (OSError, tf.errors.OpError) as error:
        raise ImportError(f"TensorFlow {tf.__version__} cannot load commlib's op library {path}: {error}. It was "
                          "tried with 2.16 to 2.21: use one of these") from error  # fmt: skip


def _self_test():
    """An op that ends on another thread, in a function: without it nothing here can work.

    Raises:
        ImportError: it does not.
    """
    sent = tf.constant([1.0, 2.0, 3.0])
    try:
        came = tf.function(lambda x: ops.commlib_self_test(tensor=x + 1.0, call=""), autograph=False)(sent)
        is_well = came.numpy().tolist() == [2.0, 3.0, 4.0]
    except tf.errors.OpError as error:
        raise _unknown(error) from error
    if not is_well:
        raise _unknown("an asynchronous op gave another result")


def _unknown(reason):
    return ImportError(f"commlib's op library does not work with TensorFlow {tf.__version__} ({reason}): it was tried with 2.16 to "
                       "2.21; please report it")  # fmt: skip


_check_version()
ops, native = _load(_path())
_self_test()
