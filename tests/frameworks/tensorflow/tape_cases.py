"""What ranks run for test_tape.py: training by hand with a tape, beside one process on the whole batch."""

import keras
import numpy as np
import tensorflow as tf

import commlib.tensorflow as comm

STEPS, ROWS = 6, 12  # rows divide among 2 and 3 ranks


def model_of(seed):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)])
    return model


def batches():
    rng = np.random.default_rng(3)
    return [(rng.standard_normal((ROWS, 5)).astype("float32"), rng.standard_normal((ROWS, 3)).astype("float32"))
            for _ in range(STEPS)]  # fmt: skip


def train(model, optimizer, rows, wrap, graph):
    """Weights after all batches, of which this rank sees `rows`."""
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        tape = wrap(tape)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    step = tf.function(step) if graph else step
    for x, y in batches():
        step(tf.constant(x[rows]), tf.constant(y[rows]))
    return [variable.numpy() for variable in model.trainable_variables]


def as_one_process(graph):
    """Every rank's weights are those of one process on the whole batches, and equal bit by bit."""
    rank, size = comm.rank(), comm.size()
    whole = train(model_of(1), keras.optimizers.SGD(0.1, momentum=0.9), slice(None), lambda tape: tape, False)
    tapes = {
        "plain": comm.DistributedGradientTape,
        "predivided": lambda tape: comm.DistributedGradientTape(tape, gradient_predivide_factor=2.0),
        "named": lambda gradtape: comm.DistributedGradientTape(gradtape=gradtape, device_dense="/cpu:0", num_groups=2),
    }
    for name, wrap in tapes.items():
        model = model_of(1 + rank)
        comm.broadcast_variables(model.variables, root_rank=0)
        mine = train(model, keras.optimizers.SGD(0.1, momentum=0.9), slice(rank, None, size), wrap, graph)
        for one, other in zip(mine, whole):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=name)
        for parts in zip(*(part for part in comm.allgather_object(mine))):
            assert all((part == parts[0]).all() for part in parts)


def local_sources(graph):
    """Gradients of local sources stay this rank's own, scaled or not."""
    rank, size = comm.rank() + 1.0, comm.size()
    model = model_of(1)
    w = tf.Variable([1.0, 2.0])
    results = {}

    def gradients(wrap, sources):
        def function():
            with tf.GradientTape() as tape:
                loss = rank * (tf.reduce_sum(w) + tf.reduce_sum(model.layers[0].kernel))
            return wrap(tape).gradient(loss, sources)

        made = tf.function(function, autograph=False)() if graph else function()
        return [one.numpy().ravel()[0].tolist() for one in tf.nest.flatten(made)]

    def registering(scale):
        def wrap(tape):
            tape = comm.DistributedGradientTape(tape, scale_local_gradients=scale)
            tape.register_local_source(w)
            return tape

        return wrap

    sources = {"w": w, "kernel": model.layers[0].kernel}  # flattened by name: kernel, w
    results["scaled"] = gradients(registering(True), sources)
    results["unscaled"] = gradients(registering(False), sources)
    results["layers"] = gradients(lambda tape: comm.PartialDistributedGradientTape(tape, local_layers=model.layers[0]), sources)
    assert size == 3
    return results


def special_gradients(graph):
    """None, sparse gradients (kept, or made dense), a single source, persistent tapes."""
    rank, size = comm.rank(), comm.size()
    table, other, unused = tf.Variable(tf.zeros([size + 1, 2])), tf.Variable(1.0), tf.Variable(1.0)

    def function(dense):
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_sum(tf.gather(table, [rank, size])) + other * rank
        tape = comm.DistributedGradientTape(tape, op=comm.Sum, sparse_as_dense=dense)
        return tape.gradient(loss, [table, other, unused]), tape.gradient(loss, other)

    for dense in (False, True):
        made = tf.function(function, autograph=False)(dense) if graph else function(dense)
        (sparse, number, none), single = made
        assert none is None and number.numpy() == sum(range(size)) == single.numpy()
        assert isinstance(sparse, tf.IndexedSlices) == (not dense)
        rows = tf.convert_to_tensor(sparse).numpy()
        assert rows.tolist() == [[1.0, 1.0]] * size + [[size, size]], rows


def arguments():
    """Name -> {argument: default or "needed"} of everything public, and what is in __all__ and not there."""
    import inspect

    def of(function):
        return [(one.name, "needed" if one.default is one.empty else plain(one.default))
                for one in inspect.signature(function).parameters.values()]  # fmt: skip

    def plain(value):
        return value if isinstance(value, (int, float, str, type(None))) else getattr(value, "__name__", repr(value))

    missing = [name for name in comm.__all__ if not hasattr(comm, name)]
    return {name: of(getattr(comm, name)) for name in comm.__all__ if inspect.isfunction(getattr(comm, name))}, missing


def examples():
    """Runs the examples of the public docstrings; their failures. The ranks live on afterwards."""
    import doctest

    from commlib.tensorflow import collectives, sync_batch_norm, tape, variables

    comm.shutdown()
    failures = {module.__name__: doctest.testmod(module) for module in (collectives, tape, variables, sync_batch_norm)}
    comm.init()
    return {name: (result.failed, result.attempted) for name, result in failures.items()}
