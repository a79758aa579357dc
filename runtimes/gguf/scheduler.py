"""What one step of the engine computes: a token for every running answer, and as much of the waiting prompts as they can bear.

A step's time is about what decoding costs plus a share for each prompt token. While answers run, a step may take STRETCH times a step
without prompts, so their readers see at most that gap; with none running, prompts take the whole batch, though not longer than STEP_S, so
that newcomers and cancellations are heard. Times are learned from the steps themselves, since they differ by machine, model and length.

Pure: counts and times in, counts out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STRETCH = 2.5  # the bar is 3 times the undisturbed p99 gap; the rest is for noise
STEP_S = 0.35  # a cancelled job gives its slot back within a second even on slow machines
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


def chunk_tokens(decode_rows: int, batch_rows: int, times: TimeModel) -> int:
    """Prompt tokens that fit into a step beside ``decode_rows`` answers; at least one, so that no prompt starves."""
    room = batch_rows - decode_rows
    bearable_s = (STRETCH - 1.0) * times.decode_s(decode_rows) if decode_rows else STEP_S
    return max(min(room, int(bearable_s / times.prefill_token_s)), min(room, 1))


def plan(decode_rows: int, waiting: Sequence[Waiting], batch_rows: int, times: TimeModel) -> list[tuple[int, int]]:
    """(key, tokens) of the prompts to go on with. ``waiting`` in order of arrival.

    The oldest prompt always gets half, so it cannot starve; the shortest get the rest, since they are soonest done.
    """
    if not waiting or decode_rows >= batch_rows:
        return []
    room = chunk_tokens(decode_rows, batch_rows, times)
    oldest = waiting[0]
    first = min(oldest.tokens, max(1, (room + 1) // 2))
    shares = {oldest.key: first}
    room -= first
    for prompt in sorted(waiting[1:], key=lambda item: item.tokens):
        if room <= 0:
            break
        shares[prompt.key] = min(prompt.tokens, room)
        room -= shares[prompt.key]
    shares[oldest.key] += min(oldest.tokens - first, max(0, room))
    return list(shares.items())
