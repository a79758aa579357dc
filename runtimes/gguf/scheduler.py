"""What one step of the engine computes: a token for every running answer, and as much of the waiting prompts as they can bear.

A step's time is about what decoding costs plus a share for each prompt token. While answers run, a step may take STRETCH times a step
without prompts, so their readers see at most that gap. Two exceptions, both at most STEP_S long, so that newcomers and cancellations are
heard: with none running, prompts have the step to themselves; and while more people wait than read, the shortest prompt is brought to its
first token, if one step can do that, since holding up the few is the smaller evil. A step that computes only prompts ends with the shortest
of them: those that finish together wait for one another. Times are learned from the steps themselves, since they differ by machine, model
and length.

Pure: counts and times in, counts out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STRETCH = 2.5  # the bar is 3 times the undisturbed p99 gap; the rest is for noise
STEP_S = 0.35  # a cancelled job gives its slot back within a second even on slow machines
SHARED_STEP_S = 0.1  # several prompts share a step where it is shorter than this
_LEARN = 0.2  # weight of a new observation
_PREFILL_TOKEN_S_MIN = 1e-7


class TimeModel:
    """Seconds of a step by its counts; learned, starting from a guess."""

    def __init__(self, decode_s: float, prefill_token_s: float) -> None:
        self._decode_s = {1: max(decode_s, 1e-6)}
        self.prefill_token_s = max(prefill_token_s, _PREFILL_TOKEN_S_MIN)

    def __repr__(self) -> str:
        return f"<TimeModel decode {self.decode_s(1) * 1e3:.1f} ms, prompt token {self.prefill_token_s * 1e3:.2f} ms>"

    def decode_s(self, rows: int) -> float:
        """Seconds of a step that decodes so many rows: as observed, else as at the nearest smaller count, else the nearest."""
        known = self._decode_s
        if rows in known:
            return known[rows]
        smaller = [count for count in known if count < rows]
        return known[max(smaller)] if smaller else known[min(known)]

    def tokens_in(self, seconds: float) -> int:
        """Prompt tokens that can be computed in so long."""
        return int(seconds / self.prefill_token_s)

    def observe(self, decode_rows: int, prefill_tokens: int, seconds: float) -> None:
        if prefill_tokens:
            rest = seconds - (self.decode_s(decode_rows) if decode_rows else 0.0)
            sample = max(rest / prefill_tokens, _PREFILL_TOKEN_S_MIN)
            self.prefill_token_s += _LEARN * (sample - self.prefill_token_s)
        elif decode_rows in self._decode_s:
            self._decode_s[decode_rows] += _LEARN * (seconds - self._decode_s[decode_rows])
        elif decode_rows:
            self._decode_s[decode_rows] = seconds


@dataclass(frozen=True, slots=True)
class Waiting:
    """A prompt that is not all computed: ``key`` names it, ``tokens`` are left."""

    key: int
    tokens: int


def chunk_tokens(decode_rows: int, waiting: Sequence[Waiting], queued: int, batch_rows: int, times: TimeModel) -> int:
    """Prompt tokens that a step computes beside ``decode_rows`` answers; at least one, so that no prompt starves. ``queued`` more jobs wait
    for their turn."""
    room = batch_rows - decode_rows
    if not waiting or room <= 0:
        return 0
    shortest = min(prompt.tokens for prompt in waiting)
    to_finish = shortest if waiting[0].tokens == shortest else 2 * shortest  # the oldest gets its half
    step_tokens = times.tokens_in(STEP_S)
    if not decode_rows:
        tokens = min(step_tokens, max(to_finish, times.tokens_in(SHARED_STEP_S)))
    elif len(waiting) + queued > decode_rows and to_finish <= step_tokens:
        tokens = to_finish
    else:
        tokens = times.tokens_in((STRETCH - 1.0) * times.decode_s(decode_rows))
    return max(1, min(room, tokens))


def plan(
    decode_rows: int, waiting: Sequence[Waiting], batch_rows: int, times: TimeModel, queued: int = 0
) -> list[tuple[int, int]]:
    """(key, tokens) of the prompts to go on with. ``waiting`` in order of arrival.

    The oldest prompt always gets half, so it cannot starve; the shortest get the rest, since they are soonest done.
    """
    room = chunk_tokens(decode_rows, waiting, queued, batch_rows, times)
    if not room:
        return []
    oldest = waiting[0]
    shares = {oldest.key: min(oldest.tokens, (room + 1) // 2)}
    room -= shares[oldest.key]
    for prompt in sorted(waiting, key=lambda item: item.tokens - shares.get(item.key, 0)):
        share = min(room, prompt.tokens - shares.get(prompt.key, 0))
        if share > 0:
            shares[prompt.key] = shares.get(prompt.key, 0) + share
            room -= share
    return list(shares.items())
