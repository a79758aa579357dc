"""What OpenAI's endpoints that run Cargos of lines have in common: the order of a request, and what is known of its answer under way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from coordinator.cache.asking import CacheAsk
from coordinator.http.ab_notes import ab_headers, ab_metadata, assigned_of
from coordinator.http.cache_notes import CacheNote
from coordinator.http.job_input import job_order
from coordinator.http.terms import Terms
from coordinator.jobs import Accepted, Assigned, CacheHit, CachePassed, ChoiceResult, Event, Replayed, Said, Settled
from coordinator.orders import Order
from protocol.cargo_io import DoneLine, ImageLine
from protocol.cargo_jobs import CargoInput
from protocol.prices import format_credits


@dataclass(frozen=True, slots=True)
class LineRequest:
    """A checked request. ``check`` is told each event before it counts, and raises Refused for what is no answer to the request."""

    model: str
    given: CargoInput
    check: Callable[[Event], None]
    stream: bool = False


def line_order(
    job_id: str,
    kind: str,
    asked: LineRequest,
    terms: Terms,
    account: str,
    salt: bytes,
    keep_s: float,
    job_timeout_s: float,
    cache: CacheAsk | None = None,
) -> Order:
    """As the desk takes it: somebody waits for it, so it is not run again. ``keep_s``: how long its answer is kept, in seconds."""
    plain = job_order(job_id, asked.model, asked.given, terms, account, salt, 0.0, job_timeout_s, is_streamed=True, cache=cache)
    return replace(plain, kind=kind, delivers=asked.stream, keep_s=keep_s, check=asked.check)


@dataclass(slots=True)
class LineAnswer:
    """What is known of an answer: identity, who serves it, its pictures, how it ended. ``explain``: the client wants to know why this
    Island."""

    model: str
    job_id: str
    created_s: int
    explain: bool = False
    island: str = ""
    placed_s: float = 0.0
    is_replay: bool = False
    images: list[ImageLine] = field(default_factory=list)
    result: ChoiceResult | None = None
    settled: Settled | None = None
    cache: CacheNote = field(default_factory=CacheNote)
    assigned: Assigned | None = None  # the A/B test that it counts for

    def note(self, event: Event) -> None:
        match event:
            case Accepted():
                self.island, self.placed_s = event.island, event.placed_s
            case Said(_, ImageLine() as image):
                self.images.append(image)
            case ChoiceResult():
                self.result, self.island = event, event.islands[-1]
            case Settled():
                self.settled = event
            case Replayed(job_id, test, variant):
                self.job_id, self.is_replay, self.assigned = job_id, True, assigned_of(test, variant)
                self.cache.note(event)
            case CacheHit() | CachePassed():
                self.job_id = self.cache.note(event) or self.job_id
            case Assigned():
                self.assigned = event
            case _:
                pass  # texts, and how far it was

    def note_all(self, events: Iterable[Event]) -> None:
        for event in events:
            self.note(event)

    @property
    def done(self) -> DoneLine:
        """Of a job that has ended."""
        assert self.result is not None and self.result.done is not None, "the job has not ended"
        return self.result.done

    @property
    def prompt_tokens(self) -> int:
        """By the Cargo's own count, where it counts."""
        if self.done.usage is not None:
            return self.done.usage.prompt_tokens
        return self.result.prompt_tokens if self.result is not None else 0

    def headers(self) -> dict[str, str]:
        timing = f"place;dur={self.placed_s * 1000:.2f}"
        if self.result is not None:
            timing += f", run;dur={(self.result.prefill_us + self.result.decode_us) / 1000:.2f}"
        return {
            "x-archipelag-job": self.job_id,
            "x-archipelag-island": self.island,
            "x-archipelag-route": self.island,
            "server-timing": timing,
            **self.cache.headers(),
            **ab_headers(self.assigned),
            **({"x-archipelag-replayed": "true"} if self.is_replay else {}),
        }

    def metadata(self) -> dict[str, Any]:
        """Ours, beside OpenAI's fields; as chats have it."""
        assert self.result is not None
        price = self.settled.price_micros if self.settled is not None else self.result.price_micros
        metadata: dict[str, Any] = {
            "job_id": self.job_id,
            "price": format_credits(price),
            **self.cache.metadata(),
            **ab_metadata(self.assigned),
        }
        if self.explain and self.settled is not None and self.settled.placement:
            metadata["placement"] = json.loads(self.settled.placement)
        if len(self.result.islands) > 1:
            metadata["islands"] = list(self.result.islands)
        return metadata
