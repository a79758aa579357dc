"""How memory is divided, as tables."""

from __future__ import annotations

import pytest

from protocol.errors import ConfigError
from runtimes.gguf.budget import CELLS_DEFAULT, PROCESS_BYTES, KvShape, gpu_layers, kv_cells, shelf_bytes

GIB = 1024**3


def test_cells_of_known_models() -> None:
    assert KvShape(layers=30, kv_heads=3, key_length=64, value_length=64).bytes_per_token == 23_040  # SmolLM2-135M
    assert KvShape(layers=32, kv_heads=8, key_length=128, value_length=128).bytes_per_token == 131_072  # Llama 3 8B


@pytest.mark.parametrize(
    ("limit_bytes", "free_bytes", "asked", "expected"),
    [
        (0, 64 * GIB, 0, CELLS_DEFAULT),
        (0, 64 * GIB, 40_000, 39_936),  # asked for, rounded to llama.cpp's step
        (0, 1 * GIB, 0, 11_520),  # a quarter of what is free
        (600 * 2**20, 64 * GIB, 0, 8_960),  # a fifth of the room for KV is left to shelved prefixes
        (400 * 2**20, 64 * GIB, 0, 2_304),
        (100 * GIB, 64 * GIB, 0, 4 * CELLS_DEFAULT),  # more would never be used
    ],
)
def test_kv_cells(limit_bytes: int, free_bytes: int, asked: int, expected: int) -> None:
    weights, compute, token = 98 * 2**20, 90 * 2**20, 23_040
    cells = kv_cells(weights, compute, token, limit_bytes, free_bytes, 8192, asked)
    assert cells == expected
    if limit_bytes:
        assert weights + compute + PROCESS_BYTES + cells * token <= limit_bytes


def test_too_little_memory_says_how_much_would_do() -> None:
    with pytest.raises(ConfigError, match="--memory-limit 104857600 cannot hold this model: it needs at least") as caught:
        kv_cells(98 * 2**20, 90 * 2**20, 23_040, 100 * 2**20, GIB, 8192)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert kv_cells(98 * 2**20, 90 * 2**20, 23_040, least, GIB, 8192) == 256


@pytest.mark.parametrize(
    ("vram_bytes", "expected"),
    [(0, 0), (GIB // 2, 0), (3 * GIB, 12), (7 * GIB, 33), (80 * GIB, 33)],
)
def test_gpu_layers(vram_bytes: int, expected: int) -> None:
    assert gpu_layers(32, 5 * GIB, GIB, 256 * 2**20, vram_bytes) == expected


@pytest.mark.parametrize(
    ("limit_bytes", "used_bytes", "free_bytes", "expected"),
    [
        (GIB, GIB - 5, 64 * GIB, 5),  # what the limit leaves
        (GIB, GIB + 5, 64 * GIB, 0),
        (64 * GIB, 2 * GIB, 64 * GIB, 2 * GIB),  # never more than twice the cells
        (0, 2 * GIB, 8 * GIB, int(0.4 * GIB)),
    ],
)
def test_shelf_bytes(limit_bytes: int, used_bytes: int, free_bytes: int, expected: int) -> None:
    assert shelf_bytes(limit_bytes, used_bytes, GIB, free_bytes) == expected
