"""How the memory that an Island offers is divided: weights, compute buffers, KV cells, and prefixes of conversations outside the cells.

Pure. Sizes in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import ConfigError

CELLS_STEP = 256  # llama.cpp pads the cache to this
CELLS_DEFAULT = 16_384  # without a limit: room for 16 default answers
FREE_SHARE = 0.25  # without a limit the cache takes at most this share of the memory that is free
PROCESS_BYTES = 160 * 1024 * 1024  # interpreter, libraries, logits: measured 150 MB beside weights and buffers
SHELF_SHARE = 0.2  # of the room for KV within a limit
SHELF_FROM_CELLS = 4096
SHELF_FREE_SHARE = 0.05
EMBEDDING_SHARE = 0.5  # of what is left, at most; the rest is for prefixes outside the cells
EMBEDDING_CELLS_MAX = 2048
VRAM_RESERVE_BYTES = 512 * 1024 * 1024  # for the desktop and the driver


@dataclass(frozen=True, slots=True)
class KvShape:
    """What decides the size of one token's cells."""

    layers: int
    kv_heads: int
    key_length: int
    value_length: int
    element_bytes: int = 2  # f16

    @property
    def bytes_per_token(self) -> int:
        return self.layers * self.kv_heads * (self.key_length + self.value_length) * self.element_bytes


def kv_cells(
    weights_bytes: int, compute_bytes: int, bytes_per_token: int, limit_bytes: int, free_bytes: int, context_tokens: int, asked: int = 0
) -> int:
    """KV cells to allocate. ``limit_bytes`` 0: no limit was set. ``context_tokens``: what the model was trained for.

    Raises ConfigError when not even CELLS_STEP cells fit; it says which limit would do.
    """
    overhead = weights_bytes + compute_bytes + PROCESS_BYTES
    if limit_bytes:
        room_bytes = limit_bytes - overhead
        room = (room_bytes - _shelf_share(room_bytes, bytes_per_token)) // bytes_per_token
        cells = min(room, max(CELLS_DEFAULT, context_tokens) * 4)
        where = f"--memory-limit {limit_bytes}"
    else:
        room = int(free_bytes * FREE_SHARE) // bytes_per_token
        cells = min(room, max(CELLS_DEFAULT, asked))
        where = f"{free_bytes} bytes of free memory"
    cells = cells // CELLS_STEP * CELLS_STEP
    if cells < CELLS_STEP:
        least = overhead + CELLS_STEP * bytes_per_token
        raise ConfigError(f"{where} cannot hold this model: it needs at least {least} bytes; offer more or choose a smaller model")
    return int(cells)


def _shelf_share(room_bytes: int, bytes_per_token: int) -> int:
    """What is left to shelved prefixes of the room for KV; nothing where cells are scarce."""
    return int(room_bytes * SHELF_SHARE) if room_bytes >= SHELF_FROM_CELLS * bytes_per_token else 0


def left_bytes(limit_bytes: int, used_bytes: int, free_bytes: int) -> int:
    """What a limit leaves beside ``used_bytes`` (weights, buffers, process and cells), or a share of the free memory."""
    return max(0, limit_bytes - used_bytes if limit_bytes else int(free_bytes * SHELF_FREE_SHARE))


def shelf_bytes(limit_bytes: int, used_bytes: int, kv_bytes: int, free_bytes: int) -> int:
    """For prefixes outside the cells: what is left, but never more than twice the cells (``kv_bytes``)."""
    return min(left_bytes(limit_bytes, used_bytes, free_bytes), 2 * kv_bytes)


def embedding_cells(room_bytes: int, buffer_bytes: int, bytes_per_token: int, context_tokens: int) -> int:
    """KV cells for embeddings, beside ``buffer_bytes``, in a part of what is left; 0 where that is too small."""
    room = int(room_bytes * EMBEDDING_SHARE) - buffer_bytes
    cells = min(room // bytes_per_token, EMBEDDING_CELLS_MAX, context_tokens)
    return max(0, cells // CELLS_STEP * CELLS_STEP)


def gpu_layers(layers: int, weights_bytes: int, kv_bytes: int, compute_bytes: int, vram_free_bytes: int) -> int:
    """How many of the last layers go to the GPU: layers + 1 (with the output matrix) when all fits, 0 when there is no room for one."""
    room = vram_free_bytes - VRAM_RESERVE_BYTES - compute_bytes
    per_layer = (weights_bytes + kv_bytes) / (layers + 1)
    if room <= 0 or per_layer <= 0:
        return 0
    return min(layers + 1, int(room / per_layer))
