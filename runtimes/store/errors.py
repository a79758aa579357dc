"""What can go wrong while a model is brought here. The text is for the user: what happened, then what to do."""

from __future__ import annotations

from protocol.errors import ArchipelagError, ConfigError


class FetchError(ConfigError):
    """A source is not reachable, does not hold what was asked for, or answers nonsense."""


class WrongContent(FetchError):
    """The bytes are not the model: a wrong hash, a file cut short, or no model at all."""


class SourceRefused(FetchError):
    """A source that a stranger named, and that is not to be asked: no public address, no https."""


class DiskFull(ConfigError):
    """There is no room for the model, on the disk or under the cap of the cache."""


class FetchCancelled(ArchipelagError):
    """The caller's ``cancelled`` said so. What was downloaded so far is kept for the next try where it can be resumed."""
