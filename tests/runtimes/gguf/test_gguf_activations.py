"""Hidden states as bytes: f32 is exact, f16 and int8 stay within their bounds, and what is no number goes nowhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from protocol.activations import INT8_BLOCK, Activations
from protocol.errors import Code, Refused
from runtimes.gguf.activations import decode, encode

Floats = npt.NDArray[np.float32]
WIDTHS = [1, 31, 32, 33, 64, 100, 576]
FLOAT_MAX = float(np.finfo(np.float32).max)


def noise(rows: int, width: int, seed: int = 0) -> Floats:
    """As hidden states are: mostly small, with a few channels that are large."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((rows, width)) * 10.0 ** random.uniform(-4, 3, (1, width))
    return values.astype(np.float32)


HOSTILE: dict[str, Callable[[int], Floats]] = {
    "zeros": lambda width: np.zeros((2, width), np.float32),
    "minus zeros": lambda width: np.full((2, width), -0.0, np.float32),
    "tiny": lambda width: np.full((2, width), 1e-30, np.float32),
    "one among zeros": lambda width: np.eye(1, width, width // 2, dtype=np.float32) * -3.5,
    "one huge among small": lambda width: np.where(np.arange(width) % 40 == 7, 6e4, 1e-3).astype(np.float32)[None],
    "both signs": lambda width: np.where(np.arange(width) % 2, -65504.0, 65504.0).astype(np.float32)[None],
    "steps": lambda width: (np.arange(width, dtype=np.float32) - width / 2)[None],
}
CASES = {f"noise {seed}": (lambda width, seed=seed: noise(1 + seed, width, seed)) for seed in range(4)} | HOSTILE


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", Activations)
def test_sizes_are_those_that_the_protocol_says(kind: Activations, width: int) -> None:
    for rows in (1, 2, 7):
        data = encode(noise(rows, width), kind)
        assert len(data) == rows * kind.row_bytes(width)
        hidden = decode(data, width, kind)
        assert hidden.shape == (rows, width) and hidden.dtype == np.float32


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CASES)
def test_f32_is_exact_to_the_bit(name: str, width: int) -> None:
    hidden = CASES[name](width)
    again = decode(encode(hidden, Activations.F32), width, Activations.F32)
    assert again.tobytes() == hidden.tobytes()


@pytest.mark.parametrize("value", [FLOAT_MAX, -FLOAT_MAX, 1e-45])
def test_f32_carries_the_ends_of_its_range(value: float) -> None:
    hidden = np.full((1, 33), value, np.float32)
    assert decode(encode(hidden, Activations.F32), 33, Activations.F32).tobytes() == hidden.tobytes()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CASES)
def test_f16_is_off_by_at_most_a_2048th(name: str, width: int) -> None:
    hidden = np.clip(CASES[name](width), -65504, 65504)
    again = decode(encode(hidden, Activations.F16), width, Activations.F16)
    bound = np.maximum(np.abs(hidden.astype(np.float64)) / 2048, 2.0**-25)  # half of the smallest subnormal
    assert (np.abs(again.astype(np.float64) - hidden) <= bound).all()


def block_bounds(hidden: Floats) -> npt.NDArray[np.float64]:
    """For each value 1/254 of the largest magnitude in its block, and what rounding to f32 may add."""
    rows, width = hidden.shape
    bounds = np.empty((rows, width), np.float64)
    for low in range(0, width, INT8_BLOCK):
        largest = np.abs(hidden[:, low : low + INT8_BLOCK].astype(np.float64)).max(axis=1, keepdims=True)
        bounds[:, low : low + INT8_BLOCK] = largest / 254 * (1 + 1e-4)
    return bounds


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CASES)
def test_int8_is_off_by_at_most_a_254th_of_the_largest_in_its_block(name: str, width: int) -> None:
    hidden = CASES[name](width)
    again = decode(encode(hidden, Activations.INT8), width, Activations.INT8)
    assert (np.abs(again.astype(np.float64) - hidden) <= block_bounds(hidden)).all()


def test_int8_holds_very_large_values() -> None:
    hidden = np.full((1, 40), 0.999 * FLOAT_MAX, np.float32)
    hidden[0, ::2] *= -1
    again = decode(encode(hidden, Activations.INT8), 40, Activations.INT8)
    assert (np.abs(again.astype(np.float64) - hidden) <= block_bounds(hidden)).all()


def test_int8_of_one_row_does_not_depend_on_the_others() -> None:
    hidden = noise(5, 70)
    data = encode(hidden, Activations.INT8)
    assert data == b"".join(encode(hidden[at : at + 1], Activations.INT8) for at in range(5))


@pytest.mark.parametrize("kind", Activations)
def test_views_are_encoded_as_what_they_show(kind: Activations) -> None:
    hidden = noise(6, 80)
    assert encode(hidden[::2, 5:70], kind) == encode(hidden[::2, 5:70].copy(), kind)
    data = encode(hidden, kind)
    assert decode(memoryview(data), 80, kind).tobytes() == decode(data, 80, kind).tobytes()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", Activations)
def test_what_is_no_number_is_not_sent(kind: Activations, value: float) -> None:
    hidden = noise(3, 50)
    hidden[1, 49] = value
    with pytest.raises(Refused, match="no finite numbers") as refused:
        encode(hidden, kind)
    assert refused.value.code is Code.BAD_INPUT


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", Activations)
def test_what_is_no_number_is_not_taken(kind: Activations, value: float) -> None:
    data = bytearray(encode(np.ones((2, 50), np.float32), kind))
    bad = np.array([value], "<f2" if kind is Activations.F16 else "<f4").tobytes()
    start = kind.row_bytes(50)  # the first value of the second row, or its first scale
    data[start : start + len(bad)] = bad
    with pytest.raises(Refused, match="no finite numbers") as refused:
        decode(bytes(data), 50, kind)
    assert refused.value.code is Code.BAD_INPUT


@pytest.mark.parametrize("kind", Activations)
def test_wrong_lengths_are_refused(kind: Activations) -> None:
    data = encode(noise(2, 50), kind)
    for wrong in (b"", data[:-1], data + b"\0", data[:1]):
        with pytest.raises(Refused, match=f"{len(wrong)} bytes are no hidden states of {kind.row_bytes(50)} bytes") as refused:
            decode(wrong, 50, kind)
        assert refused.value.code is Code.BAD_INPUT


@pytest.mark.parametrize("value", [65505.0, -7e4, 1e30])
def test_values_that_f16_cannot_hold_are_refused_with_advice(value: float) -> None:
    hidden = np.zeros((1, 40), np.float32)
    hidden[0, 3] = value
    with pytest.raises(Refused, match="choose f32 or int8") as refused:
        encode(hidden, Activations.F16)
    assert refused.value.code is Code.BAD_INPUT
