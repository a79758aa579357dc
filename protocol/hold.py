"""``/archipelag/hold/1``: a Coordinator asks an Island that offers memory to hold a range of a model's layers.

The Coordinator opens the stream and says hello with its delegation; one order a stream. The Island answers with progress and, in the end,
with ShardHeld or HoldRefused. It loads only what it can verify by hash, within the memory that its owner offers.

The same way a Coordinator passes on what the Island's owner wants to ask for a Cargo, where he has allowed that.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol import checks, limits
from protocol.errors import Code
from protocol.messages import PROTOCOL_VERSION, Hello
from protocol.prices import Ask
from protocol.registry import Registry
from protocol.shards import LayerRange, ShardManifest

HOLD_PROTOCOL = f"/archipelag/hold/{PROTOCOL_VERSION}"
HOLD = Registry("hold")

HOLD.message(1)(Hello)


@HOLD.message(2)
@dataclass(frozen=True, slots=True)
class HoldShard:
    """Hold these layers with ``cells`` KV cells. ``boot``: of the run of the Island that this is meant for. What is held already is
    answered at once."""

    manifest: ShardManifest
    layers: LayerRange
    cells: int
    boot: int
    expires_at_ms: int

    def __post_init__(self) -> None:
        self.manifest.check_range(self.layers)
        checks.in_range("cells", self.cells, 1, 2**31)
        checks.in_range("boot", self.boot, 1, 2**53)
        checks.in_range("expires_at_ms", self.expires_at_ms, 1, 2**53)


@HOLD.message(3)
@dataclass(frozen=True, slots=True)
class HoldProgress:
    """What the Island is doing; ``total`` 0 where it does not know how much there is."""

    what: str
    done: int
    total: int

    def __post_init__(self) -> None:
        checks.printable("what", self.what, limits.NAME_CHARS_MAX)
        checks.in_range("done", self.done, 0, 2**50)
        checks.in_range("total", self.total, 0, 2**50)


@HOLD.message(4)
@dataclass(frozen=True, slots=True)
class ShardHeld:
    """The shard is loaded; it stands in the Island's ad from ``sequence`` on."""

    shard_hash: str
    sequence: int

    def __post_init__(self) -> None:
        checks.content_hash("shard_hash", self.shard_hash)
        checks.in_range("sequence", self.sequence, 1, 2**53)


@HOLD.message(5)
@dataclass(frozen=True, slots=True)
class HoldRefused:
    code: Code
    message: str

    def __post_init__(self) -> None:
        checks.printable("message", self.message, limits.TEXT_CHARS_MAX)


@HOLD.message(6)
@dataclass(frozen=True, slots=True)
class DropShard:
    """The Coordinator has no more use for these layers; answered by HoldProgress or HoldRefused."""

    content_hash: str
    layers: LayerRange

    def __post_init__(self) -> None:
        checks.content_hash("content_hash", self.content_hash)


@HOLD.message(7)
@dataclass(frozen=True, slots=True)
class SetAsk:
    """The account that this Island is paired with wants it to ask so much for a Cargo; answered by AskSet or HoldRefused."""

    cargo: str
    ask: Ask

    def __post_init__(self) -> None:
        checks.label("cargo", self.cargo, limits.NAME_CHARS_MAX)


@HOLD.message(8)
@dataclass(frozen=True, slots=True)
class AskSet:
    """It stands in the Island's ad from ``sequence`` on, until the Island's next start."""

    sequence: int

    def __post_init__(self) -> None:
        checks.in_range("sequence", self.sequence, 1, 2**53)


HOLD.seal()
