"""Every Cargo that ships, run as an Island runs it: opened by its manifest, in its sandbox, and asked for its example.

Half a minute: one worker for each, of which shapes imports torch and diffusers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import trio

from node.cargo_runtimes import Grants, Runtimes, find_runtimes, open_cargo
from node.shipped import PUBLISHER, Shipped, cargo_name, shipped, shipped_names
from protocol.blobs import BlobTree, leaf_hash
from protocol.cargo_io import DoneLine, encode_input, encode_line
from protocol.cargos import Runtime, address_of, canonical_manifest, read_manifest
from protocol.limits import BLOB_CHUNK_BYTES
from runtimes.base import LineCargo, LineRequest
from runtimes.container.archive import ARCHIVE_PATH
from runtimes.container.engines import ContainerEngine
from runtimes.container.image import ImageSource, bring_image, remove_image
from runtimes.store import ModelStore
from runtimes.wasm import modules

GRANTS = Grants(memory_limit_bytes=800_000_000)  # room for the vectors of the smallest GGUF too
_ANY = "..."


def fits(expected: Any, got: Any, tolerance: float) -> bool:
    """Whether ``got`` is what an example says; the rules stand in runtimes/cargos/__init__.py."""
    if expected == _ANY:
        return True
    if isinstance(expected, dict) and isinstance(got, dict):
        told = expected.keys() - {_ANY}
        if not told <= got.keys() or (_ANY not in expected and told != got.keys()):
            return False
        return all(fits(expected[key], got[key], tolerance) for key in told)
    if isinstance(expected, list) and isinstance(got, list):
        told_of = expected[:-1] if expected[-1:] == [_ANY] else expected
        if len(got) < len(told_of) or (told_of is expected and len(got) != len(expected)):
            return False
        return all(fits(one, other, tolerance) for one, other in zip(told_of, got, strict=False))
    if float in (type(expected), type(got)) and {type(expected), type(got)} <= {int, float}:
        return math.isclose(expected, got, rel_tol=tolerance, abs_tol=tolerance)
    return type(expected) is type(got) and bool(expected == got)


@pytest.mark.parametrize(
    ("expected", "got", "is_same"),
    [
        ({"a": 1}, {"a": 1}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": 1, "...": "..."}, {"a": 1, "b": 2}, True),
        ({"a": 1, "...": "..."}, {"b": 2}, False),
        ({"a": "..."}, {"a": [1, 2]}, True),
        ({"a": "..."}, {}, False),
        ([1, 2], [1, 2, 3], False),
        ([1, 2, "..."], [1, 2, 3], True),
        ([1, 2, "..."], [1], False),
        ([1000.0, "a"], [1000.5, "a"], True),
        ([1000.0], [1002.0], False),
        ([0.0], [0.002], False),
        ([1.0], [1], True),
        ([10_000], [10_001], False),
        ([True], [1], False),
        (["a"], ["b"], False),
    ],
)
def test_the_comparer(expected: Any, got: Any, is_same: bool) -> None:
    assert fits(expected, got, 1e-3) is is_same
    assert not fits(1.0, 1.0000001, 0.0)


@pytest.fixture(scope="session")
def runtimes() -> Runtimes:
    return trio.run(find_runtimes, "test-shipped")


@pytest.fixture(scope="session")
def store() -> ModelStore:
    return ModelStore()


def known(name: str) -> Shipped:
    found = shipped(name)
    assert found is not None
    return found


def files_of(cargo: Shipped, store: ModelStore) -> Mapping[str, Path]:
    """What does not ship comes from its sources, once."""
    places = dict(cargo.files)
    for file in cargo.manifest.files:
        if file.path not in places:
            assert file.sources, f"{file.path} neither ships nor has a source"
            suffix = Path(file.path).suffix
            places[file.path] = store.fetch(list(file.sources), sha256=file.sha256, size_bytes=file.size_bytes, suffix=suffix).path
    return places


def root_of(data: bytes) -> str:
    leaves = [leaf_hash(data[at : at + BLOB_CHUNK_BYTES]) for at in range(0, len(data), BLOB_CHUNK_BYTES)]
    return BlobTree(len(data), b"".join(leaves)).root()


async def run_example(cargo: Shipped, files: Mapping[str, Path], runtimes: Runtimes) -> list[dict[str, Any]]:
    """The lines that come of the example's input."""
    assert cargo.example is not None
    with trio.fail_after(cargo.manifest.needs.time_s):
        async with open_cargo(cargo.manifest, cargo.address, files, runtimes, GRANTS) as opened:
            assert isinstance(opened, LineCargo)
            request = LineRequest("job_example", encode_input(cargo.example.input), bytes(16))
            async with opened.run_lines(request) as running:
                lines = [line async for line in running]
    assert isinstance(lines[-1], DoneLine)
    return [json.loads(encode_line(line)) for line in lines]


async def take_image_away(cargo: Shipped, files: Mapping[str, Path], runtimes: Runtimes) -> None:
    """Engines keep what was loaded into them."""
    if isinstance(runtimes.container, ContainerEngine) and ARCHIVE_PATH in files:
        source = ImageSource(archive=files[ARCHIVE_PATH])
        await remove_image(runtimes.container, await bring_image(runtimes.container, cargo.manifest.entry, source))


@pytest.mark.parametrize("name", shipped_names())
async def test_a_shipped_cargo_gives_its_example(name: str, runtimes: Runtimes, store: ModelStore) -> None:
    cargo = known(name)
    assert cargo.example is not None, "each has an example"
    if cargo.manifest.runtime is Runtime.CONTAINER and runtimes.container is None:
        pytest.skip(runtimes.why_no_container)
    files = files_of(cargo, store)
    lines = await run_example(cargo, files, runtimes)
    await take_image_away(cargo, files, runtimes)
    assert fits(cargo.example.output, lines, cargo.example.tolerance), str(lines)[:2000]


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_manifest(name: str, store: ModelStore) -> None:
    cargo = known(name)
    manifest = cargo.manifest
    assert (manifest.name, manifest.publisher) == (name, PUBLISHER)
    assert manifest.licence and len(manifest.description) > 40
    assert read_manifest(canonical_manifest(manifest)) == manifest
    shipped.cache_clear()
    assert known(name).address == cargo.address == address_of(manifest)
    for file, place in ((file, files_of(cargo, store)[file.path]) for file in manifest.files):
        data = place.read_bytes()
        assert (len(data), root_of(data)) == (file.size_bytes, file.root), file.path
        assert not any(source.startswith("file:") for source in file.sources)


def test_at_least_thirty_ship() -> None:
    names = shipped_names()
    assert len(names) == len(set(names)) >= 30
    assert {cargo_name(module) for module in modules.pins()} < set(names)
    assert {known(name).manifest.runtime for name in names} == set(Runtime)
    assert shipped("no-such-cargo") is None


def test_answers_that_are_not_to_come_again_are_not_kept() -> None:
    """And nobody is told what another account has asked."""
    policies = {name: one.manifest.cache for name in shipped_names() if (one := shipped(name)) is not None}
    assert sorted(name for name, policy in policies.items() if not policy.enabled) == ["shapes", "uuid"]
    assert not any(policy.public for policy in policies.values())
