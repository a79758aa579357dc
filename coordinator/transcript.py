"""An answer as bytes, for as long as it is kept: the events that the HTTP side made it from, so that it can be told again in any shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgpack

from coordinator.jobs import Accepted, ChoiceResult, Event, Said, Settled, StageShare, Text
from coordinator.logprobs import TokenLogprob
from protocol import limits
from protocol.cargo_io import DoneLine, ErrorLine, Line, LineReader, OutputLimits, encode_line
from protocol.errors import Code, Refused, RemoteProtocolError
from protocol.generation import FinishReason
from protocol.prices import Ask

NOBODY = ""  # instead of an Island, in answers that come from a cache
_VERSION = 2


class Transcript:
    """Gathers the events of one job."""

    def __init__(self) -> None:
        self._accepted: dict[int, Accepted] = {}
        self._texts: dict[int, list[Text]] = {}
        self._results: dict[int, ChoiceResult] = {}
        self._lines: dict[int, list[bytes]] = {}
        self._line_bytes = 0

    def __repr__(self) -> str:
        return f"<Transcript {len(self._results)} of {len(self._accepted)} choices ended>"

    def add(self, event: Event) -> None:
        """Raises Refused where lines are more than can be kept."""
        if isinstance(event, Said):
            self._add_line(event)
        elif isinstance(event, Text):
            self._texts.setdefault(event.choice, []).append(event)
        elif isinstance(event, ChoiceResult):
            self._results[event.choice] = event
        elif isinstance(event, Accepted):
            self._accepted[event.choice] = event

    def _add_line(self, said: Said) -> None:
        line = encode_line(said.line)
        self._line_bytes += len(line)
        if self._line_bytes > limits.KEPT_LINES_BYTES_MAX:
            text = f"the output is over {limits.KEPT_LINES_BYTES_MAX} bytes, which is more than is kept; send the job with stream: true"
            raise Refused(Code.CARGO_FAILED, text)
        self._lines.setdefault(said.choice, []).append(line)

    @property
    def results(self) -> list[ChoiceResult]:
        """Of the choices that have ended, in their order."""
        return [self._results[index] for index in sorted(self._results)]

    def text(self, choice: int) -> str:
        return "".join(piece.text for piece in self._texts.get(choice, ()))

    def nameless(self) -> Transcript:
        """The same answer without who gave it, how long that took and what it cost."""
        found = Transcript()
        found._texts, found._lines, found._line_bytes = self._texts, self._lines, self._line_bytes
        for index, result in self._results.items():
            found._accepted[index] = replace(self._accepted[index], island=NOBODY, placed_s=0.0, route=())
            found._results[index] = replace(
                result, islands=(NOBODY,), stages=(), price_micros=0, prefill_us=0, decode_us=0, wire_us=0, mended=0, receipt=b""
            )
        return found

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
            b"".join(self._lines.get(index, ())) + (encode_line(result.done) if result.done is not None else b""),
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
    for index, (accepted, text, logprobs, result, lines) in enumerate(choices):
        island, engine, placed_s, route = accepted
        events.append(Accepted(index, island, engine, placed_s, tuple(route)))
        if text or logprobs:
            events.append(Text(index, text, tuple(_read_logprob(entry) for entry in logprobs)))
        said = _read_lines(lines)
        events += [Said(index, line) for line in said if not isinstance(line, DoneLine | ErrorLine)]
        results.append(replace(_read_result(index, result), done=next((line for line in said if isinstance(line, DoneLine)), None)))
    return [*events, Settled(price_micros, placement), *results]


def _read_lines(data: bytes) -> list[Line]:
    reader = LineReader(OutputLimits(output_bytes=2 * limits.KEPT_LINES_BYTES_MAX))
    try:
        return reader.feed(data)
    except RemoteProtocolError as error:
        raise ValueError("the kept lines are none") from error


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
