"""What a Cargo is granted: walls for engines, tiers, limits of a job, and what is said where a runtime or the walls are missing."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from node import cargo_runtimes
from node.cargo_runtimes import Grants, Runtimes, engine_walls, limits_for, open_cargo, tier_for
from node.shipped import shipped
from protocol import limits
from protocol.cargos import CargoManifest, Needs
from protocol.errors import ConfigError
from runtimes.sandbox.probe import Level, Sandbox

STRONG, WEAK, NONE = (Sandbox(level, "as the test says") for level in (Level.NAMESPACES, Level.RLIMITS, Level.NONE))


def manifest_of(name: str) -> CargoManifest:
    found = shipped(name)
    assert found is not None
    return found.manifest


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("layers", [None, 0, 8])
@pytest.mark.parametrize("sandbox", [STRONG, WEAK, NONE])
def test_engines_work_behind_walls_but_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sandbox: Sandbox, layers: int | None, gpu: bool
) -> None:
    monkeypatch.setattr(cargo_runtimes, "has_gpu_devices", lambda: gpu)
    walls = engine_walls(sandbox, tmp_path / "model.gguf", layers)
    if sandbox is NONE or (gpu and layers != 0):
        assert walls is None
        return
    assert walls is not None and walls.sandbox is sandbox and not walls.tier.network
    assert [bind.source for bind in walls.reads] == ([str(tmp_path / "model.gguf")] if sandbox is STRONG else [])


@pytest.mark.parametrize("name", ["minilm-l6-v2", "smollm2-embed"])
async def test_native_code_of_strangers_does_not_run_without_walls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    manifest = manifest_of(name)
    files = {file.path: tmp_path / "file" for file in manifest.files}
    with pytest.raises(ConfigError, match="runs only inside a sandbox"):
        async with open_cargo(manifest, "ab" * 32, files, Runtimes(NONE), Grants()):
            pass


def test_no_more_is_granted_than_the_owner_says(caplog: pytest.LogCaptureFixture) -> None:
    greedy = replace(manifest_of("minilm-l6-v2"), trust_level=3)
    granted = [tier_for(greedy, Grants(trust_level_max=most)).name for most in (0, 1, 2, 3)]
    assert granted == ["restricted", "standard", "elevated", "elevated"]
    with caplog.at_level(logging.WARNING):
        open_cargo(greedy, "ab" * 32, {}, Runtimes(STRONG), Grants(trust_level_max=1))
    assert "asks for trust level 3 and is granted 1" in caplog.text


def test_a_job_is_bounded_by_its_needs_its_tier_and_its_runtime() -> None:
    wasm, onnx = manifest_of("text-stats"), manifest_of("minilm-l6-v2")
    brief = replace(wasm, needs=Needs(memory_bytes=1, time_s=5, output_bytes=1000))
    most = limits_for(brief, tier_for(brief, Grants()))
    assert (most.timeout_s, most.output_bytes, most.fuel) == (5, 1000, limits.WASM_FUEL_MAX)
    long = replace(onnx, needs=Needs(memory_bytes=1, time_s=600))
    assert limits_for(long, tier_for(long, Grants(trust_level_max=0))).timeout_s == 60


def test_a_runtime_that_is_not_installed_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cargo_runtimes, "_is_installed", lambda module: False)
    with pytest.raises(ConfigError, match="`make setup-images` brings it"):
        open_cargo(manifest_of("shapes"), "ab" * 32, {}, Runtimes(STRONG), Grants())
    with pytest.raises(ConfigError, match="`make setup` brings it"):
        open_cargo(manifest_of("text-stats"), "ab" * 32, {}, Runtimes(STRONG), Grants())
