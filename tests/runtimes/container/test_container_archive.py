"""Archives of images: good ones are read whole, bad ones are refused before an engine sees them."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from protocol.errors import ConfigError
from runtimes.container.archive import ArchiveLimits, check_facts, check_layers, clean_writer, read_archive
from tests.runtimes.container.container_images import ARCHITECTURE, Entry, Image, image, sha256, tar

BASE = tar(
    [
        Entry("etc", kind=tarfile.DIRTYPE),
        Entry("etc/passwd", b"root"),
        Entry("bin", kind=tarfile.SYMTYPE, link="/usr/bin"),
    ]
)
TOP = tar([Entry("job", b"program"), Entry("same", kind=tarfile.LNKTYPE, link="job")])
MACHINE = os.uname().machine


def refused(made: Image, path: Path, said: str, most: ArchiveLimits | None = None) -> None:
    with pytest.raises(ConfigError, match=said):
        found = read_archive(made.write(path / "image.tar"), made.digest)
        check_facts(found.facts, MACHINE)
        check_layers(path / "image.tar", found, most)


def written(path: Path, made: Image) -> dict[str, bytes]:
    """What an engine is given."""
    found = read_archive(made.write(path / "image.tar"), made.digest)
    check_layers(path / "image.tar", found)
    with open(path / "clean.tar", "wb") as out:
        clean_writer(path / "image.tar", found, "localhost/archipelag-cargo:x")(os.dup(out.fileno()))
    with tarfile.open(path / "clean.tar") as clean:
        return {member.name: clean.extractfile(member).read() for member in clean}  # type: ignore[union-attr]


@pytest.mark.parametrize("is_gzipped", [False, True])
def test_good_image_is_given_on_under_our_name(tmp_path: Path, is_gzipped: bool) -> None:
    made = image([BASE, TOP], is_gzipped=is_gzipped)
    extra = (
        *made.parts,
        Entry("manifest.json", b'[{"RepoTags":["debian:12"]}]'),
        Entry("blobs/sha256/" + "0" * 64, b"?"),
    )
    parts = written(tmp_path, replace(made, parts=extra))
    packed = [gzip.compress(layer, mtime=0) if is_gzipped else layer for layer in (BASE, TOP)]
    names = [f"blobs/sha256/{sha256(layer)}" for layer in packed]
    assert [parts[name] for name in names] == packed
    config = f"blobs/sha256/{made.config_digest}"
    index = [{"Config": config, "RepoTags": ["localhost/archipelag-cargo:x"], "Layers": names}]
    assert json.loads(parts["manifest.json"]) == index
    assert set(parts) == {config, "manifest.json", *names}


def test_two_layers_that_are_equal_are_written_once(tmp_path: Path) -> None:
    parts = written(tmp_path, image([BASE, BASE]))
    assert len(parts) == 3


def test_facts_are_read(tmp_path: Path) -> None:
    made = image([BASE], settings={"Volumes": {"/data": {}}})
    facts = read_archive(made.write(tmp_path / "image.tar"), made.digest).facts
    assert (facts.system, facts.architecture, facts.has_program, facts.volumes) == (
        "linux",
        ARCHITECTURE,
        True,
        ("/data",),
    )


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"settings": {"Volumes": {"/data": {}}}}, "wants a volume at '/data'"),
        ({"command": ()}, "has no entry point"),
        ({"config": {"architecture": "s390x"}}, "is for linux/s390x"),
        ({"config": {"os": "windows"}}, "is for windows/"),
        ({"config": {"config": 5}}, "not in the form"),
        ({"layer_type": "application/vnd.oci.image.layer.v1.tar+zstd"}, "plain or gzipped"),
        ({"layer_type": "application/vnd.oci.image.layer.v1.tar+gzip"}, "damaged"),
        ({"manifest": {"mediaType": "application/vnd.oci.image.index.v1+json"}}, "not that of an image's manifest"),
        ({"manifest": {"config": {"digest": "md5:1"}}}, "not named by SHA-256"),
        ({"manifest": {"config": {"digest": "sha256:" + "00" * 32}}}, "has no part 000000000000"),
        ({"manifest": {"layers": []}}, "do not have the same layers"),
        ({"manifest": {"layers": 7}}, "not in the OCI's image layout"),
        ({"unpacked": [TOP]}, "has another hash"),
    ],
)
def test_image_that_cannot_run_here_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    command = changes.pop("command", ("/job",))
    refused(image([BASE], command, **changes), tmp_path, said)


@pytest.mark.parametrize(
    "entry,said",
    [
        (Entry("../../etc/cron.d/x", b"x"), "leads out"),
        (Entry("/etc/cron.d/x", b"x"), "leads out"),
        (Entry("a/../../x", b"x"), "leads out"),
        (Entry("link", kind=tarfile.LNKTYPE, link="../../etc/shadow"), "leads out"),
        (Entry("link", kind=tarfile.LNKTYPE, link="/etc/shadow"), "leads out"),
        (Entry("disk", kind=tarfile.BLKTYPE), "has a device"),
        (Entry("tty", kind=tarfile.CHRTYPE), "has a device"),
        (Entry("pipe", kind=tarfile.FIFOTYPE), "has a device"),
    ],
)
def test_layer_with_a_trap_is_refused(tmp_path: Path, entry: Entry, said: str) -> None:
    refused(image([tar([Entry("job", b"x"), entry])], is_gzipped=True), tmp_path, said)


@pytest.mark.parametrize(
    "entry,said",
    [
        (Entry("../x", b"x"), "leads out"),
        (Entry("/x", b"x"), "leads out"),
        (Entry("x", kind=tarfile.SYMTYPE, link="/etc/shadow"), "neither a file nor a folder"),
        (Entry("x", kind=tarfile.LNKTYPE, link="index.json"), "neither a file nor a folder"),
        (Entry("index.json", b"{}"), "twice"),
        (Entry("./index.json", b"{}"), "twice"),
    ],
)
def test_archive_with_a_trap_is_refused(tmp_path: Path, entry: Entry, said: str) -> None:
    made = image([BASE])
    refused(replace(made, parts=(*made.parts, entry)), tmp_path, said)


def test_archive_of_too_many_files_is_refused(tmp_path: Path) -> None:
    made = image([BASE])
    many = tuple(Entry(f"x{number}", kind=tarfile.DIRTYPE) for number in range(1025))
    refused(replace(made, parts=(*made.parts, *many)), tmp_path, "more than 1024 files")


def test_bomb_is_stopped_where_it_is_over_the_limit(tmp_path: Path) -> None:
    bomb = tar([Entry("zeros", bytes(64 * 1024**2))])
    made = image([BASE, bomb], is_gzipped=True)
    assert sum(len(part.data) for part in made.parts) < 200_000
    refused(made, tmp_path, "unpacks to more than", ArchiveLimits(unpacked_bytes=16 * 1024**2))
    refused(made, tmp_path, "unpacks to more than", ArchiveLimits(unpacked_bytes=len(BASE) + len(bomb) - 1))
    check_layers(
        tmp_path / "image.tar", read_archive(tmp_path / "image.tar", made.digest), ArchiveLimits(len(BASE) + len(bomb))
    )


def test_bytes_after_the_end_of_a_layer_count_too(tmp_path: Path) -> None:
    refused(
        image([BASE + bytes(64 * 1024**2)], is_gzipped=True), tmp_path, "unpacks to more", ArchiveLimits(16 * 1024**2)
    )


def test_many_small_files_are_refused(tmp_path: Path) -> None:
    refused(
        image([tar([Entry(f"{number}") for number in range(101)])]), tmp_path, "more files", ArchiveLimits(entries=100)
    )


def test_many_layers_are_refused(tmp_path: Path) -> None:
    refused(image([BASE] * 3), tmp_path, "has 3 layers", ArchiveLimits(layers=2))


def test_header_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    long_name = tarfile.TarInfo("x")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 2**33
    refused(image([long_name.tobuf(tarfile.GNU_FORMAT) + bytes(1024)]), tmp_path, "has a header of 8589934592 bytes")


def test_file_with_holes_is_refused(tmp_path: Path) -> None:
    """A hundred bytes that unpack to 8 GiB."""
    info = tarfile.TarInfo("holes")
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,0",
        "GNU.sparse.size": str(2**33),
    }
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info)
    refused(image([out.getvalue()]), tmp_path, "a file with holes")


def test_archive_of_another_image_is_refused(tmp_path: Path) -> None:
    path = image([BASE]).write(tmp_path / "image.tar")
    with pytest.raises(ConfigError, match="belongs to another image"):
        read_archive(path, image([TOP]).digest)


def test_every_part_is_checked_by_its_hash(tmp_path: Path) -> None:
    made = image([BASE, TOP], is_gzipped=True)
    for number in range(2, len(made.parts)):
        part = made.parts[number]
        changed = replace(part, data=part.data[:-1] + bytes([part.data[-1] ^ 1]))
        refused(
            replace(made, parts=(*made.parts[:number], changed, *made.parts[number + 1 :])), tmp_path, "damaged|layout"
        )


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100, bytes(10240)])
def test_file_that_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "image.tar").write_bytes(data)
    with pytest.raises(ConfigError):
        read_archive(tmp_path / "image.tar", "ab" * 32)


def test_archive_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    made = image([TOP])
    data = tar(made.parts)
    for size in range(0, len(data) - 11 * 1024, 512):
        (tmp_path / "image.tar").write_bytes(data[:size])
        with pytest.raises(ConfigError):
            check_layers(tmp_path / "image.tar", read_archive(tmp_path / "image.tar", made.digest))
