"""Link constants from measured times: the least squares that turn samples of closed forms into alpha, beta and gamma.

A sample says how long an algorithm took on so many bytes; its closed form is linear in the constants, so all samples
together are a linear system. This file knows terms, bytes and seconds; it measures nothing and chooses nothing.
"""
from __future__ import annotations

import itertools
from typing import Dict, NamedTuple, Sequence

import numpy

from .cost import LinkTerms

# The unknowns, in the order of a row: settings of these names, and what a call costs whatever its algorithm.
CALL_S = "call_s"
UNKNOWNS = (
    "alpha_inside_s", "beta_inside_s_per_byte", "alpha_between_s", "beta_between_s_per_byte", "gamma_s_per_byte",
    "message_s", CALL_S,
)  # fmt: skip

# A constant that cannot be told from zero: 0 itself means "not measured" in a settings record.
_LEAST = {"alpha_inside_s": 1e-9, "alpha_between_s": 1e-9}
_LEAST_S_PER_BYTE = 1e-14


class Sample(NamedTuple):
    """One measurement.

    Args:
        terms: of the algorithm that ran, on the shape that it ran on.
        nbytes: of the operation.
        seconds: what it took.
        messages: that its busiest rank sends, on one host (commlib.cost.messages); 0: they cost nothing beside alpha.
    """

    terms: LinkTerms
    nbytes: float
    seconds: float
    messages: int = 0


def fit(samples: Sequence[Sample]) -> Dict[str, float]:
    """The constants that explain the samples best: least squares of relative errors, no constant below zero.

    Minimizes sum_i ((A_i alpha + n_i (B_i beta + C_i gamma) + M_i message + call - t_i) / t_i)^2 over both classes of link.

    Returns:
        name -> value for every unknown that some sample depends on; `call_s` and `message_s` may be 0, the others are positive.

    Example:
        >>> from commlib.cost import Terms
        >>> times = [(LinkTerms(Terms(2, 1, 0)), n, 5e-6 + 2 * 1e-6 + n * 1e-9) for n in (8, 1000, 10**6)]
        >>> times += [(LinkTerms(Terms(1, 1, 1)), n, 5e-6 + 1e-6 + n * 3e-9) for n in (8, 1000, 10**6)]
        >>> {name: float(f"{value:.3g}") for name, value in fit([Sample(*time) for time in times]).items()}
        {'alpha_inside_s': 1e-06, 'beta_inside_s_per_byte': 1e-09, 'gamma_s_per_byte': 2e-09, 'call_s': 5e-06}
    """
    rows = numpy.array([_row(sample) for sample in samples]) / [[sample.seconds] for sample in samples]
    used = [column for column in range(len(UNKNOWNS)) if rows[:, column].any()]
    values = _non_negative(rows[:, used])
    names = [UNKNOWNS[column] for column in used]
    return {name: max(float(value), 0.0 if name in (CALL_S, "message_s") else _LEAST.get(name, _LEAST_S_PER_BYTE))
            for name, value in zip(names, values)}  # fmt: skip


def _row(sample: Sample):
    """Coefficients of the unknowns."""
    inside, between, nbytes = sample.terms.inside, sample.terms.between, sample.nbytes
    return (inside.alpha, inside.beta * nbytes, between.alpha, between.beta * nbytes,
            (inside.gamma + between.gamma) * nbytes, float(sample.messages), 1.0)  # fmt: skip


def _non_negative(rows):
    """The solution of rows x = 1 in least squares with x >= 0.

    Some of the unknowns are 0 there and the others are unbounded least squares; with seven, all ways can be tried.
    """
    scale = numpy.linalg.norm(rows, axis=0)  # bytes beside counts: unscaled, small numbers would drown
    rows = rows / scale
    count = rows.shape[1]
    best, least = numpy.zeros(count), numpy.inf
    for size in range(1, count + 1):
        for chosen in map(list, itertools.combinations(range(count), size)):
            values = numpy.zeros(count)
            values[chosen] = numpy.linalg.lstsq(rows[:, chosen], numpy.ones(len(rows)), rcond=None)[0]
            error = numpy.sum((rows @ values - 1) ** 2)
            if (values >= 0).all() and error < least:
                best, least = values, error
    return best / scale
