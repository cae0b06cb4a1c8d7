"""The gradients of one optimizer on their way: what travels together, under which name and with which priority.

Small gradients that are neighbours in the optimizer's list travel as one tensor. Names and groups depend only on that list,
which is the same on all ranks; priorities come from the forward pass that this rank has traced. This file knows gradients
and their places; who begins the operations, and when their results are wanted, is up to the caller.
"""

import math

import tensorflow as tf

import commlib
from commlib.tensorflow.agreement import agreed
from commlib.tensorflow.collectives import check_reduction, kind_of
from commlib.tensorflow.forms import ABSENT
from commlib.tensorflow.operations import as_tensor, make_all, number
from commlib.tensorflow.reduction import variable_of

# Below this an operation's cost is latency; above the second the last gradient of a group would keep the first one waiting.
_SMALL_NBYTES = 64 << 10
_GROUP_NBYTES = 256 << 10


class Parcel:
    """What travels as one or more operations of one kind.

    Attributes:
        kind: of the operations.
        tensors, names: of the operations.
        priority: of all of them.
        wish: what they have besides, see native.Wish.
        open: a function of their results that gives {number of a gradient: reduced gradient}.
    """

    def __init__(self, kind, tensors, names, priority, open, **wish):
        self.kind = kind
        self.tensors = tensors
        self.names = names
        self.priority = priority
        self.open = open
        self.wish = wish


class Exchange:
    """How an optimizer's gradients become parcels.

    Args:
        name: the first part of all names, equal on all ranks and of this optimizer only.
        reduction: a tape.Reduction.
        groups: what the user chose: a number of groups, or lists of variables; None: small ones are grouped.
    """

    def __init__(self, name, reduction, groups=None):
        self.name = name
        self.reduction = reduction
        self.groups = groups
        self._chosen = None  # number of a variable -> number of its group

    def agreed(self, gradients, variables, *, zeros):
        """What all ranks have gradients of, in the order of `variables`; see agreement.agreed.

        Args:
            gradients: {number: gradient or None}, of what was asked for.
            variables: as for `parcels`.
        """
        names = [getattr(variable, "path", None) or getattr(variable, "name", f"source {place}")
                 for place, variable in enumerate(variables)]  # fmt: skip
        forms = [self.reduction.form(gradients[number], variable) if number in gradients else ABSENT
                 for number, variable in enumerate(variables)]  # fmt: skip
        return agreed(forms, names, self.name, self.reduction.process_set, zeros=zeros)

    def parcels(self, gradients, places, variables):
        """Parcels of all gradients.

        Args:
            gradients: {number of the variable in the optimizer: tensor or tf.IndexedSlices}.
            places: number -> place in the forward pass, 0 first.
            variables: all of the optimizer, or the sources of a tape.

        Raises:
            ValueError: the user's groups do not fit to them.
        """
        if self.groups is not None and self._chosen is None:
            self._chosen = _chosen(self.groups, variables)
        sparse = [number for number, gradient in gradients.items() if self.reduction.is_sparse(gradient)]
        dense = [number for number in gradients if number not in sparse]
        wires = {number: self.reduction.compression.compress(_dense(gradients[number], variables[number])) for number in dense}
        made = [self._of_slices(number, gradients[number], places[number]) for number in sparse]
        groups = self._groups(sorted(dense), {number: wire for number, (wire, _) in wires.items()}, variables)
        made += [self._of_group(group, {number: wires[number] for number in group}, min(places[number] for number in group))
                 for group in groups]  # fmt: skip
        return sorted(made, key=lambda parcel: parcel.priority)

    def _groups(self, numbers, wires, variables):
        """Numbers that travel together, as lists. What depends on it are names: only what all ranks know alike decides."""
        if self.reduction.op is commlib.Adasum:
            return [[number] for number in numbers]  # each has coefficients of its own
        if self._chosen is not None:
            return list(_by_choice(numbers, wires, self._chosen))
        return list(_neighbours(numbers, wires, variables))

    def _of_group(self, group, wires, priority):
        tensors = [wires[number][0] for number in group]
        check_reduction(self.reduction.op, tensors)
        shapes = [tensor.shape for tensor in tensors]
        if len(group) > 1:
            sizes = [shape.num_elements() for shape in shapes]
            together = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)
        else:
            together = tensors[0]

        def open(results):
            parts = results
            if len(group) > 1:
                parts = [tf.reshape(part, shape) for part, shape in zip(tf.split(results[0], sizes), shapes)]
            decompress = self.reduction.compression.decompress
            return {number: decompress(part, wires[number][1]) for number, part in zip(group, parts)}

        factor = float(self.reduction.predivide_factor)
        name = f"{self.name}.{group[0]}" if len(group) == 1 else f"{self.name}.{group[0]}-{group[-1]}"
        return Parcel(kind_of(self.reduction.op), [together], [name], priority, open, op=self.reduction.op,
                      scales=(1.0 / factor, factor), overlapped=True)  # fmt: skip

    def _of_slices(self, which, slices, priority):
        """All ranks' rows, one rank's after the other's; who uses them adds up those of the same index."""
        if self.reduction.op not in (commlib.Average, commlib.Sum):
            raise ValueError(f"gradients of tf.IndexedSlices with op={self.reduction.op!r}: use Average or Sum, or sparse_as_dense")
        wire, context = self.reduction.compression.compress(as_tensor(slices.values, "gradients"))
        rest = slices.values.shape[1:]

        def open(results):
            values, indices = results
            values.set_shape([None, *rest])
            indices.set_shape([None])
            values = self.reduction.compression.decompress(values, context)
            if self.reduction.op is commlib.Average:
                values = values / tf.cast(number("size", self.reduction.set_number), values.dtype)
            return {which: tf.IndexedSlices(values, indices, slices.dense_shape)}

        names = [f"{self.name}.{which} {part}" for part in ("values", "indices")]
        return Parcel("allgather", [wire, as_tensor(slices.indices, "gradients")], names, priority, open)


def _dense(gradient, variable):
    """The gradient as a tensor whose shape is known."""
    tensor = as_tensor(gradient, "gradients")
    if not tf.executing_eagerly() and _has_shape(variable):
        tensor.set_shape(variable.shape)
    return tensor


def _has_shape(variable):
    """Whether it is a variable of known shape. What is known of a tensor's depends on what else a rank has called."""
    return isinstance(variable_of(variable), tf.Variable) and variable.shape is not None and None not in tuple(variable.shape)


def _neighbours(numbers, wires, variables):
    """Runs of small gradients of one dtype, up to a size; big ones by themselves."""
    run, nbytes = [], 0
    for index in numbers:
        wire = wires[index]
        mine = math.prod(wire.shape) * wire.dtype.size if _has_shape(variables[index]) else _GROUP_NBYTES
        if run and (mine > _SMALL_NBYTES or nbytes + mine > _GROUP_NBYTES or wire.dtype != wires[run[0]].dtype):
            yield run
            run, nbytes = [], 0
        if mine > _SMALL_NBYTES:
            yield [index]
        else:
            run, nbytes = [*run, index], nbytes + mine
    if run:
        yield run


def checked_groups(groups):
    """What a user may choose; 0 is None.

    Raises:
        ValueError: neither a number nor lists.
    """
    if groups is None or (type(groups) is int and groups >= 0):
        return groups or None
    if isinstance(groups, (list, tuple)) and all(isinstance(group, (list, tuple)) for group in groups):
        return groups
    raise ValueError(f"groups should be a non-negative integer or a list of lists of variables, not {groups!r}")


def _chosen(groups, variables):
    """number of a variable -> number of its group. What is in no list travels by itself."""
    count = len(variables)
    if type(groups) is int:
        return {index: index * min(groups, count) // count for index in range(count)}
    number_of = {id(variable_of(variable)): index for index, variable in enumerate(variables)}
    chosen = {}
    for place, group in enumerate(groups):
        for variable in group:
            index = number_of.get(id(variable_of(variable)))
            if index is None or index in chosen:
                why = "is not one that this optimizer trains" if index is None else "is in two of them"
                raise ValueError(f"groups[{place}]: the variable {variable.name} of shape {tuple(variable.shape)} {why}")
            chosen[index] = place
    return chosen


def _by_choice(numbers, wires, chosen):
    groups = {}
    for index in numbers:
        own = ("alone", index) if index not in chosen else (chosen[index], wires[index].dtype)
        groups.setdefault(own, []).append(index)
    return groups.values()


def waited_for(parcels, process_set, told):
    """The results of each parcel's operations, all of which run at the same time; in eager mode when all have come.

    Args:
        told: a tensor before which none begins.
    """
    results = {}
    for kind in ("allreduce", "adasum", "allgather"):
        mine = [parcel for parcel in parcels if parcel.kind == kind]
        wishes = [{"priority": parcel.priority, **parcel.wish} for parcel in mine for _ in parcel.tensors]
        with tf.control_dependencies([] if tf.executing_eagerly() else [told]):
            made = iter(make_all(kind, [tensor for parcel in mine for tensor in parcel.tensors],
                                 [name for parcel in mine for name in parcel.names], process_set, wishes))  # fmt: skip
        results.update({id(parcel): [next(made) for _ in parcel.tensors] for parcel in mine})
        if kind != "allgather":
            results.update({id(parcel): [known(results[id(parcel)][0], parcel.tensors[0].shape)] for parcel in mine})
    return [results[id(parcel)] for parcel in parcels]


def known(result, shape):
    """A result whose shape is known also to TensorFlow's rewriting of graphs.

    How that orders arithmetic, and so the bits, depends on shapes: steps that wait and steps that do not shall look alike.
    """
    return result if tf.executing_eagerly() or not shape.is_fully_defined() else tf.ensure_shape(result, shape)


def reduced_by(exchange, gradients, sources):
    """The gradients of all ranks, as a list; None, where all ranks have it, stays None.

    Args:
        sources: what they are gradients of, in the order of the forward pass as far as one knows it.
    """
    reduction = exchange.reduction
    told = exchange.agreed(dict(enumerate(gradients)), sources, zeros=False)
    sent = {number: gradient for number, (gradient, source) in enumerate(zip(gradients, sources))
            if gradient is not None and not reduction.is_local(source)}  # fmt: skip
    parcels = exchange.parcels(sent, range(len(sources)), sources)
    gradients = reduction.scale_local(gradients, sources)
    for parcel, results in zip(parcels, waited_for(parcels, reduction.process_set, told)):
        for number, gradient in parcel.open(results).items():
            gradients[number] = gradient
    return gradients
