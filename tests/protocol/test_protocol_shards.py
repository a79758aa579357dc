"""Layer ranges and manifests: what a range weighs, and a JSON form in which nothing odd gets through."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields
from typing import Any

import pytest

from protocol import limits
from protocol.errors import ConfigError
from protocol.hold import HoldShard
from protocol.shards import LayerRange, ShardManifest, manifest_from_json, manifest_to_json
from tests.protocol import samples
from tests.protocol.samples import BOOT_MS, NOW_MS

HASH = "12" * 32


def test_a_range() -> None:
    layers = LayerRange(3, 7)
    assert len(layers) == 4 and str(layers) == "3-6"
    assert str(LayerRange(0, 1)) == "0-0"
    assert LayerRange(0, 2) < LayerRange(0, 3) < LayerRange(1, 2)
    assert LayerRange(0, limits.LAYERS_MAX).high == limits.LAYERS_MAX


@pytest.mark.parametrize(("low", "high"), [(0, 0), (1, 1), (2, 1), (-1, 1), (0, -1), (0, 1025), (1024, 1025), (2**70, 2**71)])
def test_a_range_that_is_none(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="layer"):
        LayerRange(low, high)


# layer_bytes 1000 1100 1200 1400, embeddings 10000, head 5000, shared 7; cells 100 110 120 140; buffers 50000 40000 90000
@pytest.mark.parametrize(
    ("low", "high", "weights", "cells", "buffers"),
    [
        (0, 1, 7 + 10_000 + 1_000, 100, 50_000),
        (0, 3, 7 + 10_000 + 3_300, 330, 50_000),
        (1, 2, 7 + 1_100, 110, 40_000),
        (1, 3, 7 + 2_300, 230, 40_000),
        (3, 4, 7 + 1_400 + 5_000, 140, 90_000),
        (1, 4, 7 + 3_700 + 5_000, 370, 90_000),
        (0, 4, 7 + 10_000 + 4_700 + 5_000, 470, 90_000),  # the head's buffers are the larger ones
    ],
)
def test_what_a_range_weighs(low: int, high: int, weights: int, cells: int, buffers: int) -> None:
    manifest, layers = samples.manifest(), LayerRange(low, high)
    assert manifest.weights_bytes(layers) == weights
    assert manifest.kv_bytes_per_token(layers) == cells
    assert manifest.measured_compute_bytes(layers) == buffers
    assert (manifest.is_first(layers), manifest.is_last(layers)) == (low == 0, high == 4)


def test_shards_that_follow_one_another_weigh_what_the_whole_does() -> None:
    """Only what every shard carries is there once more for each further one."""
    manifest = samples.manifest()
    for cuts in ((2,), (1, 2), (1, 2, 3)):
        edges = [0, *cuts, 4]
        parts = [LayerRange(low, high) for low, high in itertools.pairwise(edges)]
        whole = LayerRange(0, 4)
        extra = manifest.shared_bytes * (len(parts) - 1)
        assert sum(map(manifest.weights_bytes, parts)) == manifest.weights_bytes(whole) + extra
        assert sum(map(manifest.kv_bytes_per_token, parts)) == manifest.kv_bytes_per_token(whole)


def test_the_hash_of_a_shard_where_it_stands() -> None:
    manifest = samples.manifest()
    assert manifest.shard_hash(LayerRange(0, 2)) == samples.SHARD_HASH
    assert manifest.shard_hash(LayerRange(2, 4)) == "ef" * 32
    assert manifest.shard_hash(LayerRange(0, 3)) == ""


def test_layers_that_the_model_does_not_have() -> None:
    manifest = samples.manifest()
    manifest.check_range(LayerRange(0, 4))
    for layers in (LayerRange(0, 5), LayerRange(4, 5), LayerRange(900, 901)):
        with pytest.raises(ValueError, match="tiny has layers 0-3, not"):
            manifest.check_range(layers)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"version": 2}, "version 2 is not 1"),
    ({"name": ""}, "name"),
    ({"name": "a b"}, "name"),
    ({"name": "../x\n"}, "name"),
    ({"architecture": "x" * 129}, "architecture"),
    ({"model_sha256": "AB" * 32}, "model_sha256"),
    ({"model_sha256": "ab" * 31}, "model_sha256"),
    ({"model_sources": ("https://x/y",) * (limits.MODEL_PARTS_MAX + 1)}, "model_sources"),
    ({"model_sources": ("https://x/\x1b[2J",)}, "source"),
    ({"model_sources": ("x" * 1025,)}, "source"),
    ({"total_layers": 1, "layer_bytes": (1,), "kv_bytes": (1,)}, "total_layers"),
    ({"total_layers": limits.LAYERS_MAX + 1}, "total_layers"),
    ({"total_layers": 5}, "one entry for each layer"),
    ({"width": 0}, "width"),
    ({"width": 2**31 + 1}, "width"),
    ({"vocabulary": 0}, "vocabulary"),
    ({"context_tokens": -1}, "context_tokens"),
    ({"micro_batch": 0}, "micro_batch"),
    ({"model_bytes": -1}, "model_bytes"),
    ({"embedding_bytes": 2**50 + 1}, "embedding_bytes"),
    ({"head_bytes": -1}, "head_bytes"),
    ({"shared_bytes": -1}, "shared_bytes"),
    ({"layer_bytes": (1, 2, 3)}, "one entry for each layer"),
    ({"layer_bytes": (1, 2, 3, -4)}, "size in bytes"),
    ({"kv_bytes": (1, 2, 3, 4, 5)}, "one entry for each layer"),
    ({"kv_bytes": (1, 2, 3, 2**50 + 1)}, "size in bytes"),
    ({"compute_bytes": (1, 2, -3)}, "size in bytes"),
    ({"min_shards": 0}, "min_shards"),
    ({"min_shards": 9}, "min_shards"),
    ({"max_shards": 1}, "max_shards"),
    ({"max_shards": limits.ROUTE_STAGES_MAX + 1}, "max_shards"),
    ({"shard_layers": (LayerRange(0, 2),)}, "one entry for each shard"),
    ({"shard_hashes": (HASH,)}, "one entry for each shard"),
    ({"shard_bytes": (1, 2, 3)}, "one entry for each shard"),
    ({"shard_bytes": (1, -2)}, "size in bytes"),
    ({"shard_urls": ()}, "one entry for each shard"),
    ({"shard_urls": ("a\nb", "")}, "source"),
    ({"shard_hashes": (HASH, "")}, "shard's hash"),
    ({"shard_layers": (LayerRange(0, 2), LayerRange(0, 2))}, "twice"),
    ({"shard_layers": (LayerRange(0, 2), LayerRange(2, 5))}, "layers 0-3, not 2-4"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=lambda value: repr(value)[:50])
def test_a_manifest_checks_itself(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        samples.manifest(**change)


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=lambda value: repr(value)[:50])
def test_a_file_that_says_so_is_refused_with_the_same_sentence(change: dict[str, Any], sentence: str) -> None:
    lists = {name: _listed(value) for name, value in change.items()}
    with pytest.raises(ConfigError, match=f"cannot be used: .*{sentence}.*; write it anew with"):
        manifest_from_json(json.dumps(plain() | lists))


def _listed(value: Any) -> Any:
    if isinstance(value, LayerRange):
        return [value.low, value.high]
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def plain() -> dict[str, Any]:
    found = json.loads(manifest_to_json(samples.manifest()))
    assert isinstance(found, dict)
    return found


def test_json_round_trip() -> None:
    bare: dict[str, Any] = {name: () for name in ("model_sources", "shard_layers", "shard_hashes", "shard_bytes", "shard_urls")}
    for manifest in (samples.manifest(), samples.manifest(**bare), samples.manifest(min_shards=1, max_shards=1)):
        assert manifest_from_json(manifest_to_json(manifest)) == manifest


def test_equal_manifests_are_equal_text() -> None:
    text = manifest_to_json(samples.manifest())
    assert text == manifest_to_json(manifest_from_json(text))
    assert text.endswith("}\n") and text.isascii()
    keys = list(json.loads(text))
    assert keys == sorted(field.name for field in fields(ShardManifest))
    shuffled = json.dumps(dict(reversed(list(plain().items()))), separators=(",", ":"))
    assert manifest_to_json(manifest_from_json(shuffled)) == text


def test_every_field_missing_and_one_too_many() -> None:
    for name in plain():
        less = plain()
        del less[name]
        with pytest.raises(ConfigError, match=f"missing or unknown: {name};"):
            manifest_from_json(json.dumps(less))
    with pytest.raises(ConfigError, match="missing or unknown: __class__;"):
        manifest_from_json(json.dumps(plain() | {"__class__": "x"}))


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", '"x"', "{}", "\x00", "{'a': 1}", '{"version": 1', "NaN", "\ufeff{}"])
def test_text_that_is_no_manifest(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        manifest_from_json(text)


INTS = [field.name for field in fields(ShardManifest) if field.type == "int"]
TEXTS = [field.name for field in fields(ShardManifest) if field.type == "str"]
LISTS = [field.name for field in fields(ShardManifest) if str(field.type).startswith("tuple")]


def test_every_field_is_of_a_known_type() -> None:
    assert len(INTS) + len(TEXTS) + len(LISTS) == len(fields(ShardManifest))


@pytest.mark.parametrize("name", INTS)
@pytest.mark.parametrize("value", [True, False, 1.0, "1", None, [1], {"a": 1}, float("nan"), float("inf"), -1, 2**63])
def test_a_figure_of_another_type_or_size(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        manifest_from_json(json.dumps(plain() | {name: value}).replace("Infinity", "1e999"))


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("value", [True, 1, 1.5, None, ["x"], {"x": 1}, "", "\ud800", "a\u202eb"])
def test_a_text_of_another_type_or_none(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        manifest_from_json(json.dumps(plain() | {name: value}))


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("value", [True, 1, "abcd", None, {"0": 1}, [None, None], [[], []], [{}, {}], [1.5, 2.5, 3.5], [[1, 2, 3]] * 2])
def test_a_list_of_something_else(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        manifest_from_json(json.dumps(plain() | {name: value}))


@pytest.mark.parametrize("name", [name for name in LISTS if "bytes" in name])
def test_a_bool_is_no_size(name: str) -> None:
    wrong = [True] * len(plain()[name])
    with pytest.raises(ConfigError, match=f"every entry of {name} must be int"):
        manifest_from_json(json.dumps(plain() | {name: wrong}))


@pytest.mark.parametrize("second", [[2, True], [2.0, 4], ["2", "4"], [2], [2, 3, 4], {"low": 2}, 2, None])
def test_pairs_of_layers_that_are_none(second: Any) -> None:
    with pytest.raises(ConfigError, match="shard_layers must hold pairs"):
        manifest_from_json(json.dumps(plain() | {"shard_layers": [[0, 2], second]}))


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_three_kinds_of_stages_have_three_figures(count: int) -> None:
    with pytest.raises(ConfigError, match="first, middle and last"):
        manifest_from_json(json.dumps(plain() | {"compute_bytes": [1] * count}))


@pytest.mark.parametrize("digits", [30, 309, 400, 5000])
@pytest.mark.parametrize("name", ["width", "model_bytes"])
def test_huge_numbers_are_a_sentence_too(name: str, digits: int) -> None:
    """309 digits are more than a float holds, 5000 more than Python reads."""
    text = json.dumps(plain() | {name: "HUGE"}).replace('"HUGE"', "9" * digits)
    with pytest.raises(ConfigError, match="cannot be used"):
        manifest_from_json(text)


def test_deep_nesting_is_a_sentence_too() -> None:
    with pytest.raises(ConfigError, match="cannot be used"):
        manifest_from_json("[" * 200_000)


def order(**changes: Any) -> HoldShard:
    made: dict[str, Any] = {
        "manifest": samples.manifest(),
        "layers": LayerRange(1, 3),
        "cells": 1024,
        "boot": BOOT_MS,
        "expires_at_ms": NOW_MS,
    }
    return HoldShard(**(made | changes))


def test_an_order_is_for_layers_that_the_model_has() -> None:
    order()
    order(layers=LayerRange(0, 4))
    for name, values in {"cells": (0, 2**31 + 1), "boot": (0, 2**53 + 1), "expires_at_ms": (0, 2**53 + 1)}.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                order(**{name: value})
    with pytest.raises(ValueError, match="layers 0-3, not 3-4"):
        order(layers=LayerRange(3, 5))
