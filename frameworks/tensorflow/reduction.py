"""How gradients become those of all ranks: what tapes and optimizers share. This file sends nothing; `exchange` does."""

import tensorflow as tf

import commlib
from commlib.ops import check_op
from commlib.process_sets import global_process_set
from commlib.tensorflow.compression import Compression
from commlib.tensorflow.forms import DENSE, NONE, SPARSE
from commlib.tensorflow.operations import number


class Reduction:
    """What is done with each gradient, and which ones stay this rank's own.

    Args:
        compression, op, process_set: as for allreduce.
        sparse_as_dense: tf.IndexedSlices are made dense first.
        gradient_predivide_factor: with op=Average: divides before the sum, and the rest of the division is done after it.
        local: variables whose gradients stay this rank's own.
        scale_local_gradients: those are divided by the number of ranks, as if the others' were zero.

    Raises:
        ValueError: gradient_predivide_factor with another op.
    """

    def __init__(self, compression=Compression.none, sparse_as_dense=False, op=commlib.Average, gradient_predivide_factor=1.0,
                 process_set=global_process_set, scale_local_gradients=True):  # fmt: skip
        self.op = check_op(op, adasum=True)
        if gradient_predivide_factor != 1.0 and self.op is not commlib.Average:
            raise ValueError("gradient_predivide_factor not supported with op != Average")
        self.compression = compression
        self.sparse_as_dense = sparse_as_dense
        self.predivide_factor = gradient_predivide_factor
        self.process_set = process_set
        self.scale_local_gradients = scale_local_gradients
        self.set_number = process_set.process_set_id if process_set else 0
        self._local = {}  # id -> variable, which is kept alive and so keeps its id

    def add_local(self, source):
        """A variable (tf.Variable or keras.Variable) whose gradient is this rank's own."""
        self._local[id(variable_of(source))] = source

    def is_local(self, source):
        """Whether its gradient is this rank's own."""
        return id(variable_of(source)) in self._local

    def has_local(self):
        """Whether there are such variables."""
        return bool(self._local)

    def form(self, gradient, source):
        """What this rank sends of a gradient, one of `forms`."""
        return NONE if gradient is None or self.is_local(source) else SPARSE if self.is_sparse(gradient) else DENSE

    def is_sparse(self, gradient):
        """Whether it travels as rows and their numbers."""
        return isinstance(gradient, tf.IndexedSlices) and not self.sparse_as_dense

    def scale_local(self, gradients, sources):
        """The gradients as a list, those of local variables divided by the number of ranks if that was asked for."""
        if not self.scale_local_gradients or not self._local:
            return list(gradients)
        return [self._scaled(gradient) if gradient is not None and self.is_local(source) else gradient
                for gradient, source in zip(gradients, sources)]  # fmt: skip

    def _scaled(self, gradient):
        size = number("size", self.set_number)
        if isinstance(gradient, tf.IndexedSlices):
            return tf.IndexedSlices(gradient.values / tf.cast(size, gradient.values.dtype), gradient.indices, gradient.dense_shape)
        return gradient / tf.cast(size, gradient.dtype)


def variable_of(source):
    """The tf.Variable that a keras.Variable holds; anything else as it is."""
    value = getattr(source, "value", None)
    return value if isinstance(value, tf.Variable) else source


def weights_of(layers):
    """All trainable weights of a Keras layer, of several, or of None."""
    layers = [] if layers is None else layers if isinstance(layers, (list, tuple)) else [layers]
    return [variable for layer in layers for variable in layer.trainable_weights]
