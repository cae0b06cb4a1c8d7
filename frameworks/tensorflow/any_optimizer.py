"""DistributedOptimizer as Horovod's users of TensorFlow know it: for Keras's optimizers, and those of TensorFlow 1.

An optimizer of tf.compat.v1.train stays the object that it is; its class becomes, at run time, a subclass whose
compute_gradients gives the gradients of all ranks. Keras's optimizers are another file's.
"""

import itertools

import tensorflow as tf

import commlib
from commlib.process_sets import global_process_set
from commlib.tensorflow.adasum import combined_step
from commlib.tensorflow.compression import Compression
from commlib.tensorflow.exchange import Exchange, checked_groups, reduced_by
from commlib.tensorflow.operations import as_it_is
from commlib.tensorflow.reduction import Reduction

_numbers = itertools.count()  # every rank makes its optimizers in the same order


def DistributedOptimizer(optimizer, name=None, use_locking=False, device_dense="", device_sparse="",
                         compression=Compression.none, sparse_as_dense=False, backward_passes_per_step=1, op=commlib.Average,
                         gradient_predivide_factor=1.0, average_aggregated_gradients=False, num_groups=0, groups=None,
                         process_set=global_process_set, scale_local_gradients=True):  # fmt: skip
    """Makes an optimizer apply the gradients of all ranks.

    Args:
        optimizer: of keras.optimizers: as commlib.keras.DistributedOptimizer. Or of tf.compat.v1.train: `compute_gradients`, and so
            `minimize`, gives the gradients of all ranks.
        op: Average (the default) or Sum, or another. Adasum: each rank makes its own step, and the changes of weights are combined.
        use_locking, device_dense, device_sparse: accepted for Horovod's sake.
        name, compression, sparse_as_dense, backward_passes_per_step, gradient_predivide_factor, average_aggregated_gradients,
            num_groups, groups, process_set, scale_local_gradients: as for commlib.keras.DistributedOptimizer.

    Returns:
        The optimizer itself.

    Raises:
        ValueError: no optimizer, or an argument that is not supported: backward_passes_per_step with one of TensorFlow 1.

    Example:
        >>> import tensorflow as tf, commlib.tensorflow as comm
        >>> comm.init()
        >>> optimizer = comm.DistributedOptimizer(tf.compat.v1.train.GradientDescentOptimizer(0.5))
        >>> x = tf.Variable(1.0)
        >>> _ = optimizer.minimize(lambda: x * x)
        >>> x.numpy()
        np.float32(0.0)
        >>> comm.shutdown()
    """
    if not isinstance(optimizer, tf.compat.v1.train.Optimizer):
        from commlib.tensorflow import optimizer as of_keras  # Keras takes a second to import

        return of_keras.DistributedOptimizer(
            optimizer, name, device_dense, device_sparse, compression, sparse_as_dense, gradient_predivide_factor, op,
            backward_passes_per_step, average_aggregated_gradients, num_groups, groups, process_set, scale_local_gradients,
        )  # fmt: skip
    if isinstance(optimizer, _Distributed):
        raise ValueError(f"the optimizer {optimizer.get_name()} is distributed already")
    if backward_passes_per_step != 1:
        raise ValueError("backward_passes_per_step is not supported with optimizers of tf.compat.v1.train: use keras.optimizers")
    reduction = Reduction(compression, sparse_as_dense, op, gradient_predivide_factor, process_set, scale_local_gradients)
    name = f"DistributedOptimizer of TensorFlow 1.{next(_numbers)}" if name is None else str(name)
    optimizer._commlib = Exchange(name, reduction, checked_groups(num_groups if groups is None and num_groups else groups))
    optimizer.__class__ = type(type(optimizer).__name__, (_Distributed, type(optimizer)), {})
    return optimizer


class _Distributed:
    """What becomes an optimizer's own."""

    @as_it_is
    def compute_gradients(self, *args, **kwargs):
        """As tf.compat.v1.train.Optimizer.compute_gradients, with the gradients of all ranks."""
        gradients, variables = map(list, zip(*super().compute_gradients(*args, **kwargs)))
        if self._commlib.reduction.op is not commlib.Adasum:
            gradients = reduced_by(self._commlib, gradients, variables)
        return list(zip(gradients, variables))

    @as_it_is
    def apply_gradients(self, grads_and_vars, global_step=None, name=None):
        """As tf.compat.v1.train.Optimizer.apply_gradients; with op=Adasum what it changed is combined."""
        pairs, apply = list(grads_and_vars), super().apply_gradients
        if self._commlib.reduction.op is not commlib.Adasum:
            return apply(pairs, global_step, name)
        return combined_step(lambda: apply(pairs, global_step, name), [variable for _, variable in pairs], self._commlib.reduction,
                             self._commlib.name)  # fmt: skip

    def register_local_var(self, variable):
        """The gradient of this variable stays the rank's own."""
        self._commlib.reduction.add_local(variable)
