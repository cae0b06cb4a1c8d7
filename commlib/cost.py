"""What an algorithm costs: a closed form in alpha, beta and gamma, and the time line of its plans to check it by.

This file knows chunks, link classes and seconds. It must not know algorithms by name, and measures nothing itself.

The model. A message of m bytes from a to b:
  1. is sent when its send's dependencies are done, a's sending port is free, and b has granted it; of several such
     sends of a rank the first in the list goes first;
  2. is granted by b when every step that the receive depends on has begun, and so has every send to a that is listed
     before it; the grant itself takes no time (a small message travels without one, a large one does not feel it);
  3. keeps a's sending port busy for m beta, and begins to come in alpha after it was sent;
  4. keeps b's receiving port busy for m beta and, if it is reduced, m gamma more, in order of arrival; the reduction
     begins when the steps that the receive depends on are done.
So a rank sends one message at a time and receives one at a time, both at once, and latency alone keeps no port busy.
"""
from __future__ import annotations

from dataclasses import dataclass

from .plan import Shape


@dataclass(frozen=True)
class Terms:
    """Coefficients of a closed form: alpha + beta n + gamma n, for messages of n bytes.

    Args:
        alpha: latencies on the critical path.
        beta: bytes sent one after the other on the critical path, per byte of the message.
        gamma: bytes reduced one after the other on the critical path, per byte of the message.
    """

    alpha: float = 0.0
    beta: float = 0.0
    gamma: float = 0.0

    def __add__(self, other: Terms) -> Terms:
        return Terms(self.alpha + other.alpha, self.beta + other.beta, self.gamma + other.gamma)

    def of_part(self, fraction: float) -> Terms:
        """The terms of the same algorithm on `fraction` of the bytes, per byte of the whole."""
        return Terms(self.alpha, self.beta * fraction, self.gamma * fraction)


@dataclass(frozen=True)
class LinkTerms:
    """The terms paid on links inside hosts and on links between them."""

    inside: Terms = Terms()
    between: Terms = Terms()


def flat(shape: Shape, terms: Terms) -> LinkTerms:
    """The terms of an algorithm that does not look at hosts: all on the slowest class of link that the shape has.

    With one host, or one rank per host, this is exact; otherwise some hops stay inside hosts and it is an upper bound.
    """
    return LinkTerms(inside=terms) if shape.hosts == 1 else LinkTerms(between=terms)
