"""What a job may cost at an Island at most: the one formula behind quotes, holds, the filter "ask at most the bid" and tickets.

A price is the Island's ask for so many output tokens and so much time. Tokens are bounded by the request; time is not, so its bound is
what the job should take at the Island's measured speed, doubled. The ticket carries the bound: an Island cannot charge past it.
"""

from __future__ import annotations

from protocol import limits
from protocol.prices import Ask

TOKENS_PER_S_ASSUMED = 5.0  # where nobody has measured: a slow CPU, so that the bound is not too low
PREFILL_SPEEDUP = 8.0  # prompts are computed in batches, about so many times faster a token than answers
TIME_MARGIN = 2.0
TIME_BASE_MS = 1000


def compute_ms_max(prompt_tokens: int, output_tokens: int, tokens_per_s: float, job_s_max: float) -> int:
    """Milliseconds that are paid at most, by the speed of one stream; 0.0 tokens/s means unknown."""
    speed = tokens_per_s or TOKENS_PER_S_ASSUMED
    expected_ms = 1000 * (output_tokens + prompt_tokens / PREFILL_SPEEDUP) / speed
    # the smaller one first: at a speed next to nothing the other has no integer
    return int(min(TIME_BASE_MS + TIME_MARGIN * expected_ms, job_s_max * 1000))


def price_max(ask: Ask, prompt_tokens: int, output_tokens: int, tokens_per_s: float, job_s_max: float) -> int:
    """Micro-credits that a job can cost at most; at most PRICE_MICROS_MAX."""
    ms = compute_ms_max(prompt_tokens, output_tokens, tokens_per_s, job_s_max) if ask.per_second else 0
    return min(ask.price(output_tokens, ms), limits.PRICE_MICROS_MAX)
