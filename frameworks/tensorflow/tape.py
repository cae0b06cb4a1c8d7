"""Tapes whose gradients are those of all ranks: each is sent as soon as backward has made it.

This file knows sources and gradients; `collectives` reduces them. Optimizers are keras's and not here.
"""

import tensorflow as tf

import commlib
from commlib.ops import check_op
from commlib.process_sets import global_process_set
from commlib.tensorflow.collectives import grouped_allreduce
from commlib.tensorflow.compression import Compression
from commlib.tensorflow.operations import as_it_is, number, place_of


class Reduction:
    """How gradients become those of all ranks: what tapes and optimizers share.

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
        self.op = check_op(op)
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

    @as_it_is
    def reduce(self, gradients, sources, name, priorities=None):
        """The gradients of all ranks; None stays None.

        Args:
            gradients: tensors, tf.IndexedSlices and None.
            sources: what they are gradients of, in the order of the forward pass as far as one knows it.
            name: a word in the operations' names, equal on all ranks.
            priorities: one per gradient, lower is needed first; None: by place.

        Returns:
            A list.
        """
        gradients = list(gradients)
        priorities = range(len(gradients)) if priorities is None else priorities
        sent = [place for place, (gradient, source) in enumerate(zip(gradients, sources))
                if gradient is not None and not self.is_local(source)]  # fmt: skip
        dense = [tf.convert_to_tensor(gradients[place]) if self.sparse_as_dense else gradients[place] for place in sent]
        factor = self.predivide_factor
        reduced = grouped_allreduce(dense, op=self.op, compression=self.compression, prescale_factor=1.0 / factor,
                                    postscale_factor=factor, process_set=self.process_set, name=place_of(name),
                                    priorities=[priorities[place] for place in sent])  # fmt: skip
        for place, gradient in zip(sent, reduced):
            gradients[place] = gradient
        return self.scale_local(gradients, sources)

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


class _Distributed:
    """What becomes a tape's own: `gradient` gives the reduced ones."""

    @as_it_is
    def gradient(self, target, sources, *args, **kwargs):
        """As tf.GradientTape.gradient, with the gradients of all ranks."""
        made = super().gradient(target, sources, *args, **kwargs)
        reduced = self._commlib.reduce(tf.nest.flatten(made), tf.nest.flatten(sources), "DistributedGradientTape")
        return tf.nest.pack_sequence_as(made, reduced)

    def register_local_source(self, source):
        """The gradient of this variable stays the rank's own."""
        self._commlib.add_local(source)


def DistributedGradientTape(gradtape, device_dense="", device_sparse="", compression=Compression.none, sparse_as_dense=False,
                            op=commlib.Average, gradient_predivide_factor=1.0, num_groups=0, groups=None,
                            process_set=global_process_set, scale_local_gradients=True):  # fmt: skip
    """Makes a tape give the gradients of all ranks.

    Args:
        gradtape: a tf.GradientTape, before or after it has recorded.
        compression: what travels; one of Compression.
        sparse_as_dense: tf.IndexedSlices are made dense, and summed by rows, before they travel.
        op: Average (the default) or Sum, or another.
        gradient_predivide_factor: with Average: divides each contribution before the sum; the rest after it.
        process_set: the ranks that take part.
        scale_local_gradients: gradients of sources given to register_local_source are divided by the number of ranks.
        device_dense, device_sparse, num_groups, groups: accepted for Horovod's sake: every gradient is an operation of its
            own, and the engine orders them.

    Returns:
        The tape itself, with register_local_source(variable).

    Raises:
        ValueError: gradient_predivide_factor with another op than Average.

    Example:
        >>> import tensorflow as tf, commlib.tensorflow as comm
        >>> comm.init()
        >>> x = tf.Variable(3.0)
        >>> with tf.GradientTape() as tape:
        ...     y = x * x
        >>> comm.DistributedGradientTape(tape).gradient(y, x).numpy()
        np.float32(6.0)
        >>> comm.shutdown()
    """
    gradtape._commlib = Reduction(compression, sparse_as_dense, op, gradient_predivide_factor, process_set, scale_local_gradients)
    if not isinstance(gradtape, _Distributed):
        gradtape.__class__ = type(type(gradtape).__name__, (_Distributed, type(gradtape)), {})
    return gradtape


def PartialDistributedGradientTape(gradtape, device_dense="", device_sparse="", compression=Compression.none,
                                   sparse_as_dense=False, op=commlib.Average, gradient_predivide_factor=1.0, num_groups=0,
                                   groups=None, process_set=global_process_set, local_layers=None,
                                   scale_local_gradients=True):  # fmt: skip
    """As DistributedGradientTape, with layers whose gradients stay the rank's own.

    Args:
        local_layers: a Keras layer, or several.
    """
    tape = DistributedGradientTape(gradtape, device_dense, device_sparse, compression, sparse_as_dense, op,
                                   gradient_predivide_factor, num_groups, groups, process_set, scale_local_gradients)  # fmt: skip
    for variable in weights_of(local_layers):
        tape.register_local_source(variable)
    return tape


def weights_of(layers):
    """All trainable weights of a Keras layer, of several, or of None."""
    layers = [] if layers is None else layers if isinstance(layers, (list, tuple)) else [layers]
    return [variable for layer in layers for variable in layer.trainable_weights]
