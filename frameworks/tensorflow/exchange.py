"""The gradients of one optimizer on their way: what travels together, under which name and with which priority.

Small gradients that are neighbours in the optimizer's list travel as one tensor. Names and groups depend only on that list,
which is the same on all ranks; priorities come from the forward pass that this rank has traced. This file knows gradients
and their places; who begins the operations, and when their results are wanted, is up to the caller.
"""

import tensorflow as tf

import commlib
from commlib.tensorflow.collectives import check_reduction
from commlib.tensorflow.operations import as_tensor, number
from commlib.tensorflow.tape import variable_of

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

    def parcels(self, gradients, places, variables):
        """Parcels of all gradients.

        Args:
            gradients: {number of the variable in the optimizer: tensor or tf.IndexedSlices}.
            places: {number: place in the forward pass, 0 first}.
            variables: all of the optimizer.

        Raises:
            ValueError: the user's groups do not fit to them.
        """
        if self.groups is not None and self._chosen is None:
            self._chosen = _chosen(self.groups, variables)
        sparse = [number for number, gradient in gradients.items() if self._is_sparse(gradient)]
        dense = [number for number in gradients if number not in sparse]
        wires = {number: self.reduction.compression.compress(_dense(gradients[number], variables[number])) for number in dense}
        made = [self._of_slices(number, gradients[number], places[number]) for number in sparse]
        made += [self._of_group(group, {number: wires[number] for number in group}, min(places[number] for number in group))
                 for group in self._groups(sorted(dense), {number: wire for number, (wire, _) in wires.items()})]  # fmt: skip
        return sorted(made, key=lambda parcel: parcel.priority)

    def _is_sparse(self, gradient):
        return isinstance(gradient, tf.IndexedSlices) and not self.reduction.sparse_as_dense

    def _groups(self, numbers, wires):
        """Numbers that travel together, as lists."""
        if self._chosen is not None:
            return list(_by_choice(numbers, wires, self._chosen))
        return list(_neighbours(numbers, wires))

    def _of_group(self, group, wires, priority):
        tensors = [wires[number][0] for number in group]
        check_reduction(self.reduction.op, tensors)
        shapes = [tensor.shape for tensor in tensors]
        sizes = [shape.num_elements() for shape in shapes]
        if len(group) > 1:
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
        return Parcel("allreduce", [together], [name], priority, open, op=self.reduction.op, scales=(1.0 / factor, factor),
                      overlapped=True)  # fmt: skip

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
    if not tf.executing_eagerly():
        tensor.set_shape(variable.shape)
    return tensor


def _neighbours(numbers, wires):
    """Runs of small gradients of one dtype, up to a size; big ones by themselves."""
    run, nbytes = [], 0
    for index in numbers:
        wire = wires[index]
        mine = wire.shape.num_elements() * wire.dtype.size
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
