"""What ranks run for test_collectives_tensorflow.py: every collective against NumPy, in eager mode and in functions."""

import itertools

import numpy as np
import tensorflow as tf
from test_collectives import NUMPY_DTYPES, OPS, check, numbers, reduced

import commlib
import commlib.tensorflow as comm

SHAPES = [(), (0,), (1,), (2, 3), (5, 0, 2), (1001,)]
SCALES = [(0.5, 1.0), (2.0, 0.25)]


def run(functions, graph):
    """Calls all functions, each without arguments, in eager mode or as one tf.function, and returns their results."""
    if not graph:
        return [function() for function in functions]
    return tf.function(lambda: [function() for function in functions], autograph=False)()


def allreduces(graph):
    """dtype x op x shape, and scales; how many cases there were."""
    size, rank = comm.size(), comm.rank()
    done = 0
    for dtype in [*NUMPY_DTYPES, "bfloat16"]:
        functions, wanted = [], []
        for op, shape in itertools.product(OPS, SHAPES):
            if dtype == "bool" and op is commlib.Average:
                continue
            number_dtype = "float32" if dtype == "bfloat16" else dtype
            case = ("allreduce", dtype, op.word, shape)
            inputs = [numbers(case, r, shape, number_dtype) for r in range(size)]
            scales = SCALES[len(functions) % 2] if dtype in ("int32", "float32", "float64") else (1.0, 1.0)
            wanted.append((case, reduced(op, inputs, number_dtype, *scales)))
            tensor = tf.cast(tf.constant(inputs[rank]), dtype)
            functions.append(lambda tensor=tensor, op=op, scales=scales: comm.allreduce(
                tensor, op=op, prescale_factor=scales[0], postscale_factor=scales[1]))  # fmt: skip
        for got, (case, one) in zip(run(functions, graph), wanted):
            got = tf.cast(got, "float32") if dtype == "bfloat16" else got
            if dtype == "bfloat16" and "average" in case:
                one = tf.cast(tf.cast(tf.constant(one), "bfloat16"), "float32").numpy()
            check(case, got.numpy(), one)
            done += 1
    return done


def others(graph):
    """Every other collective, over dtypes, with uneven and empty rows."""
    size, rank = comm.size(), comm.rank()
    for dtype in NUMPY_DTYPES:
        rows = [numbers(("rows", dtype), r, (2 * r, 3), dtype) for r in range(size)]  # none on rank 0
        same = [numbers(("same", dtype), r, (7, 2), dtype) for r in range(size)]
        hollow = [np.zeros((r + 1, 0), dtype) for r in range(size)]
        sent = [numbers(("sent", dtype), r, (size * (size + 1) // 2, 2), dtype) for r in range(size)]
        splits = list(range(1, size + 1))
        first = sum(splits[:rank])
        sums = commlib.Max if dtype == "bool" else commlib.Sum
        cases = {
            "allgather": (lambda: comm.allgather(rows[rank]), np.concatenate(rows)),
            "hollow": (lambda: comm.allgather(hollow[rank]), np.concatenate(hollow)),
            "broadcast": (lambda: comm.broadcast(same[rank], size - 1), same[size - 1]),
            "broadcast of none": (lambda: comm.broadcast(hollow[0], 0), hollow[0]),
            "scalar": (lambda: comm.broadcast(same[rank][0, 0], 0), same[0][0, 0]),
            "reducescatter": (lambda: comm.reducescatter(same[rank], op=sums),
                              np.array_split(reduced(sums, same, dtype), size)[rank]),
            "alltoall": (lambda: comm.alltoall(np.repeat(same[rank], size, axis=0)),
                         np.concatenate([np.repeat(x, size, axis=0)[7 * rank : 7 * rank + 7] for x in same])),
            "splits": (lambda: comm.alltoall(sent[rank], splits=splits)[0],
                       np.concatenate([x[first : first + splits[rank]] for x in sent])),
            "received": (lambda: comm.alltoall(sent[rank], splits=tf.constant(splits))[1], np.full(size, rank + 1, np.int32)),
        }  # fmt: skip
        results = run([function for function, _ in cases.values()], graph)
        for (case, (_, wanted)), got in zip(cases.items(), results):
            check((case, dtype, graph), got.numpy(), wanted)


def groups(graph):
    """Lists complete together, with dtypes and shapes of their own."""
    size = comm.size()
    tensors = [tf.ones([3]), tf.constant(2), tf.zeros([0], tf.float64)]
    rows = [tf.fill([comm.rank(), 2], 1.5), tf.constant([comm.rank()])]
    for _ in range(2):
        dense, gathered, scattered, nothing = run([
            lambda: comm.grouped_allreduce(tensors, op=comm.Sum),
            lambda: comm.grouped_allgather(rows),
            lambda: comm.grouped_reducescatter([tf.range(5.0), tf.range(4)], op=comm.Sum),
            lambda: comm.grouped_allreduce([]),
        ], graph)  # fmt: skip
        assert [one.numpy().tolist() for one in dense] == [[size] * 3, 2 * size, []]
        assert gathered[0].shape == (size * (size - 1) // 2, 2) and gathered[1].numpy().tolist() == list(range(size))
        assert scattered[0].numpy().tolist() == np.array_split(np.arange(5.0) * size, size)[comm.rank()].tolist()
        assert nothing == []


def sparse(graph):
    """The rows of all ranks, which whoever uses them adds up."""
    rank, size = comm.rank(), comm.size()
    for op, factor in ((comm.Sum, 1.0), (comm.Average, 1.0 / size)):
        slices = tf.IndexedSlices(tf.fill([rank + 1, 2], rank + 1.0), tf.range(rank + 1), tf.constant([size, 2]))
        (got,) = run([lambda slices=slices, op=op: tf.convert_to_tensor(comm.allreduce(slices, op=op))], graph)
        # Row i has the numbers of the ranks from i on.
        wanted = [[factor * sum(range(row + 1, size + 1))] * 2 for row in range(size)]
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-6)


def numbers_of_ranks(graph):
    """Rank, size and the like, found out when the graph runs."""
    names = (comm.rank_op, comm.size_op, comm.local_rank_op, comm.local_size_op, comm.process_set_included_op)
    return [one.numpy().tolist() for one in run(names, graph)]


def compressed(graph):
    """What 16 bits leave of a number; whole numbers travel as they are."""
    numbers = tf.constant([1.0, 1.0 + 2.0**-12, 1e-9])
    made = run([lambda kind=kind: comm.allreduce(numbers, compression=kind) for kind in
                (comm.Compression.none, comm.Compression.fp16, comm.Compression.bf16)], graph)  # fmt: skip
    (whole,) = run([lambda: comm.allreduce(tf.constant([70000]), compression=comm.Compression.fp16)], graph)
    assert whole.numpy().tolist() == [70000] and all(one.dtype == tf.float32 for one in made)
    return [one.numpy().tolist() for one in made]


def differentiate(graph):
    """Gradients of sums over each collective's result, weighted by this rank's number + 1."""
    weight, rank, size = comm.rank() + 1.0, comm.rank(), comm.size()

    def gradient_of(function, rows):
        x = tf.ones([rows])

        def gradient():
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = tf.reduce_sum(function(x)) * weight
            return tape.gradient(y, x)

        return run([gradient], graph)[0].numpy().tolist()

    return {
        "sum": gradient_of(lambda x: comm.allreduce(x, op=comm.Sum), 1),
        "average": gradient_of(comm.allreduce, 1),
        "scaled": gradient_of(lambda x: comm.allreduce(x, op=comm.Sum, prescale_factor=0.5), 1),
        "group": gradient_of(lambda x: comm.grouped_allreduce([x, x * 2], op=comm.Sum)[1], 1),
        "broadcast": gradient_of(lambda x: comm.broadcast(x, 0), 1),
        "allgather": gradient_of(comm.allgather, rank + 1),
        "reducescatter": gradient_of(lambda x: comm.reducescatter(x, op=comm.Sum), size),
        "reducescatter average": gradient_of(comm.reducescatter, size),
        "alltoall": gradient_of(comm.alltoall, size),
        "alltoall with splits": gradient_of(lambda x: comm.alltoall(x, splits=[1] * size)[0], size + 1),
    }


def unequal_work(graph):
    """Ranks with more and more steps, twice, and steps of all in between; the last rank that joined."""
    rank, size = comm.rank(), comm.size()
    lasts = []

    def step():
        return comm.grouped_allreduce([tf.ones(3), tf.ones(2) * 2], op=comm.Sum, name="unequal")

    function = tf.function(step, autograph=False) if graph else step
    for _ in range(2):
        for i in range(2 * rank + 1):
            at_work = sum(2 * other + 1 > i for other in range(size))
            one, two = function()
            assert one.numpy().tolist() == [at_work] * 3 and two.numpy().tolist() == [2 * at_work] * 2
        lasts.append(comm.join())
        for _ in range(3):
            assert function()[0].numpy().tolist() == [size] * 3
            assert comm.allreduce(tf.ones(1), op=comm.Sum).numpy() == size
    return lasts


def ranks_with_more_to_do():
    """Rank 0 makes more ops than others, before a function, in it, and before its gradient: names are the same all the same."""
    rank, size = comm.rank(), comm.size()
    for i in range(7 * (size - rank)):
        tf.function(lambda x, i=i: x + i, autograph=False)(tf.ones(1))

    @tf.function(autograph=False)
    def function(x):
        for _ in range(3 * (size - rank)):
            x = x + 1.0 - 1.0
        y = comm.allreduce(x, op=comm.Sum)
        return tf.while_loop(lambda i, _: i < 3, lambda i, z: (i + 1, comm.allreduce(z) + 1.0), (0, y))[1]

    for _ in range(2):
        x = tf.ones(2)
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = function(x)
        assert y.numpy().tolist() == [size + 3.0] * 2
        assert tape.gradient(y, x).numpy().tolist() == [float(size)] * 2


def state():
    """Variables of every kind, and objects."""
    rank = comm.rank()
    variables = [tf.Variable([rank, 1.0]), tf.Variable(tf.cast([rank], tf.uint32)), tf.Variable(rank == 1)]
    comm.broadcast_variables(variables, root_rank=1)
    assert comm.broadcast_(variables[:1], 1) == variables[:1]
    in_function = tf.Variable([rank])
    tf.function(lambda: comm.broadcast_variables([in_function], 1))()
    values = [one.numpy().tolist() for one in (*variables, in_function)]
    told = comm.broadcast_object({"rank": rank}, root_rank=1), comm.broadcast_object_fn(1)(rank)
    return values, told, comm.allgather_object("x" * rank)


def in_sets():
    """Collectives of some ranks, counted within them; then the set is gone, also for a function that was made for it."""
    process_set = comm.add_process_set([0, 2])
    if process_set.included():
        me, ranks = process_set.rank(), [0, 2]
        for graph in (False, True):
            dense, rows, told, share, size, within = run([
                lambda: comm.allreduce(tf.constant([comm.rank() + 1.0]), process_set=process_set),
                lambda: comm.allgather(tf.constant([comm.rank()]), process_set=process_set),
                lambda: comm.broadcast(tf.constant(comm.rank()), 2, process_set=process_set),
                lambda: comm.reducescatter(tf.range(3), op=comm.Sum, process_set=process_set),
                lambda: comm.size_op(process_set.process_set_id),
                lambda: comm.process_set_included_op(process_set.process_set_id),
            ], graph)  # fmt: skip
            assert dense.numpy().tolist() == [2.0] and rows.numpy().tolist() == ranks and told.numpy() == 2
            assert share.numpy().tolist() == [[0, 2], [4]][me] and size.numpy() == 2 and within.numpy() == 1
    else:
        assert comm.process_set_included_op(process_set.process_set_id).numpy() == 0
        message = raised(lambda: comm.allreduce(tf.ones(1), process_set=process_set))
        assert "process is not part of provided process set" in message, message
    late = tf.function(lambda: comm.size_op(process_set.process_set_id))
    assert late().numpy() == 2
    comm.remove_process_set(process_set)
    return raised(late), raised(lambda: comm.allreduce(tf.ones(1), process_set=process_set))


def raised(function):
    """What an error says; None: there was none."""
    try:
        function()
    except (ValueError, tf.errors.OpError) as error:
        return str(error)
    return None
