"""What a rank may have of a gradient, and what is said where ranks differ in that. `agreement` has them tell each other."""

import json

from commlib.errors import MismatchError

# Of a variable that was not asked for, of one without a gradient, and so on.
ABSENT, NONE, DENSE, SPARSE = range(4)


def check(about, largest):
    """Says what is wrong, if it is.

    Args:
        about: JSON, as agreement.agreed writes it.
        largest: the largest forms, and the negatives of the smallest.

    Raises:
        MismatchError: something is.
    """
    about = json.loads(about)
    names, zeros = about["names"], about["zeros"]
    for name, most, least in zip(names, largest[: len(names)], -largest[len(names) :]):
        if most == least:
            continue
        if most == SPARSE:
            raise MismatchError(f"ranks disagree: the gradient of {name} is tf.IndexedSlices on some, and on others dense or None: "
                                "pass sparse_as_dense=True, or compute it alike on every rank")  # fmt: skip
        if least == ABSENT or not zeros:
            raise MismatchError(f"ranks disagree: some have a gradient of {name}, and others do not: compute it on every rank, or "
                                "pass unconnected_gradients=tf.UnconnectedGradients.ZERO to tape.gradient")  # fmt: skip
