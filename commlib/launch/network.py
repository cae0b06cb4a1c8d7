"""The network as one host of a job sees it: a port where others meet, the addresses to offer them, and which of theirs leads."""
from __future__ import annotations

import random
import socket
import time
from typing import List, Optional, Sequence, Tuple

from commlib import interfaces
from commlib.dial import Unreachable, dial, resolve

_REACH_S = 5.0  # a firewall that drops packets never answers


def addresses(wanted: str) -> List[str]:
    """What other hosts may try, best first, then loopback for hosts that are only containers here, or names of the same.

    Args:
        wanted: as COMMLIB_NETWORK_INTERFACES; "": any.
    Raises:
        StartError: this host has none of what is wanted.
    """
    offered = [address for address in interfaces.offered(wanted, None) if not address.ip.is_link_local]
    loopback = [] if wanted else [address for address in interfaces.addresses() if address.is_loopback]
    return list(dict.fromkeys(str(address.ip) for address in offered + loopback))


def listen(ports: str) -> socket.socket:
    """A listening socket on all addresses, on a port of the range (as COMMLIB_PORT_RANGE; "": any).

    Raises:
        OSError: every port of the range is taken.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    first, last = interfaces.parse_ports(ports) or (0, 0)
    for port in random.sample(range(first, last + 1), last + 1 - first):
        try:
            return socket.create_server(("", port), family=family, backlog=512, dualstack_ipv6=both)
        except OSError as error:
            reason = error
    raise reason if first == last else OSError(f"all ports of {ports} are taken: give a wider range")


def reach(candidates: Sequence[str], port: int, same_host: bool) -> Tuple[Optional[str], str]:
    """Finds the address of another host that leads there.

    Args:
        same_host: the other is this host under another name; otherwise addresses that this host has too lead elsewhere.
    Returns:
        (the address, or None; why there is none).
    """
    mine = () if same_host else [str(address.ip) for address in interfaces.addresses()]
    usable = [address for address in candidates if address not in mine]
    places = {place: address for address in usable for place in resolve(address, port)}
    try:
        with dial(list(places), time.monotonic() + _REACH_S) as sock:
            return next(address for place, address in places.items() if place.address[0] == sock.getpeername()[0]), ""
    except Unreachable as error:
        return None, str(error)


def join_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
