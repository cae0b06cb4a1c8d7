"""The order in which the forward pass needs variables, read off the graph that was just traced.

A variable's first use is the first op that takes its handle: a read, a gather, or a nested function or loop that reads it.
So the order is that of the program, not that of registration, and needs no hooks in layers. This file knows graphs and
variables; it knows no gradients.
"""

import tensorflow as tf

from commlib.tensorflow.reduction import variable_of

_NEVER = 1 << 30


def places_by_first_use(variables):
    """The place of each variable in the forward pass, 0 first, as a list; variables that this graph does not use come last.

    Args:
        variables: tf.Variable or keras.Variable. In eager mode, where there is no graph, their own order is the answer.
    """
    graph = tf.compat.v1.get_default_graph()
    if tf.executing_eagerly() or not hasattr(graph, "capture"):
        return list(range(len(variables)))
    number_of = {operation.name: number for number, operation in enumerate(graph.get_operations())}
    uses = [_first(graph.capture(variable_of(variable).handle), number_of) for variable in variables]
    places = [0] * len(uses)
    for place, (_, number) in enumerate(sorted((use, number) for number, use in enumerate(uses))):
        places[number] = place
    return places


def _first(handle, number_of):
    return min((number_of[operation.name] for operation in handle.consumers()), default=_NEVER)
