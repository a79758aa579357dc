"""An answer as bytes, for as long as it is kept: the events that the HTTP side made it from, so that it can be told again in any shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgpack

from coordinator.jobs import Accepted, ChoiceResult, Event, Settled, StageShare, Text
from coordinator.logprobs import TokenLogprob
from protocol.generation import FinishReason
from protocol.prices import Ask

_VERSION = 1


class Transcript:
    """Gathers the events of one job."""

    def __init__(self) -> None:
        self._accepted: dict[int, Accepted] = {}
        self._texts: dict[int, list[Text]] = {}
        self._results: dict[int, ChoiceResult] = {}

    def __repr__(self) -> str:
        return f"<Transcript {len(self._results)} of {len(self._accepted)} choices ended>"

    def add(self, event: Event) -> None:
        if isinstance(event, Text):
            self._texts.setdefault(event.choice, []).append(event)
        elif isinstance(event, ChoiceResult):
            self._results[event.choice] = event
        elif isinstance(event, Accepted):
            self._accepted[event.choice] = event

    @property
    def results(self) -> list[ChoiceResult]:
        """Of the choices that have ended, in their order."""
        return [self._results[index] for index in sorted(self._results)]

    def text(self, choice: int) -> str:
        return "".join(piece.text for piece in self._texts.get(choice, ()))

    def pack(self) -> bytes:
        """All choices, which have all ended. Receipts are kept elsewhere and left out."""
        return bytes(msgpack.packb([_VERSION, [self._packed(index) for index in sorted(self._results)]]))

    def _packed(self, index: int) -> list[Any]:
        accepted, result = self._accepted[index], self._results[index]
        logprobs = [_logprob(entry) for piece in self._texts.get(index, ()) for entry in piece.logprobs]
        shares = [
            [s.island, s.layers, [s.ask.per_job, s.ask.per_1k_output, s.ask.per_second], s.compute_us, s.held_us]
            for s in result.stages
        ]
        return [
            [accepted.island, accepted.engine, accepted.placed_s, list(accepted.route)],
            self.text(index),
            logprobs,
            [
                result.finish_reason.value,
                list(result.islands),
                list(result.engines),
                result.prompt_tokens,
                result.cached_tokens,
                result.completion_tokens,
                result.price_micros,
                result.prefill_us,
                result.decode_us,
                shares,
                result.wire_us,
                result.mended,
            ],
        ]


def _logprob(entry: TokenLogprob) -> list[Any]:
    return [entry.token, entry.logprob, list(entry.raw), [_logprob(top) for top in entry.top]]


def replay(packed: bytes, price_micros: int, placement: str = "") -> list[Event]:
    """The events again, among them the price and why it ran where it did (JSON, or empty). Raises ValueError for bytes that ``pack`` did
    not make, or that of another version did."""
    try:
        version, choices = msgpack.unpackb(packed)
    except (TypeError, msgpack.UnpackException) as error:
        raise ValueError("no kept answer") from error
    if version != _VERSION:
        raise ValueError(f"a kept answer of version {version} is not {_VERSION}")
    events: list[Event] = []
    results: list[Event] = []
    for index, (accepted, text, logprobs, result) in enumerate(choices):
        island, engine, placed_s, route = accepted
        events.append(Accepted(index, island, engine, placed_s, tuple(route)))
        if text or logprobs:
            events.append(Text(index, text, tuple(_read_logprob(entry) for entry in logprobs)))
        results.append(_read_result(index, result))
    return [*events, Settled(price_micros, placement), *results]


def _read_logprob(entry: Sequence[Any]) -> TokenLogprob:
    token, logprob, raw, top = entry
    return TokenLogprob(token, logprob, tuple(raw), tuple(_read_logprob(each) for each in top))


def _read_result(index: int, values: Sequence[Any]) -> ChoiceResult:
    finish, islands, engines, prompt, cached, completion, price, prefill_us, decode_us, shares, wire_us, mended = values
    stages = tuple(StageShare(island, layers, Ask(*ask), compute, held) for island, layers, ask, compute, held in shares)
    return ChoiceResult(
        index,
        FinishReason(finish),
        tuple(islands),
        tuple(engines),
        prompt,
        cached,
        completion,
        price,
        prefill_us,
        decode_us,
        stages,
        wire_us,
        mended,
    )
