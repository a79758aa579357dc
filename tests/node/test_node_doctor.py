"""What doctor finds, and how it asks for GPUs."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path

import pytest

from node import answer_embedder, doctor
from node.gpus import GpuReport, detect_gpus
from protocol.ads import Gpu
from runtimes.container.engines import EngineSearch
from runtimes.sandbox.probe import Level, Sandbox
from runtimes.store import ModelStore


def test_this_machine_can_run_an_island(tmp_path: Path) -> None:
    findings = doctor.examine(str(tmp_path / "d"))
    assert not [finding for finding in findings if finding.state == "fail"], "\n".join(map(str, findings))
    said = "\n".join(map(str, findings))
    for word in ("usable cores", "libp2p 0.8.1", "llama-cpp-python", "identity 12D3Koo", "model cache", "GPU"):
        assert word in said


def test_a_coordinator_that_is_not_there(tmp_path: Path) -> None:
    findings = doctor.examine(str(tmp_path / "d"), "http://127.0.0.1:1")
    assert findings[-1].state == "fail" and "cannot be reached" in findings[-1].what


def test_a_key_that_others_can_read(tmp_path: Path) -> None:
    doctor.examine(str(tmp_path))
    (tmp_path / "identity.key").chmod(0o644)
    assert any(finding.state == "fail" and "chmod 600" in str(finding) for finding in doctor.examine(str(tmp_path)))


def test_gpus_that_llama_cpp_lists() -> None:
    question = 'print(\'{"gpus": [["Big GPU", "cuda", 100, 60]], "offload": true}\')'
    report = detect_gpus(question)
    assert report == GpuReport((Gpu("Big GPU", "cuda", 100),), (60,), True)
    (found,) = doctor._gpus(report)
    assert found.state == "ok" and "Big GPU" in found.what


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("import os; os.abort()", "status -6"),
        ("raise OSError('libcuda.so.1: cannot open')", "libcuda.so.1"),
        ("print('no json')", "no list"),
        ("print('{}')", "no list"),
    ],
)
def test_a_driver_that_crashes_hurts_nobody(question: str, words: str) -> None:
    report = detect_gpus(question)
    assert report.gpus == () and words in report.problem


def test_the_hint_for_a_gpu_that_this_build_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    (found,) = doctor._gpus(GpuReport(offload=False))
    assert "make setup GPU=cuda" in found.advice


def test_whether_alike_questions_are_found_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("minilm-l6-v2", "minilm-l6-v2-tokenizer"):
        ModelStore().fetch(name)
    (found,) = doctor._alike()
    assert found.state == "ok" and "in the model cache" in found.what
    monkeypatch.setenv("ARCHIPELAG_CACHE_DIR", str(tmp_path))
    (found,) = doctor._alike()
    assert found.state == "ok" and "fetches minilm-l6-v2 first, 23 MB" in found.what
    monkeypatch.setattr(answer_embedder, "missing_modules", lambda: ["onnxruntime"])
    (found,) = doctor._alike()
    assert found.state == "note" and "onnxruntime is not installed" in found.what and "archipelag[onnx]" in found.advice


def test_runtimes_that_are_missing_say_what_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "diffusers":
            raise metadata.PackageNotFoundError(name)
        return "1.2.3"

    async def no_engine() -> EngineSearch:
        return EngineSearch(None, "neither podman nor docker is installed")

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(doctor, "find_engine", no_engine)
    onnx, wasm, diffusers, container = doctor._runtimes()
    assert str(onnx) == "ok    runtime onnx: onnxruntime 1.2.3" and wasm.state == "ok"
    assert (diffusers.state, diffusers.advice) == ("note", "make setup-images")
    assert container.state == "note" and "neither podman nor docker" in container.what


@pytest.mark.parametrize(("level", "state"), [(Level.NAMESPACES, "ok"), (Level.RLIMITS, "note"), (Level.NONE, "note")])
def test_the_walls_are_named(monkeypatch: pytest.MonkeyPatch, level: Level, state: str) -> None:
    monkeypatch.setattr(doctor, "probe", lambda: Sandbox(level, "as tried"))
    (found,) = doctor._walls()
    assert found.state == state and level.value in found.what and "as tried" in found.what
