"""Single ops of the op library, in eager mode and in graphs: names, independence, failures.

This file makes one op; what is done before and after (scaling, compression, lists, sparse tensors) is other files'.
"""

import contextlib
import functools
import re
import weakref

import tensorflow as tf
from tensorflow.python.ops import control_flow_util

from commlib.process_sets import communicator_of, global_process_set
from commlib.tensorflow.library import ops
from commlib.tensorflow.native import Wish, translated

DTYPES = (tf.uint8, tf.int8, tf.int16, tf.int32, tf.int64, tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.bool)

# AutoGraph rewrites what a tf.function calls; our functions have nothing to be rewritten.
as_it_is = tf.autograph.experimental.do_not_convert


def make(kind, tensor=None, name=None, process_set=global_process_set, splits=None, **wish):
    """One op. In eager mode it is waited for; in a graph it runs beside all others, once what it takes is there.

    Args:
        kind: of native.py's table.
        tensor: checked by `as_tensor`; None: it takes none.
        name: matches the operation between ranks. None: by sequence in eager mode, by the op's place in a graph.
        process_set: the ranks that take part.
        splits: an int64 tensor, for all-to-all.
        **wish: as for native.Wish.

    Returns:
        Its output, tuple of outputs, or Operation.

    Raises:
        ValueError: XLA compiles this function.
        CommlibError, ValueError: in eager mode, as commlib.
    """
    inputs = [] if tensor is None else [tensor] if splits is None else [tensor, splits]
    set_id = number_of(process_set)
    if tf.executing_eagerly():
        with translating():
            return _op(kind, inputs, Wish(kind, name, set_id, **wish).text())
    if name is None:
        name = place_of(f"commlib_{kind}", process_set)
    return _free_op(kind, inputs, Wish(kind, name, set_id, **wish).text())


def make_all(kind, tensors, names, process_set=global_process_set, wishes=None, **wish):
    """Ops of one kind that run at the same time, also in eager mode.

    Args:
        kind, process_set: as for `make`.
        tensors, names: equally many; the names are given, each another one.
        wishes: one dict per tensor, of what differs between the ops; the rest is `wish`.

    Returns:
        A list of outputs.
    """
    set_id = number_of(process_set)
    wishes = wishes or [{} for _ in tensors]
    texts = tuple(Wish(kind, name, set_id, **wish, **own).text() for name, own in zip(names, wishes))
    if not texts:
        return []
    if tf.executing_eagerly():
        with translating():
            return list(_at_once(kind, texts)(*tensors))
    return [_free_op(kind, [tensor], text) for tensor, text in zip(tensors, texts)]


@functools.lru_cache(maxsize=256)
def _at_once(kind, texts):
    """A function that makes ops with these attributes. As a graph they overlap; one by one each would be waited for."""
    return tf.function(lambda *tensors: [_free_op(kind, [tensor], text) for tensor, text in zip(tensors, texts)],
                       autograph=False, reduce_retracing=True)  # fmt: skip


@contextlib.contextmanager
def translating():
    """What TensorFlow raises for commlib becomes commlib's own exception."""
    try:
        yield
    except tf.errors.OpError as error:
        failure = translated(error)
        if failure is error:
            raise
        raise failure from None


def _op(kind, inputs, text):
    return getattr(ops, "commlib_" + kind)(*inputs, call=text)


def _free_op(kind, inputs, text):
    graph = tf.compat.v1.get_default_graph()
    _check_compiler(graph, kind)
    made = _op(kind, inputs, text)
    _let_run_freely(graph, made)
    return made


def begin(tensor, name, process_set=global_process_set, **wish):
    """Begins an all-reduce that `finish` ends, later and perhaps in another function; each is finished once.

    Where the engine cannot be told directly (another backend, a timeline is recorded) it is waited for here.

    Args:
        tensor, process_set, **wish: as for `make`.
        name: needed.

    Returns:
        What must be run, in a graph of TensorFlow 1; in a function it runs by itself.
    """
    text = Wish("allreduce", name, number_of(process_set), **wish).text()
    if tf.executing_eagerly():
        with translating():
            return _op("begin", [tensor], text)
    # A gradient need not depend on its own variable: nothing else says that the last result comes first.
    with tf.control_dependencies(_finished(tf.compat.v1.get_default_graph()).get(text, [])):
        return _free_op("begin", [tensor], text)


def _finished(graph):
    """What of a graph finishes reductions: attribute -> [op]."""
    if graph not in _finishing:
        _finishing[graph] = {}
    return _finishing[graph]


_finishing = weakref.WeakKeyDictionary()


def finish(name, dtype, shape, process_set=global_process_set, **wish):
    """The result of what `begin` began with the same name, process set and wish: of that dtype and shape.

    Raises:
        ValueError, CommlibError: in eager mode, as `make`; and nothing of the name was begun.
    """
    text = Wish("allreduce", name, number_of(process_set), **wish).text()
    if tf.executing_eagerly():
        with translating():
            return ops.commlib_finish(T=dtype, call=text)
    graph = tf.compat.v1.get_default_graph()
    _check_compiler(graph, "allreduce")
    made = ops.commlib_finish(T=dtype, call=text)
    made.set_shape(shape)
    _let_run_freely(graph, made)
    _finished(graph)[text] = [made.op]
    return made


def number(kind, process_set_id=0):
    """An int32 scalar that is found out when it runs: "rank", "size" and so on, see native.py."""
    with translating():
        return (_op if tf.executing_eagerly() else _free_op)("number", [], Wish(kind, set=process_set_id).text())


def number_of(process_set):
    """The number of a process set, which ops hold instead of it.

    Raises:
        ValueError: no process set, not registered, or this rank is not part of it.
    """
    if process_set is None or process_set is global_process_set:
        return 0
    communicator_of(process_set)
    return process_set.process_set_id


def as_tensor(value, what):
    """A value as a tensor that can travel.

    Raises:
        ValueError: of a dtype that commlib does not know.
    """
    tensor = tf.convert_to_tensor(value)
    if tensor.dtype not in DTYPES:
        known = ", ".join(dtype.name for dtype in DTYPES)
        raise ValueError(f"{what}: dtype {tensor.dtype.name} is not supported; use one of {known}")
    return tensor


def _check_compiler(graph, kind):
    if control_flow_util.GraphOrParentsInXlaContext(graph):
        raise ValueError(f"{kind} cannot be compiled by XLA: use tf.function without jit_compile=True, and Keras's "
                         "compile(jit_compile=False)")  # fmt: skip


def place_of(word, process_set):
    """A name for what has none: in a function the function's, and its number among those of this word and process set there;
    else the word.

    So it does not depend on what else a rank puts into the function, or what others do of which it is no part.
    """
    if tf.executing_eagerly():
        return word
    graph = tf.compat.v1.get_default_graph()
    number = number_of(process_set)
    word = f"{word}_of_{number}" if number else word
    return f"{_path(graph)}/{graph.unique_name(word)}"


def _path(graph):
    """A graph's name, after those of the graphs around it. TensorFlow's names have numbers in them of all that the process has
    ever made; here graphs of one name within another are counted in the order in which they get collectives."""
    name = re.sub("_[0-9]+(?=_|$)", "", getattr(graph, "name", ""))
    outer = getattr(graph, "outer_graph", None)
    if not hasattr(outer, "outer_graph"):
        return name
    known = _inner.setdefault(outer, {}).setdefault(name, [])
    if all(one() is not graph for one in known):
        known.append(weakref.ref(graph))
    number = next(number for number, one in enumerate(known) if one() is graph)
    return f"{_path(outer)}/{name}.{number}"


_inner = weakref.WeakKeyDictionary()  # graph -> {name: weak references to the graphs of this name within it}


def _let_run_freely(graph, made):
    """Takes an op out of the order of side effects, in which TensorFlow would run one after the other."""
    manager = getattr(graph, "experimental_acd_manager", None)
    if manager is not None:
        first = made[0] if isinstance(made, (tuple, list)) else made
        manager.run_independently(first if isinstance(first, tf.Operation) else first.op)
