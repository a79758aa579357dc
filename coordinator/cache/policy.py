"""Settings of the cache, and which policy holds for a Cargo. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from protocol import limits
from protocol.cargos import CachePolicy, CargoManifest
from protocol.errors import ConfigError

ENTRIES_MAX_DEFAULT = 10_000
BYTES_MAX_DEFAULT = 256 * 1024**2
SHADOW_SHARE_DEFAULT = 0.02
ERROR_BUDGET_DEFAULT = 0.05
CONFIDENCE_DEFAULT = 0.95
PUBLIC = ""  # the scope of answers that every account may be given; no account has this name
EXACT_MILLI = 1000  # a similarity at which only equal questions count


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """``ttl_s`` and ``similarity_milli`` hold for Cargos without a manifest. ``entries_max`` and ``bytes_max``: of all answers together.
    ``shadow_share``: of the semantic hits, how many are checked by asking an Island anyway. ``error_budget``: the share of false ones that
    a Cargo may have; ``confidence``: how sure it must be that there are more before its semantic step is switched off."""

    enabled: bool = True
    ttl_s: int = limits.CARGO_CACHE_TTL_S_DEFAULT
    entries_max: int = ENTRIES_MAX_DEFAULT
    bytes_max: int = BYTES_MAX_DEFAULT
    similarity_milli: int = limits.CARGO_CACHE_SIMILARITY_MILLI_DEFAULT
    shadow_share: float = SHADOW_SHARE_DEFAULT
    error_budget: float = ERROR_BUDGET_DEFAULT
    confidence: float = CONFIDENCE_DEFAULT

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        if not 1 <= self.ttl_s <= limits.CARGO_CACHE_TTL_S_MAX:
            raise ConfigError(f"answers are kept for 1 to {limits.CARGO_CACHE_TTL_S_MAX} seconds")
        if self.entries_max < 1 or self.bytes_max < 1:
            raise ConfigError("the cache of answers has room for at least one entry and one byte; switch it off to keep none")
        if not 1 <= self.similarity_milli <= EXACT_MILLI:
            raise ConfigError(f"a similarity has 1 to {EXACT_MILLI} thousandths")
        if not (0 <= self.shadow_share <= 1 and 0 < self.error_budget < 1 and 0.5 <= self.confidence < 1):
            raise ConfigError("the share of checked hits is 0 to 1, the error budget between 0 and 1, the confidence 0.5 to below 1")


def policy_of(
    config: CacheConfig, manifest: CargoManifest | None, said: CachePolicy | None, by_default: bool
) -> CachePolicy:
    """What holds for a Cargo: what the operator has ``said`` of it, else what its manifest says, else the settings. ``by_default``: whether
    answers of a Cargo of which nobody says anything are kept."""
    if not config.enabled:
        return CachePolicy(enabled=False)
    if said is not None:
        return said
    if manifest is not None:
        return manifest.cache
    return CachePolicy(by_default, config.ttl_s, config.similarity_milli)


def scopes_of(policy: CachePolicy, account: str, is_private: bool) -> tuple[str, ...]:
    """Whose answers may be given to an account, the first one being where its own are kept: ``PUBLIC``, or an account."""
    return (PUBLIC, account) if policy.public and not is_private else (account,)


def versions_of(releases: Sequence[str] | None, offered: Collection[str]) -> frozenset[str] | None:
    """Content hashes of a Cargo whose answers count: those that would answer now. None: all; empty: it may not run at all.

    ``releases``: those of a listed name that may run, the best first; None for a name that nobody has listed, which Islands offer as they
    like. ``offered``: what Islands offer under it. As ``Placer`` chooses: the first that somebody offers. Where nobody offers
    anything, whatever may run may have answered.
    """
    if releases is None:
        return frozenset(offered) or None
    newest = next((address for address in releases if address in offered), None)
    return frozenset(releases) if newest is None else frozenset({newest})
