"""The engine in this process: what is refused before it runs, how hostile modules end, and that equal runs are equal."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

import pytest
import wasmtime

from protocol import limits
from protocol.errors import ConfigError, LocalProtocolError
from runtimes.lines.engine import JobStopped
from runtimes.lines.messages import Outcome
from runtimes.wasm.engine import RunLimits, RunResult, WasmEngine, run_module
from tests.runtimes.wasm import hostile


@dataclass
class Sink:
    pieces: list[bytes] = field(default_factory=list)

    def __call__(self, data: bytes) -> None:
        self.pieces.append(data)


@pytest.fixture(scope="module")
def engine() -> WasmEngine:
    return WasmEngine()


def run(
    engine: WasmEngine, module: bytes, data: bytes = b"{}", most: RunLimits | None = None, seed: bytes = b""
) -> tuple[RunResult, bytes]:
    sink = Sink()
    result = run_module(engine.compile(module, hostile.sha256(module)), data, sink, most, seed)
    return result, b"".join(sink.pieces)


def test_stdin_to_stdout(engine: WasmEngine) -> None:
    result, out = run(engine, hostile.ECHO, b'{"a": 1}')
    assert out == b'{"a": 1}' and result.is_good and result.message == ""
    assert 0 < result.fuel_used < 1000 and result.output_bytes == 8


def test_runs_are_equal_and_leave_nothing_behind(engine: WasmEngine) -> None:
    results = [run(engine, hostile.CHANCE, seed=b"a") for _ in range(3)]
    assert results[0] == results[1] == results[2] and len(results[0][1]) == 32
    assert run(engine, hostile.CHANCE, seed=b"b")[1] != results[0][1]
    counter = hostile.program("(call $say (i32.const 1024) (i32.const 1)) (i32.store8 (i32.const 1024) (i32.const 88))", data="A")
    assert [run(engine, counter)[1] for _ in range(2)] == [b"A", b"A"]


def test_the_clock_is_a_counter(engine: WasmEngine) -> None:
    tell = hostile.program("(drop (call $clock (i32.const 0) (i64.const 0) (i32.const 64))) (call $say (i32.const 64) (i32.const 8))")
    outs = {run(engine, tell)[1] for _ in range(3)}
    assert [int.from_bytes(out, "little") for out in outs] == [1_577_836_800_001_000_000]


@pytest.mark.parametrize(
    ("module", "outcome", "says"),
    [
        (hostile.STACK, Outcome.OUT_OF_STACK, "stack is over 524288 bytes"),
        (hostile.TRAP, Outcome.TRAPPED, "it aborted"),
        (hostile.WILD, Outcome.TRAPPED, "out of its memory"),
        (hostile.DIVIDE, Outcome.TRAPPED, "division by zero"),
        (hostile.program("(call $proc_exit (i32.const 3))"), Outcome.EXITED, "code 3"),
        (hostile.program("(call $proc_exit (i32.const -1))"), Outcome.EXITED, "code 4294967295"),
    ],
)
def test_bad_ends(engine: WasmEngine, module: bytes, outcome: Outcome, says: str) -> None:
    result, _ = run(engine, module)
    assert result.outcome is outcome and says in result.message and not result.is_good


def test_fuel_ends_a_loop_at_the_same_place(engine: WasmEngine) -> None:
    first, second = (run(engine, hostile.TIMED_LOOP, most=RunLimits(fuel=100_000))[0] for _ in range(2))
    assert first.outcome is Outcome.OUT_OF_FUEL and first == second


def test_a_loop_is_interrupted_from_another_thread(engine: WasmEngine) -> None:
    threading.Timer(0.05, engine.interrupt).start()
    began = time.monotonic()
    result, _ = run(engine, hostile.LOOP)
    assert result.outcome is Outcome.INTERRUPTED
    assert time.monotonic() - began < 5


def test_memory_ends_at_the_cap(engine: WasmEngine) -> None:
    result, out = run(engine, hostile.BOMB)
    assert out.startswith(b'{"type":"done"}')
    assert result.exit_code <= limits.WASM_MEMORY_BYTES_MAX // (64 * 65536)
    assert result.exit_code >= limits.WASM_MEMORY_BYTES_MAX // (64 * 65536) - 1


def test_ten_gigabytes_of_output_end_at_the_limit(engine: WasmEngine) -> None:
    sizes = []
    module = engine.compile(hostile.FLOOD, hostile.sha256(hostile.FLOOD))
    result = engine.run(module, b"", lambda data: sizes.append(len(data)), RunLimits(output_bytes=10_000_000))
    assert result.outcome is Outcome.OUTPUT_LIMIT and "more than 10000000 bytes" in result.message
    assert sum(sizes) == result.output_bytes <= 10_000_000 and max(sizes) <= 65536


def test_one_write_of_many_overlapping_vectors_is_counted_too(engine: WasmEngine) -> None:
    """1,024 vectors that all show the same 100 KB: 100 MB in one call."""
    fill = """(local $i i32) (loop $next
        (i32.store (i32.add (i32.const 131072) (i32.mul (local.get $i) (i32.const 8))) (i32.const 1024))
        (i32.store (i32.add (i32.const 131076) (i32.mul (local.get $i) (i32.const 8))) (i32.const 100000))
        (br_if $next (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 1024))))"""
    for fd, outcome in ((1, Outcome.OUTPUT_LIMIT), (2, Outcome.EXITED)):
        write = f"(drop (call $fd_write (i32.const {fd}) (i32.const 131072) (i32.const 1024) (i32.const 8)))"
        result, _ = run(engine, hostile.program(fill + write, memory="4"), most=RunLimits(output_bytes=1_000_000))
        assert result.outcome is outcome
        assert len(result.stderr) == (0 if fd == 1 else limits.WASM_STDERR_BYTES_MAX)


@pytest.mark.parametrize(
    "call",
    [
        "$fd_write (i32.const 1) (i32.const -8) (i32.const 1) (i32.const 8)",
        "$fd_write (i32.const 1) (i32.const 131064) (i32.const 2) (i32.const 8)",
        "$fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const -1)",
        "$fd_read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const -1)",
        "$random_get (i32.const 131070) (i32.const 100)",
        "$clock (i32.const 0) (i64.const 0) (i32.const -4)",
    ],
)
def test_pointers_that_lead_out_are_an_error_of_the_call(engine: WasmEngine, call: str) -> None:
    module = hostile.program(f"(call $proc_exit (call {call}))")
    assert run(engine, module)[0].exit_code == 21  # EFAULT


@pytest.mark.parametrize(
    ("call", "errno"),
    [
        ("$fd_write (i32.const 3) (i32.const 0) (i32.const 1) (i32.const 8)", 8),
        ("$fd_write (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)", 8),
        ("$fd_write (i32.const 1) (i32.const 0) (i32.const -1) (i32.const 8)", 28),
        ("$fd_write (i32.const 1) (i32.const 0) (i32.const 1025) (i32.const 8)", 28),
        ("$fd_read (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)", 8),
        ("$random_get (i32.const 0) (i32.const 100000)", 28),
        ("$random_get (i32.const 0) (i32.const -1)", 28),
        ("$clock (i32.const 9) (i64.const 0) (i32.const 64)", 28),
    ],
)
def test_calls_that_make_no_sense(engine: WasmEngine, call: str, errno: int) -> None:
    assert run(engine, hostile.program(f"(call $proc_exit (call {call}))"))[0].exit_code == errno


def test_files_are_not_there(engine: WasmEngine) -> None:
    imports = """
      (import "wasi_snapshot_preview1" "path_open" (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_prestat_get" (func $prestat (param i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ (param i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))"""
    zero = "(i32.const 0)"
    opened = f"(call $open (i32.const 3) {zero} {zero} (i32.const 4) {zero} (i64.const -1) (i64.const -1) {zero} (i32.const 64))"
    environ = """(drop (call $environ (i32.const 64) (i32.const 68)))
      (call $proc_exit (i32.add (i32.load (i32.const 64)) (i32.load (i32.const 68))))"""
    for body, code in (
        (f"(call $proc_exit {opened})", 52),
        ("(call $proc_exit (call $prestat (i32.const 3) (i32.const 64)))", 8),
        (environ, 0),
    ):
        assert run(engine, hostile.program(body, imports=imports))[0].exit_code == code


def test_sleeping_sets_the_clock_forward_and_takes_no_time(engine: WasmEngine) -> None:
    imports = """
      (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))"""
    body = """(i32.store (i32.const 16) (i32.const 1)) (i64.store (i32.const 24) (i64.const 3600000000000))
      (drop (call $clock (i32.const 1) (i64.const 0) (i32.const 256)))
      (if (call $poll (i32.const 0) (i32.const 512) (i32.const 1) (i32.const 600)) (then (call $proc_exit (i32.const 99))))
      (drop (call $clock (i32.const 1) (i64.const 0) (i32.const 264)))
      (call $proc_exit (i32.wrap_i64 (i64.div_u (i64.sub (i64.load (i32.const 264)) (i64.load (i32.const 256))) (i64.const 1000000000))))"""
    began = time.monotonic()
    assert run(engine, hostile.program(body, imports=imports))[0].exit_code == 3600
    assert time.monotonic() - began < 5


def wat(text: str) -> bytes:
    return bytes(wasmtime.wat2wasm(text))


_MEMORY = '(memory (export "memory") 1)'


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (b"", "no WebAssembly module"),
        (b"(module)", "no WebAssembly module"),
        (b"\x7fELF" + bytes(64), "no WebAssembly module"),
        (b"\0asm\x0d\0\1\0", "no WebAssembly module"),
        (hostile.ECHO[:-5], "is not valid"),
        (b"\0asm\1\0\0\0" + b"\xff" * 100, "is not valid"),
        (wat(f"(module {_MEMORY})"), "no entry point _start"),
        (wat(f'(module {_MEMORY} (func (export "_start") (param i32)))'), "no entry point _start"),
        (wat(f'(module {_MEMORY} (global (export "_start") i32 (i32.const 0)))'), "no entry point _start"),
        (wat('(module (func (export "_start")))'), "exports no memory"),
        (wat('(module (memory (export "memory") 5000) (func (export "_start")))'), "begins with more than"),
        (wat(f'(module (import "env" "system" (func (param i32))) {_MEMORY} (func (export "_start")))'), "env.system"),
        (
            wat(f'(module (import "wasi_snapshot_preview1" "sock_open" (func (param i32))) {_MEMORY} (func (export "_start")))'),
            "wasi_snapshot_preview1.sock_open",
        ),
        (
            wat(f'(module (import "wasi_snapshot_preview1" "fd_write" (func (param i64))) {_MEMORY} (func (export "_start")))'),
            "is not valid",
        ),
        (
            wat(f'(module (import "wasi_snapshot_preview1" "fd_write" (global i32)) {_MEMORY} (func (export "_start")))'),
            "wasi_snapshot_preview1.fd_write",
        ),
        (wat('(module (memory (export "memory") i64 1) (func (export "_start")))'), "is not valid"),
        (wat(f'(module {_MEMORY} (memory 1) (func (export "_start")))'), "is not valid"),
        (wat('(module (memory (export "memory") 1 2 shared) (func (export "_start")))'), "is not valid"),
    ],
)
def test_what_is_refused_before_it_runs(engine: WasmEngine, module: bytes, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        engine.compile(module, hostile.sha256(module))
    assert says in str(error.value)


def test_a_changed_or_too_large_module_is_refused(engine: WasmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="not the one that was signed"):
        engine.compile(hostile.ECHO, hostile.sha256(hostile.LOOP))
    monkeypatch.setattr(limits, "WASM_MODULE_BYTES_MAX", 100)
    with pytest.raises(ConfigError, match="at most 100"):
        engine.compile(hostile.ECHO, hostile.sha256(hostile.ECHO))


def test_modules_are_compiled_once(engine: WasmEngine) -> None:
    compiled = [engine.compile(hostile.ECHO, hostile.sha256(hostile.ECHO)) for _ in range(2)]
    assert compiled[0] is compiled[1]


def test_a_start_section_is_bounded_as_well(engine: WasmEngine) -> None:
    module = wat(f'(module {_MEMORY} (func $s (loop $a (br $a))) (start $s) (func (export "_start")))')
    assert run(engine, module, most=RunLimits(fuel=10_000))[0].outcome is Outcome.OUT_OF_FUEL


def test_a_table_bomb_is_bounded(engine: WasmEngine) -> None:
    grow = "(call $proc_exit (i32.eq (table.grow $t (ref.null func) (i32.const 100000000)) (i32.const -1)))"
    assert run(engine, hostile.program(grow, more="(table $t 1 funcref)"))[0].exit_code == 1


def test_emit_may_end_the_run_and_its_other_errors_are_not_hidden(engine: WasmEngine) -> None:
    compiled = engine.compile(hostile.FLOOD, hostile.sha256(hostile.FLOOD))

    def stop(data: bytes) -> None:
        raise JobStopped

    def fail(data: bytes) -> None:
        raise OSError("pipe")

    assert engine.run(compiled, b"", stop).outcome is Outcome.INTERRUPTED
    with pytest.raises(OSError, match="pipe"):
        engine.run(compiled, b"", fail)
    assert run(engine, hostile.ECHO, b"after")[1] == b"after"


def test_one_job_at_a_time(engine: WasmEngine) -> None:
    compiled = engine.compile(hostile.ECHO, hostile.sha256(hostile.ECHO))

    def nested(data: bytes) -> None:
        engine.run(compiled, b"", lambda _: None)

    with pytest.raises(LocalProtocolError, match="one job at a time"):
        engine.run(compiled, b"x", nested)
