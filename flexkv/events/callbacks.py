"""Where a recovery server may connect back to: this machine, and what a setting names."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


class CallbackPolicy:
    """Loopback and this machine's own addresses always; others only if ``hosts`` names them.

    ``hosts``: addresses, networks (10.0.0.0/8) and names, these compared as text.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._names: set[str] = set()
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for host in hosts:
            try:
                self._networks.append(ipaddress.ip_network(host, strict=False))
            except ValueError:
                self._names.add(host.lower())

    def allows(self, host: str) -> bool:
        """Whether an answer may go to ``host``."""
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return host.lower() in self._names
        mapped = getattr(address, "ipv4_mapped", None)
        address = mapped or address
        return (
            address.is_loopback
            or any(address in network for network in self._networks)
            or _is_own(address)
        )


def _is_own(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Only an address of this machine can be bound to. Nothing is sent."""
    if address.is_unspecified or address.is_multicast:
        return False
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6  # noqa: PLR2004
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True
