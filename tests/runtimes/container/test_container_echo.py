"""The container Cargo that ships: its image is what its source makes, and its program keeps the contract at the edges."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import tomllib
from pathlib import Path

import pytest

from runtimes.container.archive import check_facts, check_layers, read_archive
from runtimes.container.echo import FOLDER, build
from runtimes.container.image import digest_of

IMAGE = FOLDER / "image.tar"


def entry_digest() -> str:
    return digest_of(tomllib.loads((FOLDER / "cargo.toml").read_text())["entry"])


def test_the_manifest_names_the_image() -> None:
    image = read_archive(IMAGE, entry_digest())
    check_layers(IMAGE, image)
    check_facts(image.facts, "x86_64")


def test_a_rebuild_gives_the_same_image() -> None:
    clang = shutil.which("clang")
    if clang is None or build.COMPILER not in subprocess.run([clang, "--version"], capture_output=True, text=True, check=True).stdout:
        pytest.skip(f"there is no {build.COMPILER}, which made the image")
    digest, archive = build.packed(build.compiled())
    assert (digest, archive) == (f"sha256:{entry_digest()}", IMAGE.read_bytes())


@pytest.fixture
def program(tmp_path: Path) -> Path:
    if os.uname().machine != "x86_64":
        pytest.skip("the program is for x86-64")
    with tarfile.open(IMAGE) as archive:
        layer = read_archive(IMAGE, entry_digest()).layers[0].blob.name
        data = archive.extractfile(layer)
        assert data is not None
        with tarfile.open(fileobj=io.BytesIO(data.read())) as files:
            files.extract("echo", tmp_path, filter="data")
    return tmp_path / "echo"


@pytest.mark.parametrize("text", ["{}", '{"a":\n[1,\r\n "\\n"]}', json.dumps({"a": "x" * 1_000_000})])
def test_the_input_comes_back_on_one_line(program: Path, text: str) -> None:
    run = subprocess.run([str(program)], input=text.encode(), capture_output=True, check=True, timeout=20)
    status, done = map(json.loads, run.stdout.decode().splitlines())
    assert status == {"type": "status", "message": "reading"}
    assert done == {"type": "done", "input": json.loads(text)}


def test_an_input_without_end_is_given_up(program: Path) -> None:
    run = subprocess.run([str(program)], input=b" " * 2 * 1024**2, capture_output=True, check=False, timeout=20)
    assert (run.returncode, run.stdout.splitlines()) == (1, [b'{"type":"status","message":"reading"}'])
