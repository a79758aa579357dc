"""Sealed values: only this secret opens them, only in their own row, and only as they were sealed."""

from __future__ import annotations

import pytest

from privacy.sealed_rows import NONCE_BYTES, RowSealer, SealBroken

SECRET = bytes(range(32))
NONCE = bytes(range(100, 100 + NONCE_BYTES))


@pytest.mark.parametrize("value", [b"", b"a", "Grüße\0".encode(), bytes(1_000_000)])
def test_what_is_sealed_opens_again(value: bytes) -> None:
    sealed = RowSealer(SECRET).seal(value, "job-1", NONCE)
    assert RowSealer(SECRET).open(sealed, "job-1") == value
    assert len(sealed) == NONCE_BYTES + len(value) + 16


def test_nothing_of_the_value_shows() -> None:
    value = b"who reads this row reads nothing"
    sealed = RowSealer(SECRET).seal(value, "job-1", NONCE)
    assert all(value[start : start + 4] not in sealed for start in range(len(value) - 3))
    assert sealed != RowSealer(SECRET).seal(value, "job-1", bytes(NONCE_BYTES))


def test_the_bytes_of_another_run_and_of_another_program_are_these() -> None:
    """What is in a database has to be read by the next version too: HKDF-SHA-256, then XChaCha20-Poly1305."""
    sealed = RowSealer(SECRET).seal(b"value", "job-1", NONCE)
    assert sealed.hex() == NONCE.hex() + "8e7f9f341de3f842d81a45e7d11cc731d584aa5d01"


@pytest.mark.parametrize("place", range(0, NONCE_BYTES + 5 + 16))
def test_a_changed_bit_is_noticed(place: int) -> None:
    sealed = bytearray(RowSealer(SECRET).seal(b"value", "job-1", NONCE))
    sealed[place] ^= 1
    with pytest.raises(SealBroken):
        RowSealer(SECRET).open(bytes(sealed), "job-1")


@pytest.mark.parametrize("length", [0, 1, NONCE_BYTES - 1, NONCE_BYTES, NONCE_BYTES + 15, NONCE_BYTES + 16, NONCE_BYTES + 20])
def test_a_value_that_was_cut_off(length: int) -> None:
    sealed = RowSealer(SECRET).seal(b"value", "job-1", NONCE)
    with pytest.raises(SealBroken):
        RowSealer(SECRET).open(sealed[:length], "job-1")


@pytest.mark.parametrize("row", ["job-2", "", "job-1 ", "JOB-1"])
def test_a_value_that_was_moved_to_another_row(row: str) -> None:
    sealed = RowSealer(SECRET).seal(b"value", "job-1", NONCE)
    with pytest.raises(SealBroken):
        RowSealer(SECRET).open(sealed, row)


def test_another_secret_opens_nothing_and_is_not_shown() -> None:
    sealer = RowSealer(SECRET)
    sealed = sealer.seal(b"value", "job-1", NONCE)
    with pytest.raises(SealBroken, match=r"salt\.key"):
        RowSealer(SECRET[:-1] + b"\0").open(sealed, "job-1")
    assert repr(sealer) == "<RowSealer>"
