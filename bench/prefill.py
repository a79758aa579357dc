"""What running answers feel while a prompt of 1,000 tokens enters: gaps between tokens, through the whole path, against undisturbed ones.

Four clients stream long answers from one Island. Each round first takes the gaps of a while without prompts, then sends a prompt of 1,000
tokens and takes the gaps until its first token comes; so both come from the same streams on the same machine at nearly the same time.
The figure is the median over rounds of (p99 disturbed / p99 undisturbed).
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

from bench.bars import at_most
from node.localnet import LocalNetwork

MODEL = "smollm2-135m"
STREAMS = 4
PROMPT_TOKENS = 1000
RATIO_MAX = 3.0
_UNDISTURBED_TOKENS = 150  # of each stream: 600 gaps, so that the p99 is the sixth largest
_ANSWER_TOKENS = 1000
_NO_END = {"0": -100, "2": -100}  # this model's end tokens, so that no answer stops while others are measured


class _Stream:
    """One running answer and the times at which its tokens came."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.moved = asyncio.Event()

    async def run(self, session: aiohttp.ClientSession, url: str, key: str, number: int) -> None:
        text = f"{number} is my lucky number. Count from {number} to a million, one number a line, and never stop."
        messages = [{"role": "user", "content": text}]
        more = {"stream": True, "temperature": 0, "max_tokens": _ANSWER_TOKENS, "logit_bias": _NO_END}
        async with _post(session, url, key, messages=messages, **more) as answer:
            answer.raise_for_status()
            async for raw in answer.content:
                if raw.startswith(b"data: {") and b'"content":"' in raw:
                    self.times_s.append(time.perf_counter())
                    self.moved.set()

    async def wait_tokens(self, count: int) -> None:
        while len(self.times_s) < count:
            self.moved.clear()
            await self.moved.wait()

    def gaps_s(self, start_s: float, end_s: float) -> list[float]:
        """Gaps that began in this time."""
        pairs = zip(self.times_s, self.times_s[1:], strict=False)
        return [later - earlier for earlier, later in pairs if start_s <= earlier < end_s]


def _post(session: aiohttp.ClientSession, url: str, key: str, **body: Any) -> Any:
    headers = {"Authorization": f"Bearer {key}"}
    return session.post(url + "/v1/chat/completions", json={"model": MODEL, **body}, headers=headers)


def _long_prompt(number: int) -> str:
    """About PROMPT_TOKENS tokens that no other prompt begins with; one short word is one token of this model."""
    words = ("sea", "sand", "wind", "ship", "rock", "bird", "rain", "star")
    return f"{number} " + " ".join(words[(i * number + i // 7) % len(words)] for i in range(PROMPT_TOKENS - 40))


async def _first_token(session: aiohttp.ClientSession, url: str, key: str, text: str) -> tuple[float, int]:
    """Seconds until the answer to a prompt is complete (it has one token), and the tokens of the prompt."""
    started_s = time.perf_counter()
    async with _post(session, url, key, messages=[{"role": "user", "content": text}], max_tokens=1) as answer:
        answer.raise_for_status()
        tokens: int = (await answer.json())["usage"]["prompt_tokens"]
    return time.perf_counter() - started_s, tokens


async def _round(url: str, key: str, number: int) -> dict[str, float]:
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        streams = [_Stream() for _ in range(STREAMS)]
        tasks = [
            asyncio.create_task(stream.run(session, url, key, 10 * number + i)) for i, stream in enumerate(streams)
        ]
        try:
            for stream in streams:
                await stream.wait_tokens(10)
            start_s = time.perf_counter()
            counts = [len(stream.times_s) for stream in streams]
            for stream, count in zip(streams, counts, strict=True):
                await stream.wait_tokens(count + _UNDISTURBED_TOKENS)
            sent_s = time.perf_counter()
            alone = [gap for stream in streams for gap in stream.gaps_s(start_s, sent_s)]
            took_s, tokens = await _first_token(session, url, key, _long_prompt(number))
            end_s = sent_s + took_s
            for stream in streams:
                await stream.wait_tokens(len(stream.times_s) + 1)
            beside = [gap for stream in streams for gap in stream.gaps_s(sent_s, end_s)]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "alone_p99_ms": _p99(alone) * 1000,
        "beside_p99_ms": _p99(beside) * 1000,
        "ratio": _p99(beside) / _p99(alone),
        "prompt_tokens": tokens,
        "first_token_s": took_s,
        "gaps": len(beside),
    }


def _p99(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def run(quick: bool = False) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="archipelag-bench-") as folder, LocalNetwork(Path(folder)) as network:
        network.start_coordinator()
        network.start_island("island", "--cargo", MODEL).wait_ready()
        key = network.make_key()
        rounds = [asyncio.run(_round(network.url, key, number)) for number in range(1, 3 if quick else 8)]
    medians = {figure: round(statistics.median(one[figure] for one in rounds), 3) for figure in rounds[0]}
    bars = [at_most("p99 gap beside a prompt of 1,000 tokens / undisturbed", medians["ratio"], RATIO_MAX)]
    return {"bench": "prefill", "model": MODEL, "streams": STREAMS, "rounds": rounds, **medians, "bars": bars}


def table(result: dict[str, Any]) -> str:
    return (
        f"{result['streams']} answers, p99 gap: undisturbed {result['alone_p99_ms']:.1f} ms, beside a prompt of "
        f"{result['prompt_tokens']:.0f} tokens {result['beside_p99_ms']:.1f} ms; the prompt's first token after "
        f"{result['first_token_s']:.1f} s"
    )


if __name__ == "__main__":
    print(table(run("--quick" in sys.argv)))
