"""Shard manifests of catalogue models: what their layers weigh, so that a route can be planned before anybody has fetched the model.

Made by `archipelag-node cargo shard NAME`, without the shards' files: whoever holds the model cuts the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType

from protocol.shards import ShardManifest, manifest_from_json

_SUFFIX = ".json"


@cache
def catalogue_manifests() -> Mapping[str, ShardManifest]:
    """Manifests by the catalogue's name. Raises ConfigError where the installation is damaged."""
    files = (file for file in resources.files(__name__).iterdir() if file.name.endswith(_SUFFIX))
    manifests = (manifest_from_json(file.read_text(encoding="utf-8")) for file in files)
    return MappingProxyType({manifest.name: manifest for manifest in sorted(manifests, key=lambda manifest: manifest.name)})
