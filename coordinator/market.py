"""The market as the Coordinator runs it: bids for requests, quotes, what jobs cleared at, snapshots every five minutes.

Decisions are coordinator/exchange's; this shell knows who asks what now (the placer), what the books remember, and the time.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict

import trio

from coordinator.books import market_queries
from coordinator.books.books import Books
from coordinator.books.errors import BooksRefused, BooksUnavailable, Why
from coordinator.books.queries import island_view
from coordinator.exchange.bids import AskPrices, Bid, BidSource, StandingAsk, Work, resolve_bid
from coordinator.exchange.markets import Listing, Markets
from coordinator.exchange.order_book import OrderBook, order_book
from coordinator.exchange.parsing import AskingPrice
from coordinator.exchange.quotes import Quote, QuoteFault, QuoteRefused, check_quote, make_quote
from coordinator.exchange.rates import RATE_WINDOW_MS, Clearing
from coordinator.exchange.snapshots import (
    HOUR_MS,
    SNAPSHOT_INTERVAL_MS,
    Facts,
    History,
    Snapshot,
    due_slot,
    history,
    snapshot_now,
    take_snapshot,
)
from coordinator.matching import Refusal, Wish
from coordinator.placement import NotPlaced, Placer
from coordinator.ports import IslandPort
from protocol import limits
from protocol.hold import SetAsk

log = logging.getLogger(__name__)

REFRESH_S = 30.0
UNKNOWN_BID_MICROS = 10 * limits.CREDIT_MICROS  # where nobody asks anything yet: a pipeline that has still to be planned
SAVED_BIDS_S = 10.0
OVERLAP_MS = int(3 * limits.CLOCK_SKEW_S * 1000)  # what others write may be dated back so much: their clocks differ, commits take time
_SAVED_BIDS_MAX = 10_000
_EVERYTHING = 2**60  # the books cut a bid to what the account has, in the transaction that reserves it


class MarketShell:
    """Runs on trio. ``clock_ms`` gives Unix milliseconds."""

    def __init__(
        self,
        books: Books,
        placer: Placer,
        port: IslandPort,
        owner: str,
        clock_ms: Callable[[], int],
        job_timeout_s: float,
    ) -> None:
        self._port = port
        self._books, self._placer, self._owner, self._clock_ms = books, placer, owner, clock_ms
        self._job_timeout_s = job_timeout_s
        self._markets = Markets()
        self._saved: OrderedDict[tuple[str, str], tuple[int | None, float]] = OrderedDict()
        self._last_slot_ms: int | None = None
        self._read_ms = 0  # when the clearings of others were read last
        self._heard: dict[str, int] = {}  # jobs that would be read again and have been counted -> when they cleared
        self.owners: Mapping[str, str] = {}  # Island -> account that it is paired with

    def __repr__(self) -> str:
        return f"<MarketShell {self._markets!r}>"

    # ---- bids

    async def bid(
        self, account: str, cargo: str, work: Work, explicit: int | None, content_hash: str = ""
    ) -> tuple[Bid, int | None]:
        """See desk.Bidding. Raises BooksUnavailable."""
        there = self._placer.price_range(cargo, work.prompt_tokens, work.output_tokens, work.job_s_max, content_hash)
        prices = AskPrices(_times(there.cheapest, work.choices), _times(there.median, work.choices))
        saved = None if explicit is not None else await self.saved_bid(account, cargo)
        market = self._markets.market(cargo, None, self._placer.queued(cargo), there.slots, self._clock_ms())
        bid = resolve_bid(work, market, prices, available_micros=_EVERYTHING, explicit=explicit, saved=saved)
        if bid is None:
            return Bid(UNKNOWN_BID_MICROS, BidSource.DEFAULT), 0
        return bid, None if bid.source is BidSource.EXPLICIT else _floor(prices, bid)

    def _standing(self, cargo: str) -> list[StandingAsk]:
        return [StandingAsk(peer, ask, speed, total) for peer, ask, speed, _, total in self._placer.asks(cargo)]

    async def saved_bid(self, account: str, cargo: str) -> int | None:
        """What an account bids for a Cargo where a request says nothing, as it was within SAVED_BIDS_S. Raises BooksUnavailable."""
        known = self._saved.get((account, cargo))
        if known is not None and trio.current_time() < known[1]:
            return known[0]
        micros = await self._books.ask(market_queries.saved_bid, account, cargo)
        self._saved[account, cargo] = micros, trio.current_time() + SAVED_BIDS_S
        if len(self._saved) > _SAVED_BIDS_MAX:
            self._saved.popitem(last=False)
        return micros

    async def save_bid(self, account: str, cargo: str, micros: int | None) -> None:
        """What the account bids for a Cargo from now on; None: no bid of its own any more."""
        await self._books.change(market_queries.save_bid, account, cargo, micros, self._clock_ms())
        self._saved.pop((account, cargo), None)

    async def saved_bids(self, account: str) -> dict[str, int]:
        return await self._books.ask(market_queries.saved_bids, account)

    # ---- quotes

    async def quote(self, account: str, quote_id: str, cargo: str, work: Work) -> Quote:
        """Raises QuoteRefused for one that this job may not use."""
        quote = await self.promised(quote_id)
        if quote is None:
            raise QuoteRefused(QuoteFault.NOT_YOURS, f"there is no quote {quote_id}")
        check_quote(quote, account, cargo, work, self._clock_ms())
        return quote

    async def promised(self, quote_id: str) -> Quote | None:
        """A quote that a job has used, or any other; also one that is over."""
        body = await self._books.ask(market_queries.quote_body, quote_id)
        return Quote.from_json(json.loads(body)) if body is not None else None

    async def make_quote(self, wish: Wish, work: Work, explicit: int | None) -> Quote:
        """Price, Island and expiry of a request that is not made yet. Raises NotPlaced where nobody would take it."""
        bid, _ = await self.bid(wish.account, wish.cargo, work, explicit)
        outcome = self._placer.preview(wish, bid.limit(work.choices))
        if isinstance(outcome, Refusal):
            raise NotPlaced(outcome)
        candidate = outcome.candidate
        standing = StandingAsk(candidate.island, candidate.offer.ask, candidate.offer.tokens_per_s, candidate.offer.slots_total)
        quote = make_quote(
            f"qt_{secrets.token_hex(12)}", wish.account, wish.cargo, standing, work, bid, outcome.reasons, self._clock_ms()
        )
        body = json.dumps(quote.to_json(), separators=(",", ":"))
        await self._books.change(market_queries.keep_quote, quote.id, quote.account, body, quote.expires_at_ms)
        return quote

    def gives_lines(self, cargo: str) -> bool:
        """Whether it is known to write no texts."""
        return self._placer.writes_text(cargo) is False

    # ---- asks

    async def set_ask(self, account: str, wanted: AskingPrice) -> None:
        """Passes on what an account wants its Island to ask. Raises BooksRefused for an Island that is not its own, Refused with what
        the Island says."""
        view = await self._books.ask(island_view, wanted.island)
        if view is None or view.record.account != account:
            raise BooksRefused(Why.NO_ISLAND, "this account has no such Island; pair it first")
        await self._port.set_ask(wanted.island, SetAsk(wanted.cargo, wanted.ask))

    # ---- what is shown

    def listings(self) -> list[Listing]:
        return [self.listing(cargo) for cargo in self._placer.cargos()]

    def listing(self, cargo: str) -> Listing:
        capacity = sum(standing.slots for standing in self._standing(cargo))
        return self._markets.listing(cargo, self._placer.queued(cargo), self._running(cargo), capacity, self._clock_ms())

    def snapshot(self, cargo: str) -> Snapshot:
        now_ms = self._clock_ms()
        return snapshot_now(cargo, now_ms, self._facts(cargo, now_ms), self._markets.statistics(cargo, now_ms))

    def order_book(self, cargo: str) -> OrderBook:
        return order_book(self._standing(cargo))

    async def history(self, cargo: str, hours: int) -> History:
        now_ms = self._clock_ms()
        bodies = await self._books.ask(market_queries.snapshots_of, cargo, now_ms - hours * HOUR_MS)
        return history(cargo, [Snapshot(**json.loads(body)) for body in bodies], hours, now_ms)

    # ---- what happens

    def cleared(self, clearing: Clearing, account: str, island: str) -> None:
        """A job was paid. What an account pays to its own Islands is no price."""
        if self.owners.get(island) != account:
            self._markets.add(clearing)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Started once the last day's prices are known again. Runs until cancelled."""
        now_ms = self._clock_ms()
        self._placer.remember_offered(await self._read_clearings(now_ms - RATE_WINDOW_MS, ""))
        task_status.started()
        while True:
            await trio.sleep(REFRESH_S)
            try:
                await self._read_clearings(min(self._read_ms, self._clock_ms()) - OVERLAP_MS, self._owner)
                await self._take_snapshots()
            except BooksUnavailable as error:
                log.warning("the market's history waits: %s", error)

    async def _read_clearings(self, since_ms: int, but_of: str) -> set[str]:
        """Those that have not been counted yet, but for those of one Coordinator. Gives the Cargos of all."""
        now_ms = self._clock_ms()
        found = await self._books.ask(market_queries.clearings, since_ms, but_of)
        self._read_ms = now_ms
        for job_id, clearing in found.items():
            if job_id not in self._heard:
                self._markets.add(clearing)
        self._heard = {job_id: at_ms for job_id, at_ms in self._heard.items() if at_ms >= since_ms}
        self._heard.update((job_id, clearing.at_ms) for job_id, clearing in found.items())
        return {clearing.cargo for clearing in found.values()}

    async def _take_snapshots(self) -> None:
        now_ms = self._clock_ms()
        slot = due_slot(self._last_slot_ms, now_ms)
        if slot is None:
            return
        found = await self._books.ask(market_queries.clearings, slot - SNAPSHOT_INTERVAL_MS, "")
        cleared = list(found.values())
        cargos = {*self._placer.cargos(), *(clearing.cargo for clearing in cleared)}
        rows = []
        for cargo in sorted(cargos):
            snapshot = take_snapshot(cargo, slot, self._facts(cargo, now_ms), cleared)
            if not snapshot.is_empty:
                rows.append((cargo, slot, json.dumps(asdict(snapshot), separators=(",", ":"))))
        await self._books.change(market_queries.keep_snapshots, rows, now_ms)
        self._last_slot_ms = slot

    def _facts(self, cargo: str, now_ms: int) -> Facts:
        standing = self._standing(cargo)
        capacity = sum(each.slots for each in standing)
        surge = self._markets.surge(cargo, self._placer.queued(cargo), capacity, now_ms)
        return Facts(
            asks=standing,
            bids=self._placer.waiting_bids(cargo),
            running=self._running(cargo),
            rate=self._markets.rate(cargo, now_ms),
            tokens_per_s=self._markets.tokens_per_s(cargo, now_ms),
            surge=surge.active,
        )

    def _running(self, cargo: str) -> int:
        return sum(total - free for _, _, _, free, total in self._placer.asks(cargo))


def _times(micros: int | None, choices: int) -> int | None:
    return None if micros is None else min(micros * choices, limits.PRICE_MICROS_MAX)


def _floor(prices: AskPrices, bid: Bid) -> int:
    """The least that a bid nobody named may be cut to: then at least the cheapest Island can be paid."""
    return min(prices.cheapest if prices.cheapest is not None else bid.micros, bid.micros)
