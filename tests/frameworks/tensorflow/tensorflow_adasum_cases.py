"""What ranks run for test_adasum_tensorflow.py: op=Adasum against the published algorithm in NumPy."""

import keras
import numpy as np
import tensorflow as tf
from collectives_cases import run
from failure_cases import error_of
from test_adasum import reference

import commlib.tensorflow as comm

TOLERANCES = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 3e-2, "float16": 4e-3}
SHAPES = [(), (0,), (1,), (40, 3), (120_001,)]


def tensor_of(rank, seed, shape, dtype="float32"):
    return tf.cast(np.asarray(np.random.default_rng((seed, rank)).normal(size=shape)), dtype)


def wide(tensor):
    return tf.cast(tensor, tf.float64).numpy()


def wanted(seed, shape, dtype, ranks):
    return reference([wide(tensor_of(rank, seed, shape, dtype)) for rank in ranks])


def collectives(graph):
    """dtype x shape, alone and in lists, among all and among some; what is wrong, and how many cases there were."""
    rank, everybody = comm.rank(), list(range(comm.size()))
    some = comm.add_process_set(everybody[-2:]) if comm.size() > 2 else comm.global_process_set
    functions, cases = [], []
    for dtype in TOLERANCES:
        tensors = [tensor_of(rank, number, shape, dtype) for number, shape in enumerate(SHAPES)]
        for process_set, ranks in ((comm.global_process_set, everybody), (some, everybody[-2:])):
            if rank not in ranks:
                continue
            results = [wanted(number, shape, dtype, ranks) for number, shape in enumerate(SHAPES)]
            options = {"op": comm.Adasum, "process_set": process_set}
            functions += [lambda t=tensor, o=options: comm.allreduce(t, **o) for tensor in tensors]
            functions.append(lambda t=tensors, o=options: comm.grouped_allreduce(t, **o))
            functions.append(lambda t=tensors[3], o=options: comm.allreduce(t, prescale_factor=2.0, postscale_factor=0.5, **o))
            cases += [(dtype, result) for result in [*results, results, results[3]]]
    wrong = []
    for got, (dtype, result) in zip(run(functions, graph), cases):
        pairs = zip(got, result) if isinstance(result, list) else [(got, result)]
        for one, other in pairs:
            near = 4 * TOLERANCES[dtype] * np.abs(other).max(initial=0)
            if one.dtype != dtype or one.shape != other.shape or np.abs(wide(one) - other).max(initial=0) > near:
                wrong.append((dtype, other.shape))
    if comm.size() > 2:
        comm.remove_process_set(some)
    return wrong, len(cases)


def of_tapes(graph):
    """Gradients of two variables, each with coefficients of its own; how far they are from the reference."""
    variables = [tf.Variable(tf.zeros([5, 2])), tf.Variable(tf.zeros([3]))]

    def gradients():
        with tf.GradientTape() as tape:
            loss = sum(tf.reduce_sum(one * tensor_of(comm.rank(), number, one.shape)) for number, one in enumerate(variables))
        return comm.DistributedGradientTape(tape, op=comm.Adasum).gradient(loss, variables)

    made = (tf.function(gradients, autograph=False) if graph else gradients)()
    results = [wanted(number, one.shape, "float32", range(comm.size())) for number, one in enumerate(variables)]
    return max(np.abs(one - other).max() for one, other in zip(map(wide, made), results))


def net():
    keras.utils.set_random_seed(2)
    constraint = keras.constraints.MaxNorm(1.0)
    layers = [keras.layers.Dense(20, activation="tanh", kernel_constraint=constraint), keras.layers.Dense(2)]
    return keras.Sequential([keras.Input((3,)), *layers])


def optimizer_of(kind):
    if kind == "accumulating":
        return keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2)
    return keras.optimizers.Adam(0.01, epsilon=1e-3)


def step(model, optimizer, rank, number):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(tensor_of(rank, number, (4, 3)))))
    optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)


def by_hand(kind, size, steps):
    """Every rank's own step, and Adasum of the changes, variable by variable."""
    models, optimizers = [net() for _ in range(size)], [optimizer_of(kind) for _ in range(size)]
    for number in range(steps):
        before = [one.numpy().astype(np.float64) for one in models[0].trainable_variables]
        for rank in range(size):
            step(models[rank], optimizers[rank], rank, number)
        for start, *ends in zip(before, *(model.trainable_variables for model in models)):
            combined = (start + reference([end.numpy() - start for end in ends])).astype(np.float32)
            for end in ends:
                end.assign(combined if end.constraint is None else end.constraint(combined))
    return models[0]


def of_keras(kind):
    """How far weights are from those by hand, after four steps in a function and in eager mode."""
    far = []
    for graph in (False, True):
        model, optimizer = net(), comm.DistributedOptimizer(optimizer_of(kind), op=comm.Adasum)
        one = tf.function(step) if graph else step
        for number in range(4):
            one(model, optimizer, comm.rank(), number)
        pairs = zip(model.trainable_variables, by_hand(kind, comm.size(), 4).trainable_variables)
        far.append(max(float(np.abs(a.numpy() - b.numpy()).max()) for a, b in pairs))
        everywhere = comm.allgather_object([one.numpy().tobytes() for one in model.trainable_variables])
        assert all(one == everywhere[0] for one in everywhere)
    return far


def in_fit():
    """(whether all ranks have one loss-scaled model after fit with Adasum, what enable_forward_overlap does with it)."""
    import commlib.keras as keras_comm

    model = net()
    scaled = keras.optimizers.LossScaleOptimizer(optimizer_of("adam"), initial_scale=8.0)
    model.compile(keras_comm.DistributedOptimizer(scaled, op=comm.Adasum), "mse")
    keras_comm.enable_forward_overlap(model)
    x = tensor_of(comm.rank(), 1, (24, 3)).numpy()
    x[5] = np.inf if comm.rank() == 1 else 1.0  # so this rank skips a step
    model.fit(x, np.zeros((24, 2), np.float32), batch_size=4, verbose=0, shuffle=False)
    weights = [one.numpy() for one in model.trainable_variables]
    everywhere = comm.allgather_object([one.tobytes() for one in weights])
    return all(one == everywhere[0] for one in everywhere) and all(np.isfinite(one).all() for one in weights)


def of_tensorflow_1(adasum):
    """A variable after a step in eager mode, in a function, and in a graph of TensorFlow 1, each from 1."""
    op = comm.Adasum if adasum else comm.Average
    optimizer = comm.DistributedOptimizer(tf.compat.v1.train.GradientDescentOptimizer(1.0), op=op, name=f"first {adasum}")
    mine = [1.0, 0.0] if comm.rank() == 0 else [0.0, 2.0]
    results = []

    def loss_of(variable):
        return tf.reduce_sum(variable * mine)

    def make_step(variable):
        def one():
            optimizer.minimize(lambda: loss_of(variable), var_list=[variable])

        return one

    for wrap in (lambda one: one, lambda one: tf.function(one, autograph=False)):
        variable = tf.Variable([1.0, 1.0])
        wrap(make_step(variable))()
        results.append(variable.numpy().tolist())
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variable = tf.compat.v1.get_variable("v", initializer=[1.0, 1.0])
        train = optimizer.minimize(loss_of(variable))
        session.run(tf.compat.v1.global_variables_initializer())
        session.run(train)
        results.append(session.run(variable).tolist())
    return results


def wrong(graph):
    """Errors, and that all works afterwards; also that what is in flight ends with the communicator."""
    x = tf.ones([2 + comm.rank()])

    def gradient():
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = comm.allreduce(x[:2], op=comm.Adasum)
        return tape.gradient(y, x)

    v1 = tf.compat.v1.train.GradientDescentOptimizer
    errors = {name: error_of(function, graph) for name, function in {
        "shapes": lambda: comm.allreduce(x, op=comm.Adasum, name="m"),
        "integers": lambda: comm.allreduce(tf.constant([1]), op=comm.Adasum),
        "sparse": lambda: comm.allreduce(tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0])), op=comm.Adasum),
        "scattered": lambda: comm.reducescatter(tf.ones(4), op=comm.Adasum),
        "not differentiable": gradient,
        "ema": lambda: comm.DistributedOptimizer(keras.optimizers.SGD(0.1, use_ema=True), op=comm.Adasum),
        "passes": lambda: comm.DistributedOptimizer(v1(0.1), backward_passes_per_step=2),
        "twice": lambda: comm.DistributedOptimizer(comm.DistributedOptimizer(v1(0.1))),
    }.items()}  # fmt: skip
    assert comm.allreduce(tf.ones(1), op=comm.Adasum).numpy() == 1
    return errors


def left():
    """Rank 1 shuts down instead: what the others' Adasum in a function says; then all live again."""
    function = tf.function(lambda: comm.allreduce(tf.ones(5), op=comm.Adasum, name="left"), autograph=False)
    function()
    error = None if comm.rank() == 1 else error_of(function, False)
    comm.shutdown()
    comm.init()
    assert function().numpy().tolist() == [1.0] * 5
    return error
