"""An answer as bytes, and told again from them: as if it came anew."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from coordinator.jobs import Accepted, ChoiceResult, Event, Settled, StageShare, Text
from coordinator.logprobs import TokenLogprob
from coordinator.transcript import Transcript, replay
from protocol.generation import FinishReason
from protocol.prices import Ask

TOP = (TokenLogprob("a", -0.5, (97,)), TokenLogprob("ä", -1.5, (195, 164)))


def result(choice: int, **changes: Any) -> ChoiceResult:
    plain: dict[str, Any] = {
        "choice": choice,
        "finish_reason": FinishReason.LENGTH,
        "islands": ("p1", "p2"),
        "engines": ("e1",),
        "prompt_tokens": 7,
        "cached_tokens": 3,
        "completion_tokens": 5,
        "price_micros": 1234,
        "prefill_us": 10,
        "decode_us": 20,
        "stages": (StageShare("p1", "0-4", Ask(1, 2, 3), 100, 200), StageShare("p3", "", Ask(), 0, 1)),
        "wire_us": 30,
        "mended": 1,
        "receipt": b"signed",
    }
    return ChoiceResult(**{**plain, **changes})


def told(*events: Event) -> Transcript:
    transcript = Transcript()
    for event in events:
        transcript.add(event)
    return transcript


def test_all_of_an_answer_comes_again_but_its_receipt() -> None:
    accepted = Accepted(0, "p1", "e1", 0.25, ("p3", "p1"))
    said = told(accepted, Text(0, "Grüße "), Text(0, "von\0hier", TOP), result(0))
    assert said.text(0) == "Grüße von\0hier" and said.results == [result(0)]
    assert replay(said.pack(), 99, '{"island":"p1"}') == [
        accepted,
        Text(0, "Grüße von\0hier", TOP),
        Settled(99, '{"island":"p1"}'),
        result(0, receipt=b""),
    ]


def test_choices_come_again_in_their_order_whatever_order_they_ended_in() -> None:
    events: list[Event] = [Accepted(choice, f"p{choice}", "e", 0.0) for choice in (2, 0, 1)]
    events += [Text(2, "c"), Text(0, "a"), Text(1, "b"), Text(0, "a")]
    events += [result(1), result(2), result(0)]
    again = replay(told(*events).pack(), 5)
    assert [event.text for event in again if isinstance(event, Text)] == ["aa", "b", "c"]
    assert [event.choice for event in again if isinstance(event, ChoiceResult)] == [0, 1, 2]
    assert again.index(Settled(5)) == len(again) - 4, "paid before the first result that a writer may end with"


def test_the_last_island_that_took_a_choice_counts() -> None:
    again = replay(told(Accepted(0, "p1", "e1", 0.1), Accepted(0, "p2", "e2", 0.5), Text(0, "x"), result(0)).pack(), 0)
    assert again[0] == Accepted(0, "p2", "e2", 0.5)


def test_an_answer_without_a_word() -> None:
    again = replay(told(Accepted(0, "p1", "e", 0.0), result(0)).pack(), 0)
    assert not [event for event in again if isinstance(event, Text)]


def test_logprobs_nest() -> None:
    entry = TokenLogprob("a", -0.5, (97,), TOP)
    again = replay(told(Accepted(0, "p1", "e", 0.0), Text(0, "", (entry, entry)), result(0)).pack(), 0)
    assert again[1] == Text(0, "", (entry, entry))


@pytest.mark.parametrize(
    "packed", [b"", b"\xc1", msgpack.packb(7), msgpack.packb([]), msgpack.packb([1, []]), msgpack.packb([2, []])[:-1]]
)
def test_bytes_of_something_else(packed: bytes) -> None:
    with pytest.raises(ValueError):
        replay(packed, 0)
