"""The addresses of this host's network interfaces, and which of them the ranks of other hosts shall use.

Linux tells them over a netlink socket (rtnetlink(7)); Python has no call for it. Knows no ranks and reads no environment.
"""
from __future__ import annotations

import errno
import fcntl
import ipaddress
import random
import re
import socket
import struct
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

from commlib.bootstrap import StartError
from commlib.dial import Place

_SIOCGIFFLAGS, _IFF_UP, _IFF_LOOPBACK = 0x8913, 0x1, 0x8  # netdevice(7)
_RTM_NEWADDR, _RTM_GETADDR, _NLMSG_DONE, _NLMSG_ERROR = 20, 22, 3, 2
_REQUEST_DUMP = 0x301                                     # NLM_F_REQUEST | NLM_F_DUMP
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_UNUSABLE = 0x68  # IFA_F_TENTATIVE | IFA_F_DEPRECATED | IFA_F_DADFAILED
_HEADER, _IFADDRMSG, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBBBI"), struct.Struct("=HH")

# Bridges and tunnels that containers and virtual machines of one host use; every host has the same addresses there.
_INSIDE_ONLY = re.compile(r"(docker|virbr|veth|br-|cni|flannel|cali|lxc|lxdbr|podman)")
_MOST = 8  # addresses that are offered to others: each is a listening socket, and may cost them a fruitless attempt

_TAKEN = (errno.EADDRINUSE, errno.EACCES)  # EACCES: below 1024, without the right to

IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]


class Address(NamedTuple):
    """One address of an interface that is up."""

    interface: str
    ip: IPAddress

    def place(self, port: int) -> Place:
        """Where to bind or to connect to it."""
        if self.ip.version == 4:
            return Place(socket.AF_INET, (str(self.ip), port))
        scope = socket.if_nametoindex(self.interface) if self.ip.is_link_local else 0
        return Place(socket.AF_INET6, (str(self.ip), port, 0, scope))

    @property
    def is_loopback(self) -> bool:
        return self.ip.is_loopback


def addresses() -> List[Address]:
    """All usable addresses of interfaces that are up, in the kernel's order."""
    names = {index: name for index, name in socket.if_nameindex() if _is_up(name)}
    return [Address(names[index], ip) for index, ip in _dump() if index in names]


def _is_up(name: str) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFFLAGS, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return False  # it has just gone
    return bool(struct.unpack_from("=H", answer, 16)[0] & _IFF_UP)


def _dump() -> List[Tuple[int, IPAddress]]:
    """(interface index, address) of all that the kernel knows."""
    found: List[Tuple[int, IPAddress]] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as sock:  # protocol 0: NETLINK_ROUTE
        request = _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
        sock.send(_HEADER.pack(_HEADER.size + len(request), _RTM_GETADDR, _REQUEST_DUMP, 1, 0) + request)
        while True:
            data, offset = sock.recv(1 << 16), 0
            while offset < len(data):
                nbytes, kind, _, _, _ = _HEADER.unpack_from(data, offset)
                if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    return found
                if kind == _RTM_NEWADDR:
                    found += _parse(data[offset + _HEADER.size:offset + nbytes])
                offset += nbytes + -nbytes % 4


def _parse(message: bytes) -> List[Tuple[int, IPAddress]]:
    """What one RTM_NEWADDR says: one address, or none that can be used."""
    _, _, flags, _, index = _IFADDRMSG.unpack_from(message)
    attributes, offset = {}, _IFADDRMSG.size
    while offset + _ATTRIBUTE.size <= len(message):
        nbytes, kind = _ATTRIBUTE.unpack_from(message, offset)
        attributes[kind] = message[offset + _ATTRIBUTE.size:offset + nbytes]
        offset += max(nbytes + -nbytes % 4, _ATTRIBUTE.size)
    flags = struct.unpack("=I", attributes[_IFA_FLAGS])[0] if _IFA_FLAGS in attributes else flags
    packed = attributes.get(_IFA_LOCAL, attributes.get(_IFA_ADDRESS))  # LOCAL: ADDRESS is the other end of a point-to-point link
    return [] if packed is None or flags & _UNUSABLE else [(index, ipaddress.ip_address(packed))]


# ---- choosing ----------------------------------------------------------------------------------------------------

def offered(wanted: str, route: Optional[str], known: Optional[Sequence[Address]] = None) -> List[Address]:
    """The addresses that other hosts shall try, best first.

    Args:
        wanted: COMMLIB_NETWORK_INTERFACES: names of interfaces, addresses and networks, such as "eth0,10.1.0.0/16", the first
            that the host has being the best; "": the address on the route to the other ranks first, then all others.
        route: this host's address on the way to the other ranks, if it is known.
        known: what this host has, of `addresses` by default.
    Raises:
        StartError: nothing that is wanted is here, or it can be neither name, address nor network.
    Example:
        >>> [str(address.ip) for address in offered("127.0.0.0/8", None)]
        ['127.0.0.1']
    """
    known = addresses() if known is None else known
    if wanted:
        return _selected(wanted, known)[:_MOST]
    outside = [address for address in known if not address.is_loopback]
    return sorted(outside, key=lambda address: _distance(address, route))[:_MOST] or list(known)


def _distance(address: Address, route: Optional[str]) -> tuple:
    route = (route or "").partition("%")[0]
    return (str(address.ip) != route, bool(_INSIDE_ONLY.match(address.interface)), address.ip.is_link_local)


def _selected(wanted: str, known: Sequence[Address]) -> List[Address]:
    words = [word.strip() for word in wanted.split(",") if word.strip()]
    chosen = list(dict.fromkeys(address for word in words for address in known if _fits(word, address)))
    if not chosen:
        here = ", ".join(f"{address.interface} ({address.ip})" for address in known) or "no address at all"
        raise StartError(f"COMMLIB_NETWORK_INTERFACES is {wanted!r}, and this host has none of these, but {here}")
    return chosen


def _fits(word: str, address: Address) -> bool:
    if word == address.interface:
        return True
    try:
        return address.ip in ipaddress.ip_network(word, strict=False)
    except ValueError:
        return False  # the name of an interface that other hosts may have


def reached_from_here(interface: str, ip: str, known: Optional[Sequence[Address]] = None) -> List[Address]:
    """Another host's address as this host must call it.

    A link-local address says nothing of the link: it is tried on the interface of the same name, then on all others.
    """
    there = ipaddress.ip_address(ip)
    if there.version == 4 or not there.is_link_local:
        return [Address("", there)]
    known = addresses() if known is None else known
    links = dict.fromkeys(address.interface for address in known if address.ip.version == 6 and address.ip.is_link_local)
    return [Address(link, there) for link in sorted(links, key=lambda link: link != interface)]


# ---- ports -------------------------------------------------------------------------------------------------------

def parse_ports(text: str) -> Optional[Tuple[int, int]]:
    """(first, last) of a range of ports; None for "": any free port.

    Raises:
        StartError: it is no range of ports.
    Example:
        >>> parse_ports("20000-20099")
        (20000, 20099)
    """
    if not text:
        return None
    match = re.fullmatch(r"\s*(\d{1,5})\s*-\s*(\d{1,5})\s*", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 0 < first <= last < 65536:
        raise StartError(f"the range of ports (COMMLIB_PORT_RANGE, init(port_range=...)) is {text!r}: it must be FIRST-LAST, "
                         "such as 20000-20099")
    return first, last


def listen_at(address: Address, ports: Optional[Tuple[int, int]], backlog: int) -> socket.socket:
    """A socket that listens at an address of this host, on a free port of a range.

    Raises:
        StartError: all ports of the range are taken.
        OSError: the address cannot be bound.
    """
    candidates = [0] if ports is None else random.sample(range(ports[0], ports[1] + 1), ports[1] - ports[0] + 1)
    for port in candidates:  # in an order of its own: ranks of one host must not run after each other
        place = address.place(port)
        sock = socket.socket(place.family, socket.SOCK_STREAM)
        try:
            sock.bind(place.address)
            sock.listen(backlog)
            return sock
        except OSError as error:
            sock.close()
            if ports is None or error.errno not in _TAKEN:
                raise
    raise StartError(f"every port of COMMLIB_PORT_RANGE={ports[0]}-{ports[1]} is taken at {address.ip}: each rank that has peers "
                     "on other hosts needs one for each of its addresses, while it starts")
