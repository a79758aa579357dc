"""``/archipelag/ads/1``, both ends: an Island introduces itself to a Coordinator and keeps it informed; anybody helps a newcomer.

The client holds one long-lived stream to its Coordinator. It says hello, checks the Coordinator's delegation, announces a fresh ad,
and announces again whenever the ad changes. When the stream is lost it redials with backoff and jitter, at most about a second
apart, for as long as the node lives: a Coordinator that restarts has its Islands back within seconds.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from node.bookkeeper import BookKeeper, now_ms
from node.greeting import answer_hello, exchange_hello
from node.net.frames import FrameStream
from node.net.host import Host
from node.trust import CoordinatorAddress, Pins, resolve_coordinator
from protocol import limits
from protocol.ads import Ad, read_ad
from protocol.book import Outcome
from protocol.catchup import answer, next_request
from protocol.errors import ArchipelagError, ConfigError, LinkLost, RemoteProtocolError
from protocol.messages import (
    ADS,
    ADS_PROTOCOL,
    AdAck,
    Announce,
    BookRequest,
    Coordinators,
    Hello,
    NodeRole,
)
from protocol.tickets import Delegation

log = logging.getLogger(__name__)

_REDIAL_MAX_S = 1.0
_PROBLEM_REPEAT_S = 30.0


@dataclass(frozen=True, slots=True)
class SignedAd:
    ad: Ad
    envelope: bytes


class AdSource:
    """Makes this Island's ads, each with a higher sequence than the one before, and tells who waits that one is due."""

    def __init__(self, make: Callable[[], SignedAd]) -> None:
        self._make = make
        self.current: SignedAd | None = None
        self._changed = trio.Event()

    def fresh(self) -> SignedAd:
        """A new ad, now."""
        self.current = self._make()
        self._changed.set()
        self._changed = trio.Event()
        return self.current

    async def wait_next(self, known: SignedAd) -> SignedAd:
        """The newest ad, as soon as it is another than ``known``."""
        while self.current is None or self.current is known:
            await self._changed.wait()
        return self.current


class CoordinatorFinder:
    """Turns the configured addresses into a Coordinator that has proved its delegation."""

    def __init__(
        self, host: Host, pins: Pins, addresses: Sequence[str], hello: Callable[[], Hello], ca_file: str | None = None
    ) -> None:
        self._host, self._pins, self._hello, self._ca_file = host, pins, hello, ca_file
        self._addresses = list(addresses)
        self._learned: list[str] = []

    def learn(self, addresses: Sequence[str]) -> None:
        """Addresses that a peer or mDNS named; tried after the configured ones."""
        fresh = [a for a in addresses if a not in self._addresses and a not in self._learned]
        self._learned = (self._learned + fresh)[-limits.AD_ADDRESSES_MAX :]

    def known(self) -> tuple[str, ...]:
        """Multiaddrs of Coordinators to tell to newcomers."""
        return tuple(a for a in self._addresses + self._learned if a.startswith("/"))[: limits.AD_ADDRESSES_MAX]

    async def open(self) -> tuple[FrameStream, Delegation]:
        """A stream to the first Coordinator that answers. Raises ConfigError, OSError, ArchipelagError or TooSlowError of the last try."""
        error: Exception = ConfigError("no Coordinator is known; give one with --coordinator")
        for address in [*self._addresses, *self._learned]:
            try:
                with trio.fail_after(limits.DIAL_TIMEOUT_S):
                    return await self._try(await resolve_coordinator(address, self._pins, self._ca_file))
            except (OSError, ArchipelagError, trio.TooSlowError) as caught:
                error = caught
        raise error

    async def _try(self, target: CoordinatorAddress) -> tuple[FrameStream, Delegation]:
        self._host.remember(target.peer, target.addresses)
        await self._host.connect(target.peer)
        stream = await self._host.open(target.peer, ADS_PROTOCOL, ADS)
        try:
            hello = await exchange_hello(stream, self._hello())
            if hello.role is not NodeRole.COORDINATOR:
                await self._ask_the_way(stream)
            delegation = self._pins.check_hello(hello, target.peer, now_ms())
        except BaseException:
            stream.abort()
            raise
        self.learn(target.addresses)
        return stream, delegation

    async def _ask_the_way(self, stream: FrameStream) -> None:
        """The address was another peer's: it tells which Coordinators it knows, and the next try dials them."""
        answer = await stream.receive()
        if isinstance(answer, Coordinators):
            self.learn(answer.addresses)
        raise RemoteProtocolError(
            f"{stream.remote_peer} is no Coordinator; it named {len(self.known())} addresses to try"
        )


class AdsClient:
    """Keeps one Coordinator informed. ``ready`` is set when it has acknowledged an ad."""

    def __init__(
        self,
        finder: CoordinatorFinder,
        ads: AdSource,
        keeper: BookKeeper,
        trust: Callable[[Delegation], None],
        rng: random.Random,
    ) -> None:
        self._finder, self._ads, self._keeper, self._trust, self._rng = finder, ads, keeper, trust, rng
        self.ready = trio.Event()
        self.coordinator = ""
        self.sessions_total = 0
        self.refusal = ""

    def __repr__(self) -> str:
        return f"<AdsClient to {self.coordinator or 'nobody'}, {self.sessions_total} sessions>"

    async def run(self) -> None:
        """Runs until cancelled."""
        failures, told_s = 0, -_PROBLEM_REPEAT_S
        while True:
            before = self.sessions_total
            try:
                await self._session()
            except (OSError, ArchipelagError, trio.TooSlowError) as error:
                if self.sessions_total > before:
                    failures, told_s = 0, -_PROBLEM_REPEAT_S
                if trio.current_time() - told_s >= _PROBLEM_REPEAT_S:
                    told_s = trio.current_time()
                    log.warning("no Coordinator at the moment (%s); trying again", str(error) or type(error).__name__)
            failures += 1
            await trio.sleep(
                min(_REDIAL_MAX_S, limits.RECONNECT_MIN_S * 2 ** min(failures, 8)) * self._rng.uniform(0.5, 1.0)
            )

    async def _session(self) -> None:
        stream, delegation = await self._finder.open()
        try:
            self._trust(delegation)
            self._keeper.trust(delegation.coordinator)
            self.coordinator, self.sessions_total = delegation.coordinator, self.sessions_total + 1
            log.info("joined network %s through Coordinator %s", delegation.network, delegation.coordinator)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._speak, stream)
                await self._listen(stream)
        except* (LinkLost, RemoteProtocolError, OSError) as group:
            raise LinkLost(f"lost the Coordinator: {group.exceptions[0]}") from None
        finally:
            self.coordinator = ""
            stream.abort()

    async def _speak(self, stream: FrameStream) -> None:
        signed = self._ads.fresh()
        await stream.send(next_request(self._keeper.book, self._rng))
        while True:
            await stream.send(Announce((signed.envelope,)))
            signed = await self._ads.wait_next(signed)

    async def _listen(self, stream: FrameStream) -> None:
        while True:
            message = await stream.receive()
            match message:
                case AdAck(accepted=True):
                    self.refusal = ""
                    self.ready.set()
                case AdAck(reason=reason):
                    self.refusal = reason
                    log.warning("the Coordinator refuses this Island's ad: %s", reason)
                case Announce(envelopes):
                    for envelope in envelopes:
                        self._keeper.hear(envelope)
                case _:
                    raise RemoteProtocolError(f"a Coordinator does not say {type(message).__name__}")


class AdsServer:
    """Answers who introduces himself: with the book where it is asked for, with acknowledgements where this node is a Coordinator."""

    def __init__(
        self,
        keeper: BookKeeper,
        hello: Callable[[], Hello],
        coordinators: Callable[[], tuple[str, ...]],
        pass_on: Callable[[bytes], None],
    ) -> None:
        self._keeper, self._hello, self._coordinators, self._pass_on = keeper, hello, coordinators, pass_on
        self.sessions_open = 0

    async def serve(self, stream: FrameStream) -> None:
        """Handler of one stream; raises what ends it."""
        ours = await answer_hello(stream, self._hello)
        if ours.role is not NodeRole.COORDINATOR:
            await stream.send(Coordinators(self._coordinators()))
        self.sessions_open += 1
        try:
            while True:
                await self._answer(stream, await stream.receive())
        finally:
            self.sessions_open -= 1

    async def _answer(self, stream: FrameStream, message: object) -> None:
        match message:
            case BookRequest():
                await stream.send(Announce(answer(message, self._keeper.book, now_ms())))
            case Announce(envelopes):
                for envelope in envelopes:
                    await self._hear(stream, envelope)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} is not for a node to hear on an ads stream")

    async def _hear(self, stream: FrameStream, envelope: bytes) -> None:
        outcome = self._keeper.hear(envelope)
        if outcome is Outcome.CHANGED:
            self._pass_on(envelope)
        ad = _own_ad(envelope, stream.remote_peer)
        if isinstance(ad, Ad):
            accepted = outcome is not Outcome.REFUSED
            reason = (
                ""
                if accepted
                else f"it is for network {ad.network}"
                if ad.network != self._keeper.book.network
                else "the book is full"
            )
            await stream.send(AdAck(ad.sequence, accepted, reason))
        elif outcome is Outcome.REFUSED:
            await stream.send(AdAck(0, False, ad[: limits.TEXT_CHARS_MAX]))


def _own_ad(envelope: bytes, sender: str) -> Ad | str:
    """The sender's ad, or why the envelope is none."""
    try:
        ad = read_ad(envelope, now_ms())
    except RemoteProtocolError as error:
        return str(error)
    return ad if ad.peer == sender else "an ad of somebody else"
