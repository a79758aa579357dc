"""From the events of a job to the JSON of OpenAI's API, for chat and for completions: only their shapes differ.

Chunks are put together from bytes that stay the same for the whole answer and the JSON of the new text, since a stream is mostly that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import web

from coordinator.http.ab_notes import ab_headers, ab_metadata, assigned_of
from coordinator.http.cache_notes import CacheNote
from coordinator.http.schema import ApiRequest
from coordinator.jobs import (
    Accepted,
    Assigned,
    CacheHit,
    CachePassed,
    CacheWaits,
    ChoiceResult,
    Event,
    Replayed,
    Said,
    Settled,
    StageShare,
    Text,
)
from coordinator.logprobs import TokenLogprob
from protocol.prices import format_credits


def to_json(value: object) -> bytes:
    """Compact UTF-8 JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(status=status, body=to_json(value), headers={"Content-Type": "application/json", **(headers or {})})


def string_to_json(text: str) -> bytes:
    return json.dumps(text, ensure_ascii=False).encode()


@dataclass(slots=True)
class Answer:
    """What is known of an answer under way: identity, who serves it, how its choices ended."""

    api: ApiRequest
    job_id: str
    created_s: int
    island: str = ""
    engine: str = ""
    placed_s: float = 0.0
    route: tuple[str, ...] = ()
    results: dict[int, ChoiceResult] = field(default_factory=dict)
    explain: bool = False  # the client wants to know why this Island
    settled: Settled | None = None
    is_replay: bool = False
    cache: CacheNote = field(default_factory=CacheNote)
    assigned: Assigned | None = None  # the A/B test that it counts for

    def note(self, event: Accepted | Said | ChoiceResult | Settled | Replayed | CacheHit | CachePassed | CacheWaits | Assigned) -> None:
        if isinstance(event, Said | CacheWaits):
            return  # lines are not shown in answers of OpenAI's shapes
        if isinstance(event, ChoiceResult):
            self.results[event.choice] = event
        elif isinstance(event, Assigned):
            self.assigned = event
        elif isinstance(event, Settled):
            self.settled = event
        elif isinstance(event, Replayed):
            self.job_id, self.is_replay = event.job_id, True
            self.assigned = assigned_of(event.test, event.variant)
            self.cache.note(event)
        elif isinstance(event, CacheHit | CachePassed):
            self.job_id = self.cache.note(event) or self.job_id
        elif not self.island:
            self.island, self.engine, self.placed_s = event.island, event.engine, event.placed_s
            self.route = event.route

    @property
    def complete(self) -> bool:
        return len(self.results) == len(self.api.choices)

    def headers(self) -> dict[str, str]:
        timing = f"place;dur={self.placed_s * 1000:.2f}"
        if self.complete:
            prefill_us = max(result.prefill_us for result in self.results.values())
            decode_us = max(result.decode_us for result in self.results.values())
            timing += f", prefill;dur={prefill_us / 1000:.2f}, decode;dur={decode_us / 1000:.2f}"
            for number, share in enumerate(self.results[min(self.results)].stages):
                timing += f", stage{number};dur={share.compute_us / 1000:.2f};desc={share.layers or 'replaced'}"
            if self.route:
                timing += f", wire;dur={self.results[min(self.results)].wire_us / 1000:.2f}"
        return {
            "x-archipelag-job": self.job_id,
            "x-archipelag-island": self.island,
            "x-archipelag-route": ",".join(self.route) or self.island,
            "server-timing": timing,
            **self.cache.headers(),
            **ab_headers(self.assigned),
            **({"x-archipelag-replayed": "true"} if self.is_replay else {}),
        }

    def usage(self) -> dict[str, Any]:
        """Tokens of all choices. The prompts of n choices of one prompt are one prompt, as at OpenAI."""
        choices, results = self.api.choices, list(self.results.values())
        if len(results) == 1:
            return _usage(results[0].prompt_tokens, results[0].cached_tokens, results[0].completion_tokens)
        prompts = {(choices[r.choice].messages, choices[r.choice].prompt): r for r in results}
        return _usage(
            sum(result.prompt_tokens for result in prompts.values()),
            sum(result.cached_tokens for result in prompts.values()),
            sum(result.completion_tokens for result in results),
        )

    @property
    def price_micros(self) -> int:
        """What was charged; by the receipts where nobody keeps books."""
        if self.settled is not None:
            return self.settled.price_micros
        return sum(result.price_micros for result in self.results.values())

    def metadata(self) -> dict[str, Any]:
        """Ours, beside OpenAI's fields. ``islands`` and ``spliced_engines`` only where another Island had to continue."""
        results = [self.results[index] for index in sorted(self.results)]
        metadata: dict[str, Any] = {
            "job_id": self.job_id,
            "price": format_credits(self.price_micros),
            **self.cache.metadata(),
            **ab_metadata(self.assigned),
        }
        if self.explain and self.settled is not None and self.settled.placement:
            metadata["placement"] = json.loads(self.settled.placement)
        moved = [result for result in results if len(result.islands) > 1]
        if moved:
            metadata["islands"] = list(moved[0].islands)
        staged = [result for result in results if result.stages]
        if staged:
            metadata["route"] = [_share(share) for share in staged[0].stages]
            metadata["wire_ms"] = round(staged[0].wire_us / 1000, 2)
            metadata["stages_replaced"] = staged[0].mended
        spliced = [result for result in results if len(result.engines) > 1]
        if spliced:
            metadata["spliced_engines"] = list(spliced[0].engines)
        return metadata


def _share(share: StageShare) -> dict[str, Any]:
    """One stage of a pipeline: who, which layers, what it asks (in credits) and its time."""
    ask = share.ask
    return {
        "island": share.island,
        "layers": share.layers or None,
        "ask": "+".join(format_credits(part) for part in (ask.per_job, ask.per_1k_output, ask.per_second)),
        "compute_ms": round(share.compute_us / 1000, 2),
        "held_ms": round(share.held_us / 1000, 2),
    }


def _usage(prompt_tokens: int, cached_tokens: int, completion_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class Shape(Protocol):
    """How one endpoint writes its choices. ``kind``: what the books call its jobs."""

    kind: str

    def begin(self, answer: Answer) -> None:
        """The Island is known; called once."""
        ...

    def opening(self, choice: int) -> bytes:
        """First events of a choice, or nothing."""
        ...

    def delta(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """One event with new text."""
        ...

    def closing(self, result: ChoiceResult, metadata: bytes) -> bytes:
        """The event with the finish reason; ``metadata`` is JSON to put on it, or empty."""
        ...

    def usage(self, usage: bytes, metadata: bytes) -> bytes:
        """The final event without choices."""
        ...

    def whole(self, answer: Answer, texts: Sequence[str], logprobs: Sequence[Sequence[TokenLogprob]]) -> bytes:
        """The object of an answer that is not streamed."""
        ...


class StreamWriter:
    """Bytes of a stream from its events; text of one choice that came in a burst is joined into one chunk."""

    def __init__(self, answer: Answer, shape: Shape) -> None:
        self._answer, self._shape = answer, shape
        self._opened: set[int] = set()

    @property
    def complete(self) -> bool:
        """All choices have ended; only ``[DONE]`` is missing."""
        return self._answer.complete

    def feed(self, events: Iterable[Event]) -> bytes:
        """What to write for these events, ``[DONE]`` not included."""
        parts: list[bytes] = []
        texts: dict[int, list[Text]] = {}
        for event in events:
            if isinstance(event, Text):
                texts.setdefault(event.choice, []).append(event)
                continue
            self._answer.note(event)
            if isinstance(event, Accepted):
                self._open(event.choice, parts)
            if not isinstance(event, ChoiceResult):
                continue
            self._flush(event.choice, texts.pop(event.choice, []), parts)
            self._close(event, parts)
        for choice, pieces in texts.items():
            self._flush(choice, pieces, parts)
        return b"".join(parts)

    def _open(self, choice: int, parts: list[bytes]) -> None:
        if not self._opened:
            self._shape.begin(self._answer)
        if choice in self._opened:
            return  # another Island took over; the client need not know
        self._opened.add(choice)
        parts.append(self._shape.opening(choice))
        if self._answer.api.echoes:
            parts.append(self._shape.delta(choice, self._answer.api.echoes[choice], ()))

    def _flush(self, choice: int, pieces: list[Text], parts: list[bytes]) -> None:
        if not pieces:
            return
        text = pieces[0].text if len(pieces) == 1 else "".join(piece.text for piece in pieces)
        logprobs = [entry for piece in pieces for entry in piece.logprobs]
        parts.append(self._shape.delta(choice, text, logprobs))

    def _close(self, result: ChoiceResult, parts: list[bytes]) -> None:
        answer, include_usage = self._answer, self._answer.api.include_usage
        metadata = to_json(answer.metadata()) if answer.complete else b""
        parts.append(self._shape.closing(result, b"" if include_usage else metadata))
        if answer.complete and include_usage:
            parts.append(self._shape.usage(to_json(answer.usage()), metadata))


def whole(answer: Answer, shape: Shape, events: Sequence[Event]) -> bytes:
    """The body of an answer that is not streamed."""
    count = len(answer.api.choices)
    texts: list[list[str]] = [[echo] for echo in answer.api.echoes] or [[] for _ in range(count)]
    logprobs: list[list[TokenLogprob]] = [[] for _ in range(count)]
    for event in events:
        if isinstance(event, Text):
            texts[event.choice].append(event.text)
            logprobs[event.choice].extend(event.logprobs)
            continue
        answer.note(event)
        if isinstance(event, Accepted) and event.choice == 0:
            answer.route = event.route
    # the Island that ended the first choice counts: an earlier one may have died before the client heard of it
    first = answer.results[0]
    answer.island, answer.engine = first.islands[-1], first.engines[-1]
    if first.stages:
        answer.route = tuple(share.island for share in first.stages if share.layers)
    shape.begin(answer)
    return shape.whole(answer, ["".join(pieces) for pieces in texts], logprobs)
