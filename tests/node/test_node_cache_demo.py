"""What the demo shows of the cache, with a Coordinator that the test plays."""

from __future__ import annotations

import io
from typing import Any

import pytest

from node import demo_cache
from node.demo_cache import Told, reworded, show

FIRST = Told(0.8, {"cache_hit": False, "cache_strategy": None, "price": "0.001"})


class Played:
    """``states``: what the Coordinator says of its model, one after the other; the last one again and again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *states: str) -> None:
        self.asked: list[str] = []
        self._states, self._now_s = list(states), 0.0
        monkeypatch.setattr(demo_cache, "ask_json", self._answer)
        monkeypatch.setattr(demo_cache, "ask_node", self._status)
        monkeypatch.setattr(demo_cache, "time", self)

    def monotonic(self) -> float:
        return self._now_s

    def sleep(self, seconds: float) -> None:
        self._now_s += seconds

    def _answer(self, url: str, key: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        asked = body["messages"][-1]["content"]
        strategy = "exact" if asked == "Who?" else "semantic"
        self.asked.append(asked)
        return {"metadata": {"cache_hit": True, "cache_strategy": strategy, "price": "0"}}

    def _status(self, data_dir: str, question: str) -> dict[str, Any]:
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        return {"cache_model": {"state": state} if state else {}}


def shown() -> str:
    out = io.StringIO()
    show("http://127.0.0.1:1", "ak_x", "/nowhere", "Who?", FIRST, out)
    return out.getvalue()


def test_a_hit_beside_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    played = Played(monkeypatch, "the model is being loaded", "on")
    lines = shown().splitlines()
    assert ["miss" in lines[2], "exact hit" in lines[3], "semantic hit" in lines[4]] == [True] * 3
    assert "800.0 ms" in lines[2] and "0.001 credits" in lines[2] and "0 credits" in lines[4]
    assert played.asked == ["Who?", "Who, please?"]


@pytest.mark.parametrize(
    ("state", "words", "waited_s"),
    [
        ("the model is being fetched", "is being fetched", 10.0),
        ("the model cannot be fetched; that is tried again within 5 s", "cannot be fetched", 0.0),
        ("", "no model says what is alike", 0.0),
    ],
)
def test_it_does_not_wait_long_for_a_model(monkeypatch: pytest.MonkeyPatch, state: str, words: str, waited_s: float) -> None:
    played = Played(monkeypatch, state)
    assert words in shown() and played.asked == ["Who?"]
    assert waited_s <= played.monotonic() <= waited_s + 0.2


def test_a_question_in_other_words() -> None:
    assert [reworded(text) for text in ("Who?", "Say it", "Go!", "")] == ["Who, please?", "Say it, please", "Go, please!", ", please"]
