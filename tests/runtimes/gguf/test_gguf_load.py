"""Model files that are damaged, engines that crash on them, and the memory that a whole one takes: said in sentences, never by a crash."""

from __future__ import annotations

import os
import random
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import psutil
import pytest
import trio

from protocol import limits
from protocol.errors import ConfigError
from protocol.generation import GenerationRequest
from runtimes.base import RunRequest
from runtimes.gguf import llama as llama_module
from runtimes.gguf import load as load_module
from runtimes.gguf import process as process_module
from runtimes.gguf.budget import PROCESS_BYTES, KvShape
from runtimes.gguf.cargo import GgufCargo, open_gguf_cargo
from runtimes.gguf.layers import Stage
from runtimes.gguf.llama import ContextSize, LlamaError, Model, buffer_bytes
from runtimes.gguf.messages import Load

HASH = "5a" * 32
LIMIT_BYTES = 450_000_000  # 2048 cells of SmolLM2-135M
DATA_START = 1_785_664  # of the model that the tests use: behind metadata and list of tensors
Damage = Callable[[bytes], bytes]


async def attempt(path: Path, **options: Any) -> GgufCargo:
    """Opens a Cargo and closes it again; what it spawned must be gone, however that went."""
    before = {child.pid for child in psutil.Process().children()}
    given: dict[str, Any] = {"memory_limit_bytes": LIMIT_BYTES, "threads": 1, "slots": 2}
    try:
        with trio.fail_after(60):
            async with open_gguf_cargo(name="m", path=path, content_hash=HASH, **(given | options)) as cargo:
                return cargo
    finally:
        assert {child.pid for child in psutil.Process().children()} <= before


@pytest.fixture(scope="module")
def whole(smollm2_path: Path) -> bytes:
    return smollm2_path.read_bytes()


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Path]:
    """A place for one file; pytest would keep 98 MB of each."""
    path = tmp_path / "damaged.gguf"
    yield path
    path.unlink(missing_ok=True)


def number_at(key: bytes, value: int) -> Damage:
    """The metadata say another number."""

    def damage(data: bytes) -> bytes:
        at = data.index(key) + len(key) + 4  # behind the type
        return data[:at] + struct.pack("<I", value) + data[at + 4 :]

    return damage


def text_at(old: bytes, new: bytes) -> Damage:
    assert len(old) == len(new)
    return lambda data: data.replace(old, new, 1)


def random_behind(start: int) -> Damage:
    return lambda data: data[:start] + random.Random(1).randbytes(len(data) - start)


AGAIN = ".* [Dd]elete it and fetch it again"
DAMAGES: list[tuple[str, Damage, str]] = [
    ("empty", lambda _: b"", "ends after 0 bytes" + AGAIN),
    ("magic alone", lambda _: b"GGUF", "ends after 4 bytes" + AGAIN),
    ("a web page", lambda _: b"<html>Not found</html>" * 99, "not a GGUF model" + AGAIN),
    ("half", lambda data: data[: len(data) // 2], "49,181,216 of at least 98,362,432 bytes" + AGAIN),
    ("a byte short", lambda data: data[:-1], "98,362,431 of at least 98,362,432 bytes" + AGAIN),
    ("cut in the header", lambda data: data[:5000], "inside its header" + AGAIN),
    ("random metadata", random_behind(24), "not a GGUF model" + AGAIN),
    ("random weights", random_behind(DATA_START), "what it computes are no numbers" + AGAIN),
    ("no context", number_at(b"llama.context_length", 0), "context has 0 tokens" + AGAIN),
    ("negative context", number_at(b"llama.context_length", 2**32 - 1), "context has -1 tokens" + AGAIN),
    ("a layer too few", number_at(b"llama.block_count", 29), "wrong number of tensors" + AGAIN),
    ("no heads", number_at(b"llama.attention.head_count", 0), "has wrong shape" + AGAIN),
    ("unknown architecture", text_at(b"llama\x0c", b"camel\x0c"), "unknown model architecture: 'camel'" + AGAIN),
    ("template", text_at(b"{% endfor %}", b"{% endfar %}"), "chat template cannot be used.* use another model file"),
    ("a text a byte longer", text_at(b"<|endoftext|>\x0c", b"<|endoftext|>\x0d"), "not a GGUF model" + AGAIN),
    # On these llama.cpp aborts the process.
    ("no layers", number_at(b"llama.block_count", 0), r"crashed twice \(SIGABRT\)" + AGAIN),
    ("a token twice", text_at(b"<jupyter_text>", b"<jupyter_code>"), r"crashed twice \(SIGABRT\)" + AGAIN),
]


@pytest.mark.parametrize(("damage", "sentence"), [rest for _, *rest in DAMAGES], ids=[name for name, *_ in DAMAGES])
async def test_a_damaged_file_is_a_sentence(damage: Damage, sentence: str, whole: bytes, damaged: Path) -> None:
    damaged.write_bytes(damage(whole))
    with pytest.raises(ConfigError, match=sentence) as caught:
        await attempt(damaged)
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)
    assert "Dumping metadata" not in str(caught.value), "of llama.cpp's log only what went wrong"


async def test_a_path_without_a_file_is_a_sentence(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none.gguf", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"cannot be read .{reason}.*check the path"):
            await attempt(path)


async def test_flipped_bits_never_end_the_caller(whole: bytes, damaged: Path) -> None:
    """Behind the tokens' texts, where the header's own rules find little: merges, special tokens, template, tensor names and shapes."""
    chance = random.Random(20)
    sentences = 0
    for _ in range(10):
        data = bytearray(whole)
        data[chance.randrange(DATA_START - 18_000, DATA_START)] ^= 1 << chance.randrange(8)
        damaged.write_bytes(data)
        try:
            await attempt(damaged)
        except ConfigError as error:
            assert "again" in str(error) or "another model file" in str(error)
            sentences += 1
    assert sentences >= 5


# Engines that crash while they load.


def program(text: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", f"import os, resource, sys, time\nresource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n{text}"]


DIES = "os.kill(os.getpid(), {})"
TALKS_NONSENSE = "os.write(int(sys.argv[1]), bytes(range(256)))"
HANGS = "time.sleep(100)"


class Spawns:
    """Stands in for the worker's command: these programs first, the real worker behind them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *programs: list[str]) -> None:
        self.programs, self.count = programs, 0
        self._real = process_module.worker_command
        monkeypatch.setattr(process_module, "worker_command", self.command)

    def command(self, descriptor: int) -> list[str]:
        self.count += 1
        if self.count > len(self.programs):
            return self._real(descriptor)
        return [*self.programs[self.count - 1], str(descriptor)]


async def test_a_build_whose_kernels_crash_is_tried_without_them(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Spawns(monkeypatch, program(DIES.format("4")))  # SIGILL
    async with open_gguf_cargo(
        name="m", path=smollm2_path, content_hash=HASH, memory_limit_bytes=LIMIT_BYTES, threads=1, slots=2
    ) as cargo:
        assert plain.count == 2 and cargo.restarts == 1
        assert "/plain/" in cargo.facts().engine
        async with cargo.run(RunRequest("job", GenerationRequest(prompt="x", max_tokens=2), b"")) as run:
            assert [event async for event in run]


async def test_the_engine_is_named_after_what_it_computes(smollm2_path: Path) -> None:
    engine = (await attempt(smollm2_path)).facts().engine
    assert "plain" not in engine and engine.startswith("llama-cpp-python/0.3.") and engine.endswith("/Q4_1/" + HASH[:12])
    order = Load("m", "/m.gguf", HASH, 0, 1, 0, 0, 1)
    name = load_module._engine_name("1.2", "cuda", "qwen3moe 30B.A3B Q4_K - Medium", order)
    assert name == "llama-cpp-python/1.2/cuda/qwen3moe/30B.A3B/Q4_K/-/Medium/5a5a5a5a5a5a"
    assert load_module._engine_name("1.2", "cuda", "ö x", replace(order, plain=True)) == "llama-cpp-python/1.2/cuda/-/x/plain/5a5a5a5a5a5a"


@pytest.mark.parametrize(
    ("programs", "sentence"),
    [
        ([program(DIES.format("4")), program(DIES.format("11"))], r"crashed twice \(SIGSEGV\).*fetch it again"),
        ([program(DIES.format("9"))], "was killed while it loaded .* want of memory; free some or use a smaller model"),
        ([program("sys.exit(3)")], "gave up with code 3 .*make setup"),
        ([program(TALKS_NONSENSE)], "gave up with code 0 .*make setup"),
        ([program(HANGS)], r"was not loaded after 0 s; use a faster disk"),
        ([["/no/such/program"]], "could not be started .*free memory"),
    ],
    ids=["twice", "killed", "exit", "nonsense", "hangs", "absent"],
)
async def test_an_engine_that_cannot_load_is_a_sentence(
    programs: list[list[str]], sentence: str, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawns = Spawns(monkeypatch, *programs)
    monkeypatch.setattr(limits, "WORKER_LOAD_TIMEOUT_S", 0.4)
    monkeypatch.setattr(limits, "WORKER_STALL_S", 0.4)
    with pytest.raises(ConfigError, match=sentence):
        await attempt(smollm2_path)
    assert spawns.count == len(programs)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("sys.modules['llama_cpp'] = None", r"llama-cpp-python cannot be used .*make setup"),
        ("import runtimes.gguf.load as l; l.kv_shape = lambda _: 1 // 0", r"could not be loaded \(ZeroDivisionError.*fetch it again"),
    ],
    ids=["not installed", "surprise"],
)
async def test_a_changed_worker_that_cannot_load_is_a_sentence(
    change: str, sentence: str, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"import runpy, sys; {change}; runpy.run_module('runtimes.gguf.worker', run_name='__main__')"
    monkeypatch.setattr(process_module, "worker_command", lambda fd: [sys.executable, "-P", "-c", text, str(fd), str(os.getpid())])
    with pytest.raises(ConfigError, match=sentence):
        await attempt(smollm2_path)


# Memory.


class Metadata:
    """As much of a model as its shape is read from."""

    def __init__(self, **values: str) -> None:
        self._values = {"general.architecture": "m"} | {f"m.{key.replace('__', '.')}": value for key, value in values.items()}

    def meta(self, key: str) -> str:
        return self._values.get(key, "")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"block_count": "30", "embedding_length": "576", "attention__head_count": "9", "attention__head_count_kv": "3"}, (30, 3, 64, 64)),
        ({"block_count": "2", "embedding_length": "64", "attention__head_count": "4"}, (2, 4, 16, 16)),  # as many for keys as for queries
        ({"block_count": "2", "attention__head_count_kv": "[4, 0, 8]", "attention__key_length": "96"}, (2, 8, 96, 1)),  # one a layer
        ({"attention__head_count": "2", "attention__key_length": "192", "attention__value_length": "128"}, (1, 2, 192, 128)),
        ({}, (1, 1, 1, 1)),
    ],
)
def test_the_shape_of_cells_follows_from_the_metadata(values: dict[str, str], expected: tuple[int, int, int, int]) -> None:
    assert load_module.kv_shape(cast(Model, Metadata(**values))) == KvShape(*expected)


def test_the_shape_and_the_guesses_agree_with_what_llama_allocates(smollm2_path: Path) -> None:
    model = Model(str(smollm2_path), plain=True)
    shape = load_module.kv_shape(model)
    assert shape == KvShape(layers=30, kv_heads=3, key_length=64, value_length=64)
    for cells, sequences in ((256, 66), (1024, 192)):
        size = ContextSize(cells, sequences, batch=512, micro_batch=128, outputs=sequences, threads=1)
        stage = Stage(model, size)
        assert stage.context.cells == cells
        assert load_module._kv_bytes_per_token(shape, stage.context.kv_bytes, cells) == shape.bytes_per_token == 23_040
        assert 0 < stage.context.compute_bytes <= load_module._compute_guess(model.n_vocab, sequences, 128)
        stage.close()
    model.close()


def test_other_cells_than_the_metadata_promise_are_taken_from_the_log() -> None:
    shape = KvShape(layers=30, kv_heads=3, key_length=64, value_length=64)
    assert load_module._kv_bytes_per_token(shape, 2 * 256 * 23_040, 256) == 46_080
    assert load_module._kv_bytes_per_token(shape, 5_893_000, 256) == 23_040  # 5.62 MiB, rounded
    assert load_module._kv_bytes_per_token(shape, 512 * 1000 + 1, 512) == 1001


def test_buffers_are_summed_by_kind() -> None:
    lines = [
        "load_tensors:        CUDA0 model buffer size =  1000.50 MiB",
        "llama_kv_cache:        CPU KV buffer size =    45.00 MiB",
        "llama_kv_cache:      CUDA0 KV buffer size =    15.25 MiB",
        "llama_kv_cache: size =   60.25 MiB (  2048 cells,  30 layers, 72/1 seqs), K (f16):   22.50 MiB, V (f16):   22.50 MiB",
        "sched_reserve:        CPU compute buffer size =    14.42 MiB",
        "llama_context:        CPU  output buffer size =    13.50 MiB",
    ]
    assert buffer_bytes(lines, "KV") == 60.25 * 2**20
    assert buffer_bytes(lines, "model") == 1000.5 * 2**20
    assert buffer_bytes(lines, "compute") == int(14.42 * 2**20) and buffer_bytes(lines, "RS") == 0


def test_of_llamas_log_the_errors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [(2, "overrides do not apply"), (4, "error loading model: no such tensor"), (2, "cleaning up"), (3, "not freed"), (2, "x")]
    log = deque(lines)
    monkeypatch.setattr(llama_module, "_log", log)
    assert llama_module._last_errors() == "error loading model: no such tensor"
    log.remove(log[1])
    assert llama_module._last_errors() == "cleaning up; not freed; x"
    log.clear()
    assert llama_module._last_errors() == "no reason given"


def test_large_vocabularies_need_room_for_their_logits() -> None:
    assert load_module._compute_guess(49_152, 128, 128) == 128 * 2**20
    assert load_module._compute_guess(262_144, 128, 128) >= 269_421_117  # measured for Gemma 3 270M with 64 slots


def no_node(message: object) -> None:
    raise AssertionError(f"a whole model says nothing by itself, but it said {message!r}")


def test_buffers_larger_than_guessed_are_made_again_within_the_limit(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_bytes = 96_576_768 + PROCESS_BYTES + 2500 * 23_040  # the buffers take 1,140 of these cells
    order = Load("m", str(smollm2_path), HASH, limit_bytes, 1, 0, 0, 2, plain=True)
    monkeypatch.setattr(load_module, "_compute_guess", lambda *_: 0)
    loaded = load_module.load(order, no_node)
    loaded.stage.close()
    loaded.model.close()
    ready = loaded.ready
    cells_bytes = ready.kv_tokens * ready.kv_bytes_per_token
    used_bytes = ready.weights_bytes + ready.compute_bytes + PROCESS_BYTES + cells_bytes
    assert limit_bytes - 512 * ready.kv_bytes_per_token < used_bytes <= limit_bytes


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [(None, None, 8_000), (10_000, 4_000, 6_000), (100_000, 4_000, 8_000), (None, 4_000, 8_000)],
)
def test_free_memory_is_the_control_groups_where_that_is_less(
    limit: int | None, used: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"/sys/fs/cgroup/memory.max": limit, "/sys/fs/cgroup/memory.current": used}
    monkeypatch.setattr(load_module, "_read_int", figures.__getitem__)
    monkeypatch.setattr(load_module, "_meminfo_available", lambda: 8_000)
    assert load_module.free_memory_bytes() == expected


def test_metadata_too_long_to_be_read_are_a_sentence(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_long(_: Model) -> KvShape:
        raise LlamaError("the model's metadata llama.attention.head_count_kv has 5000 bytes; the limit is 4096")

    monkeypatch.setattr(load_module, "kv_shape", too_long)
    with pytest.raises(ConfigError, match=r"has 5000 bytes.* fetch it again"):
        load_module.load(Load("m", str(smollm2_path), HASH, LIMIT_BYTES, 1, 0, 0, 2, plain=True), no_node)
