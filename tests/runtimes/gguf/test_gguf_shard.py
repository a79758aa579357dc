"""Shards are the same bytes everywhere, weigh what the manifest says, and compute what the whole model computes, bit for bit."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from protocol.errors import ConfigError
from protocol.shards import LayerRange, ShardManifest, manifest_from_json, manifest_to_json
from runtimes.catalogue import CATALOGUE
from runtimes.gguf import shard_check
from runtimes.gguf.llama import Context, ggml
from runtimes.gguf.shard import cut, make_manifest, planned_bytes, read_header, read_shard_layers, verified_layers
from runtimes.gguf.shard_check import check_chain, check_files
from runtimes.gguf.shard_header import BLOCKS
from runtimes.manifests import catalogue_manifests
from runtimes.store import ModelStore
from tests.runtimes.gguf.tiny_models import TINY, Tiny, metadata, tensors, write_gguf, write_tiny

GIVEN = "ab" * 32  # a model's hash, where no store has computed it


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    return Path(ModelStore().fetch("gemma3-270m").path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cut_at(model: Path, folder: Path, *ends: int) -> tuple[ShardManifest, list[Path]]:
    """Shards that end behind these layers, and the manifest of the model with them."""
    manifest = make_manifest(model, "m", GIVEN, ())
    ranges = [LayerRange(low, high) for low, high in zip((0, *ends[:-1]), ends, strict=True)]
    paths = [folder / f"{layers}.gguf" for layers in ranges]
    hashes = [cut(model, path, layers, GIVEN) for path, layers in zip(paths, ranges, strict=True)]
    sizes = tuple(path.stat().st_size for path in paths)
    return replace(manifest, shard_layers=tuple(ranges), shard_hashes=tuple(hashes), shard_bytes=sizes, shard_urls=("",) * len(ends)), paths


def test_smollm2_in_three(smollm2_path: Path, tmp_path: Path) -> None:
    manifest, paths = cut_at(smollm2_path, tmp_path, 11, 12, 30)
    compute_bytes = check_chain(smollm2_path, paths, manifest)
    assert 0 < compute_bytes[1] < compute_bytes[0] == compute_bytes[2]
    assert manifest.embedding_bytes == 49152 * 576 // 32 * 34 and manifest.kv_bytes == (768,) * 30


@pytest.mark.parametrize("ends", [(7, 18), (5, 6, 17, 18), (4, 11, 18)], ids=str)
def test_gemma_wherever_it_is_cut(gemma_path: Path, tmp_path: Path, ends: tuple[int, ...]) -> None:
    """Every sixth layer is global, by its number in the whole model; 5-5 and 17-17 are shards of a global layer alone."""
    manifest, paths = cut_at(gemma_path, tmp_path, *ends)
    check_chain(gemma_path, paths, manifest)


def test_gemma_without_the_pattern_is_found_out(gemma_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.gguf.shard._GLOBAL_EVERY", {})
    manifest, paths = cut_at(gemma_path, tmp_path, 7, 18)
    with pytest.raises(ConfigError, match=r"\(architecture gemma3\) cannot be cut: its shards give other logits .* serve the model whole"):
        check_chain(gemma_path, paths, manifest)


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_that_is_cut(name: str, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model.gguf", TINY[name])
    for ends in ((2, TINY[name].layers), (1, 3, TINY[name].layers)):
        manifest, paths = cut_at(model, tmp_path, *ends)
        measured = check_files(model, paths)
        for layers, path, found in zip(manifest.shard_layers, paths, measured, strict=True):
            assert found.weights_bytes == manifest.weights_bytes(layers)
            assert abs(found.kv_bytes - manifest.kv_bytes_per_token(layers) * shard_check.CELLS) <= 16 * 1024
            assert path.stat().st_size == planned_bytes(read_header(model), layers, GIVEN)


def test_the_check_compares_sizes_in_its_child(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model.gguf", TINY["deci"])
    manifest, paths = cut_at(model, tmp_path, 2, 4)
    assert manifest.kv_bytes == (128, 256, 64, 128)
    cut(model, tmp_path / "spare.gguf", LayerRange(1, 2), GIVEN)
    assert all(check_chain(model, paths, manifest, tmp_path / "spare.gguf"))
    with pytest.raises(ConfigError, match=r"llama.cpp holds .* of KV cells for the layers 2-3"):
        check_chain(model, paths, replace(manifest, kv_bytes=(128, 256, 64, 64)))
    with pytest.raises(ConfigError, match=r"the shards 0-1 are not all of m in order"):
        check_chain(model, paths[:1], manifest)
    with pytest.raises(ConfigError, match="is a whole model, not a shard"):
        check_chain(model, [model], manifest)


@pytest.mark.parametrize(
    ("tiny", "reason"),
    [
        (Tiny("smollm3"), "its shards give other logits than the whole model"),  # every fourth layer has no positions
        (Tiny("gemma2", post_norms=True, tied=True), "its shards give other logits"),  # scales hidden states as if they were embeddings
        (Tiny("notknown"), "unknown model architecture: 'notknown'"),
        (Tiny("mistral"), "unknown model architecture: 'mistral'"),  # Mistral's models say "llama", newer ones "mistral3"
    ],
    ids=lambda value: value.architecture if isinstance(value, Tiny) else "",
)
def test_what_cannot_be_cut_is_refused(tiny: Tiny, reason: str, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model.gguf", tiny)
    manifest, paths = cut_at(model, tmp_path, 1, 4)
    with pytest.raises(ConfigError) as caught:
        check_chain(model, paths, manifest)
    assert f"(architecture {tiny.architecture}) cannot be cut" in str(caught.value) and reason in str(caught.value)


def test_hidden_states_that_cannot_be_read_are_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that do not call them ``l_out``."""
    model = write_tiny(tmp_path / "model.gguf", TINY["llama"])
    _, paths = cut_at(model, tmp_path, 2, 4)
    monkeypatch.setattr(Context, "_on_tensor", lambda self, tensor, ask, data: not ask)
    with pytest.raises(shard_check._Unfit, match="hidden states cannot be read"):
        check_files(model, paths)


def test_an_engine_that_dies_is_a_refusal(tmp_path: Path) -> None:
    """A window that no layer has: llama.cpp ends the process."""
    arrays: Sequence[bool] = [False] * 8
    tiny = replace(TINY["gemma3"], more=(*TINY["gemma3"].more, ("gemma3.attention.sliding_window_pattern", list(arrays))))
    model = write_tiny(tmp_path / "model.gguf", tiny)
    manifest, paths = cut_at(model, tmp_path, 2, 8)
    with pytest.raises(ConfigError, match=r"the engine failed on its shards \(exit status -\d+\)"):
        check_chain(model, paths, manifest)


def test_equal_ranges_are_equal_files(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    one, other = (write_tiny(folder / name, TINY["llama"]) for folder, name in ((tmp_path, "a.gguf"), (tmp_path / "elsewhere", "b.gguf")))
    first, _ = cut_at(one, tmp_path, 1, 3, 4)
    again, _ = cut_at(one, tmp_path, 1, 3, 4)
    moved, paths = cut_at(other, tmp_path / "elsewhere", 1, 3, 4)
    assert first.shard_hashes == again.shard_hashes == moved.shard_hashes == tuple(map(sha256, paths))
    assert len(set(first.shard_hashes)) == 3
    assert not [path for path in tmp_path.rglob("*.tmp")]
    older = tmp_path / "v2.gguf"
    write_gguf(older, metadata(TINY["llama"]), tensors(TINY["llama"], 7), version=2)
    assert cut_at(older, tmp_path, 1, 3, 4)[0].shard_hashes == first.shard_hashes, "the version of the source's layout does not matter"


def test_the_cut_of_today_is_the_cut_of_tomorrow(smollm2_path: Path, tmp_path: Path) -> None:
    """Changing what cut() writes makes all shards in the world strangers: these hashes change with the manifest's version only."""
    entry = CATALOGUE["smollm2-135m"]
    first = cut(smollm2_path, tmp_path / "0-14.gguf", LayerRange(0, 15), entry.sha256)
    last = cut(smollm2_path, tmp_path / "15-29.gguf", LayerRange(15, 30), entry.sha256)
    assert (first[:16], last[:16]) == ("9fb79e2df8d26304", "fbdb2cb193b94ba1")


def test_what_stands_in_which_shard(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model.gguf", TINY["llama"])
    manifest, paths = cut_at(model, tmp_path, 1, 3, 4)
    first, middle, last = headers = [read_header(path) for path in paths]
    assert [header.tensors["token_embd.weight"].rows for header in headers] == [289, 1, 288]
    for header, layers in zip(headers, manifest.shard_layers, strict=True):
        assert header.total_layers == len(layers) and {t.layer for t in header.tensors.values()} == {-1, *range(len(layers))}
        assert {"output_norm.weight", "rope_freqs.weight"} <= set(header.tensors) and "output.weight" not in header.tensors
        facts = read_shard_layers(header.path)
        assert facts is not None and (facts.layers, facts.total_layers, facts.model_sha256) == (layers, 4, GIVEN)
    for header in (first, middle):
        assert [key for key in header.entries if key.startswith("tokenizer.")] == ["tokenizer.ggml.model"]
        assert header.entries["tokenizer.ggml.model"].value == "none"
    assert {key for key in read_header(model).entries if key.startswith("tokenizer.")} <= set(last.entries)
    whole = read_header(model)
    data, kept = model.read_bytes(), paths[2].read_bytes()
    head, moved = whole.tensors["output.weight"], last.tensors["token_embd.weight"]
    assert kept[moved.start : moved.start + moved.size] == data[head.start : head.start + head.size]
    assert read_shard_layers(model) is None


def quantized(path: Path) -> Path:
    """The tied tiny llama with its embeddings as Q4_0, whose rows llama.cpp repacks for some CPUs."""
    write_tiny(path, replace(TINY["llama-tied"], vocabulary=320))
    header = read_header(path)
    data, tensor = bytearray(path.read_bytes()), header.tensors["token_embd.weight"]
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    data[at : at + 4] = struct.pack("<I", 2)  # Q4_0: 18 bytes for 32 weights instead of 128
    blocks = struct.pack("<e16s", 0.01, bytes(range(16))) * (tensor.size // 128)
    data[tensor.start : tensor.start + tensor.size] = blocks
    shift = tensor.size - len(blocks)
    for other in header.tensors.values():
        if other.start > tensor.start:
            place = data.index(other.name.encode()) + len(other.name) + 4 + 8 * len(other.shape) + 4
            data[place : place + 8] = struct.pack("<Q", struct.unpack("<Q", data[place : place + 8])[0] - shift)
    path.write_bytes(data)
    return path


# In a process of its own, since what is repacked is made by the CPU's own kernels.
_HELD_TWICE = """
import sys
from runtimes.gguf.llama import Model, buffer_bytes, log_lines
model = Model(sys.argv[1])
print(buffer_bytes([line for line in log_lines() if "REPACK" in line or "AMX" in line], "model"))
"""


def test_the_embeddings_are_held_once(tmp_path: Path) -> None:
    """llama.cpp keeps a repacked copy of a tied matrix for the output, but not of an odd number of rows."""
    model = quantized(tmp_path / "model.gguf")
    _, paths = cut_at(model, tmp_path, 2, 4)
    held = [int(subprocess.check_output([sys.executable, "-c", _HELD_TWICE, str(path)])) for path in (model, paths[0])]
    if held[0] == 0:
        pytest.skip("this CPU's kernels repack nothing")
    assert held[1] == 0


def test_the_sizes_of_types_are_ggmls() -> None:
    import ctypes

    lib = ggml()
    lib.ggml_blck_size.restype, lib.ggml_type_size.restype = ctypes.c_int64, ctypes.c_size_t
    assert {kind: (lib.ggml_blck_size(kind), lib.ggml_type_size(kind)) for kind in BLOCKS} == BLOCKS


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_manifests_that_are_shipped_are_those_of_the_models(name: str, request: pytest.FixtureRequest) -> None:
    model: Path = request.getfixturevalue("smollm2_path" if name == "smollm2-135m" else "gemma_path")
    shipped, entry = catalogue_manifests()[name], CATALOGUE[name]
    assert all(shipped.compute_bytes)
    assert shipped == replace(make_manifest(model, name, entry.sha256, entry.parts), compute_bytes=shipped.compute_bytes)
    assert manifest_from_json(manifest_to_json(shipped)) == shipped


def test_changed_shards_are_found_by_their_hash(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model.gguf", TINY["qwen2"])
    manifest, paths = cut_at(model, tmp_path, 2, 4)
    assert [verified_layers(path, manifest) for path in paths] == [LayerRange(0, 2), LayerRange(2, 4)]
    with pytest.raises(ConfigError, match="is no shard of m"):
        verified_layers(paths[0], replace(manifest, model_sha256="cd" * 32))
    with pytest.raises(ConfigError, match="is no shard of m"):
        verified_layers(model, manifest)
    bare = replace(manifest, shard_layers=(), shard_hashes=(), shard_bytes=(), shard_urls=())
    with pytest.raises(ConfigError, match="lists no shard of the layers 0-1"):
        verified_layers(paths[0], bare)
    data = bytearray(paths[1].read_bytes())
    data[-40] ^= 1
    paths[1].write_bytes(data)
    with pytest.raises(ConfigError, match=r"the manifest says .* it was changed; delete it and cut it anew"):
        verified_layers(paths[1], manifest)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [((2, 5), "has the layers 0-3, not 2-4; ask for layers"), ((0, 4), "are all of .*: use the model's file itself")],
)
def test_ranges_that_are_none(layers: tuple[int, int], reason: str, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model.gguf", TINY["llama"])
    with pytest.raises(ConfigError, match=reason):
        cut(model, tmp_path / "shard.gguf", LayerRange(*layers), GIVEN)
    assert not (tmp_path / "shard.gguf").exists()
    with pytest.raises(ValueError, match="layer behind the last must be between 3"):
        LayerRange(2, 2)


def test_shards_and_parts_are_not_cut(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model.gguf", TINY["llama"])
    _, paths = cut_at(model, tmp_path, 2, 4)
    with pytest.raises(ConfigError, match="is a shard itself; name the whole model's file"):
        cut(paths[0], tmp_path / "x.gguf", LayerRange(0, 1), GIVEN)
    with pytest.raises(ConfigError, match="is a shard itself"):
        make_manifest(paths[0], "m", GIVEN, ())
    more = replace(TINY["llama"], more=(("split.count", 3),))
    with pytest.raises(ConfigError, match="is one of 3 files of a model; join them"):
        cut(write_tiny(model, more), tmp_path / "x.gguf", LayerRange(0, 1), GIVEN)
    with pytest.raises(ConfigError, match="predict further tokens"):
        cut(write_tiny(model, replace(more, more=(("llama.nextn_predict_layers", 1),))), tmp_path / "x.gguf", LayerRange(0, 1), GIVEN)
    with pytest.raises(ConfigError, match="SHA-256"):
        cut(write_tiny(model, TINY["llama"]), tmp_path / "x.gguf", LayerRange(0, 1), "none")
    with pytest.raises(ConfigError, match="cannot be described by a manifest"):
        make_manifest(model, "a name", GIVEN, ())
    liar = replace(TINY["llama"], more=(("archipelag.model_sha256", GIVEN), ("archipelag.layers_low", 3)))
    with pytest.raises(ConfigError, match="is no usable shard"):
        read_shard_layers(write_tiny(model, liar))


def test_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file"):
        read_header(path)
    path.write_bytes(b"PK\3\4" + b"\0" * 100)
    with pytest.raises(ConfigError, match=r"is not a GGUF model; name a file that ends in .gguf"):
        read_header(path)
    data = write_tiny(path, TINY["llama"]).read_bytes()
    for size in (*range(4, 9000, 241), len(data) - 33):
        path.write_bytes(data[:size])
        with pytest.raises(ConfigError, match=r"is not a usable GGUF model: it is cut short.*delete it and fetch it again"):
            read_header(path)


def spoiled(data: bytes, behind: bytes, skip: int, form: str, value: int) -> bytes:
    at = data.index(behind) + len(behind) + skip
    return data[:at] + struct.pack(form, value) + data[at + struct.calcsize(form) :]


@pytest.mark.parametrize(
    ("behind", "skip", "form", "value", "reason"),
    [
        (b"GGUF", 0, "<I", 0x03000000, "it has the version"),
        (b"GGUF", 4, "<Q", 2**60, "tensors and"),
        (b"GGUF", 12, "<Q", 2**60, "entries"),
        (b"llama.block_count", 4, "<I", 0, "its number of layers is 0"),
        (b"llama.block_count", 4, "<I", 3, "belongs to a layer behind the last, 2"),
        (b"llama.block_count", 0, "<I", 77, "has the type 77"),
        (b"tokenizer.ggml.scores", 8, "<Q", 2**61, "an array of"),
        (b"tokenizer.ggml.scores", 4, "<I", 9, "items of the type 9"),
        (b"tokenizer.chat_template", 4, "<Q", 2**61, "cut short inside its header"),
        (b"output_norm.weight", 0, "<I", 9, "has 9 dimensions"),
        (b"output_norm.weight", 4, "<Q", 2**62, "has the shape"),
        (b"output_norm.weight", 12, "<I", 99, "has the type 99"),
        (b"output_norm.weight", 16, "<Q", 0, "lies at 0, not behind the one before it"),
        (b"blk.3.attn_norm.weight", -16, "8s", 0, "stands there twice"),
    ],
)
def test_headers_that_lie(behind: bytes, skip: int, form: str, value: int, reason: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "model.gguf", TINY["llama"])
    data = path.read_bytes()
    if form == "8s":
        data = data.replace(behind, behind.replace(b"3", b"2"))
    else:
        data = spoiled(data, behind, skip, form, value)
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=reason):
        read_header(path)


@pytest.mark.parametrize("alignment", [0, 48, 2**20])
def test_alignments_that_are_none(alignment: int, tmp_path: Path) -> None:
    tiny = replace(TINY["llama"], more=(("general.alignment", alignment),))
    with pytest.raises(ConfigError, match=f"its alignment is {alignment}"):
        read_header(write_tiny(tmp_path / "model.gguf", tiny))


def test_models_without_what_a_shard_needs(tmp_path: Path) -> None:
    path, tiny = tmp_path / "model.gguf", TINY["llama"]
    arrays = tensors(tiny, 7)
    write_gguf(path, metadata(tiny), {name: array for name, array in arrays.items() if name != "token_embd.weight"})
    with pytest.raises(ConfigError, match=r"it has no usable token_embd.weight"):
        make_manifest(path, "m", GIVEN, ())
    write_gguf(path, metadata(tiny), arrays | {"output.weight": arrays["output.weight"][:-1]})
    with pytest.raises(ConfigError, match=r"output.weight has the shape"):
        make_manifest(path, "m", GIVEN, ())
    meta = metadata(tiny)
    del meta["llama.context_length"]
    write_gguf(path, meta, arrays)
    with pytest.raises(ConfigError, match=r"its entry llama.context_length is None"):
        make_manifest(path, "m", GIVEN, ())
    write_gguf(path, metadata(replace(tiny, kv_heads=(1, 2))), arrays)
    with pytest.raises(ConfigError, match="head_count_kv is not one figure for each of 4 layers"):
        make_manifest(path, "m", GIVEN, ())


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "is full: .* needs .* bytes; free some room"), (errno.EIO, "cannot be written")]
)
def test_a_disk_that_takes_no_more(number: int, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny(tmp_path / "model.gguf", TINY["llama"])

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ConfigError, match=reason):
        cut(model, tmp_path / "shard.gguf", LayerRange(0, 2), GIVEN)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model.gguf", TINY["llama"])
    seen: list[tuple[str, int, int | None]] = []
    cut(model, tmp_path / "shard.gguf", LayerRange(1, 3), GIVEN, lambda *step: seen.append(step))
    size = (tmp_path / "shard.gguf").stat().st_size
    assert seen[-1] == ("layers 1-2", size, size) and [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
