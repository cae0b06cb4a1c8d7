"""Tapes whose gradients are those of all ranks: each is sent as soon as backward has made it.

This file knows sources and gradients; `exchange` sends them. Optimizers are keras's and not here.
"""

import tensorflow as tf

import commlib
from commlib.process_sets import global_process_set
from commlib.tensorflow.compression import Compression
from commlib.tensorflow.exchange import Exchange, checked_groups, reduced_by
from commlib.tensorflow.operations import as_it_is, place_of
from commlib.tensorflow.reduction import Reduction, weights_of


class _Distributed:
    """What becomes a tape's own: `gradient` gives the reduced ones."""

    @as_it_is
    def gradient(self, target, sources, *args, **kwargs):
        """As tf.GradientTape.gradient, with the gradients of all ranks."""
        made = super().gradient(target, sources, *args, **kwargs)
        return tf.nest.pack_sequence_as(made, self._reduced(tf.nest.flatten(made), tf.nest.flatten(sources)))

    def _reduced(self, gradients, sources):
        """The gradients of all ranks; None stays None. Sources are in the order of the forward pass as far as one knows it."""
        reduction, groups = self._commlib
        name = place_of("DistributedGradientTape", reduction.process_set)
        return reduced_by(Exchange(name, reduction, groups), gradients, sources)

    def register_local_source(self, source):
        """The gradient of this variable stays the rank's own."""
        self._commlib[0].add_local(source)


def DistributedGradientTape(gradtape, device_dense="", device_sparse="", compression=Compression.none, sparse_as_dense=False,
                            op=commlib.Average, gradient_predivide_factor=1.0, num_groups=0, groups=None,
                            process_set=global_process_set, scale_local_gradients=True):  # fmt: skip
    """Makes a tape give the gradients of all ranks.

    Args:
        gradtape: a tf.GradientTape, before or after it has recorded.
        compression: what travels; one of Compression.
        sparse_as_dense: tf.IndexedSlices are made dense, and summed by rows, before they travel.
        op: Average (the default) or Sum, or another. Adasum combines gradients, each by itself.
        gradient_predivide_factor: with Average: divides each contribution before the sum; the rest after it.
        process_set: the ranks that take part.
        scale_local_gradients: gradients of sources given to register_local_source are divided by the number of ranks.
        groups: gradients that travel together: their number, or lists of sources. None: small neighbours do.
        num_groups: deprecated: as groups, a number.
        device_dense, device_sparse: accepted for Horovod's sake.

    Returns:
        The tape itself, with register_local_source(variable).

    Raises:
        ValueError: gradient_predivide_factor with another op than Average.
        MismatchError: from `gradient`: some ranks have a gradient where others have None. In a function as any other error.

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
    reduction = Reduction(compression, sparse_as_dense, op, gradient_predivide_factor, process_set, scale_local_gradients)
    gradtape._commlib = reduction, checked_groups(num_groups if groups is None and num_groups else groups)
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
