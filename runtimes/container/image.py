"""How an engine gets a Cargo's image: it has it, or it is loaded from the Cargo's own file, or it is pulled where the operator lets it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import trio

from protocol.errors import ConfigError
from runtimes.container.archive import (
    ArchivedImage,
    ArchiveLimits,
    check_facts,
    check_layers,
    clean_writer,
    facts_of,
    read_archive,
)
from runtimes.container.client import Answer, EngineFailed, call_program
from runtimes.container.engines import ContainerEngine

_ASK_S = 30.0
_LOAD_S = 600.0  # a large image on a slow disk
_PULL_S = 1800.0
_TAG_CHARS = 32


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where an image may come from. ``archive``: the Cargo's own file with it, ARCHIVE_PATH in the manifest. ``registries``: hosts that
    the operator lets the engine pull from, such as docker.io; none unless said so. ``most``: what an archive may unpack to."""

    archive: Path | None = None
    registries: frozenset[str] = frozenset()
    most: ArchiveLimits = field(default_factory=ArchiveLimits)


def digest_of(entry: str) -> str:
    """The digest in a Cargo's entry (protocol/cargos.py has checked its form), in hex."""
    return entry.rpartition("@sha256:")[2]


def registry_of(entry: str) -> str:
    """The host that an entry names; empty where it names none."""
    first, slash, _ = entry.partition("@")[0].partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else ""


def tag_of(image_id: str) -> str:
    """Our own name for an image that was loaded, so that it is not taken for rubbish. Nothing is ever run by it."""
    return f"localhost/archipelag-cargo:{image_id[:_TAG_CHARS]}"


async def bring_image(engine: ContainerEngine, entry: str, source: ImageSource) -> str:
    """The engine has the image after this. Returns by which digest to run it. Raises ConfigError with a sentence that says what to do."""
    try:
        if source.archive is not None:
            return await _loaded(engine, entry, source.archive, source.most)
        return await _present_or_pulled(engine, entry, source.registries)
    except EngineFailed as error:
        raise ConfigError(f"the container engine does not work: {error}") from None
    except OSError as error:
        raise ConfigError(f"the image's archive cannot be read: {error.strerror}") from None


async def _loaded(engine: ContainerEngine, entry: str, path: Path, most: ArchiveLimits) -> str:
    image = await trio.to_thread.run_sync(partial(read_archive, path, digest_of(entry)))
    check_facts(image.facts, os.uname().machine)
    reference = f"sha256:{image.image_id}"
    if await _inspected(engine, reference) is None:
        await trio.to_thread.run_sync(partial(check_layers, path, image, most))
        await _load(engine, path, image)
    return reference


async def _load(engine: ContainerEngine, path: Path, image: ArchivedImage) -> None:
    """The engine computes the id anew from what it was given; it has to be ours."""
    answer = await call_program((*engine.prefix, "load"), _LOAD_S, clean_writer(path, image, tag_of(image.image_id)))
    reference = f"sha256:{image.image_id}"
    if answer.code:
        raise ConfigError(f"{engine.kind} did not load the image: {answer.complaint}")
    if await _inspected(engine, reference) is None:
        raise ConfigError(
            f"{engine.kind} has loaded the image under another id than {reference[:19]}…; look at its storage driver"
        )


async def _present_or_pulled(engine: ContainerEngine, entry: str, registries: frozenset[str]) -> str:
    facts = await _inspected(engine, entry)
    if facts is None:
        await _pull(engine, entry, registries)
        facts = await _inspected(engine, entry)
    digest = f"sha256:{digest_of(entry)}"
    known = (
        {str(facts.get("Digest")), *(str(name).rpartition("@")[2] for name in facts.get("RepoDigests") or [])}
        if facts
        else set()
    )
    if facts is None or digest not in known:
        raise ConfigError(f"{engine.kind} has no image of digest {digest[:19]}…")
    check_facts(facts_of(facts), os.uname().machine)
    return entry


async def _pull(engine: ContainerEngine, entry: str, registries: frozenset[str]) -> None:
    registry = registry_of(entry)
    if registry not in registries:
        whence = registry or "a registry that its entry does not name"
        raise ConfigError(
            f"the image is not here, and it may not be pulled from {whence}: its publisher has to pack it into the Cargo as image.tar "
            "(podman save --format oci-archive)"
        )
    answer = await call_program((*engine.prefix, "pull", "--quiet", entry), _PULL_S)
    if answer.code:
        raise ConfigError(f"{engine.kind} could not pull the image: {answer.complaint}")


async def _inspected(engine: ContainerEngine, reference: str) -> dict[str, Any] | None:
    """What the engine says of an image that it has, else None. Raises EngineFailed, ConfigError."""
    answer = await call_program((*engine.prefix, "image", "inspect", reference), _ASK_S)
    return None if answer.code else _first(answer)


def _first(answer: Answer) -> dict[str, Any]:
    try:
        images = json.loads(answer.stdout)
    except ValueError:
        images = None
    if not (isinstance(images, list) and images and isinstance(images[0], dict)):
        raise ConfigError(f"the engine describes the image in a way that we do not know: {answer.complaint}")
    return images[0]


async def remove_image(engine: ContainerEngine, image: str) -> None:
    """For a Cargo that the Island gives up; nothing happens where the image is not there. ``image``: as ``bring_image`` returned it.
    Raises ConfigError where containers still use it, or the engine does not work."""
    try:
        if await _inspected(engine, image) is None:
            return
        answer = await call_program((*engine.prefix, "image", "rm", image), _ASK_S)
    except EngineFailed as error:
        raise ConfigError(f"the container engine does not work: {error}") from None
    if answer.code:
        raise ConfigError(f"{engine.kind} did not remove the image: {answer.complaint}")
