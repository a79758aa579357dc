"""A GGUF file that is whole, cut anywhere, or hostile."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from runtimes.store import ModelStore, WrongContent
from runtimes.store.gguf_file import check_gguf


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def whole_file() -> tuple[bytes, int]:
    """A small sound file, and the size of its header."""
    entries = [
        text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama"),
        text(b"general.alignment") + struct.pack("<II", 4, 64),
        text(b"llama.block_count") + struct.pack("<II", 4, 2),
        text(b"tokenizer.ggml.scores") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3),
        text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text(b"a") + text(b"bc"),
    ]
    tensors = [tensor(b"a", (64, 2), 3, 0), tensor(b"b", (10,), 0, 128)]  # Q4_1: 4 blocks of 20 bytes; f32: 40 bytes
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries)) + b"".join(entries + tensors)
    padded = header + bytes(-len(header) % 64)
    return padded + bytes(128 + 40), len(header)


def test_a_whole_file_passes(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole_file()[0])
    check_gguf(path)


def test_every_cut_is_seen(tmp_path: Path) -> None:
    data, header = whole_file()
    path = tmp_path / "m.gguf"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(WrongContent, match=r"is cut short.*Delete it and fetch it again") as caught:
            check_gguf(path)
        assert ("inside its header" in str(caught.value)) == (length < header)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"<!DOCTYPE html><html><body>Not found</body></html>", "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 1, 1), "version"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "entries"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62), "a text of"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"k") + struct.pack("<IIQ", 9, 8, 2**62), "an array of"),
        (
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 9,
            "value of type",
        ),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"k") + struct.pack("<I", 77), "value of type 77"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"general.alignment") + struct.pack("<II", 4, 0), "alignment"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text(b"t") + struct.pack("<I", 2**31), "dimensions"),
    ],
)
def test_rubbish_is_refused_without_being_believed(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data + bytes(64))
    with pytest.raises(WrongContent, match=says):
        check_gguf(path)


def test_the_store_refuses_a_file_that_is_cut_short(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "cache")
    path = tmp_path / "m.gguf"
    data = whole_file()[0]
    path.write_bytes(data)
    assert store.fetch(str(path)).name == "m"
    path.write_bytes(data[:-1])
    with pytest.raises(WrongContent, match=r"is cut short: it has .* of at least"):
        store.fetch(str(path))
