"""Batch normalisation over the batches of all ranks.

Each rank's sums over its own rows travel in two small operations forward, and those again backward, as the gradient of a sum
over ranks is a sum over ranks; everything else is Keras's own layer.
"""

import keras
import tensorflow as tf

import commlib
from commlib.process_sets import global_process_set
from commlib.tensorflow.operations import as_it_is, make


@keras.saving.register_keras_serializable(package="commlib")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """Keras's BatchNormalization, with mean and variance over the rows of all ranks, which may have different numbers of them.

    All ranks call these layers in one order. In inference it is Keras's own.

    Args:
        process_set: the ranks that share statistics.
        **options: as for keras.layers.BatchNormalization.

    Raises:
        ValueError: renorm=True or synchronized=True, which is tf.distribute's.

    Example:
        >>> import tensorflow as tf, commlib.tensorflow as comm
        >>> comm.init()
        >>> comm.SyncBatchNormalization()(tf.constant([[1.0], [3.0]]), training=True).numpy().round()
        array([[-1.],
               [ 1.]], dtype=float32)
        >>> comm.shutdown()

    References:
        Ioffe and Szegedy, "Batch normalization: accelerating deep network training by reducing internal covariate shift",
        ICML 2015.
    """

    def __init__(self, *args, process_set=global_process_set, **options):
        for name in ("renorm", "synchronized"):
            if options.get(name):
                raise ValueError(f"SyncBatchNormalization does not know {name}=True: leave it out")
        super().__init__(*args, **options)
        self.process_set = process_set

    @as_it_is
    def _moments(self, inputs, mask):
        x, axes = tf.convert_to_tensor(inputs), self._reduction_axes
        if mask is None:
            kept, count = x, tf.reduce_prod(tf.gather(tf.shape(x), axes))
        else:
            weights = tf.cast(mask, x.dtype)[..., tf.newaxis]
            kept, count = x * weights, tf.reduce_sum(weights)
        # Sums of squares would cancel; so means are told first, and then every rank's distance from their mean.
        sums = self._told(tf.concat([_sum(kept, axes), tf.cast(count, tf.float64)[tf.newaxis]], 0))
        total = sums[-1]
        mean = tf.cast(tf.math.divide_no_nan(sums[:-1], total), x.dtype)
        squares = tf.square(x - tf.reshape(mean, [1 if axis in axes else -1 for axis in range(len(x.shape))]))
        variance = tf.math.divide_no_nan(self._told(_sum(squares if mask is None else squares * weights, axes)), total)
        return mean, tf.cast(variance, x.dtype)

    def _told(self, sums):
        """This rank's sums become those of all ranks."""
        return make("allreduce", sums, process_set=self.process_set, op=commlib.Sum)


def _sum(x, axes):
    return tf.cast(tf.reduce_sum(x, axes), tf.float64)
