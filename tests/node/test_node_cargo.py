"""`archipelag-node cargo shard`: what it writes, what it refuses, and that nothing is left behind."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from node.cli import EXIT_CONFIG, build_parser, main
from node.commands.cargo import chains, even_ranges
from protocol.errors import ConfigError
from protocol.shards import LayerRange, ShardManifest, manifest_from_json
from runtimes.manifests import catalogue_manifests
from tests.runtimes.gguf.tiny_models import TINY, Tiny, write_tiny


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.gguf", TINY["llama"])


def shard(tmp_path: Path, model: Path, *arguments: str) -> int:
    return main(["cargo", "shard", str(model), "--out", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache"), *arguments])


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out").iterdir())


def written(tmp_path: Path, name: str = "tiny") -> ShardManifest:
    return manifest_from_json((tmp_path / "out" / f"{name}.shards.json").read_text())


def test_two_shards(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(tmp_path, model, "--shards", "2") == 0
    assert left(tmp_path) == ["tiny.0-1.gguf", "tiny.2-3.gguf", "tiny.shards.json"]
    manifest = written(tmp_path)
    assert manifest.shard_layers == (LayerRange(0, 2), LayerRange(2, 4)) and manifest.shard_urls == ("", "")
    assert manifest.model_sha256 == hashlib.sha256(model.read_bytes()).hexdigest() and manifest.model_sources == ()
    assert all(manifest.compute_bytes), "a middle stage is measured too"
    out = capsys.readouterr().out
    for layers, digest, size in zip(manifest.shard_layers, manifest.shard_hashes, manifest.shard_bytes, strict=True):
        data = (tmp_path / "out" / f"tiny.{layers}.gguf").read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (digest, size)
        assert digest[:16] in out and str(layers) in out
    assert "Next: " in out


def test_one_range_of_a_named_model(tmp_path: Path, model: Path) -> None:
    """The rest is cut for the check only."""
    assert shard(tmp_path, model, "--layers", "1-2", "--name", "org/tiny", "--url-base", "https://example.org/x/") == 0
    assert left(tmp_path) == ["org_tiny.1-2.gguf", "org_tiny.shards.json"]
    manifest = written(tmp_path, "org_tiny")
    assert manifest.name == "org/tiny" and manifest.shard_urls == ("https://example.org/x/org_tiny.1-2.gguf",)


def test_ranges_may_overlap(tmp_path: Path, model: Path) -> None:
    assert shard(tmp_path, model, "--layers", "2-3", "--layers", "0-1", "--layers", "1-3") == 0
    assert written(tmp_path).shard_layers == (LayerRange(0, 2), LayerRange(1, 4), LayerRange(2, 4))


def test_a_model_that_cannot_be_cut_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny(tmp_path / "other.gguf", Tiny("smollm3"))
    assert shard(tmp_path, model, "--shards", "3") == EXIT_CONFIG
    assert left(tmp_path) == []
    assert "(architecture smollm3) cannot be cut: its shards give other logits" in capsys.readouterr().err


def test_files_of_an_earlier_cut_outlive_a_failed_one(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shard(tmp_path, model, "--shards", "2") == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in left(tmp_path)}

    def fails(*arguments: object) -> tuple[int, int, int]:
        raise ConfigError("no")

    monkeypatch.setattr("runtimes.gguf.shard_check.check_chain", fails)
    assert shard(tmp_path, model, "--shards", "2") == EXIT_CONFIG
    assert {name: (tmp_path / "out" / name).read_bytes() for name in left(tmp_path)} == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "either with --shards N or with --layers A-B"),
        (["--shards", "2", "--layers", "0-1"], "either with --shards N or with --layers A-B"),
        (["--shards", "1"], "--shards must be between 2 and 8, not 1"),
        (["--shards", "9"], "--shards must be between 2 and 8, not 9"),
        (["--shards", "5"], "has 4 layers, too few for 5 shards; ask for fewer"),
        (["--layers", "2-4"], "has the layers 0-3, not 2-4"),
        (["--layers", "0-3"], "are all of"),
        (["--layers", "0-1", "--layers", "0-1"], "names a range twice"),
        (["--shards", "2", "--name", "a b"], "--name is not a valid name"),
        (["--shards", "2", "--url-base", "https://x\n"], "--url-base must be printable"),
    ],
)
def test_wrong_usage(
    arguments: Sequence[str], sentence: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shard(tmp_path, model, *arguments) == EXIT_CONFIG
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or left(tmp_path) == []


@pytest.mark.parametrize("text", ["3", "a-b", "5-2", "-1-2", "0-5000"])
def test_ranges_that_are_none(text: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shard(tmp_path, model, f"--layers={text}")
    assert "argument --layers" in capsys.readouterr().err


def test_sources_that_are_no_model(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard(tmp_path, Path("nosuchmodel"), "--shards", "2") == EXIT_CONFIG
    assert "is no model that is known here" in capsys.readouterr().err
    assert shard(tmp_path, model, "--shards", "2") == 0
    assert shard(tmp_path, tmp_path / "out" / "tiny.0-1.gguf", "--shards", "2") == EXIT_CONFIG
    assert "is a shard itself; name the whole model's file" in capsys.readouterr().err


def test_a_disk_without_room(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert shard(tmp_path, model, "--shards", "2") == EXIT_CONFIG
    assert "MB free; the shards and their check need" in capsys.readouterr().err
    assert left(tmp_path) == []


def test_an_output_folder_that_is_a_file(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("in the way")
    assert shard(tmp_path, model, "--shards", "2") == EXIT_CONFIG
    assert "name another folder with --out" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["cargo", "--help"], ["cargo", "shard", "--help"]):
        with pytest.raises(SystemExit) as caught:
            build_parser().parse_args(arguments)
        assert caught.value.code == 0 and "archipelag-node cargo shard smollm2-135m --shards 2" in capsys.readouterr().out


@pytest.mark.parametrize("count", range(2, 9))
def test_shards_of_about_the_same_weight(count: int) -> None:
    manifest = catalogue_manifests()["smollm2-135m"]
    ranges = even_ranges(manifest, count)
    assert [layers.low for layers in ranges] == [0, *(layers.high for layers in ranges[:-1])] and ranges[-1].high == 30
    weights = [manifest.weights_bytes(layers) for layers in ranges]
    # an end that is more than its share with a single layer cannot be made lighter
    ends = max(manifest.weights_bytes(LayerRange(0, 1)), manifest.weights_bytes(LayerRange(29, 30)))
    assert max(weights) <= max(ends, sum(weights) / count + max(manifest.layer_bytes))


def test_many_layers_are_divided_in_no_time() -> None:
    small = catalogue_manifests()["smollm2-135m"]
    large = replace(small, total_layers=128, layer_bytes=(2_000_000,) * 128, kv_bytes=(768,) * 128)
    assert len(even_ranges(large, 8)) == 8


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(0, 5), (5, 9)], ["0-4 5-8"]),
        ([(3, 5)], ["0-2 3-4 5-8"]),
        ([(0, 5)], ["0-4 5-8"]),
        ([(6, 9)], ["0-5 6-8"]),
        ([(0, 5), (0, 4), (4, 9)], ["0-4 5-8", "0-3 4-8"]),
        ([(0, 2), (1, 3), (2, 9)], ["0-1 2-8", "0-0 1-2 3-8"]),
        ([(0, 2), (4, 6), (8, 9)], ["0-1 2-3 4-5 6-7 8-8"]),
    ],
)
def test_every_range_is_checked_in_a_chain(ranges: Sequence[tuple[int, int]], expected: Sequence[str]) -> None:
    rows = chains([LayerRange(low, high) for low, high in ranges], 9)
    assert [" ".join(map(str, row)) for row in rows] == expected
