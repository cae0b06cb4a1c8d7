"""Optimizers with op=Adasum, as Horovod has it: ranks make steps of their own, and the changes of weights are combined.

Gradients of different ranks are not comparable once an optimizer has scaled them each by its own state, but the changes that
it makes are. This file knows variables before and after a step; the step is the optimizer's own.
"""

import tensorflow as tf

from commlib import Adasum
from commlib.tensorflow.operations import make_all


def combined_step(step, variables, reduction, name):
    """Makes a step, and one change of all ranks' changes, with coefficients for each variable.

    Args:
        step: a function that changes variables; what it returns, if anything, is an Operation of a graph.
        variables: which they are, tf.Variable or keras.Variable, the same on all ranks.
        reduction: a tape.Reduction: of its local variables the changes stay the rank's own.
        name: the first part of the operations' names.

    Returns:
        In a graph of TensorFlow 1, an Operation; else None.
    """
    numbers = [number for number, variable in enumerate(variables) if not reduction.is_local(variable)]
    shared = [variables[number] for number in numbers]
    before = [tf.identity(variable) for variable in shared]
    with tf.control_dependencies(before if not tf.executing_eagerly() else []):
        done = step()
    with tf.control_dependencies([done] if isinstance(done, tf.Operation) else []):
        changes = [_value(variable) - start for variable, start in zip(shared, before)]
    pairs = [reduction.compression.compress(change) for change in changes]
    names = [f"{name} change of weights {number}" for number in numbers]
    made = make_all("adasum", [wire for wire, _ in pairs], names, reduction.process_set,
                    [{"priority": number} for number in numbers], op=Adasum)  # fmt: skip
    changes = [reduction.compression.decompress(one, ctx) for one, (_, ctx) in zip(made, pairs)]
    assigned = [_assign(variable, start + change) for variable, start, change in zip(shared, before, changes)]
    return None if tf.compat.v1.executing_eagerly_outside_functions() else tf.group(*assigned)


def _value(variable):
    return variable.read_value() if isinstance(variable, tf.Variable) else tf.convert_to_tensor(variable)


def _assign(variable, value):
    """Within what the variable is constrained to: combined changes may leave it."""
    constraint = getattr(variable, "constraint", None)
    return variable.assign(value if constraint is None else constraint(value))
