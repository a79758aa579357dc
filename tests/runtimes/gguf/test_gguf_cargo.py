"""A loaded Cargo with the real model in its real worker process: what it streams, what it gives back, and how it outlives its worker."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import trio

from protocol import limits
from protocol.errors import Code, ConfigError, Refused
from protocol.generation import ChatMessage, FinishReason, GenerationRequest, Role, Sampling, pack_tokens, unpack_tokens
from protocol.messages import JobChunk
from runtimes.base import CargoFacts, Chunk, Finished, Run, RunRequest
from runtimes.gguf import cargo as cargo_module
from runtimes.gguf import process as process_module
from runtimes.gguf.cargo import GgufCargo, open_gguf_cargo, worker_environment
from runtimes.gguf.messages import Load
from runtimes.worker_process import WorkerProcess, pause_after

ROOT = Path(cargo_module.__file__).resolve().parents[2]
HASH = "5a" * 32
LIMIT_BYTES = 450_000_000  # 2048 cells of SmolLM2-135M
SLOTS = 4
SALT = b"account"
ENDS = (0, 2, 4)  # <|endoftext|>, <|im_end|>, <reponame>
ENDLESS = tuple((token, -100.0) for token in ENDS)
CRASH = "import resource, os; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.abort()"


@asynccontextmanager
async def opened(path: Path, **options: Any) -> AsyncIterator[GgufCargo]:
    """A small Cargo; nothing in here takes a minute."""
    given: dict[str, Any] = {"name": "smollm2-135m", "content_hash": HASH, "memory_limit_bytes": LIMIT_BYTES}
    given |= {"threads": 1, "slots": SLOTS}
    with trio.fail_after(60):
        async with open_gguf_cargo(path=path, **(given | options)) as cargo:
            yield cargo


def completion(prompt: str, max_tokens: int, **sampling: Any) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, max_tokens=max_tokens, sampling=Sampling(**({"temperature": 0.0} | sampling)))


def endless(max_tokens: int, prompt: str = "The sea is") -> GenerationRequest:
    """An answer that takes all its tokens."""
    return completion(prompt, max_tokens, logit_bias=ENDLESS)


def always(token: int, max_tokens: int) -> GenerationRequest:
    """An answer that is one token over and over, whatever the model thinks of it."""
    return completion("Say:", max_tokens, logit_bias=((token, 100.0),))


def asked(generation: GenerationRequest, salt: bytes = b"") -> RunRequest:
    return RunRequest("job", generation, salt)


@dataclass
class Answer:
    chunks: list[Chunk] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return unpack_tokens(b"".join(chunk.tokens for chunk in self.chunks))

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks) + self.end.text

    @property
    def end(self) -> Finished:
        assert len(self.finished) == 1
        return self.finished[0]

    @property
    def logprobs(self) -> list[dict[str, Any]]:
        return [entry for chunk in self.chunks for entry in json.loads(chunk.logprobs or b"[]")]


async def read(run: Run) -> Answer:
    """The whole answer; asserts that Finished comes last, and once."""
    answer = Answer()
    async for event in run:
        assert not answer.finished, f"{event} came behind the end"
        if isinstance(event, Chunk):
            assert event.tokens
            answer.chunks.append(event)
        else:
            answer.finished.append(event)
    assert answer.end.completion_tokens >= len(answer.tokens)
    return answer


async def ask(cargo: GgufCargo, generation: GenerationRequest, salt: bytes = b"") -> Answer:
    async with cargo.run(asked(generation, salt)) as run:
        answer = await read(run)
        assert (run.prompt_tokens, run.cached_tokens) == (answer.end.prompt_tokens, answer.end.cached_tokens)
    return answer


async def until(cargo: GgufCargo, condition: Callable[[], bool], seconds: float = 20.0) -> None:
    with trio.fail_after(seconds):
        while not condition():
            await cargo.wait_changed()


def at_rest(facts: CargoFacts) -> bool:
    return facts.slots_free == facts.slots_total and facts.kv_tokens_free == facts.kv_tokens_total


def is_gone(pid: int) -> bool:
    """A process that nobody has collected yet computes nothing either."""
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


# What a run gives.


async def test_a_run_streams_chunks_and_then_finishes_once(smollm2_path: Path) -> None:
    messages = (ChatMessage(Role.SYSTEM, "You are a helpful AI assistant."), ChatMessage(Role.USER, "What is the capital of France?"))
    chat = GenerationRequest(messages=messages, max_tokens=64, sampling=Sampling(temperature=0.0))
    async with opened(smollm2_path) as cargo:
        answer = await ask(cargo, chat)
        assert "Paris" in answer.text
        assert answer.end.reason is FinishReason.STOP
        assert answer.end.completion_tokens == len(answer.tokens) < 64
        assert len(answer.chunks) > 1 and answer.end.prefill_s > 0 and answer.end.decode_s > 0
        continued = await ask(cargo, completion("1, 2, 3, 4, 5, 6,", 12))
        assert continued.text.startswith(" 7, 8, 9,")
        assert continued.end.reason is FinishReason.LENGTH and len(continued.tokens) == 12
        facts = cargo.facts()
        assert (facts.name, facts.content_hash, facts.runtime) == ("smollm2-135m", HASH, "gguf")
        assert (facts.kv_tokens_total, facts.context_tokens, facts.slots_total) == (2048, 2048, SLOTS)
        assert facts.kv_bytes_per_token == 23_040 and facts.weights_bytes > 90_000_000 and facts.tokens_per_s > 0
        await until(cargo, lambda: at_rest(cargo.facts()))


async def test_leaving_early_frees_slot_and_cells_within_a_second(smollm2_path: Path) -> None:
    async with opened(smollm2_path) as cargo:
        total = cargo.facts().kv_tokens_total
        answering, prefilling = (endless(1500), 3), (endless(100, "word " * 1500), 0)
        for generation, chunks in (answering, prefilling):
            async with cargo.run(asked(generation, SALT)) as run:
                events = aiter(run)
                for _ in range(chunks):
                    await anext(events)
                await until(cargo, lambda: cargo.facts().slots_free == SLOTS - 1)
                assert cargo.facts().kv_tokens_free == total - run.prompt_tokens - generation.max_tokens
            await until(cargo, lambda: at_rest(cargo.facts()), seconds=1.0)


async def test_many_runs_at_once_get_each_their_own_answer(smollm2_path: Path) -> None:
    answers: dict[int, list[int]] = {}
    least_free = SLOTS
    async with opened(smollm2_path) as cargo:

        async def one(token: int, length: int) -> None:
            nonlocal least_free
            async with cargo.run(asked(always(token, length))) as run:
                answers[token] = (await read(run)).tokens
                least_free = min(least_free, cargo.facts().slots_free)

        async with trio.open_nursery() as nursery:
            for number in range(24):
                nursery.start_soon(one, 1000 + number, 3 + number % 10)
        assert answers == {1000 + number: [1000 + number] * (3 + number % 10) for number in range(24)}
        assert 0 <= least_free < SLOTS - 1
        await until(cargo, lambda: at_rest(cargo.facts()))


async def test_logprobs_are_the_models_own_distribution(smollm2_path: Path) -> None:
    async with opened(smollm2_path) as cargo:
        answer = await ask(cargo, replace(completion("The capital of France is", 8), top_logprobs=5))
        assert len(answer.logprobs) == len(answer.tokens) == 8
        for entry in answer.logprobs:
            top = entry["top_logprobs"]
            values = [other["logprob"] for other in top]
            assert len(top) == 5 and values == sorted(values, reverse=True)
            assert 0.0 < sum(map(math.exp, values)) <= 1.0 + 1e-6
            assert {key: entry[key] for key in ("token", "logprob", "bytes")} == top[0], "greedy takes the likeliest"
        assert bytes(byte for entry in answer.logprobs for byte in entry["bytes"]).decode() == answer.text
        forced = replace(always(1000, 1), top_logprobs=1)
        (entry,) = (await ask(cargo, forced)).logprobs
        assert entry["logprob"] < -5.0 < entry["top_logprobs"][0]["logprob"], "a bias changes the choice, not what is told of it"
        (entry,) = (await ask(cargo, replace(forced, top_logprobs=0))).logprobs
        assert entry["top_logprobs"] == []
        assert not (await ask(cargo, replace(forced, top_logprobs=-1))).logprobs


async def test_bias_stop_strings_and_seeds(smollm2_path: Path) -> None:
    async with opened(smollm2_path) as cargo:
        plain = await ask(cargo, completion("1 2 3 4 5 6 7 8 9", 30))
        first = plain.tokens[0]
        forbidden = await ask(cargo, completion("1 2 3 4 5 6 7 8 9", 30, logit_bias=((first, -100.0),)))
        assert first not in forbidden.tokens
        stop = plain.text[8:11]
        stopped = await ask(cargo, replace(completion("1 2 3 4 5 6 7 8 9", 30), stop=("never said", stop)))
        assert stopped.text == plain.text[: plain.text.index(stop)]
        assert stopped.end.reason is FinishReason.STOP and len(stopped.tokens) < 30

        def lively(seed: int) -> GenerationRequest:
            return completion("A story:", 16, temperature=1.5, seed=seed)

        one, again, other = [await ask(cargo, lively(seed)) for seed in (7, 7, 8)]
        assert one.tokens == again.tokens != other.tokens


async def test_a_prefix_is_reused_under_the_same_salt_only(smollm2_path: Path) -> None:
    async with opened(smollm2_path) as cargo:
        story = "On an island lived " + ", ".join(f"{number} birds" for number in range(2, 16)) + " and the people"
        longer = completion(story + " And then", 4)

        async def check_who_reuses(prefix_tokens: int, stranger: bytes) -> None:
            for salt in (b"", stranger):
                assert (await ask(cargo, longer, salt)).end.cached_tokens == 0
            reused = await ask(cargo, longer, SALT)
            assert prefix_tokens <= reused.end.cached_tokens < reused.end.prompt_tokens

        async with cargo.run(asked(endless(1500, story), SALT)) as run:
            await check_who_reuses(run.prompt_tokens, b"stranger 1")  # of a running answer
        await until(cargo, lambda: at_rest(cargo.facts()))
        await check_who_reuses(run.prompt_tokens, b"stranger 2")  # of one that is over
        await until(cargo, lambda: at_rest(cargo.facts()))


async def test_an_answer_is_resumed_behind_its_delivered_tokens(smollm2_path: Path) -> None:
    async with opened(smollm2_path) as cargo:
        request = completion("1, 2, 3, 4, 5, 6, 7, 8,", 24)
        whole = await ask(cargo, request)
        rest = await ask(cargo, replace(request, resume=pack_tokens(whole.tokens[:9])))
        assert whole.tokens[:9] + rest.tokens == whole.tokens
        assert whole.text.endswith(rest.text) and 0 < len(rest.text) < len(whole.text)
        assert rest.end.completion_tokens == 24 and rest.end.prompt_tokens == whole.end.prompt_tokens
        nothing = await ask(cargo, replace(request, resume=pack_tokens(whole.tokens)))
        assert nothing.chunks == [] and nothing.end.reason is FinishReason.LENGTH


# What the memory holds.


async def test_a_limit_that_is_too_small_names_one_that_will_do(smollm2_path: Path) -> None:
    with pytest.raises(ConfigError, match="--memory-limit 300000000 cannot hold this model") as caught:
        async with opened(smollm2_path, memory_limit_bytes=300_000_000):
            pass
    found = re.search(r"at least (\d+) bytes", str(caught.value))
    assert found is not None
    least = int(found[1])
    with pytest.raises(ConfigError, match=f"at least {least} bytes"):
        async with opened(smollm2_path, memory_limit_bytes=least - 1):
            pass
    async with opened(smollm2_path, memory_limit_bytes=least) as cargo:
        facts = cargo.facts()
        assert facts.kv_tokens_total == facts.context_tokens == 256
        prompt = "word " * 200
        with pytest.raises(Refused) as refused:
            await ask(cargo, endless(256, prompt))
        counted = re.search(r"the request has (\d+) in its messages", str(refused.value))
        assert counted is not None
        rest = 256 - int(counted[1])
        assert len((await ask(cargo, endless(rest, prompt))).tokens) == rest > 50, "the last cell is there too"
        assert psutil.Process(cargo.worker_pid).memory_info().rss <= least


async def test_the_advertised_room_is_exact_to_the_token(smollm2_path: Path) -> None:
    async with opened(smollm2_path) as cargo:
        total = cargo.facts().kv_tokens_total
        prompt_tokens = (await ask(cargo, endless(1))).end.prompt_tokens
        with pytest.raises(Refused, match="maximum context length is 2048 tokens") as caught:
            await ask(cargo, endless(total - prompt_tokens + 1))
        assert caught.value.code is Code.CONTEXT_LENGTH
        async with cargo.run(asked(endless(total - prompt_tokens))):
            await until(cargo, lambda: cargo.facts().kv_tokens_free == 0)

        async with cargo.run(asked(endless(1500))), trio.open_nursery() as nursery:
            await until(cargo, lambda: cargo.facts().slots_free == SLOTS - 1)
            free = cargo.facts().kv_tokens_free
            assert free == total - prompt_tokens - 1500
            async with cargo.run(asked(endless(free - prompt_tokens))):  # entering means that it is admitted
                await until(cargo, lambda: cargo.facts().kv_tokens_free == 0)
            await until(cargo, lambda: cargo.facts().kv_tokens_free == free)
            admitted = trio.Event()

            async def one_token_more() -> None:
                async with cargo.run(asked(endless(free - prompt_tokens + 1))):
                    admitted.set()

            nursery.start_soon(one_token_more)
            await until(cargo, lambda: cargo._room.waiting == 1)
            assert not admitted.is_set() and cargo.facts().kv_tokens_free == free
            nursery.cancel_scope.cancel()
        await until(cargo, lambda: at_rest(cargo.facts()) and cargo._room.waiting == 0)


async def test_what_waits_is_admitted_once_there_is_room_and_the_queue_is_bounded(smollm2_path: Path) -> None:
    async with opened(smollm2_path, slots=1) as cargo:
        refused, admitted = [], []

        async def one(number: int) -> None:
            try:
                async with cargo.run(asked(always(1000 + number, 1))) as run:
                    admitted.append((await read(run)).tokens)
            except Refused as refusal:
                refused.append(refusal.code)

        async with trio.open_nursery() as nursery, cargo.run(asked(endless(1500))) as run:
            for number in range(limits.ENGINE_WAITING_MAX + 2):
                nursery.start_soon(one, number)
            await until(cargo, lambda: cargo._room.waiting == limits.ENGINE_WAITING_MAX)
            async for _ in run:
                if len(refused) == 2:
                    break
            assert not admitted
        assert refused == [Code.NO_CAPACITY] * 2
        assert len(admitted) == limits.ENGINE_WAITING_MAX
        await until(cargo, lambda: at_rest(cargo.facts()))


async def test_a_refusal_harms_nobody_else(smollm2_path: Path) -> None:
    async with opened(smollm2_path) as cargo, cargo.run(asked(always(1000, 20))) as run:
        long_echo = GenerationRequest(prompt="€" * 25_000, echo=True, max_tokens=1)
        for generation in (replace(completion("x", 5), resume=pack_tokens([10_000_000])), long_echo):
            with pytest.raises(Refused) as caught:
                await ask(cargo, generation)
            assert caught.value.code is Code.BAD_INPUT
        assert (await read(run)).tokens == [1000] * 20
        assert cargo.restarts == 0


# Readers.


async def test_a_slow_reader_gets_joined_chunks_and_holds_up_nobody(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CHUNK_TOKENS_MAX", 16)
    async with opened(smollm2_path) as cargo, cargo.run(asked(replace(always(1000, 40), top_logprobs=1))) as slow:
        other = await ask(cargo, always(1001, 60))
        assert other.tokens == [1001] * 60
        await until(cargo, lambda: at_rest(cargo.facts()))
        answer = await read(slow)
        assert answer.tokens == [1000] * 40
        assert [len(chunk.tokens) // 4 for chunk in answer.chunks] == [16, 16, 8]
        assert [len(json.loads(chunk.logprobs)) for chunk in answer.chunks] == [16, 16, 8]
        assert len({entry["token"] for entry in answer.logprobs}) == 1


@pytest.mark.parametrize(("text", "logprobs"), [("x", b"[1]"), ("ß" * 300, b""), ("x", b'["' + b"1" * 2000 + b'"]')])
async def test_joined_chunks_fit_into_what_a_peer_accepts(text: str, logprobs: bytes) -> None:
    """1,000 tokens that nobody fetched; those of the last case have 2 MB of logprobs."""
    run = cargo_module._Run(1)
    run.chunks.extend(Chunk(pack_tokens([number]), text, logprobs) for number in range(1000))
    run.finished = Finished(FinishReason.LENGTH, 1, 1000, 0)
    answer = await read(run)
    for chunk in answer.chunks:
        JobChunk(1, 0, chunk.text, chunk.logprobs, chunk.tokens)  # checks itself
    assert answer.tokens == list(range(1000)) and answer.text == text * 1000
    assert len(answer.chunks) <= 20
    assert answer.logprobs == json.loads(logprobs or b"[]") * 1000


# The worker's life.


async def test_a_killed_worker_ends_its_jobs_and_is_started_again(smollm2_path: Path) -> None:
    async with opened(smollm2_path) as cargo:
        pid = cargo.worker_pid
        refusals: list[Refused] = []

        async def victim(heard: trio.Event) -> None:
            with pytest.raises(Refused) as caught:
                async with cargo.run(asked(endless(900))) as run:
                    async for event in run:
                        assert isinstance(event, Chunk)
                        heard.set()
            refusals.append(caught.value)

        async with trio.open_nursery() as nursery:
            for _ in range(3):  # the third does not fit and waits
                nursery.start_soon(victim, trio.Event())
            await until(cargo, lambda: cargo._room.waiting == 1)
            os.kill(pid, signal.SIGKILL)
        assert [refusal.code for refusal in refusals] == [Code.WORKER_DIED] * 3
        assert all(refusal.retryable for refusal in refusals)
        assert not cargo.alive and cargo.worker_pid == 0
        assert cargo.facts().slots_free == cargo.facts().kv_tokens_free == 0
        with pytest.raises(Refused) as caught:
            await ask(cargo, endless(1))
        assert caught.value.code is Code.NO_CAPACITY, "who comes while there is none has ended no worker"
        await until(cargo, lambda: cargo.alive)
        assert cargo.restarts == 1 and cargo.worker_pid not in (0, pid) and is_gone(pid)
        assert at_rest(cargo.facts())
        assert (await ask(cargo, always(1000, 5))).tokens == [1000] * 5


async def test_a_worker_that_crashes_over_and_over_is_started_after_growing_pauses(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "WORKER_RESTART_MIN_S", 0.02)
    starts: list[float] = []
    real = process_module.worker_command

    def failing(descriptor: int) -> list[str]:
        starts.append(trio.current_time())
        if len(starts) == 3:
            return ["/no/such/program"]
        return [sys.executable, "-I", "-S", "-c", CRASH] if len(starts) < 6 else real(descriptor)

    async with opened(smollm2_path) as cargo:
        monkeypatch.setattr(process_module, "worker_command", failing)
        os.kill(cargo.worker_pid, signal.SIGKILL)
        await until(cargo, lambda: not cargo.alive)
        died = trio.current_time()
        await until(cargo, lambda: cargo.alive)
        waited = [later - earlier for earlier, later in pairwise([died, *starts])]
        assert cargo.restarts == 6
        assert all(time_s >= pause_s for time_s, pause_s in zip(waited, (0.02, 0.04, 0.08, 0.16, 0.32, 0.64), strict=True))
        assert (await ask(cargo, always(1000, 5))).tokens == [1000] * 5


def test_pauses_grow_to_a_limit_and_start_anew_after_a_good_life() -> None:
    pauses = [0.0]
    for _ in range(12):
        pauses.append(pause_after(pauses[-1], served_s=1.0))
    assert pauses[1] == limits.WORKER_RESTART_MIN_S and pauses[-1] == limits.WORKER_RESTART_MAX_S
    assert all(later == min(2 * earlier, limits.WORKER_RESTART_MAX_S) for earlier, later in pairwise(pauses[1:]))
    assert pause_after(pauses[-1], served_s=60.0) == limits.WORKER_RESTART_MIN_S


async def test_a_worker_that_stands_still_is_noticed_and_replaced(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WORKER_STALL_S", 0.5)
    async with opened(smollm2_path) as cargo:
        pid = cargo.worker_pid
        with trio.fail_after(30), pytest.raises(Refused) as caught:
            async with cargo.run(asked(endless(1000))) as run:
                events = aiter(run)
                await anext(events)
                os.kill(pid, signal.SIGSTOP)
                async for _ in events:
                    pass
        assert caught.value.code is Code.WORKER_DIED
        await until(cargo, lambda: cargo.alive)
        assert cargo.worker_pid != pid and is_gone(pid)
        assert (await ask(cargo, always(1000, 5))).tokens == [1000] * 5


class Silent:
    """As much of a worker as the watch looks at."""

    def __init__(self) -> None:
        self.heard_s, self.has_stalled = trio.current_time(), False


@pytest.mark.parametrize(
    ("is_loading", "runs", "allowed_s"),
    [
        (True, 0, limits.WORKER_LOAD_TIMEOUT_S),
        (False, 0, math.inf),
        (False, 1, limits.WORKER_STALL_S),
        (False, -1, math.inf),  # the run is over; its reader takes his time
    ],
)
async def test_who_owes_nothing_may_be_silent(is_loading: bool, runs: int, allowed_s: float, autojump_clock: trio.abc.Clock) -> None:
    cargo = GgufCargo(Load("m", "/m.gguf", HASH, 0, 1, 0, 0, 1))
    worker: Any = Silent()
    if not is_loading:
        cargo._worker = worker
    if runs:
        cargo._runs[1] = cargo_module._Run(1, refusal=Refused(Code.CANCELLED, "over") if runs < 0 else None)
    with trio.move_on_after(10_000) as waited, trio.CancelScope() as scope:
        await cargo._watch(worker, scope)
        lasted_s = trio.current_time()
    assert waited.cancelled_caught == (allowed_s == math.inf)
    assert worker.has_stalled == (allowed_s != math.inf)
    if allowed_s != math.inf:
        assert allowed_s < lasted_s <= allowed_s + limits.WORKER_STALL_S / 5


async def test_a_job_after_a_long_rest_has_the_full_time(autojump_clock: trio.abc.Clock) -> None:
    cargo = GgufCargo(Load("m", "/m.gguf", HASH, 0, 1, 0, 0, 1))
    worker: Any = SimpleNamespace(heard_s=trio.current_time(), send_nowait=lambda _: None)
    cargo._worker = worker
    await trio.sleep(10 * limits.WORKER_STALL_S)
    with trio.move_on_after(1.0):
        async with cargo.run(asked(endless(1))):
            pass
    assert trio.current_time() - worker.heard_s <= 1.0


async def test_closing_ends_an_idle_worker(smollm2_path: Path) -> None:
    async with opened(smollm2_path) as cargo:
        worker = cargo._worker
        assert worker is not None
    assert not cargo.alive and isinstance(worker, WorkerProcess)
    assert worker.process.returncode == 0, "it ends by itself, without being killed"


async def test_closing_ends_the_worker_and_what_still_runs(smollm2_path: Path) -> None:
    async with opened(smollm2_path) as cargo:
        worker = cargo._worker
        assert worker is not None
        async with cargo.run(asked(endless(1500))) as run:
            events = aiter(run)
            await anext(events)
            await cargo.aclose()
            with pytest.raises(Refused) as caught:
                async for _ in events:
                    pass
        assert caught.value.code is Code.WORKER_DIED
        await cargo.aclose()
        assert not cargo.alive and isinstance(worker, WorkerProcess) and worker.process.returncode == 0
        with pytest.raises(Refused):
            await ask(cargo, endless(1))
    assert cargo.restarts == 0


async def test_an_error_of_the_caller_comes_out_as_it_is_and_ends_the_worker(smollm2_path: Path) -> None:
    pid = 0
    with pytest.raises(KeyError, match="mine"):
        async with open_gguf_cargo(
            name="m", path=smollm2_path, content_hash=HASH, memory_limit_bytes=LIMIT_BYTES, threads=1, slots=1
        ) as cargo:
            pid = cargo.worker_pid
            raise KeyError("mine")
    assert pid and is_gone(pid)


NODE = """
import sys, trio
from runtimes.gguf.cargo import open_gguf_cargo

async def main():
    path, limit = sys.argv[1], 450_000_000
    async with open_gguf_cargo(name="m", path=path, content_hash="0" * 64, memory_limit_bytes=limit, threads=1, slots=1) as cargo:
        print(cargo.worker_pid, flush=True)
        await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.parametrize("hears", [True, False])
def test_the_worker_ends_with_its_node_even_on_kill_9(hears: bool, smollm2_path: Path) -> None:
    """It reads the end of the stream; one that cannot, here since it is stopped, is ended by the kernel."""
    if not hears and sys.platform != "linux":
        pytest.skip("only Linux ends a process with its parent")
    with subprocess.Popen([sys.executable, "-c", NODE, str(smollm2_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as node:
        assert node.stdout is not None
        pid = int(node.stdout.readline())
        assert not is_gone(pid)
        if not hears:
            os.kill(pid, signal.SIGSTOP)
        node.kill()
        node.wait()
    deadline = time.monotonic() + 5.0
    while not is_gone(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_gone(pid)


async def test_no_secret_of_the_node_reaches_the_worker(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ("ARCHIPELAG_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "PYTHONSTARTUP", "LD_PRELOAD_TOKEN", "MY_CUDA_")
    for name in secrets:
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert "s3cret" not in worker_environment().values()
    assert worker_environment()["CUDA_VISIBLE_DEVICES"] == "3"
    async with opened(smollm2_path) as cargo:
        found = psutil.Process(cargo.worker_pid).environ()
        assert found["CUDA_VISIBLE_DEVICES"] == "3" and found["GGML_NO_BACKTRACE"] == "1"
        assert not set(secrets) & set(found) and "s3cret" not in found.values()
