"""Compiles echo.c and packs image.tar: ``python -m runtimes.container.echo.build``. Needs Debian's ``clang lld``."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from runtimes.container.echo import FOLDER

COMPILER = "Debian clang version 14.0.6"
"""Which made image.tar; another one may make other bytes."""

_FLAGS = (
    "--target=x86_64-linux-gnu",
    *("-std=gnu11", "-Os", "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fno-builtin", "-fno-ident", "-fno-stack-protector"),
    *("-fno-asynchronous-unwind-tables", "-nostdlib", "-static", "-fuse-ld=lld", "-Wl,--strip-all", "-Wl,--build-id=none"),
)
_TIMEOUT_S = 60.0
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"


def compiled() -> bytes:
    """Raises CalledProcessError, and FileNotFoundError where there is no clang."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "echo"
        subprocess.run(["clang", *_FLAGS, "echo.c", "-o", str(target)], cwd=FOLDER, check=True, timeout=_TIMEOUT_S)
        return target.read_bytes()


def packed(program: bytes) -> tuple[str, bytes]:
    """The digest of the image's manifest, and the archive with the image."""
    layer = _tar({"echo": (program, 0o755)})
    config = _json(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": ["/echo"]},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        }
    )
    manifest = _json({"schemaVersion": 2, "mediaType": _MANIFEST, "config": _named(config, _CONFIG), "layers": [_named(layer, _LAYER)]})
    files = {
        "oci-layout": b'{"imageLayoutVersion":"1.0.0"}',
        "index.json": _json({"schemaVersion": 2, "manifests": [_named(manifest, _MANIFEST)]}),
        **{f"blobs/sha256/{hashlib.sha256(blob).hexdigest()}": blob for blob in (manifest, config, layer)},
    }
    return _digest(manifest), _tar({name: (data, 0o644) for name, data in files.items()})


def _tar(files: dict[str, tuple[bytes, int]]) -> bytes:
    """No times, no owners."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, (data, mode) in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _named(data: bytes, media_type: str) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _digest(data), "size": len(data)}


def main() -> None:
    digest, archive = packed(compiled())
    (FOLDER / "image.tar").write_bytes(archive)
    print(f"{len(archive)} bytes; the entry in cargo.toml is localhost/container-echo@{digest}")


if __name__ == "__main__":
    main()
