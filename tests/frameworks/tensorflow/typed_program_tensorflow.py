"""A user's program, as mypy sees it: test_typing_tensorflow.py checks what it reveals. It is never run."""

import keras
import tensorflow as tf
from typing_extensions import reveal_type

import commlib.keras
import commlib.tensorflow as hvd
import commlib.tensorflow.keras as hvd_keras

hvd.init(process_sets=[hvd.ProcessSet([0, 1]), [1, 2]])
tensor = tf.ones(3)
reveal_type(hvd.rank())  # int
reveal_type(hvd.grouped_allreduce([tensor, 1.0], op=hvd.Sum, priorities=[1, 0]))  # list
reveal_type(hvd.alltoall(tensor, splits=[1, 2]))  # tuple
reveal_type(hvd.broadcast_object({"epoch": 3}))  # dict str int
reveal_type(hvd.broadcast_object_fn(0))  # def
reveal_type(hvd.allgather_object("x"))  # list str
reveal_type(hvd.join())  # int
hvd.allreduce(tensor, op=hvd.Adasum, name="x", compression=hvd.Compression.fp16)
hvd.broadcast_variables([tf.Variable(1.0)], root_rank=0)


class Tape:
    """Stands for tf.GradientTape, of which mypy knows nothing."""

    def gradient(self) -> int:
        """Of nothing."""
        return 3


reveal_type(hvd.DistributedGradientTape(Tape(), groups=2).gradient())  # int
reveal_type(hvd.DistributedOptimizer(Tape(), op=hvd.Average))  # Tape
reveal_type(hvd_keras.DistributedOptimizer(Tape(), backward_passes_per_step=2))  # Tape
reveal_type(commlib.keras.enable_forward_overlap(Tape()))  # Tape
commlib.keras.synchronize(keras.Model())
callbacks = [commlib.keras.callbacks.BroadcastGlobalVariablesCallback(0), hvd_keras.callbacks.MetricAverageCallback()]
reveal_type(hvd_keras.callbacks.LearningRateWarmupCallback(0.1, warmup_epochs=3))  # LearningRateWarmupCallback
layer = hvd.SyncBatchNormalization(momentum=0.9, process_set=hvd.global_process_set)
try:
    hvd.barrier()
except hvd.HorovodInternalError:
    hvd.shutdown()
