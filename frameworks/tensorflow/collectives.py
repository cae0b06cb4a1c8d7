"""The collectives on tensors, with Horovod's names, arguments and defaults; in eager mode and in graphs, and differentiable.

In eager mode a call waits; in a function each op runs as soon as its input is there, beside compute and beside the others.
`device_dense`, `device_sparse` and `ignore_name_scope` are accepted for Horovod's sake: names here do not depend on scopes.
"""

import tensorflow as tf

import commlib
from commlib.compressor import checked_compression
from commlib.ops import check_op, op_of
from commlib.process_sets import global_process_set
from commlib.reduction import check_op as check_meaning
from commlib.tensorflow.compression import Compression
from commlib.tensorflow.operations import as_it_is, as_tensor, make, make_all, number, place_of


@as_it_is
def barrier(process_set=global_process_set):
    """Returns when all ranks of the process set have called it; in a graph of TensorFlow 1, the Operation that waits."""
    made = make("barrier", process_set=process_set)
    return None if tf.compat.v1.executing_eagerly_outside_functions() else made


@as_it_is
def allreduce(tensor, average=None, device_dense="", device_sparse="", compression=Compression.none, op=None,
              prescale_factor=1.0, postscale_factor=1.0, name=None, process_set=global_process_set, *, priority=0):  # fmt: skip
    """Reduces a tensor over all ranks: postscale * op_r(prescale * x_r), on every rank. Differentiable.

    Args:
        tensor: of the same shape and dtype on all ranks. A tf.IndexedSlices, with any number of rows: the rows of all ranks
            are gathered, and each takes part in the sum that its users make of them.
        average: deprecated: True for op=Average, False for op=Sum.
        compression: what travels; one of Compression.
        op: Average (the default), Sum, Min, Max, Product or Adasum (floats; not differentiable).
        prescale_factor, postscale_factor: multiply each contribution, and the result.
        name: matches the operation between ranks; None: by sequence number, in a graph by its place there.
        process_set: the ranks that take part; others do not call it. Average divides by how many they are.
        priority: 0 is needed first; lower goes first.

    Returns:
        A new tensor, or tf.IndexedSlices.

    Raises:
        ValueError: a tensor or an argument that is not supported, or a name that is in flight.
        CommlibError: ranks differ in shape, dtype or op; a rank was lost. Within tf.function it is a tf.errors.OpError with
            the same text.

    Example:
        >>> import tensorflow as tf, commlib.tensorflow as comm
        >>> comm.init()
        >>> comm.allreduce(tf.ones(2), op=comm.Sum).numpy()  # with one rank
        array([1., 1.], dtype=float32)
        >>> comm.shutdown()
    """
    return _reduced([tensor], [name], op_of(average, op, adasum=True), compression, (prescale_factor, postscale_factor),
                    process_set, [priority], "allreduce", False)[0]  # fmt: skip


@as_it_is
def grouped_allreduce(tensors, average=None, device_dense="", device_sparse="", compression=Compression.none, op=None,
                      prescale_factor=1.0, postscale_factor=1.0, process_set=global_process_set, *, name=None,
                      priorities=None):  # fmt: skip
    """As `allreduce` of each tensor of a list, all at the same time. Differentiable.

    Args:
        tensors: as many on every rank; dtypes and shapes may differ within the list.
        name: the first part of each operation's name.
        priorities: one for each tensor; None: their places in the list.

    Returns:
        A list of new tensors.
    """
    tensors = list(tensors)
    names = _names(name, "grouped_allreduce", tensors, process_set)
    priorities = range(len(tensors)) if priorities is None else priorities
    return _reduced(tensors, names, op_of(average, op, adasum=True), compression, (prescale_factor, postscale_factor), process_set,
                    priorities, "grouped_allreduce", len(tensors) > 1)  # fmt: skip


def _names(name, what, tensors, process_set):
    """One for each tensor; those of lists without a name must differ within a function."""
    name = place_of(what, process_set) if name is None else name
    return [f"{name}.{place}" for place in range(len(tensors))]


def _reduced(tensors, names, op, compression, scales, process_set, priorities, what, overlapped):
    """The reductions of dense tensors and of sparse ones, in the order of the list."""
    compression = checked_compression(compression)
    dense = [place for place, tensor in enumerate(tensors) if not isinstance(tensor, tf.IndexedSlices)]
    results = [None if place in dense else _sparse(tensor, names[place], op, compression, scales, process_set, what)
               for place, tensor in enumerate(tensors)]  # fmt: skip
    pairs = [compression.compress(as_tensor(tensors[place], what)) for place in dense]
    wish = {"op": op, "scales": tuple(map(float, scales)), "overlapped": overlapped}
    check_reduction(op, [wire for wire, _ in pairs])
    kind = kind_of(op)
    if len(dense) == 1:
        made = [make(kind, pairs[0][0], names[dense[0]], process_set, priority=priorities[dense[0]], **wish)]
    else:
        own = [{"priority": priorities[place]} for place in dense]
        made = make_all(kind, [wire for wire, _ in pairs], [names[place] for place in dense], process_set, own, **wish)
    for place, result, (_, ctx) in zip(dense, made, pairs):
        results[place] = compression.decompress(result, ctx)
    return results


def kind_of(op):
    """The kind of op that an all-reduce is."""
    return "adasum" if op is commlib.Adasum else "allreduce"


def check_reduction(op, tensors):
    """Refuses what has no meaning, or is no reduction."""
    for dtype in {tensor.dtype.name for tensor in tensors} or {"float32"}:
        check_meaning(op, dtype)


def _sparse(slices, name, op, compression, scales, process_set, what):
    """All ranks' rows, one rank's after the other's; who uses them adds up those of the same index."""
    if op not in (commlib.Average, commlib.Sum):
        raise ValueError(f"{what} of tf.IndexedSlices with op={op!r}: use Average or Sum, or tf.convert_to_tensor(slices)")
    wire, ctx = compression.compress(as_tensor(slices.values, what))
    parts = [(wire, "values"), (as_tensor(slices.indices, what), "indices")]
    names = [None if name is None else f"{name} {part}" for _, part in parts]
    if name is None:
        values, indices = (make("allgather", tensor, None, process_set) for tensor, _ in parts)
    else:
        values, indices = make_all("allgather", [tensor for tensor, _ in parts], names, process_set)
    values.set_shape([None, *slices.values.shape[1:]])
    indices.set_shape([None])
    values, factor = compression.decompress(values, ctx), scales[0] * scales[1]
    if op is commlib.Average:
        factor = factor / tf.cast(number("size", process_set.process_set_id if process_set else 0), tf.float64)
    return tf.IndexedSlices(values * tf.cast(factor, values.dtype), indices, slices.dense_shape)


@as_it_is
def broadcast(tensor, root_rank, name=None, ignore_name_scope=False, process_set=global_process_set):
    """The root's tensor, as a new tensor on every rank. Differentiable.

    Args:
        tensor: of the same shape and dtype on all ranks.
        root_rank: whose values everybody gets; its rank among all, also with a process set.
        name, process_set: as for `allreduce`.
    """
    return make("broadcast", as_tensor(tensor, "broadcast"), name, process_set, root=root_rank)


def _rows(tensor, what):
    tensor = as_tensor(tensor, what)
    if tensor.shape.rank == 0:
        raise ValueError(f"{what} works along the first dimension, and a scalar has none: reshape it to (1,)")
    return tensor


def _with_rows(result, tensor):
    """What a graph may know of the result's shape."""
    if not tf.executing_eagerly() and tensor.shape.rank is not None:
        result.set_shape([None, *tensor.shape[1:]])
    return result


@as_it_is
def allgather(tensor, name=None, ignore_name_scope=False, process_set=global_process_set):
    """All ranks' tensors joined along the first dimension, which may differ between ranks. Differentiable.

    Returns:
        A new tensor, the same on every rank.
    """
    tensor = _rows(tensor, "allgather")
    return _with_rows(make("allgather", tensor, name, process_set), tensor)


@as_it_is
def grouped_allgather(tensors, name=None, ignore_name_scope=False, process_set=global_process_set):
    """As `allgather` of each tensor of a list, all at the same time. Returns a list of new tensors. Differentiable."""
    tensors = [_rows(tensor, "grouped_allgather") for tensor in tensors]
    names = _names(name, "grouped_allgather", tensors, process_set)
    return [_with_rows(*pair) for pair in zip(make_all("allgather", tensors, names, process_set), tensors)]


@as_it_is
def reducescatter(tensor, device_dense="", compression=Compression.none, op=commlib.Average, name=None,
                  process_set=global_process_set, prescale_factor=1.0, postscale_factor=1.0):  # fmt: skip
    """Reduces over all ranks and gives each its share of the rows; low ranks get those that remain. Differentiable."""
    op, compression = check_op(op), checked_compression(compression)
    tensor, ctx = compression.compress(_rows(tensor, "reducescatter"))
    check_reduction(op, [tensor])
    result = make("reducescatter", tensor, name, process_set, op=op, scales=(float(prescale_factor), float(postscale_factor)))
    return compression.decompress(_with_rows(result, tensor), ctx)


@as_it_is
def grouped_reducescatter(tensors, device_dense="", compression=Compression.none, op=commlib.Average,
                          process_set=global_process_set, prescale_factor=1.0, postscale_factor=1.0, *, name=None):  # fmt: skip
    """As `reducescatter` of each tensor of a list, all at the same time. Returns a list of new tensors. Differentiable."""
    op, compression = check_op(op), checked_compression(compression)
    pairs = [compression.compress(_rows(tensor, "grouped_reducescatter")) for tensor in tensors]
    tensors = [tensor for tensor, _ in pairs]
    check_reduction(op, tensors)
    names = _names(name, "grouped_reducescatter", tensors, process_set)
    results = make_all("reducescatter", tensors, names, process_set, op=op,
                       scales=(float(prescale_factor), float(postscale_factor)))  # fmt: skip
    return [compression.decompress(_with_rows(result, tensor), ctx) for result, (tensor, ctx) in zip(results, pairs)]


@as_it_is
def alltoall(tensor, splits=None, name=None, ignore_name_scope=False, process_set=global_process_set):
    """Sends rows to every rank and receives theirs, joined in rank order. Differentiable.

    Args:
        tensor: of one dimension at least; the first may differ between ranks.
        splits: rows for each rank, in rank order, a tensor or a list; None: the same number for each.
        name, process_set: as for `allreduce`.

    Returns:
        The received rows; with splits, (received rows, how many came from each rank).
    """
    tensor = _rows(tensor, "alltoall")
    wanted = tf.zeros([0], tf.int64) if splits is None else tf.cast(splits, tf.int64)
    received, received_splits = make("alltoall", tensor, name, process_set, wanted)
    received = _with_rows(received, tensor)
    if splits is None:
        return received
    dtype = splits.dtype if isinstance(splits, tf.Tensor) else tf.int32
    return received, tf.cast(received_splits, dtype)
