"""Two programs that count the primes below a number: the same question, the same answer, and one of them is much faster.

They are written as WebAssembly text, so that nothing but the engine is needed to make Cargos of them. stdin: ``{"below": N}``; stdout: a
line ``{"type": "done", "primes": COUNT}``.
"""

from __future__ import annotations

import wasmtime

BELOW_MAX = 1_000_000

_AROUND = r"""(module
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 17)                          ;; a page for what is said, 16 for a byte for each number
  (data (i32.const 1024) "{\"type\":\"done\",\"primes\":")
  (data (i32.const 1120) "}\n")

  (func $below (result i32)                              ;; the number that stands on stdin
    (local $at i32) (local $end i32) (local $digit i32) (local $n i32)
    (i32.store (i32.const 0) (i32.const 2048))
    (i32.store (i32.const 4) (i32.const 4096))
    (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
    (local.set $at (i32.const 2048))
    (local.set $end (i32.add (local.get $at) (i32.load (i32.const 8))))
    (loop $next
      (if (i32.lt_u (local.get $at) (local.get $end)) (then
        (local.set $digit (i32.sub (i32.load8_u (local.get $at)) (i32.const 48)))
        (if (i32.lt_u (local.get $digit) (i32.const 10))
          (then (local.set $n (i32.add (i32.mul (local.get $n) (i32.const 10)) (local.get $digit)))))
        (if (i32.gt_u (local.get $n) (i32.const {most})) (then unreachable))
        (local.set $at (i32.add (local.get $at) (i32.const 1)))
        (br $next))))
    (local.get $n))

  (func $tell (param $count i32)
    (local $at i32)
    (local.set $at (i32.const 1120))
    (loop $digit
      (local.set $at (i32.sub (local.get $at) (i32.const 1)))
      (i32.store8 (local.get $at) (i32.add (i32.const 48) (i32.rem_u (local.get $count) (i32.const 10))))
      (br_if $digit (local.tee $count (i32.div_u (local.get $count) (i32.const 10)))))
    (i32.store (i32.const 0) (i32.const 1024))
    (i32.store (i32.const 4) (i32.const 24))
    (i32.store (i32.const 8) (local.get $at))
    (i32.store (i32.const 12) (i32.sub (i32.const 1122) (local.get $at)))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 2) (i32.const 16))))
{count}
  (func (export "_start") (call $tell (call $count (call $below)))))
"""

_DIVIDING = r"""
  (func $count (param $n i32) (result i32)               ;; each number is divided by all up to its root
    (local $i i32) (local $d i32) (local $count i32)
    (local.set $i (i32.const 2))
    (block $end (loop $number
      (br_if $end (i32.ge_u (local.get $i) (local.get $n)))
      (local.set $d (i32.const 2))
      (block $divided
        (loop $divisor
          (if (i32.le_u (i32.mul (local.get $d) (local.get $d)) (local.get $i)) (then
            (br_if $divided (i32.eqz (i32.rem_u (local.get $i) (local.get $d))))
            (local.set $d (i32.add (local.get $d) (i32.const 1)))
            (br $divisor))))
        (local.set $count (i32.add (local.get $count) (i32.const 1))))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br $number)))
    (local.get $count))
"""

_SIEVING = r"""
  (func $count (param $n i32) (result i32)               ;; Eratosthenes' sieve: multiples of each prime are crossed out
    (local $i i32) (local $j i32) (local $count i32)
    (local.set $i (i32.const 2))
    (block $end (loop $number
      (br_if $end (i32.ge_u (local.get $i) (local.get $n)))
      (if (i32.eqz (i32.load8_u (i32.add (i32.const 65536) (local.get $i)))) (then
        (local.set $count (i32.add (local.get $count) (i32.const 1)))
        (local.set $j (i32.add (local.get $i) (local.get $i)))
        (block $crossed (loop $multiple
          (br_if $crossed (i32.ge_u (local.get $j) (local.get $n)))
          (i32.store8 (i32.add (i32.const 65536) (local.get $j)) (i32.const 1))
          (local.set $j (i32.add (local.get $j) (local.get $i)))
          (br $multiple)))))
      (local.set $i (i32.add (local.get $i) (i32.const 1)))
      (br $number)))
    (local.get $count))
"""

ABOUT = {"1.0.0": "trial division", "2.0.0": "a sieve"}
_COUNTS = {"1.0.0": _DIVIDING, "2.0.0": _SIEVING}


def module(release: str) -> bytes:
    """The WebAssembly of a release; ``ABOUT`` names them. Both trap at more than BELOW_MAX."""
    text = _AROUND.replace("{most}", str(BELOW_MAX)).replace("{count}", _COUNTS[release])
    return bytes(wasmtime.wat2wasm(text))
