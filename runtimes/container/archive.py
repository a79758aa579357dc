"""An image in a file: what is in it, and whether an engine may see it. The file is the OCI's image layout in a tar, as made by
``docker save`` (25 and later), ``podman save --format oci-archive`` and ``docker buildx build --output type=oci``.

The digest in a Cargo's entry is that of the image's manifest. The manifest names configuration and layers by digest, the configuration
names each layer as unpacked by digest, so all bytes are checked against the entry. What is given to the engine is an archive of our own
making, from checked parts only: names and tags in the file count for nothing, so none can take the place of another image.

Refused: names that lead elsewhere, links and devices, files with holes (few bytes that unpack to many), more bytes, entries or layers
than there may be, layers in other forms than tar and gzip. Layouts: https://github.com/opencontainers/image-spec (image-layout.md,
manifest.md, config.md, layer.md).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

from protocol.cargos import CargoManifest
from protocol.errors import ConfigError

ARCHIVE_PATH = "image.tar"
"""Under this path a Cargo's manifest has its image, where it brings it."""

_GIB = 1024**3
_JSON_BYTES_MAX = 1024 * 1024  # of an index, a manifest or a configuration
_OUTER_ENTRIES_MAX = 1024
_HEADER_BYTES_MAX = 64 * 1024  # of a long name or of extended headers, which are read into memory
_READ_BYTES = 1024 * 1024
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})\Z")
_MANIFESTS = frozenset(
    {"application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"}
)
_PLAIN = frozenset({"application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar"})
_GZIPPED = frozenset(
    {"application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.docker.image.rootfs.diff.tar.gzip"}
)
_EXTENDED = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """Of one image: bytes of all layers together when they are unpacked, files and folders in them, layers."""

    unpacked_bytes: int = 16 * _GIB
    entries: int = 500_000
    layers: int = 127  # as many as overlayfs takes


@dataclass(frozen=True, slots=True)
class Blob:
    """A part of the archive. ``sha256``: of its bytes as they are; ``name``: of the archive's entry."""

    sha256: str
    size_bytes: int
    name: str


@dataclass(frozen=True, slots=True)
class Layer:
    """``unpacked_sha256``: of the tar within."""

    blob: Blob
    unpacked_sha256: str
    is_gzipped: bool


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """``digest``: of the manifest. ``image_id``: of the configuration, by which engines call the image. ``facts``: its own words."""

    digest: str
    image_id: str
    config: Blob
    layers: tuple[Layer, ...]
    facts: ImageFacts


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """Of an image's configuration. ``architecture`` in Go's words (amd64, arm64)."""

    system: str
    architecture: str
    has_program: bool
    volumes: tuple[str, ...]


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


def has_archive(manifest: CargoManifest) -> bool:
    """Whether the Cargo brings its image."""
    return any(file.path == ARCHIVE_PATH for file in manifest.files)


def check_facts(facts: ImageFacts, machine: str) -> None:
    """Whether an image can run here. ``machine``: as ``os.uname`` says. Raises ConfigError."""
    ours = {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)
    if facts.system != "linux" or facts.architecture != ours:
        raise ConfigError(f"the image is for {facts.system}/{facts.architecture}; this machine is linux/{ours}")
    if not facts.has_program:
        raise ConfigError("the image has no entry point; its publisher has to set ENTRYPOINT or CMD")
    if facts.volumes:  # they would be folders on the host's disk, without a limit of size
        raise ConfigError(
            f"the image wants a volume at {facts.volumes[0][:80]!r}; Cargos have none, /tmp is there to write to"
        )


def facts_of(fields: dict[str, Any]) -> ImageFacts:
    """From a configuration; engines' ``inspect`` has the same fields, with a capital letter. Raises ConfigError."""
    either = {name.lower(): value for name, value in fields.items()}
    config = either.get("config") or {}
    if not isinstance(config, dict):
        raise ConfigError("the image's configuration is not in the form of the OCI's")
    volumes = config.get("Volumes") or {}
    has_program = bool(config.get("Entrypoint") or config.get("Cmd"))
    return ImageFacts(str(either.get("os")), str(either.get("architecture")), has_program, tuple(map(str, volumes)))


@contextmanager
def _readable() -> Iterator[None]:
    """tarfile, gzip and json raise many kinds of errors for bytes that are not theirs."""
    try:
        yield
    except (tarfile.TarError, zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise ConfigError(f"the image's archive is damaged or no tar: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ConfigError(f"the image's archive is not in the OCI's image layout ({type(error).__name__})") from None


class _Header(tarfile.TarInfo):
    """Raises ConfigError for headers that would be read into memory without end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENDED and header.size > _HEADER_BYTES_MAX):
            raise ConfigError(
                f"the image's archive has a header of {header.size} bytes; at most {_HEADER_BYTES_MAX} are read"
            )
        return header


def read_archive(path: Path, digest: str) -> ArchivedImage:
    """What is in the archive, without looking into its layers. ``digest``: of the entry, in hex. Raises ConfigError, OSError."""
    with _readable(), tarfile.open(path, "r:", tarinfo=_Header) as archive:
        members = _members(archive)
        manifest_blob = _find(members, digest)
        manifest = _json(archive, members, manifest_blob)
        if manifest.get("mediaType", _named(archive, members, digest)) not in _MANIFESTS:
            raise ConfigError(
                "the entry's digest is not that of an image's manifest; name the one of the image for this machine"
            )
        config = _find(members, _hex(manifest["config"]["digest"]))
        fields = _json(archive, members, config)
        layers = _layers(members, manifest["layers"], fields["rootfs"]["diff_ids"])
        return ArchivedImage(digest, config.sha256, config, layers, facts_of(fields))


def _members(archive: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """Files of the archive by name. Raises ConfigError."""
    members: dict[str, tarfile.TarInfo] = {}
    for number, member in enumerate(archive):
        if number >= _OUTER_ENTRIES_MAX:
            raise ConfigError(f"the image's archive has more than {_OUTER_ENTRIES_MAX} files")
        name = member.name.removeprefix("./")
        _check_name(name)
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            raise ConfigError(f"the image's archive has {name[:80]!r}, which is neither a file nor a folder")
        if name in members:
            raise ConfigError(f"the image's archive has {name[:80]!r} twice")
        members[name] = member
    return members


def _check_name(name: str) -> None:
    if name.startswith("/") or ".." in name.split("/"):
        raise ConfigError(f"the image's archive has a name that leads out of its folder: {name[:80]!r}")


def _hex(digest: str) -> str:
    found = _DIGEST.match(digest)
    if found is None:
        raise ConfigError("the image's archive has parts that are not named by SHA-256")
    return found[1]


def _find(members: dict[str, tarfile.TarInfo], sha256: str) -> Blob:
    name = f"blobs/sha256/{sha256}"
    if name not in members:
        raise ConfigError(
            f"the image's archive has no part {sha256[:12]}…: it belongs to another image, or is incomplete"
        )
    return Blob(sha256, members[name].size, name)


def _named(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], digest: str) -> object:
    """The media type that the index has for a manifest which does not say so itself."""
    index = _parse(_content(archive, members["index.json"]))
    for entry in index["manifests"]:
        if entry["digest"] == f"sha256:{digest}":
            return entry["mediaType"]
    return None


def _json(archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], blob: Blob) -> dict[str, Any]:
    data = _content(archive, members[blob.name])
    if hashlib.sha256(data).hexdigest() != blob.sha256:
        raise ConfigError(f"the image's archive is damaged: part {blob.sha256[:12]}… has another hash")
    return _parse(data)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > _JSON_BYTES_MAX:
        raise ConfigError(
            f"the image's archive describes itself in {member.size} bytes; at most {_JSON_BYTES_MAX} are read"
        )
    return _open(archive, member).read()


def _open(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = archive.extractfile(member)
    if stream is None:
        raise ConfigError("the image's archive has a part that is no file")
    return stream


def _parse(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _layers(
    members: dict[str, tarfile.TarInfo], entries: list[dict[str, Any]], unpacked: list[str]
) -> tuple[Layer, ...]:
    if len(entries) != len(unpacked):
        raise ConfigError("the image's manifest and configuration do not have the same layers")
    layers: list[Layer] = []
    for entry, digest in zip(entries, unpacked, strict=True):
        kind = entry["mediaType"]
        if kind not in _PLAIN | _GZIPPED:
            raise ConfigError(
                f"the image has a layer of type {str(kind)[:80]!r}; build it with plain or gzipped layers"
            )
        layers.append(Layer(_find(members, _hex(entry["digest"])), _hex(digest), kind in _GZIPPED))
    return tuple(layers)


def check_layers(path: Path, image: ArchivedImage, most: ArchiveLimits | None = None) -> None:
    """Unpacks all layers to nowhere. Blocks for some 5 s a GiB. Raises ConfigError, OSError."""
    most = most or ArchiveLimits()
    if len(image.layers) > most.layers:
        raise ConfigError(f"the image has {len(image.layers)} layers; at most {most.layers} are unpacked")
    bytes_left, entries_left = most.unpacked_bytes, most.entries
    with _readable(), tarfile.open(path, "r:", tarinfo=_Header) as archive:
        members = _members(archive)
        for layer in image.layers:
            packed = _Counted(_open(archive, members[layer.blob.name]), hashlib.sha256(), layer.blob.size_bytes)
            plain = cast(IO[bytes], packed)
            source = cast(IO[bytes], gzip.GzipFile(fileobj=plain)) if layer.is_gzipped else plain
            unpacked = _Counted(source, hashlib.sha256(), bytes_left)
            entries_left = _walk(unpacked, entries_left)
            bytes_left = unpacked.bytes_left
            packed.drain()
            if (packed.hexdigest(), unpacked.hexdigest()) != (layer.blob.sha256, layer.unpacked_sha256):
                raise ConfigError(f"the image's archive is damaged: layer {layer.blob.sha256[:12]}… has another hash")


class _Counted(io.RawIOBase):
    """Reads through, hashes, and raises ConfigError where there is more than there may be."""

    def __init__(self, source: IO[bytes], digest: _Hash, bytes_max: int) -> None:
        self._source, self._digest = source, digest
        self._bytes_max = self.bytes_left = bytes_max

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        data = self._source.read(_READ_BYTES if size is None or size < 0 else min(size, _READ_BYTES))
        self._digest.update(data)
        self.bytes_left -= len(data)
        if self.bytes_left < 0:
            raise ConfigError(f"the image unpacks to more than the {self._bytes_max} bytes that are left to it")
        return data

    def drain(self) -> None:
        while self.read(_READ_BYTES):
            pass

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _walk(unpacked: _Counted, entries_left: int) -> int:
    """Looks at all that a layer has. Returns how many entries are left to the next. Raises ConfigError."""
    with tarfile.open(fileobj=cast(IO[bytes], unpacked), mode="r|", tarinfo=_Header, bufsize=_READ_BYTES) as layer:
        while (member := layer.next()) is not None:
            entries_left -= 1
            if entries_left < 0:
                raise ConfigError("the image has more files than an Island unpacks")
            _check_name(member.name)
            _check_kind(member)
            layer.members.clear()  # type: ignore[attr-defined]  # else tarfile remembers all that it has seen
    unpacked.drain()
    return entries_left


def _check_kind(member: tarfile.TarInfo) -> None:
    name = member.name[:80]
    if member.isdev():
        raise ConfigError(f"the image has a device, {name!r}; Cargos have none of their own")
    if member.issparse():
        raise ConfigError(f"the image has a file with holes, {name!r}; pack it without --sparse")
    if member.islnk():
        _check_name(member.linkname)


def clean_writer(path: Path, image: ArchivedImage, tag: str) -> Callable[[int], None]:
    """Writes the image to a descriptor and closes it, in the one form that podman and Docker both load, under our tag. It may raise
    OSError, and ConfigError where the file is no longer what it was."""

    def write(descriptor: int) -> None:
        with open(descriptor, "wb") as out, tarfile.open(path, "r:", tarinfo=_Header) as archive:
            members = _members(archive)
            with tarfile.open(fileobj=out, mode="w|", format=tarfile.GNU_FORMAT) as clean:
                blobs = {blob.name: blob for blob in (image.config, *(layer.blob for layer in image.layers))}
                for blob in blobs.values():
                    _add(clean, blob.name, blob.size_bytes, _open(archive, members[blob.name]))
                index = [
                    {
                        "Config": image.config.name,
                        "RepoTags": [tag],
                        "Layers": [layer.blob.name for layer in image.layers],
                    }
                ]
                data = json.dumps(index).encode()
                _add(clean, "manifest.json", len(data), io.BytesIO(data))

    return write


def _add(clean: tarfile.TarFile, name: str, size_bytes: int, source: IO[bytes]) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size_bytes, 0o644
    clean.addfile(entry, source)
