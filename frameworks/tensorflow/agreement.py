"""Whether all ranks have gradients of the same variables: asked in every step before the first of them travels.

A graph is traced by each rank for itself, and what it has gradients of is fixed there. If ranks differed in that, some would wait
for operations that others never submit. So each tells, in one small operation that needs nothing of the step and is done while
the forward pass runs, what it has; the gradients wait for it. This file reduces nothing.
"""

import json

import tensorflow as tf

import commlib
from commlib.tensorflow.forms import check
from commlib.tensorflow.operations import make


def agreed(forms, names, name, process_set, *, zeros):
    """Tells other ranks what this one has, and hears what they have.

    Args:
        forms: of each gradient, one of `forms`.
        names: what people call them.
        name: of the operation.
        process_set: the ranks that take part.
        zeros: whether a rank that has no gradient sends zeros where another one has a dense one; else that is an error.

    Returns:
        A tensor to be waited for by whatever travels; its first elements are the largest forms that any rank has.

    Raises:
        MismatchError: in eager mode: ranks differ. In a function it is raised by whoever waits for the tensor, on every rank.
    """
    mine = tf.constant([*forms, *(-form for form in forms)], tf.int32)
    largest = make("allreduce", mine, f"{name} forms of gradients", process_set, op=commlib.Max)
    about = json.dumps({"names": list(names), "zeros": zeros})
    if tf.executing_eagerly():
        if not bool(tf.reduce_all(largest == mine)):
            check(about, largest.numpy())
        return largest
    same = tf.reduce_all(tf.equal(largest, mine))
    return tf.cond(same, lambda: tf.identity(largest), lambda: make("check", largest, about))
