"""The data folder: permissions, formats, locks and half-written files."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from node.datadir import FORMAT, DataDir, write_atomically
from protocol.errors import ConfigError


def test_the_identity_is_made_once_and_private(tmp_path: Path) -> None:
    data = DataDir.open(tmp_path / "d")
    key = data.key("identity")
    assert stat.S_IMODE((tmp_path / "d" / "identity.key").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o700
    assert DataDir.open(tmp_path / "d").key("identity").peer_id == key.peer_id
    assert data.key("network").peer_id != key.peer_id


def test_a_key_that_others_can_read_is_refused_with_the_way_out(tmp_path: Path) -> None:
    data = DataDir.open(tmp_path)
    data.key("identity")
    (tmp_path / "identity.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        data.key("identity")


def test_a_damaged_key_is_not_replaced(tmp_path: Path) -> None:
    data = DataDir.open(tmp_path)
    write_atomically(tmp_path / "identity.key", b"short")
    with pytest.raises(ConfigError, match="5 bytes instead of 32"):
        data.key("identity")
    assert (tmp_path / "identity.key").read_bytes() == b"short"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps({"format": FORMAT + 1}), "newer archipelag-node"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": "x"}', "damaged"),
    ],
)
def test_formats_that_this_program_does_not_know(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "format.json").write_text(content)
    with pytest.raises(ConfigError, match=words):
        DataDir.open(tmp_path)


def test_one_node_a_folder(tmp_path: Path) -> None:
    data = DataDir.open(tmp_path)
    with data.locked(), pytest.raises(ConfigError, match="already runs"), DataDir.open(tmp_path).locked():
        pass
    with data.locked():
        pass


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "f", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_damaged_json_says_what_to_do(tmp_path: Path, content: str) -> None:
    data = DataDir.open(tmp_path)
    (tmp_path / "pins.json").write_text(content)
    with pytest.raises(ConfigError, match="delete it"):
        data.read_json("pins.json")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--data-dir"):
        DataDir.open(tmp_path / "file" / "d")
