"""What the demo shows of the cache of answers: the same question again, and one in other words, beside the first answer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from node.answer_embedder import ON
from node.control import ask_node
from node.demo_client import ask_json, question, say

_WAIT_S = 10.0  # for a model that is on its way; one that is in the user's cache is loaded long before the first answer
_POLL_S = 0.1
_ON_THE_WAY = "is being"


@dataclass(frozen=True, slots=True)
class Told:
    """How an answer came: ``seconds`` until all of it was there, ``metadata`` as the answer has it."""

    seconds: float
    metadata: Mapping[str, Any]


def show(url: str, key: str, data_dir: str, prompt: str, first: Told, out: TextIO) -> None:
    """A line for each of the answers. ``data_dir``: the Coordinator's. Raises DemoFailed."""
    say(out, "\n> what the cache of answers makes of it")
    say(out, _line("the first time", first))
    say(out, _line("the same again", _ask(url, key, prompt)))
    if (state := _model_state(data_dir)) != ON:
        say(out, f"  (in other words: only equal questions are found here; {state or 'no model says what is alike'})")
        return
    other = reworded(prompt)
    say(out, _line(f"as {other!r}", _ask(url, key, other)))


def reworded(prompt: str) -> str:
    """The same question, politely."""
    asked = prompt.rstrip("?.!")
    return f"{asked}, please{prompt[len(asked) :]}"


def _ask(url: str, key: str, prompt: str) -> Told:
    started = time.monotonic()
    answer = ask_json(url, key, "/v1/chat/completions", question(prompt))
    return Told(time.monotonic() - started, answer.get("metadata") or {})


def _line(name: str, told: Told) -> str:
    hit = f"{told.metadata.get('cache_strategy')} hit" if told.metadata.get("cache_hit") else "miss"
    return f"  {1000 * told.seconds:8,.1f} ms  {told.metadata.get('price')!s:>9} credits  {hit:<12}  {name}"


def _model_state(data_dir: str) -> str:
    """``on``, or why no alike questions are found; empty where none are wanted."""
    deadline = time.monotonic() + _WAIT_S
    while True:
        state = str(ask_node(data_dir, "status")["cache_model"].get("state", ""))
        if _ON_THE_WAY not in state or time.monotonic() > deadline:
            return state
        time.sleep(_POLL_S)
