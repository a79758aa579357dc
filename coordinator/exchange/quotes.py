"""Quotes: what a job will cost at most and where, promised for a minute; and what is charged in the end.

Theory of operation. A quote fixes an Island and its ask of that moment. A job that names the quote goes to that Island and is charged by
that ask for what was metered, never above the quoted price, whatever the Island asks by then. The Island had said that price itself, at
most a minute before. A quote is for one account and for work of at most the quoted size. It reserves nothing: neither credits nor a slot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from coordinator.exchange.bids import Bid, BidSource, StandingAsk, Work
from protocol import checks, limits
from protocol.errors import ArchipelagError
from protocol.prices import Ask

QUOTE_LIFETIME_MS = 60_000
QUOTE_REASONS_MAX = 16
_INT_MAX = 2**63


class QuoteFault(StrEnum):
    """Why a quote is of no use to a job."""

    EXPIRED = "quote_expired"
    NOT_YOURS = "unknown_quote"  # nobody learns which quotes others have
    OTHER_WORK = "quote_mismatch"


class QuoteRefused(ArchipelagError):
    """A job may not use the quote that it names; the message says why."""

    def __init__(self, fault: QuoteFault, message: str) -> None:
        super().__init__(message)
        self.fault, self.message = fault, message


@dataclass(frozen=True, slots=True)
class Quote:
    """A promise to ``account`` until ``expires_at_ms``: ``work`` of a Cargo on ``island`` by ``ask`` for ``price_micros`` at most.

    Raises ValueError for a price above the bid.
    """

    id: str
    account: str
    cargo: str
    island: str
    ask: Ask
    price_micros: int
    bid: Bid
    work: Work
    reasons: tuple[str, ...]
    created_at_ms: int
    expires_at_ms: int

    def __post_init__(self) -> None:
        for name in ("id", "cargo"):
            checks.label(name, getattr(self, name), limits.NAME_CHARS_MAX)
        checks.printable("account", self.account, limits.NAME_CHARS_MAX)
        checks.peer_id("island", self.island)
        checks.at_most("reasons", self.reasons, QUOTE_REASONS_MAX)
        for reason in self.reasons:
            checks.printable("reason", reason, limits.TEXT_CHARS_MAX)
        if not 0 <= self.price_micros <= self.bid.micros <= limits.PRICE_MICROS_MAX:
            raise ValueError(
                f"a price of {self.price_micros} micro-credits is above the bid of {self.bid.micros}, or none"
            )
        checks.in_range("created_at_ms", self.created_at_ms, 1, 2**53)
        checks.in_range("expires_at_ms", self.expires_at_ms, self.created_at_ms, 2**53)

    @property
    def limit(self) -> int:
        """Micro-credits that each choice can cost: the price limit of its ticket."""
        return self.price_micros // self.work.choices

    def to_json(self) -> dict[str, Any]:
        """What is stored: whole numbers and texts. What is shown is ``answers.quote_answer``."""
        ask, bid, work = self.ask, self.bid, self.work
        return {
            "id": self.id,
            "account": self.account,
            "cargo": self.cargo,
            "island": self.island,
            "ask": [ask.per_job, ask.per_1k_output, ask.per_second],
            "price_micros": self.price_micros,
            "bid": [bid.micros, str(bid.source), bid.surge, bid.capped],
            "work": [work.prompt_tokens, work.output_tokens, work.choices, float(work.job_s_max)],
            "reasons": list(self.reasons),
            "created_at_ms": self.created_at_ms,
            "expires_at_ms": self.expires_at_ms,
        }

    @classmethod
    def from_json(cls, value: object) -> Quote:
        """The quote of ``to_json``. Raises ValueError for anything else."""
        if not isinstance(value, Mapping) or value.keys() != _KINDS.keys():
            raise ValueError("no quote: other fields")
        for name, kinds in _KINDS.items():
            _check(name, value[name], kinds)
        micros, source, surge, capped = value["bid"]
        return cls(
            id=value["id"],
            account=value["account"],
            cargo=value["cargo"],
            island=value["island"],
            ask=Ask(*value["ask"]),
            price_micros=value["price_micros"],
            bid=Bid(micros, BidSource(source), surge, capped),
            work=Work(*value["work"]),
            reasons=tuple(value["reasons"]),
            created_at_ms=value["created_at_ms"],
            expires_at_ms=value["expires_at_ms"],
        )


# Types of the stored fields: of a list those of its entries, where ... says that there may be any number of the one before.
_KINDS: dict[str, Any] = {
    "id": str,
    "account": str,
    "cargo": str,
    "island": str,
    "ask": [int, int, int],
    "price_micros": int,
    "bid": [int, str, bool, bool],
    "work": [int, int, int, float],
    "reasons": [str, ...],
    "created_at_ms": int,
    "expires_at_ms": int,
}


def _check(name: str, value: object, kind: Any) -> None:
    if not isinstance(kind, list):
        if type(value) is not kind or (kind is int and abs(value) > _INT_MAX):  # type: ignore[arg-type]
            raise ValueError(f"no quote: {name} is no {kind.__name__}")
        return
    if not isinstance(value, list):
        raise ValueError(f"no quote: {name} is no list")
    kinds = kind[:1] * len(value) if kind[-1] is ... else kind
    if len(value) != len(kinds):
        raise ValueError(f"no quote: {name} has {len(value)} entries")
    for entry, entry_kind in zip(value, kinds, strict=True):
        _check(name, entry, entry_kind)


def make_quote(
    id: str,
    account: str,
    cargo: str,
    standing: StandingAsk,
    work: Work,
    bid: Bid,
    reasons: Sequence[str],
    now_ms: int,
    lifetime_ms: int = QUOTE_LIFETIME_MS,
) -> Quote:
    """The quote for work on one Island, which placement has chosen. Raises ValueError when it can cost more than the bid."""
    price = work.price_max(standing.ask, standing.tokens_per_s)
    expires = now_ms + lifetime_ms
    return Quote(id, account, cargo, standing.island, standing.ask, price, bid, work, tuple(reasons), now_ms, expires)


def check_quote(quote: Quote, account: str, cargo: str, work: Work, now_ms: int) -> None:
    """Raises QuoteRefused unless a job of this account may use the quote at ``now_ms``."""
    if quote.account != account:
        raise QuoteRefused(QuoteFault.NOT_YOURS, f"there is no quote {quote.id}")
    # a clock that was set back must not make a quote last longer; another Coordinator's may differ by the usual
    if not quote.created_at_ms - limits.CLOCK_SKEW_S * 1000 <= now_ms < quote.expires_at_ms:
        raise QuoteRefused(QuoteFault.EXPIRED, f"the quote {quote.id} has expired; ask for another")
    if quote.cargo != cargo:
        raise QuoteRefused(QuoteFault.OTHER_WORK, f"the quote {quote.id} is for {quote.cargo}, not for {cargo}")
    quoted = quote.work
    for what, wanted, promised in (
        ("output tokens", work.output_tokens, quoted.output_tokens),
        ("choices", work.choices, quoted.choices),
        ("prompt tokens", work.prompt_tokens, quoted.prompt_tokens),
    ):
        if wanted > promised:
            raise QuoteRefused(
                QuoteFault.OTHER_WORK, f"the quote {quote.id} is for {promised} {what}, not for {wanted}"
            )


def charge(quoted_ask: Ask, limit_micros: int, output_tokens: int, compute_ms: int, receipt_micros: int) -> int:
    """Micro-credits that one choice costs: by the ask that was promised, never above its limit nor above what the Island's receipt wants.

    Raises ValueError for amounts below nothing.
    """
    if limit_micros < 0 or receipt_micros < 0:
        raise ValueError("nobody is paid for being served")
    return min(quoted_ask.price(output_tokens, compute_ms), limit_micros, receipt_micros)
