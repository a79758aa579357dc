"""Sources that a stranger's manifest names: https to public addresses and nothing else, so that nobody makes an Island look round inside
its own network (server-side request forgery).

The rules stand at the one place where requests leave, so they hold for the first address and for every redirect alike. The name is resolved
here, every address of the answer is checked, and the connection goes to one of the addresses that were checked: a second look-up, which
could give another answer (DNS rebinding), never happens. The certificate is still checked against the name. Proxies of the environment are
not used, since a proxy would resolve the name again.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from runtimes.store.errors import FetchError, SourceRefused

_PORT = 443
_ADDRESSES_TRIED_MAX = 4

# Python's own is_global lets multicast, a part of 192.0.0.0/24 and the relays of 6to4 pass. RFC 6890 and its successors.
_CLOSED_V4 = tuple(map(ipaddress.IPv4Network, ("192.0.0.0/24", "192.88.99.0/24", "224.0.0.0/4", "240.0.0.0/4")))
# Only global unicast, without what carries an IPv4 address inside (Teredo, 6to4) or is for documents. ``::ffff:0:0/96`` (mapped),
# ``64:ff9b::/96`` (NAT64), link-local, unique local and multicast addresses all lie outside.
_OPEN_V6 = ipaddress.IPv6Network("2000::/3")
_CLOSED_V6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet at large; False for what is no address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv4Address):
        return found.is_global and not any(found in network for network in _CLOSED_V4)
    if found.scope_id is not None:
        return False
    return found.is_global and found in _OPEN_V6 and not any(found in network for network in _CLOSED_V6)


def resolve(host: str, port: int) -> Sequence[str]:
    """All addresses of a name, as the system gives them. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@dataclass(frozen=True, slots=True)
class PublicOnly:
    """The rules. ``ports``: an operator may allow more; ``tls``: None for the certificates that httpx trusts."""

    resolve: Callable[[str, int], Sequence[str]] = resolve
    is_allowed: Callable[[str], bool] = is_public
    ports: frozenset[int] = field(default_factory=lambda: frozenset({_PORT}))
    tls: ssl.SSLContext | None = None

    def checked(self, url: httpx.URL) -> Sequence[str]:
        """Addresses to connect to, all of them allowed. Raises SourceRefused, FetchError where the name has no address."""
        host, port = url.raw_host.decode("ascii"), url.port or _PORT
        if url.scheme != "https":
            raise SourceRefused(f"A source at {host[:80]} is not https. Refused.")
        if url.userinfo:
            raise SourceRefused(f"The address of a source at {host[:80]} holds a user name or password. Refused.")
        if port not in self.ports:
            raise SourceRefused(f"A source at {host[:80]} uses port {port}; only {', '.join(map(str, sorted(self.ports)))} may be used.")
        try:
            addresses = self.resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise FetchError(f"{host[:80]} cannot be found ({error}). Check the network, or take another source.") from error
        if not addresses:
            raise FetchError(f"{host[:80]} has no address. Take another source.")
        for address in addresses:
            if not self.is_allowed(address):
                raise SourceRefused(f"{host[:80]} leads to {address[:60]}, which is no public address; a Cargo's sources have to be.")
        return addresses


class PublicTransport(httpx.BaseTransport):
    """Sends requests by the rules of ``PublicOnly``. Raises SourceRefused, FetchError, httpx.TransportError."""

    def __init__(self, rules: PublicOnly) -> None:
        self._rules = rules
        tls = httpx.create_ssl_context() if rules.tls is None else rules.tls
        # No connection is used twice: it was opened for one name, and another name may lie at the same address.
        once = httpx.Limits(max_keepalive_connections=0)
        self._inner = httpx.HTTPTransport(verify=tls, trust_env=False, limits=once)

    def __repr__(self) -> str:
        return f"<PublicTransport to ports {sorted(self._rules.ports)}>"

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        addresses = self._rules.checked(request.url)[:_ADDRESSES_TRIED_MAX]
        for address in addresses[:-1]:
            try:
                return self._inner.handle_request(_aimed(request, address))
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return self._inner.handle_request(_aimed(request, addresses[-1]))

    def close(self) -> None:
        self._inner.close()


def _aimed(request: httpx.Request, address: str) -> httpx.Request:
    """The same request to an address; its Host header and the name in TLS stay."""
    extensions = {**request.extensions, "sni_hostname": request.url.raw_host.decode("ascii")}
    url = request.url.copy_with(host=address)
    return httpx.Request(request.method, url, headers=request.headers, stream=request.stream, extensions=extensions)
