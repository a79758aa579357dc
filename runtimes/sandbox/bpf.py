"""A small assembler for the classic BPF that seccomp runs: what the filter needs, and nothing else.

A program is a sequence of instructions of 8 bytes. They work on one register and on ``struct seccomp_data``: the number of the call,
the architecture, the instruction pointer, six arguments of 64 bits. Jumps only go forward, by at most 255 instructions.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

INSTRUCTIONS_MAX = 4096  # BPF_MAXINSNS
_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_ABOVE = 0x25  # BPF_JMP | BPF_JGT | BPF_K
_JUMP_BITS = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K

ALLOW = 0x7FFF0000
KILL = 0x80000000  # the whole process
_ERRNO = 0x00050000

NUMBER_OFFSET = 0
ARCHITECTURE_OFFSET = 4
_ARGUMENTS_OFFSET = 16


@dataclass(frozen=True, slots=True)
class Instruction:
    """``when`` and ``otherwise``: how many instructions to skip if a jump's test holds, and if not."""

    code: int
    value: int
    when: int = 0
    otherwise: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.when < 256 and 0 <= self.otherwise < 256 and 0 <= self.value < 2**32):
            raise ValueError(f"{self} does not fit an instruction")


def fail(errno: int) -> int:
    """The verdict that has the call return this error. 0 pretends success without doing anything."""
    return _ERRNO | errno


def load(offset: int) -> Instruction:
    """The word at this offset of ``struct seccomp_data``."""
    return Instruction(_LOAD_WORD, offset)


def load_argument(index: int) -> Instruction:
    """The low word of an argument, on little-endian machines: all that the kernel reads of an ``int`` or of clone's flags."""
    return load(_ARGUMENTS_OFFSET + 8 * index)


def if_equal(value: int, when: int, otherwise: int) -> Instruction:
    return Instruction(_JUMP_EQUAL, value, when, otherwise)


def if_above(value: int, when: int, otherwise: int) -> Instruction:
    return Instruction(_JUMP_ABOVE, value, when, otherwise)


def if_bits(value: int, when: int, otherwise: int) -> Instruction:
    """Whether any of these bits is set."""
    return Instruction(_JUMP_BITS, value, when, otherwise)


def give(verdict: int) -> Instruction:
    return Instruction(_RETURN, verdict)


def assemble(program: Iterable[Instruction]) -> bytes:
    """The bytes as ``struct sock_filter[]``. Raises ValueError for a program that the kernel would refuse for its length."""
    code = b"".join(struct.pack("<HBBI", i.code, i.when, i.otherwise, i.value) for i in program)
    if not 0 < len(code) <= 8 * INSTRUCTIONS_MAX:
        raise ValueError(f"a filter has 1 to {INSTRUCTIONS_MAX} instructions, not {len(code) // 8}")
    return code
