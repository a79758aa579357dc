"""Images made by hand for the tests: a layer from files, an archive in the OCI's image layout around layers."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True, slots=True)
class Entry:
    """Of a layer or of an archive."""

    name: str
    data: bytes = b""
    mode: int = 0o755
    kind: bytes = tarfile.REGTYPE
    link: str = ""


def tar(entries: Sequence[Entry]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.mode, info.type, info.linkname, info.size = entry.mode, entry.kind, entry.link, len(entry.data)
            archive.addfile(info, io.BytesIO(entry.data))
    return out.getvalue()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob(data: bytes) -> Entry:
    return Entry(f"blobs/sha256/{sha256(data)}", data, 0o644)


@dataclass(frozen=True, slots=True)
class Image:
    """``digest``: of its manifest; ``parts``: the entries of its archive."""

    digest: str
    config_digest: str
    parts: tuple[Entry, ...]

    def write(self, path: Path) -> Path:
        path.write_bytes(tar(self.parts))
        return path


def image(
    layers: Sequence[bytes],
    command: Sequence[str] = ("/job",),
    *,
    is_gzipped: bool = False,
    unpacked: Sequence[bytes] | None = None,
    manifest: dict[str, Any] | None = None,
    layer_type: str = "",
    config: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> Image:
    """``unpacked``: what the configuration says of the layers, if that is not so; the other three change what stands in the JSON."""
    packed = [gzip.compress(layer, mtime=0) if is_gzipped else layer for layer in layers]
    kind = layer_type or (f"{LAYER_TYPE}+gzip" if is_gzipped else LAYER_TYPE)
    facts: dict[str, Any] = {
        "architecture": ARCHITECTURE,
        "os": "linux",
        "config": {"Entrypoint": list(command)} | (settings or {}),
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(layer)}" for layer in unpacked or layers]},
    }
    config_data = json.dumps(facts | (config or {})).encode()
    fields: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": _described(config_data, "application/vnd.oci.image.config.v1+json"),
        "layers": [_described(layer, kind) for layer in packed],
    }
    manifest_data = json.dumps(fields | (manifest or {})).encode()
    index = {"schemaVersion": 2, "manifests": [_described(manifest_data, MANIFEST_TYPE)]}
    parts = [
        Entry("oci-layout", b'{"imageLayoutVersion":"1.0.0"}', 0o644),
        Entry("index.json", json.dumps(index).encode(), 0o644),
        *{part.name: part for part in map(blob, (manifest_data, config_data, *packed))}.values(),
    ]
    return Image(sha256(manifest_data), sha256(config_data), tuple(parts))


def _described(data: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": f"sha256:{sha256(data)}", "size": len(data)}
