"""The shapes of ``/v1/completions``: ``text_completion``, the same object streamed and whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator.http.answers import Answer, string_to_json, to_json
from coordinator.http.sse import event
from coordinator.jobs import ChoiceResult
from coordinator.logprobs import TokenLogprob


class CompletionShape:
    kind = "completion"

    def __init__(self) -> None:
        self._head = self._tail = b""
        self._offsets: dict[int, int] = {}

    def begin(self, answer: Answer) -> None:
        self._head = b'{"id":"%b","object":"text_completion","created":%d,"model":%b,"system_fingerprint":%b,' % (
            _id(answer).encode(),
            answer.created_s,
            string_to_json(answer.api.model),
            string_to_json(answer.engine),
        )
        self._tail = b',"usage":null' if answer.api.include_usage else b""

    def opening(self, choice: int) -> bytes:
        return b""

    def delta(self, choice: int, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        shown = b"null"
        if logprobs:
            offset = self._offsets.get(choice, 0)
            shown = to_json(_logprobs(logprobs, offset))
            self._offsets[choice] = offset + sum(len(entry.token) for entry in logprobs)
        return self._chunk(choice, string_to_json(text), shown)

    def closing(self, result: ChoiceResult, metadata: bytes) -> bytes:
        extra = b',"metadata":' + metadata if metadata else b""
        return self._chunk(result.choice, b'""', finish=string_to_json(result.finish_reason), extra=extra)

    def usage(self, usage: bytes, metadata: bytes) -> bytes:
        return event(b'%b"choices":[],"usage":%b,"metadata":%b}' % (self._head, usage, metadata))

    def whole(self, answer: Answer, texts: Sequence[str], logprobs: Sequence[Sequence[TokenLogprob]]) -> bytes:
        choices = [
            {
                "index": index,
                "text": text,
                "logprobs": _logprobs(logprobs[index], 0) if answer.api.logprobs else None,
                "finish_reason": answer.results[index].finish_reason,
            }
            for index, text in enumerate(texts)
        ]
        return to_json(
            {
                "id": _id(answer),
                "object": "text_completion",
                "created": answer.created_s,
                "model": answer.api.model,
                "choices": choices,
                "usage": answer.usage(),
                "system_fingerprint": answer.engine,
                "metadata": answer.metadata(),
            }
        )

    def _chunk(
        self, choice: int, text: bytes, logprobs: bytes = b"null", finish: bytes = b"null", extra: bytes = b""
    ) -> bytes:
        return event(
            b'%b"choices":[{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}]%b%b}'
            % (self._head, choice, text, logprobs, finish, self._tail, extra)
        )


def _id(answer: Answer) -> str:
    return f"cmpl-{answer.job_id}"


def _logprobs(entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """Four arrays side by side; ``text_offset`` counts characters from the start of the answer."""
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.token)
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [{top.token: top.logprob for top in entry.top} for entry in entries],
        "text_offset": offsets,
    }
