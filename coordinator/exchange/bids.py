"""What a job may cost at most: its bid.

Theory of operation. A bid is for one whole request, all its choices together. The first of these that there is: what the job says
(explicit), what its account saved for the Cargo, what the market says, what the Cargo says. The first two are hard limits and are taken as
they are. The others are a guess at what is usual, so they may give a little: a guess reaches the cheapest Island that asks for this
very job now, up to ``GUESS_FACTOR_MAX`` times what is usual. Beyond that it is not usual any more, and the Consumer has to say so himself.

A bid is not what is paid: that is the chosen Island's ask for what was metered (quotes.charge).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from coordinator import pricing
from coordinator.books.errors import BooksRefused, Why
from coordinator.exchange.amounts import ONE_PPM, median, scaled
from protocol import limits
from protocol.prices import Ask, format_credits

SUGGESTED_BID_PPM = 1_050_000  # mission.md: suggested bid = rate x 1.05
SURGE_PPM = 1_250_000  # mission.md: surge x 1.25
GUESS_FACTOR_MAX = 4  # a lone Island cannot name any price it likes to those who did not bid


class BidSource(StrEnum):
    """Where a bid comes from, in the order in which they are asked."""

    EXPLICIT = "explicit"
    SAVED = "saved"
    MARKET = "market"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Work:
    """A request as far as its price depends on it: tokens of its longest prompt, tokens of each of its ``choices`` at most."""

    prompt_tokens: int
    output_tokens: int
    choices: int = 1
    job_s_max: float = limits.JOB_TIMEOUT_S

    def __post_init__(self) -> None:
        if self.prompt_tokens < 0 or self.output_tokens < 0 or self.choices < 1:
            raise ValueError(
                f"no request has {self.prompt_tokens} + {self.output_tokens} tokens in {self.choices} choices"
            )

    def price_of_choice(self, ask: Ask, tokens_per_s: float) -> int:
        """Micro-credits that one choice can cost at most."""
        return pricing.price_max(ask, self.prompt_tokens, self.output_tokens, tokens_per_s, self.job_s_max)

    def price_max(self, ask: Ask, tokens_per_s: float) -> int:
        """Micro-credits that all choices together can cost at most; at most PRICE_MICROS_MAX."""
        return min(self.choices * self.price_of_choice(ask, tokens_per_s), limits.PRICE_MICROS_MAX)


@dataclass(frozen=True, slots=True)
class StandingAsk:
    """One Island (for a pipeline: its driver, and the sum of the stages' asks) that offers a Cargo now. Speed in tokens per second of
    one stream, 0.0 unknown."""

    island: str
    ask: Ask
    tokens_per_s: float
    slots: int


@dataclass(frozen=True, slots=True)
class AskPrices:
    """What Islands that could take a request ask for it at most, in micro-credits; None where there are none."""

    cheapest: int | None = None
    median: int | None = None


def ask_prices(asks: Iterable[StandingAsk], work: Work) -> AskPrices:
    prices = sorted(work.price_max(standing.ask, standing.tokens_per_s) for standing in asks)
    return AskPrices(prices[0], median(prices)) if prices else AskPrices()


@dataclass(frozen=True, slots=True)
class Market:
    """What is usual for one Cargo: ``rate`` at which jobs cleared lately and the speed they had (0.0 unknown), the Cargo's own price."""

    rate: Ask | None = None
    tokens_per_s: float = 0.0
    default: Ask | None = None
    surge: bool = False


@dataclass(frozen=True, slots=True)
class Bid:
    """The most that a request may cost, in micro-credits. ``surge``: it was raised for that. ``capped``: the account has no more."""

    micros: int
    source: BidSource
    surge: bool = False
    capped: bool = False

    def limit(self, choices: int) -> int:
        """Of each of the choices; together never more than the bid."""
        return self.micros // choices


def resolve_bid(
    work: Work,
    market: Market,
    prices: AskPrices,
    *,
    available_micros: int,
    explicit: int | None = None,
    saved: int | None = None,
) -> Bid | None:
    """The bid of a request whose account has ``available_micros`` free.

    None: there is nothing to go by, neither bid nor rate nor default, and nobody asks; once somebody does, this can be called again.
    Raises BooksRefused(NO_CREDIT) for an explicit bid that the account does not have; any other is cut to what it has.
    """
    if explicit is not None:
        if explicit > available_micros:
            said, there = format_credits(explicit), format_credits(available_micros)
            raise BooksRefused(Why.NO_CREDIT, f"the bid is {said} credits, and the account has {there} free")
        return Bid(explicit, BidSource.EXPLICIT)
    bid = Bid(saved, BidSource.SAVED) if saved is not None else _guess(work, market, prices)
    if bid is None or bid.micros <= available_micros:
        return bid
    return Bid(max(0, available_micros), bid.source, bid.surge, capped=True)


def suggested_bid(rate: Ask, work: Work, tokens_per_s: float, surge: bool = False) -> int:
    """What is worth bidding for a request at this rate, in micro-credits."""
    return _suggested(work.price_max(rate, tokens_per_s), surge)


def _suggested(usual: int, surge: bool) -> int:
    return min(scaled(usual, SUGGESTED_BID_PPM, SURGE_PPM if surge else ONE_PPM), limits.PRICE_MICROS_MAX)


def _guess(work: Work, market: Market, prices: AskPrices) -> Bid | None:
    if market.rate is not None:
        usual = work.price_max(market.rate, market.tokens_per_s)
        if _says_something(usual, prices):
            micros = _reaching(_suggested(usual, market.surge), usual, prices)
            return Bid(micros, BidSource.MARKET, market.surge)
    if market.default is not None:
        usual = work.price_max(market.default, market.tokens_per_s)
        if _says_something(usual, prices):
            return Bid(_reaching(usual, usual, prices), BidSource.DEFAULT)
    if prices.median is None:
        return None
    return Bid(_suggested(prices.median, surge=False), BidSource.DEFAULT)


def _says_something(usual: int, prices: AskPrices) -> bool:
    """Nothing is a price while somebody asks no more. When all want something, four times nothing would reach nobody for ever."""
    return usual > 0 or prices.cheapest == 0


def _reaching(micros: int, usual: int, prices: AskPrices) -> int:
    reach = min(prices.cheapest or 0, GUESS_FACTOR_MAX * usual, limits.PRICE_MICROS_MAX)
    return max(micros, reach)
