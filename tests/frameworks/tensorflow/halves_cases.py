"""What ranks run for test_halves.py: reductions that one function begins and another, or its next call, finishes."""

import tempfile

import tensorflow as tf

import commlib
import commlib.tensorflow as comm
from commlib.tensorflow import native, operations

NAMES = [f"half {i}" for i in range(5)]


def train_functions(variables):
    """(first, step): the first begins; each step finishes what was begun, and begins its own."""
    wishes = [{"op": comm.Sum, "priority": i, "overlapped": True} for i in range(len(NAMES))]

    def begin(x):
        for i, name in enumerate(NAMES):
            operations.begin(x * (i + 1.0), name, **wishes[i])

    def step(x):
        for i, name in enumerate(NAMES):
            variables[i].assign(operations.finish(name, tf.float32, [4], **wishes[i]))
        begin(x)
        return tf.stack(variables)

    return tf.function(begin), tf.function(step)


def over_calls():
    """Steps finish what the call before them began, also over shutdown, and while a timeline is recorded."""
    variables = [tf.Variable(tf.zeros(4)) for _ in NAMES]
    first, step = train_functions(variables)
    mine, sums = tf.ones(4) * (comm.rank() + 1.0), [sum(range(1, comm.size() + 1)) * (i + 1.0) for i in range(len(NAMES))]

    def steps(count):
        for _ in range(count):
            assert step(mine).numpy()[:, 3].tolist() == sums

    first(mine)
    steps(10)
    with tempfile.TemporaryDirectory() as folder:
        commlib.start_timeline(folder + "/trace.json")
        steps(3)
        commlib.stop_timeline()
    steps(3)
    comm.shutdown()
    comm.init()
    message = raised(step, mine)
    assert "nothing of this name was begun" in message, message
    comm.shutdown()  # it has begun others
    comm.init()
    first(mine)
    steps(3)
    for name in NAMES:
        operations.finish(name, tf.float32, [4], op=comm.Sum, priority=NAMES.index(name), overlapped=True)


def one_after_the_other():
    """In eager mode; what was begun twice is refused, what nobody finished can be forgotten."""
    for _ in range(3):
        operations.begin(tf.ones(3), "eager half", op=comm.Sum)
        assert "still in flight" in raised(operations.begin, tf.ones(3), "eager half", op=comm.Sum)
        assert operations.finish("eager half", tf.float32, [3], op=comm.Sum).numpy().tolist() == [comm.size()] * 3
        assert "nothing of this name" in raised(operations.finish, "eager half", tf.float32, [3], op=comm.Sum)
    operations.begin(tf.ones(3), "forgotten half", op=comm.Sum)
    native.drop_begun()
    assert "nothing of this name" in raised(operations.finish, "forgotten half", tf.float32, [3], op=comm.Sum)
    message = None
    operations.begin(tf.ones(3 + comm.rank()), "mismatched half")
    try:
        operations.finish("mismatched half", tf.float32, None)
    except comm.HorovodInternalError as error:
        message = str(error)
    return message


def one_name():
    """What is said to who uses a name that is in flight, for each two of the ways to submit under it."""
    def begin():
        operations.begin(tf.ones(3), "one name", op=comm.Sum)

    others = {"begin": begin, "whole": lambda: comm.allreduce(tf.ones(3), op=comm.Sum, name="one name"),
              "function": tf.function(lambda: comm.allreduce(tf.ones(3), op=comm.Sum, name="one name"), autograph=False),
              "Adasum": lambda: comm.allreduce(tf.ones(3), op=comm.Adasum, name="one name")}  # fmt: skip
    said = {}
    with tempfile.TemporaryDirectory() as folder:
        for way in ("directly", "by Python"):
            if way == "by Python":
                commlib.start_timeline(folder + "/trace.json")
            begin()
            said.update({(way, name): raised(other) for name, other in others.items()})
            if way == "directly":
                commlib.start_timeline(folder + "/trace.json")
            else:
                commlib.stop_timeline()
            said.update({(way, name, "after a change"): raised(other) for name, other in others.items()})
            operations.finish("one name", tf.float32, [3], op=comm.Sum)
            if way == "directly":
                commlib.stop_timeline()
    assert [others["whole"]().numpy().tolist(), others["Adasum"]().numpy().tolist()] == [[comm.size()] * 3, [1.0] * 3]
    return said


def raised(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (ValueError, tf.errors.OpError) as error:
        return str(error)
    return None
