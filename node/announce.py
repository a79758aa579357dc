"""``/archipelag/ads/1``, both ends: an Island introduces itself to a Coordinator and keeps it informed; anybody helps a newcomer.

The client holds one long-lived stream to each Coordinator that it knows, up to ``JOINED_MAX``. It says hello, checks the Coordinator's
delegation, announces a fresh ad, and announces again whenever the ad changes. When a stream is lost it redials with backoff and jitter, at
most about a second apart, for as long as the node lives: a Coordinator that restarts has its Islands back within seconds.
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

JOINED_MAX = 4  # Coordinators of a network that an Island is joined to at once
_REDIAL_MAX_S = 1.0
_LOOK_ROUND_MAX_S = 30.0  # for a Coordinator that was never reached, while there is another
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


class AllTaken(ArchipelagError):
    """There is no Coordinator left to dial."""


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

    async def open(self, taken: set[str] | None = None) -> tuple[FrameStream, Delegation]:
        """A stream to the first Coordinator that answers. Raises ConfigError, OSError, ArchipelagError or TooSlowError of the last try.

        ``taken``: peers to leave out, since somebody else dials them or has a stream to them. The one that this opens is put there, to be
        taken out by the caller when the stream has ended.
        """
        taken = set() if taken is None else taken
        error: Exception = ConfigError("no Coordinator is known; give one with --coordinator")
        for address in [*self._addresses, *self._learned]:
            if self._peer_of(address) in taken:
                error = AllTaken("there is a stream to every Coordinator that is known")
                continue
            try:
                with trio.fail_after(limits.DIAL_TIMEOUT_S):
                    return await self._take(await resolve_coordinator(address, self._pins, self._ca_file), taken)
            except (OSError, ArchipelagError, trio.TooSlowError) as caught:
                error = caught
        raise error

    def _peer_of(self, address: str) -> str:
        """Empty where it cannot be told yet."""
        return address.rpartition("/p2p/")[2] if address.startswith("/") else self._pins.peer_of(address)

    async def _take(self, target: CoordinatorAddress, taken: set[str]) -> tuple[FrameStream, Delegation]:
        if target.peer in taken:
            raise AllTaken(f"there is a stream to {target.peer} already")
        taken.add(target.peer)
        try:
            return await self._try(target)
        except BaseException:
            taken.discard(target.peer)
            raise

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
    """Keeps Coordinators informed. ``ready`` is set when one has acknowledged an ad."""

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
        self._taken: set[str] = set()
        self._joined: dict[str, None] = {}
        self._told_s = -_PROBLEM_REPEAT_S
        self.sessions_total = 0
        self.refusal = ""

    def __repr__(self) -> str:
        return f"<AdsClient to {', '.join(self._joined) or 'nobody'}, {self.sessions_total} sessions>"

    @property
    def coordinators(self) -> tuple[str, ...]:
        """Peer ids of those that we are joined to, the longest first."""
        return tuple(self._joined)

    @property
    def coordinator(self) -> str:
        """The one that we have been joined to for longest; empty while there is none."""
        return next(iter(self._joined), "")

    async def run(self) -> None:
        """Runs until cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(JOINED_MAX):
                nursery.start_soon(self._keep_one)

    async def _keep_one(self) -> None:
        """A stream to some Coordinator that no other of these tasks has one to."""
        failures, had_one = 0, False
        while True:
            try:
                stream, delegation = await self._finder.open(self._taken)
            except AllTaken:
                had_one = False
            except (OSError, ArchipelagError, trio.TooSlowError) as error:
                self._tell(error)
            else:
                failures, had_one = 0, True
                await self._session(stream, delegation)
            failures += 1
            longest_s = _REDIAL_MAX_S if had_one or not self._joined else _LOOK_ROUND_MAX_S
            await trio.sleep(min(longest_s, limits.RECONNECT_MIN_S * 2 ** min(failures, 8)) * self._rng.uniform(0.5, 1.0))

    def _tell(self, error: Exception) -> None:
        """As long as there is another Coordinator nothing is wrong."""
        if not self._joined and trio.current_time() - self._told_s >= _PROBLEM_REPEAT_S:
            self._told_s = trio.current_time()
            log.warning("no Coordinator at the moment (%s); trying again", str(error) or type(error).__name__)

    async def _session(self, stream: FrameStream, delegation: Delegation) -> None:
        """To the end of the stream."""
        peer = delegation.coordinator
        try:
            self._trust(delegation)
            self._keeper.trust(peer)
            self._joined[peer] = None
            self.sessions_total += 1
            log.info("joined network %s through Coordinator %s", delegation.network, peer)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._speak, stream)
                await self._listen(stream)
        except* (LinkLost, RemoteProtocolError, OSError) as group:
            log.warning("lost Coordinator %s: %s", peer, group.exceptions[0])
        finally:
            self._joined.pop(peer, None)
            self._taken.discard(peer)
            self._told_s = -_PROBLEM_REPEAT_S
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
        meet: Callable[[Hello, str], object] = lambda hello, sender: None,
    ) -> None:
        """``meet`` is told who opens a stream, and raises RemoteProtocolError for somebody who may not."""
        self._keeper, self._hello, self._coordinators, self._pass_on = keeper, hello, coordinators, pass_on
        self._meet = meet
        self.sessions_open = 0

    async def serve(self, stream: FrameStream) -> None:
        """Handler of one stream; raises what ends it."""
        ours = await answer_hello(stream, self._hello, self._meet)
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
