"""What ranks run for test_failures_tensorflow.py: what goes wrong, in eager mode and in functions."""

import os
import signal

import numpy as np
import tensorflow as tf

import commlib
import commlib.tensorflow as comm


def error_of(function, graph):
    """(class, text) of what a call raises."""
    try:
        (tf.function(function, autograph=False) if graph else function)()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def mismatches(graph):
    """Errors where the last rank asks for something else, and what NumPy's users are told; then all works."""
    odd = comm.rank() == comm.size() - 1
    rows = 3 if odd else 2
    errors = {
        "shape": error_of(lambda: comm.allreduce(tf.ones([rows]), name="m"), graph),
        "dtype": error_of(lambda: comm.allreduce(tf.zeros([2], tf.int32 if odd else tf.float32), op=comm.Sum, name="m"), graph),
        "op": error_of(lambda: comm.allreduce(tf.ones(2), op=comm.Max if odd else comm.Sum, name="m"), graph),
        "root": error_of(lambda: comm.broadcast(tf.ones(2), 0 if odd else 1, name="m"), graph),
        "width": error_of(lambda: comm.allgather(tf.ones([2, rows]), name="m"), graph),
        "rows": error_of(lambda: comm.reducescatter(tf.ones([rows]), name="m"), graph),
        "list": error_of(lambda: comm.grouped_allreduce([tf.ones(2), tf.ones(rows)], name="m"), graph),
    }
    try:
        commlib.allreduce(np.ones(rows, np.float32), name="m")
    except commlib.MismatchError as error:
        told = str(error)
    assert comm.allreduce(tf.ones(1), op=comm.Sum).numpy() == comm.size()
    return errors, told


def wrong_calls(graph):
    """case -> error, of calls that are wrong on every rank."""
    x = tf.ones([2, 3])
    stranger = object()
    return {name: error_of(function, graph) for name, function in {
        "dtype": lambda: comm.allreduce(tf.constant("text")),
        "complex": lambda: comm.allgather(tf.ones([1], tf.complex64)),
        "op": lambda: comm.allreduce(x, op="sum"),
        "average and op": lambda: comm.allreduce(x, average=True, op=comm.Sum),
        "average of bool": lambda: comm.allreduce(tf.constant([True])),
        "scalar": lambda: comm.allgather(tf.constant(1.0)),
        "scalar scattered": lambda: comm.reducescatter(tf.constant(1.0)),
        "splits": lambda: comm.alltoall(x, splits=[2] * comm.size()),
        "no even splits": lambda: comm.alltoall(tf.ones([comm.size() + 1])),
        "root": lambda: comm.broadcast(x, comm.size()),
        "process set": lambda: comm.allreduce(x, process_set=stranger),
        "compression": lambda: comm.allreduce(x, compression=16),
        "sparse": lambda: comm.allreduce(tf.IndexedSlices(x, tf.constant([0, 1])), op=comm.Max),
        "predivide": lambda: comm.DistributedGradientTape(tf.GradientTape(), op=comm.Sum, gradient_predivide_factor=2.0),
        "not differentiable": lambda: gradient_of_max(x),
    }.items()}  # fmt: skip


def gradient_of_max(x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = comm.allreduce(x, op=comm.Max)
    return tape.gradient(y, x)


def compiled():
    """What XLA's users are told."""
    function = tf.function(lambda: comm.allreduce(tf.ones(2)), jit_compile=True, autograph=False)
    return error_of(function, False)


def without_init():
    """Errors before init and after shutdown, also of a function that was made before; then all works again."""
    function = tf.function(lambda: comm.allreduce(tf.ones(2), op=comm.Sum), autograph=False)
    function()
    comm.shutdown()
    errors = [error_of(one, False) for one in (function, lambda: comm.allreduce(tf.ones(2)), comm.barrier,
                                               lambda: comm.allgather(tf.ones(2)), comm.size_op, comm.rank)]  # fmt: skip
    comm.init()
    return errors, function().numpy().tolist()


def orders():
    """Every rank makes the ops of a function in an order of its own; no op waits for another."""
    ranks = range(comm.size())
    order = [(comm.rank() + i) % comm.size() for i in ranks]

    def function():
        made = {i: comm.allreduce(tf.ones(2) * i, name=f"order {i}", op=comm.Sum) for i in order}
        gathered = {i: comm.allgather(tf.ones(2) * i, name=f"order {i}") for i in order}
        return [made[i] for i in ranks], [gathered[i] for i in ranks]

    for _ in range(3):
        reduced, gathered = tf.function(function, autograph=False)()
        assert [one.numpy()[0] for one in reduced] == [i * comm.size() for i in ranks]
        assert [one.numpy().tolist() for one in gathered] == [[i] * 2 * comm.size() for i in ranks]


def cycles(count):
    """init and shutdown, again and again, with a function that lives through all of them."""
    function = tf.function(lambda x: comm.allreduce(x, op=comm.Sum) + comm.allgather(x)[0], autograph=False)
    for i in range(count):
        assert function(tf.ones(1) * i).numpy() == i * comm.size() + i
        comm.shutdown()
        comm.init()


def beside_torch():
    """Torch and TensorFlow on one engine, at the same time; the texts of their errors are the same."""
    import torch

    import commlib.torch as torch_comm

    communicator = commlib.communicator()
    torch_comm.init()
    assert commlib.communicator() is communicator
    function = tf.function(lambda x: [comm.allreduce(x, name=f"mixed {i}", op=comm.Sum) for i in range(5)], autograph=False)
    for _ in range(5):
        handles = [torch_comm.allreduce_async(torch.ones(1000), name=f"mixed {i}", op=comm.Sum) for i in range(5)]
        for one in function(tf.ones(1000) * 2):
            assert one.numpy().tolist() == [2 * comm.size()] * 1000
        for handle in handles:
            assert torch_comm.synchronize(handle).tolist() == [comm.size()] * 1000
    texts, rows = [], 3 if comm.rank() == comm.size() - 1 else 2
    for module, ones in ((comm, tf.ones), (torch_comm, torch.ones)):
        try:
            module.allreduce(ones(rows), name="both")
        except comm.HorovodInternalError as error:
            texts.append(str(error))
    return texts


def lose_rank_1():
    """Rank 1 dies within its step, which is rank 0's eager one; the others' errors, of the step and of what follows."""
    function = tf.function(lambda x: comm.allreduce(comm.allreduce(x, name="lost 1"), name="lost 2"), autograph=False)
    function(tf.ones(1))
    if comm.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step = (lambda: comm.allreduce(tf.ones(1), name="lost 1")) if comm.rank() == 0 else (lambda: function(tf.ones(1)))
    return [error_of(step, False) for _ in range(3)], str(commlib.communicator().health)


def leave():
    """Rank 1 shuts down while the others need it; the others' error."""
    function = tf.function(lambda x: comm.allreduce(x, name="left"), autograph=False)
    function(tf.ones(1))
    if comm.rank() == 1:
        comm.shutdown()
        return None
    return error_of(lambda: function(tf.ones(1)), False)


def again():
    """Another life for all ranks."""
    comm.shutdown()
    comm.init()
