"""Which network a node belongs to, and which Coordinators speak for it: learned once, then pinned in the data folder."""

from __future__ import annotations

import json
import logging
import socket
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import trio

from node.datadir import DataDir
from protocol import limits
from protocol.errors import ConfigError, RemoteProtocolError, SignatureError
from protocol.messages import Hello, NodeRole
from protocol.tickets import Delegation, read_delegation

log = logging.getLogger(__name__)

PINS_FILE = "pins.json"
WELL_KNOWN = "/.well-known/archipelag.json"
_WELL_KNOWN_BYTES_MAX = 64 * 1024


@dataclass(frozen=True, slots=True)
class CoordinatorAddress:
    """Where a Coordinator can be dialled: multiaddrs that end in its peer id."""

    peer: str
    addresses: tuple[str, ...]


class Pins:
    """The network and the Coordinators' ids by URL, as pinned at first use."""

    def __init__(self, data: DataDir) -> None:
        self._data = data
        self._values = data.read_json(PINS_FILE)

    @property
    def network(self) -> str:
        """Empty before the first contact."""
        return str(self._values.get("network", ""))

    def check_hello(self, hello: Hello, sender: str, now_ms: int) -> Delegation:
        """The delegation of the Coordinator that says hello; pins its network at first use.

        Raises RemoteProtocolError (SignatureError) when it is no Coordinator, or one of another network.
        """
        delegation = check_delegation(hello, sender, now_ms)
        if self.network and delegation.network != self.network:
            raise SignatureError(
                f"the Coordinator belongs to network {delegation.network}, this node to {self.network}; "
                f"to move it, stop the node and delete {self._data.path / PINS_FILE}"
            )
        if not self.network:
            self._pin("network", delegation.network)
        return delegation

    def peer_of(self, url: str) -> str:
        """Whose URL it was at first contact; empty before."""
        return str(self._values.get("coordinators", {}).get(url.rstrip("/"), ""))

    def check_url(self, url: str, peer: str) -> None:
        """Pins the peer id behind a URL at first use. Raises ConfigError when it has changed since."""
        known = self._values.get("coordinators", {})
        if known.get(url, peer) != peer:
            raise ConfigError(
                f"the Coordinator at {url} has another identity ({peer}) than at first contact ({known[url]}); if its operator "
                f"moved it on purpose, delete {self._data.path / PINS_FILE}"
            )
        if url not in known:
            self._pin("coordinators", {**known, url: peer})

    def _pin(self, name: str, value: Any) -> None:
        self._values[name] = value
        self._data.write_json(PINS_FILE, self._values)


def check_delegation(hello: Hello, sender: str, now_ms: int) -> Delegation:
    """The delegation of the Coordinator that says hello, of whatever network. Raises RemoteProtocolError (SignatureError)."""
    if hello.role is not NodeRole.COORDINATOR:
        raise RemoteProtocolError(f"{sender} is no Coordinator but a {hello.role}")
    delegation = read_delegation(hello.delegation, now_ms)
    if delegation.coordinator != sender:
        raise SignatureError("a Coordinator showed somebody else's delegation")
    return delegation


def check_address(address: str) -> None:
    """Raises ConfigError when an address is neither a multiaddr with a peer id nor an HTTP URL."""
    if address.startswith("/"):
        if not address.rpartition("/p2p/")[0] or not address.rpartition("/p2p/")[2]:
            raise ConfigError(
                f"{address} has no /p2p/PEER_ID at its end; take the whole address that the Coordinator prints"
            )
    elif not address.startswith(("http://", "https://")) or not urlsplit(address).hostname:
        raise ConfigError(f"{address!r} is neither a multiaddr (/ip4/…/p2p/…) nor an http(s):// URL")


async def resolve_coordinator(address: str, pins: Pins, ca_file: str | None = None) -> CoordinatorAddress:
    """Takes a multiaddr with a peer id, or the Coordinator's HTTP URL.

    Raises ConfigError when the address can never work, OSError when nobody answers there now.
    """
    check_address(address)
    if address.startswith("/"):
        return CoordinatorAddress(address.rpartition("/p2p/")[2], (address,))
    facts, ip = await trio.to_thread.run_sync(_fetch_facts, address.rstrip("/"), ca_file, abandon_on_cancel=True)
    try:
        peer, addresses = str(facts["peer_id"]), tuple(str(a) for a in facts["addresses"])
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{address} answers, but not like a Coordinator; check the address") from error
    pins.check_url(address.rstrip("/"), peer)
    return CoordinatorAddress(peer, _reachable(addresses, ip, peer))


def _reachable(addresses: tuple[str, ...], ip: str, peer: str) -> tuple[str, ...]:
    """The Coordinator's addresses; its ports on the machine that answered HTTP come first, since a forwarded port or a container
    shows other interfaces inside than outside."""
    family = "ip6" if ":" in ip else "ip4"
    ports = dict.fromkeys(a.split("/tcp/")[1].split("/")[0] for a in addresses if "/tcp/" in a)
    seen_from_here = (f"/{family}/{ip}/tcp/{port}/p2p/{peer}" for port in ports)
    return tuple(dict.fromkeys((*seen_from_here, *addresses)))


def _fetch_facts(url: str, ca_file: str | None) -> tuple[dict[str, Any], str]:
    """What the Coordinator says of itself, and the IP address of the machine that said it."""
    parts = urlsplit(url)
    ip = str(socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)[0][4][0])
    context = ssl.create_default_context(cafile=ca_file) if url.startswith("https:") else None
    try:
        with urllib.request.urlopen(url + WELL_KNOWN, timeout=limits.DIAL_TIMEOUT_S, context=context) as answer:
            facts = json.loads(answer.read(_WELL_KNOWN_BYTES_MAX))
    except urllib.error.HTTPError as error:
        raise ConfigError(f"{url} answers with status {error.code}; is that a Coordinator?") from error
    except ValueError as error:
        raise ConfigError(f"{url} does not answer like a Coordinator ({error}); check the address") from error
    if not isinstance(facts, dict):
        raise ConfigError(f"{url} does not answer like a Coordinator; check the address")
    return facts, ip
