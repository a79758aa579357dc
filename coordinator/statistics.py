"""What the Coordinator counts: plain numbers, so that tests can prove that recovery fired and ``/metrics`` can show it. Never a prompt."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class Statistics:
    """Counts since the start. Written by the trio side only; reading a slightly old number elsewhere does no harm."""

    jobs_started: int = 0
    jobs_done: int = 0
    jobs_failed: Counter[str] = field(default_factory=Counter)  # by code
    jobs_cancelled: int = 0
    attempts: int = 0
    takeovers_before_first_token: int = 0
    takeovers_mid_stream: int = 0
    splices_across_engines: int = 0
    workers_ended: int = 0
    refusals: Counter[str] = field(default_factory=Counter)  # what Islands answered, by code
    prompt_tokens: int = 0
    cached_tokens: int = 0
    routes_broken: int = 0
    routes_mended: int = 0
    completion_tokens: int = 0
    price_micros: int = 0

    def __repr__(self) -> str:
        failed = sum(self.jobs_failed.values())
        return f"<Statistics {self.jobs_started} started, {self.jobs_done} done, {failed} failed, {self.jobs_cancelled} cancelled>"
