"""What ranks tell each other through the store, in JSON, checked before it is believed.

Whoever tells has proven that it belongs to the job; it may still be another version, or have gone mad. Bytes in, values out; no
sockets and no store.
"""
from __future__ import annotations

import ipaddress
import json
from typing import Any, Dict, List, Tuple

from commlib.bootstrap import StartError

_FACTS = ("host", "name", "transport", "nonce")


def facts_of(text: bytes, rank: int) -> Dict[str, str]:
    """Where a rank lives and what it has chosen: connect.survey's.

    Raises:
        StartError: by this and by all others here, naming the rank, for what is none.
    """
    facts = _parsed(text, rank)
    if not isinstance(facts, dict) or any(type(facts.get(name)) is not str for name in _FACTS):
        raise _unsound(rank)
    return facts


def name_of(text: bytes, rank: int) -> str:
    """The name of a rank's Unix socket."""
    name = _parsed(text, rank)
    if type(name) is not str:
        raise _unsound(rank)
    return name


def ranks_of(text: bytes, rank: int) -> List[int]:
    """Ranks that a rank has called."""
    ranks = _parsed(text, rank)
    if not isinstance(ranks, list) or any(type(one) is not int for one in ranks):
        raise _unsound(rank)
    return ranks


def offers_of(text: bytes, rank: int) -> List[Tuple[str, str, int]]:
    """Where a rank listens: interface, address, port.

    Example:
        >>> offers_of(b'[["eth0", "10.0.0.7", 4711]]', 3)
        [('eth0', '10.0.0.7', 4711)]
    """
    offers = _parsed(text, rank)
    if not isinstance(offers, list) or not all(map(_is_offer, offers)):
        raise _unsound(rank)
    return [tuple(offer) for offer in offers]


def _is_offer(offer: Any) -> bool:
    if not isinstance(offer, list) or [type(part) for part in offer] != [str, str, int] or not 0 < offer[2] < 1 << 16:
        return False
    try:
        ipaddress.ip_address(offer[1])
    except ValueError:
        return False
    return True


def _parsed(text: bytes, rank: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise _unsound(rank) from None


def _unsound(rank: int) -> StartError:
    return StartError(f"rank {rank} told this rank what no rank of this version tells: is the same version of commlib installed "
                      "everywhere?", rank)  # fmt: skip
