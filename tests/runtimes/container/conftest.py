"""A real container engine, and one image for all Cargos of the tests: a small static program that does what its input says."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

from runtimes.container.engines import ContainerEngine, find_engine
from runtimes.container.image import ImageSource, bring_image, remove_image
from tests.runtimes.container.container_images import Entry, image, tar

NODE = f"test-{os.getpid()}"
MARKER = f"archipelag-test-{os.getpid()}"


@dataclass(frozen=True, slots=True)
class Port:
    """Where Cargos of the tests run. ``entry``: of their manifests; ``marker`` stands in the arguments of each of their processes."""

    engine: ContainerEngine
    entry: str
    source: ImageSource
    node: str
    marker: str

    def processes(self) -> list[int]:
        """All that run now and are of the Cargos."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it has just ended
            if words[0] in (b"/job", b"/suid", b"/tmp/job") and self.marker.encode() in words:
                found.append(int(folder.name))
        return found

    def containers(self) -> list[str]:
        command = [*self.engine.prefix, "ps", "--all", "--quiet", "--filter", f"label=archipelag.node={self.node}"]
        return subprocess.run(command, capture_output=True, check=True, text=True, timeout=30).stdout.split()

    def is_clean(self) -> bool:
        return not self.processes() and not self.containers()


def wanted(name: str) -> str | None:
    """Where a program is; ``ARCHIPELAG_TEST_ENGINE`` (podman, docker) leaves the other engine out."""
    only = os.environ.get("ARCHIPELAG_TEST_ENGINE", name)
    return shutil.which(name) if name in (only, "runc") else None


@pytest.fixture(scope="session")
def engine() -> ContainerEngine:
    search = trio.run(find_engine, wanted)
    if search.engine is None:
        pytest.skip(search.reason)
    return search.engine


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("hostile") / "job"
    source = Path(__file__).with_name("hostile.c")
    subprocess.run(["gcc", "-static", "-O1", "-Wall", "-Werror", "-o", str(path), str(source)], check=True, timeout=60)
    return path.read_bytes()


@pytest.fixture(scope="session")
def port(engine: ContainerEngine, program: bytes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    root = tar(
        [Entry("job", program), Entry("suid", program, 0o4755), Entry("etc/passwd", b"root:x:0:0::/:/job\n", 0o666)]
    )
    made = image([root], ("/job", MARKER), is_gzipped=True)
    path = made.write(tmp_path_factory.mktemp("image") / "image.tar")
    entry = f"localhost/hostile@sha256:{made.digest}"
    source = ImageSource(archive=path)
    reference = trio.run(bring_image, engine, entry, source)
    yield Port(engine, entry, source, NODE, MARKER)
    trio.run(partial(remove_image, engine, reference))
