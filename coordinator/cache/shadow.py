"""Checking hits of the semantic step: an Island is asked the same after all, in the background, and the answers are compared.

The Coordinator pays for that from an account of its own, filled up daily like any other; where it has no credit nothing is checked.
An answer that was drawn by chance (temperature above 0) differs from the next one to the very same question, so there both questions are
asked again without chance, and those two answers are compared; else the kept answer is compared with the new one.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from coordinator.books.accounts import CreateAccount
from coordinator.books.errors import BooksRefused, Why
from coordinator.cache.asking import with_question
from coordinator.cache.candidates import Slot
from coordinator.cache.judging import looks_the_same, says_the_same
from coordinator.desk import Desk
from coordinator.jobs import ChoiceResult, Event, Text
from coordinator.orders import Order
from protocol.errors import ArchipelagError
from protocol.generation import FinishReason, GenerationRequest

log = logging.getLogger(__name__)

SHADOW_ACCOUNT = "coordinator-cache"  # whose jobs the checks are
KIND = "check"
CHECKS_AT_ONCE_MAX = 2
PATIENCE_S = 60.0  # a check waits so long for an Island

Embed = Callable[[Sequence[str]], Awaitable[Sequence[Sequence[float]]]]


@dataclass(frozen=True, slots=True)
class Hit:
    """What is to be checked: ``order`` was answered with ``text``, which is the answer to ``question`` and is kept at ``slot``."""

    order: Order
    question: str
    text: str
    slot: Slot


def requests_of(hit: Hit) -> tuple[GenerationRequest, ...]:
    """What an Island is asked: the order's question; and the other one too, where answers are drawn by chance."""
    (asked,) = hit.order.spec.choices
    assert isinstance(asked, GenerationRequest), "only texts have semantic hits"
    if asked.sampling.temperature == 0:
        return (asked,)
    plain = replace(asked, sampling=replace(asked.sampling, temperature=0.0))
    return plain, with_question(plain, hit.question)


def order_of(order: Order, request: GenerationRequest, job_id: str, salt: bytes) -> Order:
    """A request of the Coordinator's own, where the order's may be computed."""
    spec = replace(
        order.spec,
        job_id=job_id,
        account=SHADOW_ACCOUNT,
        cache_salt=salt,
        choices=(request,),
        price_max_micros=None,
        priority=0,
        island="",
        patience_s=PATIENCE_S,
    )
    return Order(spec=spec, work=order.work, kind=KIND, policy_text=order.policy_text)


class Shadow:
    """Runs on trio. ``salt(account)``: its cache salt; ``note(cargo, is_false)`` hears of each check."""

    def __init__(
        self,
        desk: Desk,
        salt: Callable[[str], bytes],
        new_id: Callable[[], str],
        embed: Embed,
        note: Callable[[Hit, bool], None],
    ) -> None:
        self._desk, self._salt, self._new_id, self._embed, self._note = desk, salt, new_id, embed, note
        self.running = 0
        self.failed = 0

    def __repr__(self) -> str:
        return f"<Shadow {self.running} running, {self.failed} failed>"

    @property
    def has_room(self) -> bool:
        return self.running < CHECKS_AT_ONCE_MAX

    async def check(self, hit: Hit) -> None:
        """Never fails: what cannot be checked is not counted."""
        self.running += 1
        try:
            is_same = await self._is_same(hit)
        except ArchipelagError as error:
            log.debug("a hit of %s was not checked: %s", hit.order.spec.cargo, type(error).__name__)
            is_same = None
        finally:
            self.running -= 1
        if is_same is None:
            self.failed += 1
        else:
            self._note(hit, not is_same)

    async def _is_same(self, hit: Hit) -> bool | None:
        """None: nobody can tell."""
        answers = [await self._answer(hit.order, request) for request in requests_of(hit)]
        if None in answers:
            return None
        new, old = answers[0], answers[1] if len(answers) > 1 else hit.text
        assert new is not None and old is not None
        told = says_the_same(new, old)
        if told is not None:
            return told
        first, second = await self._embed((new, old))
        return looks_the_same(first, second)

    async def _answer(self, order: Order, request: GenerationRequest) -> str | None:
        """What an Island says; None where it does not come to an end."""
        own = order_of(order, request, self._new_id(), self._salt(SHADOW_ACCOUNT))
        try:
            events = await self._desk.collect(own)
        except BooksRefused as refused:
            if refused.why is not Why.NO_ACCOUNT:
                raise
            await self._desk.books.do(CreateAccount(SHADOW_ACCOUNT))
            events = await self._desk.collect(own)
        return _whole_text(events)


def _whole_text(events: Sequence[Event]) -> str | None:
    ended = [event for event in events if isinstance(event, ChoiceResult)]
    if not ended or ended[0].finish_reason is not FinishReason.STOP:
        return None
    return "".join(event.text for event in events if isinstance(event, Text))
