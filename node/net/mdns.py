"""Peers on the same LAN, by DNS service discovery (RFC 6763) over multicast DNS (RFC 6762), with the zeroconf library.

A node registers ``PEER_ID._archipelag._udp.local.`` with a TXT record: ``network``, ``role``, and its addresses as ``a0``, ``a1``, …
Anybody on the LAN can register anything, so what is heard is only a hint whom to dial; Noise proves who answers.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio
from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf

from protocol import checks, limits

log = logging.getLogger(__name__)

SERVICE = "_archipelag._udp.local."
_ASK_TIMEOUT_MS = 1500
_QUEUED_MAX = 256


class MdnsSocketError(Exception):
    """This machine has no interface that does multicast, or the port is not ours to use."""


@dataclass(frozen=True, slots=True)
class FoundPeer:
    """What a neighbour says of itself; addresses are without ``/p2p/…``."""

    peer_id: str
    addresses: tuple[str, ...]
    network: str = ""
    role: str = ""

    def __post_init__(self) -> None:
        checks.peer_id("peer_id", self.peer_id)
        if not 0 < len(self.addresses) <= limits.MDNS_ADDRESSES_MAX:
            raise ValueError(f"a neighbour has 1 to {limits.MDNS_ADDRESSES_MAX} addresses")
        if len(self.network) > limits.NAME_CHARS_MAX or len(self.role) > limits.NAME_CHARS_MAX:
            raise ValueError("network and role are short names")


def txt_record(peer_id: str, addresses: list[str], network: str, role: str) -> dict[str, str]:
    listed = [address.partition("/p2p/")[0] for address in addresses][: limits.MDNS_ADDRESSES_MAX]
    return {"id": peer_id, "network": network, "role": role, **{f"a{i}": address for i, address in enumerate(listed)}}


def read_txt(record: dict[bytes, bytes | None]) -> FoundPeer:
    """Raises ValueError for a record that is none of ours."""
    text = {key.decode(): (value or b"").decode() for key, value in record.items()}
    addresses = tuple(text[f"a{i}"] for i in range(limits.MDNS_ADDRESSES_MAX) if f"a{i}" in text)
    return FoundPeer(text.get("id", ""), addresses, text.get("network", ""), text.get("role", ""))


class _Listener(ServiceListener):
    """Called in zeroconf's threads; hands names over to trio."""

    def __init__(self, token: trio.lowlevel.TrioToken, names: trio.MemorySendChannel[str]) -> None:
        self._token, self._names = token, names

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        try:
            self._token.run_sync_soon(self._put, name)
        except trio.RunFinishedError:
            log.debug("%s was found too late", name)

    update_service = add_service

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:
        """A lost neighbour shows in its connection."""

    def _put(self, name: str) -> None:
        try:
            self._names.send_nowait(name)
        except (trio.WouldBlock, trio.BrokenResourceError):
            log.debug("%s is left out: too many at once", name)


async def serve_mdns(
    peer_id: str, addresses: list[str], network: str, role: str, found: Callable[[FoundPeer], None]
) -> None:
    """Announces this node and calls ``found`` for each neighbour, until cancelled. Raises MdnsSocketError."""
    zeroconf = await trio.to_thread.run_sync(_open)
    names, to_resolve = trio.open_memory_channel[str](_QUEUED_MAX)
    info = _service_info(peer_id, addresses, network, role)
    try:
        await trio.to_thread.run_sync(zeroconf.register_service, info)
        browser = ServiceBrowser(zeroconf, SERVICE, _Listener(trio.lowlevel.current_trio_token(), names))
        async for name in to_resolve:
            if not name.startswith(peer_id):
                await _resolve(zeroconf, name, found)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(zeroconf.close)
    del browser


def _open() -> Zeroconf:
    try:
        return Zeroconf(ip_version=IPVersion.V4Only)
    except (OSError, ZeroconfError) as error:
        raise MdnsSocketError(str(error)) from error


def _service_info(peer_id: str, addresses: list[str], network: str, role: str) -> ServiceInfo:
    ips = {address.split("/")[2] for address in addresses if address.startswith("/ip4/")}
    port = next((int(address.split("/")[4]) for address in addresses if address.startswith("/ip4/")), 0)
    return ServiceInfo(
        SERVICE,
        f"{peer_id}.{SERVICE}",
        addresses=[socket.inet_aton(ip) for ip in sorted(ips)],
        port=port,
        properties=txt_record(peer_id, addresses, network, role),
        server=f"{peer_id}.local.",
    )


async def _resolve(zeroconf: Zeroconf, name: str, found: Callable[[FoundPeer], None]) -> None:
    info: Any = await trio.to_thread.run_sync(zeroconf.get_service_info, SERVICE, name, _ASK_TIMEOUT_MS)
    if info is None:
        return
    try:
        found(read_txt(info.properties))
    except ValueError as error:
        log.debug("%s is no neighbour of ours: %s", name, error)
