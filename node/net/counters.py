"""What the network layer counts: refusals are evidence, so each kind has a number of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(slots=True)
class NetCounters:
    """Monotonic counts of one host since it was opened. Only the host's own trio thread changes them."""

    connections_opened: int = 0
    connections_lost: int = 0
    handshakes_refused: int = 0  # bytes on the port that never became a connection
    connections_broken: int = 0  # closed by us because the peer broke the protocol or froze
    streams_opened: int = 0
    streams_accepted: int = 0
    streams_refused: int = 0  # over STREAMS_PER_PEER_MAX, or for a protocol that nobody serves
    frames_sent: int = 0
    frames_received: int = 0
    frames_refused: int = 0
    frame_bytes_sent: int = 0
    frame_bytes_received: int = 0
    handler_errors: int = 0
    dials_failed: int = 0

    def snapshot(self) -> dict[str, int]:
        return dataclasses.asdict(self)


class ConnectionOwner(Protocol):
    """What a connection needs from the host that it belongs to."""

    counters: NetCounters

    def connection_began(self, connection: Any) -> None:
        """Called once, when streams can be opened."""

    def connection_ended(self, connection: Any, reason: str) -> None:
        """Called once for each connection, at the moment it is lost, before anybody waiting on it wakes up."""
