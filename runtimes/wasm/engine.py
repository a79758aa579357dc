"""Compiles WASM modules and runs them in this process, strictly: what is not listed in wasi.py is refused before anything runs.

One engine runs one job at a time, since wasmtime's epoch, by which a job is interrupted from another thread, belongs to the engine.
Two things bound a job: fuel, which counts instructions and so ends it at the same place everywhere, and the caller's clock by
``interrupt``. Native code may still fail; whoever runs modules of others does it in a worker process (cargo.py).
"""

from __future__ import annotations

import ctypes
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import wasmtime
from wasmtime import ExportType, FuncType, MemoryType, TrapCode, ValType

from protocol import checks, limits
from protocol.errors import ConfigError, LocalProtocolError
from runtimes.lines.engine import JobStopped
from runtimes.lines.messages import Outcome
from runtimes.wasm import wasi

_COMPILED_MAX = 64
_GUARD_BYTES = 64 * 1024
_PAGE_BYTES = 64 * 1024
_ENTRY = "_start"
_MAGIC = b"\0asm\1\0\0\0"
ENGINE_NAME = f"wasmtime-{version('wasmtime')}"


@dataclass(frozen=True, slots=True)
class RunLimits:
    """Of one job; what is left out is the most that there is."""

    fuel: int = limits.WASM_FUEL_MAX
    output_bytes: int = limits.CARGO_OUTPUT_BYTES_DEFAULT

    def __post_init__(self) -> None:
        checks.in_range("fuel", self.fuel, 1, limits.WASM_FUEL_MAX)
        checks.in_range("output_bytes", self.output_bytes, 1, limits.CARGO_OUTPUT_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class RunResult:
    """``message``: for a person, empty where the module ended by itself with code 0. ``stderr``: the beginning of what it wrote there."""

    outcome: Outcome
    message: str
    exit_code: int
    fuel_used: int
    output_bytes: int
    stderr: bytes

    @property
    def is_good(self) -> bool:
        return self.outcome is Outcome.EXITED and self.exit_code == 0


@dataclass(frozen=True, slots=True)
class Compiled:
    """A module that may be run. ``content_hash``: SHA-256 of its bytes."""

    content_hash: str
    engine: WasmEngine
    ready: wasmtime.InstancePre


class WasmEngine:
    """wasmtime with our settings, and the modules that it has compiled."""

    def __init__(self) -> None:
        self._engine = wasmtime.Engine(_config())
        self._linker = wasmtime.Linker(self._engine)
        self._compiled: OrderedDict[str, Compiled] = OrderedDict()
        self._running = threading.Lock()
        self._job: wasi.Job | None = None
        self._define()

    def __repr__(self) -> str:
        return f"<WasmEngine {len(self._compiled)} modules{', running' if self._running.locked() else ''}>"

    def _define(self) -> None:
        kinds = {"i": ValType.i32, "I": ValType.i64}
        for name, (parameters, function) in wasi.FUNCTIONS.items():
            results = [] if name == "proc_exit" else [ValType.i32()]
            self._linker.define_func(
                wasi.MODULE, name, FuncType([kinds[p]() for p in parameters], results), partial(self._call, function)
            )

    def _call(self, function: wasi.Call, *arguments: int) -> int | None:
        if self._job is None:
            raise LocalProtocolError("no job runs")
        return wasi.call(function, self._job, arguments)

    def compile(self, module: bytes, content_hash: str) -> Compiled:
        """A checked module, from memory where it was compiled before. Raises ConfigError with what is wrong with it."""
        if len(module) > limits.WASM_MODULE_BYTES_MAX:
            raise ConfigError(f"the module has {len(module)} bytes; at most {limits.WASM_MODULE_BYTES_MAX} are allowed")
        if hashlib.sha256(module).hexdigest() != content_hash:
            raise ConfigError(f"the module is not the one that was signed: its SHA-256 is not {content_hash:.16}…; fetch it again")
        if content_hash not in self._compiled:
            self._compiled[content_hash] = Compiled(content_hash, self, self._prepare(module))
            if len(self._compiled) > _COMPILED_MAX:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(content_hash)
        return self._compiled[content_hash]

    def _prepare(self, data: bytes) -> wasmtime.InstancePre:
        if not data.startswith(_MAGIC):  # wasmtime would take text too, and a component is another thing
            raise ConfigError("the file is no WebAssembly module (version 1); build it for wasm32-wasi")
        try:
            module = wasmtime.Module(self._engine, data)
            _check_imports(module)
            _check_exports(module.exports)
            return self._linker.instantiate_pre(module)
        except wasmtime.WasmtimeError as error:
            raise ConfigError(f"the module is not valid: {checks.made_printable(str(error), 300)}") from None

    def interrupt(self) -> None:
        """Ends the job that runs now, from any thread; nothing where none does."""
        self._engine.increment_epoch()

    def run(
        self, compiled: Compiled, data: bytes, emit: Callable[[bytes], None], most: RunLimits | None = None, seed: bytes = b""
    ) -> RunResult:
        """Runs ``_start`` to its end. ``data``: stdin. ``emit``: called with pieces of stdout as they come; it may wait, and may raise
        JobStopped. Never raises for what the module does. Raises LocalProtocolError where a job runs already."""
        most = most or RunLimits()
        job = wasi.Job(data, emit, most.output_bytes, seed)
        with self._owned(job), _store(self._engine, most.fuel) as store:
            outcome, message, code = self._start(compiled, store, job)
            fuel_used = most.fuel - store.get_fuel()
        return RunResult(outcome, message, code, fuel_used, job.output_bytes, bytes(job.stderr))

    @contextmanager
    def _owned(self, job: wasi.Job) -> Iterator[None]:
        if not self._running.acquire(blocking=False):
            raise LocalProtocolError("an engine runs one job at a time")
        try:
            self._job = job
            yield
        finally:
            self._job = None
            self._running.release()

    def _start(self, compiled: Compiled, store: wasmtime.Store, job: wasi.Job) -> tuple[Outcome, str, int]:
        try:
            exports = compiled.ready.instantiate(store).exports(store)
            memory, start = exports["memory"], exports[_ENTRY]
            if not isinstance(memory, wasmtime.Memory) or not isinstance(start, wasmtime.Func):
                raise LocalProtocolError("a module's exports have changed since it was checked")
            job.memory = _Memory(store, memory)
            start(store)
            return Outcome.EXITED, "", 0
        except wasi.Exit as ended:
            return Outcome.EXITED, f"the module ended with code {ended.code}" if ended.code else "", ended.code
        except wasi.OutputLimit:
            return Outcome.OUTPUT_LIMIT, f"the module wrote more than {job.output_bytes_max} bytes", 0
        except JobStopped:
            return Outcome.INTERRUPTED, _INTERRUPTED, 0
        except wasmtime.Trap as trap:
            return _of_trap(trap)
        except wasmtime.WasmtimeError as error:  # memory that the host could not give
            return Outcome.TRAPPED, f"the module could not be started: {checks.made_printable(str(error), 300)}", 0


def run_module(
    compiled: Compiled, data: bytes, emit: Callable[[bytes], None], most: RunLimits | None = None, seed: bytes = b""
) -> RunResult:
    """See WasmEngine.run."""
    return compiled.engine.run(compiled, data, emit, most, seed)


@dataclass(frozen=True, slots=True)
class _Memory:
    store: wasmtime.Store
    memory: wasmtime.Memory

    def span(self) -> tuple[int, int]:
        return ctypes.addressof(self.memory.data_ptr(self.store).contents), self.memory.data_len(self.store)


def _config() -> wasmtime.Config:
    """What is off is off since it is another way to run out of memory, or differs between machines."""
    config = wasmtime.Config()
    config.consume_fuel = True
    config.epoch_interruption = True
    config.max_wasm_stack = limits.WASM_STACK_BYTES_MAX
    config.cranelift_nan_canonicalization = True
    config.parallel_compilation = False
    config.wasm_threads = False
    config.wasm_memory64 = False
    config.wasm_multi_memory = False
    config.wasm_relaxed_simd = False
    config.wasm_component_model = False
    config.wasm_stack_switching = False
    config.wasm_function_references = False
    config.wasm_gc = False
    config.wasm_exceptions = False
    # Not 4 GiB of addresses for each memory, so that a limit on addresses can hold for the whole process
    config.memory_reservation = limits.WASM_MEMORY_BYTES_MAX
    config.memory_guard_size = _GUARD_BYTES
    config.memory_may_move = False
    return config


@contextmanager
def _store(engine: wasmtime.Engine, fuel: int) -> Iterator[wasmtime.Store]:
    """Of one job; its memory is given back at the end."""
    store = wasmtime.Store(engine)
    try:
        store.set_limits(limits.WASM_MEMORY_BYTES_MAX, limits.WASM_TABLE_ELEMENTS_MAX, instances=1, tables=4, memories=1)
        store.set_fuel(fuel)
        store.set_epoch_deadline(1)
        yield store
    finally:
        store.close()


def _check_imports(module: wasmtime.Module) -> None:
    """Raises ConfigError naming what an Island does not offer."""
    unknown = []
    for item in module.imports:
        known = wasi.FUNCTIONS.get(item.name or "") if item.module == wasi.MODULE else None
        if known is None or not isinstance(item.type, FuncType):
            unknown.append(f"{item.module}.{item.name}")
    if unknown:
        names = checks.made_printable(", ".join(unknown[:8]), 300)
        raise ConfigError(f"the module imports what Islands do not offer: {names}; a module has stdin, stdout and stderr only")


def _check_exports(exports: list[ExportType]) -> None:
    by_name = {item.name: item.type for item in exports}
    start, memory = by_name.get(_ENTRY), by_name.get("memory")
    if not isinstance(start, FuncType) or start.params or start.results:
        raise ConfigError(f"the module has no entry point {_ENTRY}; build a program with main, not a library")
    if not isinstance(memory, MemoryType):
        raise ConfigError("the module exports no memory")
    if memory.limits.min * _PAGE_BYTES > limits.WASM_MEMORY_BYTES_MAX:
        raise ConfigError(f"the module begins with more than {limits.WASM_MEMORY_BYTES_MAX} bytes of memory")


_INTERRUPTED = "the module was told to end"
_OUTCOMES = {
    TrapCode.OUT_OF_FUEL: (Outcome.OUT_OF_FUEL, "the module has used up its fuel"),
    TrapCode.INTERRUPT: (Outcome.INTERRUPTED, _INTERRUPTED),
    TrapCode.STACK_OVERFLOW: (Outcome.OUT_OF_STACK, f"the module's stack is over {limits.WASM_STACK_BYTES_MAX} bytes"),
}
_TRAPS = {
    TrapCode.MEMORY_OUT_OF_BOUNDS: "it reached out of its memory",
    TrapCode.TABLE_OUT_OF_BOUNDS: "it reached out of a table",
    TrapCode.INDIRECT_CALL_TO_NULL: "it called a function that is not there",
    TrapCode.BAD_SIGNATURE: "it called a function of another type",
    TrapCode.INTEGER_OVERFLOW: "integer overflow",
    TrapCode.INTEGER_DIVISION_BY_ZERO: "division by zero",
    TrapCode.BAD_CONVERSION_TO_INTEGER: "a number that is no integer",
    TrapCode.UNREACHABLE: "it aborted",
}


def _of_trap(trap: wasmtime.Trap) -> tuple[Outcome, str, int]:
    code = trap.trap_code
    if code in _OUTCOMES:
        return *_OUTCOMES[code], 0
    reason = _TRAPS.get(code) if code is not None else None
    return Outcome.TRAPPED, f"the module crashed: {reason or 'trap'}", 0
