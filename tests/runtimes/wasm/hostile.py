"""Modules in text form for the tests: small, and most of them up to no good."""

from __future__ import annotations

import hashlib

import wasmtime

_IMPORTS = """
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (import "wasi_snapshot_preview1" "random_get" (func $random_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "clock_time_get" (func $clock (param i32 i64 i32) (result i32)))
"""
DONE = '{"type":"done"}\n'


def escaped(text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    return "".join(f"\\{byte:02x}" for byte in data)


def program(start: str, *, data: str | bytes = DONE, imports: str = _IMPORTS, memory: str = "2", more: str = "") -> bytes:
    """A module whose ``_start`` has this body. ``data`` lies at 1024; ``(call $say (i32.const 1024) (i32.const N))`` writes it."""
    say = """
      (func $say (param i32 i32)
        (i32.store (i32.const 0) (local.get 0)) (i32.store (i32.const 4) (local.get 1))
        (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))
    """
    text = f"""(module {imports} (memory (export "memory") {memory}) (data (i32.const 1024) "{escaped(data)}")
      {say if imports == _IMPORTS else ""} {more} (func (export "_start") {start}))"""
    return bytes(wasmtime.wat2wasm(text))


def says(output: str | bytes, after: str = "") -> bytes:
    """A module that writes this, then goes on with ``after``."""
    size = len(output.encode() if isinstance(output, str) else output)
    pages = 2 + size // 65536
    return program(f"(call $say (i32.const 1024) (i32.const {size})) {after}", data=output, memory=str(pages))


def sha256(module: bytes) -> str:
    return hashlib.sha256(module).hexdigest()


LOOP = program("(loop $again (br $again))")
TIMED_LOOP = program("(loop $again (drop (call $clock (i32.const 0) (i64.const 0) (i32.const 64))) (br $again))")
STACK = program("(call $deeper (i64.const 1))", more="(func $deeper (param i64) (call $deeper (i64.add (local.get 0) (i64.const 1))))")
TRAP = program("unreachable")
WILD = program("(drop (i32.load (i32.const -64)))")
DIVIDE = program("(drop (i32.div_u (i32.const 1) (i32.load (i32.const 512))))")
# Takes pages until it gets no more, then says how many it has got
BOMB = program(
    """(local $n i32)
    (block $full (loop $again
      (br_if $full (i32.eq (memory.grow (i32.const 64)) (i32.const -1)))
      (memory.fill (i32.sub (i32.mul (memory.size) (i32.const 65536)) (i32.const 4194304)) (i32.const 1) (i32.const 4194304))
      (br $again)))
    (call $say (i32.const 1024) (i32.const 16))
    (call $proc_exit (i32.shr_u (memory.size) (i32.const 6)))"""
)
FLOOD = program("(loop $again (call $say (i32.const 1024) (i32.const 65536)) (br $again))", data=b"x" * 8)
WORDS = '{"type":"token","content":"word "}\n'
CHATTER = program(f"(loop $again (call $say (i32.const 1024) (i32.const {len(WORDS)})) (br $again))", data=WORDS)
# stdin to stdout, up to 64 KiB
ECHO = program(
    """(i32.store (i32.const 16) (i32.const 2048)) (i32.store (i32.const 20) (i32.const 65536))
    (drop (call $fd_read (i32.const 0) (i32.const 16) (i32.const 1) (i32.const 24)))
    (call $say (i32.const 2048) (i32.load (i32.const 24)))"""
)
CHANCE = program("(drop (call $random_get (i32.const 2048) (i32.const 32))) (call $say (i32.const 2048) (i32.const 32))")


def _leb(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes(out) + bytes([number])


def _section(number: int, data: bytes) -> bytes:
    return bytes([number]) + _leb(len(data)) + data


def many_functions(count: int) -> bytes:
    """A valid module whose compilation takes long: about 25 functions a millisecond."""
    parts = (
        _section(1, b"\x01\x60\0\0"),
        _section(3, _leb(count) + b"\0" * count),
        _section(5, b"\x01\0\x01"),
        _section(7, b"\x02\x06memory\x02\0\x06_start\0\0"),
        _section(10, _leb(count) + b"\x02\0\x0b" * count),
    )
    return b"\0asm\1\0\0\0" + b"".join(parts)
