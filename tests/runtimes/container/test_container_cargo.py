"""Container Cargos through a real engine: jobs, slots, images, and what is left when something breaks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import trio
import trio.testing

from protocol import limits
from protocol.cargo_io import DoneLine, ProgressLine, StatusLine
from protocol.errors import Code, ConfigError, LocalProtocolError, Refused
from runtimes.base import LineCargo, LineRequest
from runtimes.container.cargo import open_container_cargo, remove_leftovers
from runtimes.container.engines import Kind
from runtimes.container.image import ImageSource, bring_image, remove_image, tag_of
from runtimes.container.run import STDERR_BYTES_MAX, ContainerLeft, remove_containers
from tests.runtimes.container.conftest import Port
from tests.runtimes.container.container_cargos import (
    ADDRESS,
    SEED,
    lines_of,
    manifest,
    needs,
    opened,
    request,
    result_of,
)
from tests.runtimes.container.container_images import Entry, image, tar

AHEAD_BYTES_MAX = 2 * 1024**2  # pipes and sockets between the Cargo and us
NO_PROGRAM = tar([Entry("etc/passwd", b"root:x:0:0::/:/job\n", 0o644)])


@pytest.fixture(autouse=True)
def nothing_left(port: Port) -> Iterator[None]:
    yield
    assert port.containers() == []
    assert port.processes() == []


async def test_object_goes_in_and_lines_come_out(port: Port) -> None:
    async with opened(port) as cargo:
        text = "Grüße, 世界"
        async with cargo.run_lines(LineRequest("job", f'{{"mode":"echo","text":"{text}"}}'.encode(), SEED)) as run:
            first, last = [line async for line in run]
        assert first == StatusLine("reading")
        assert isinstance(last, DoneLine)
        assert json.loads(last.result) == {"input": {"mode": "echo", "text": text}, "seed_hex": SEED.hex()}


async def test_large_input_arrives_whole_and_may_go_unread(port: Port) -> None:
    async with opened(port) as cargo:
        text = "x" * 700_000
        assert (await result_of(cargo, "echo", text=text))["input"]["text"] == text
        beyond = "x" * 4_000_000  # the Cargo's own buffer holds a MiB
        with pytest.raises(Refused, match="line 2 of the Cargo's output is not JSON"):
            await lines_of(cargo, "echo", text=beyond)


async def test_who_does_not_read_holds_the_cargo_up(port: Port) -> None:
    async with opened(port) as cargo, cargo.run_lines(request("stream")) as run:
        lines = aiter(run)
        assert await anext(lines) == ProgressLine(0, 400)
        (process,) = port.processes()
        written, before = written_by(process), -1
        with trio.fail_after(5):
            while written != before:
                await trio.sleep(0.1)
                written, before = written_by(process), written
        assert 0 < written < AHEAD_BYTES_MAX
        rest = [line async for line in lines]
        assert rest[:-1] == [ProgressLine(step, 400) for step in range(1, 400)]
        assert isinstance(rest[-1], DoneLine)


def written_by(process: int) -> int:
    """Bytes."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{process}/io").read_text().splitlines())
    return int(fields["wchar"])


async def test_facts_say_what_it_is(port: Port) -> None:
    async with opened(port, slots=2) as cargo:
        checked: LineCargo = cargo
        facts = checked.facts()
        assert (facts.name, facts.runtime, facts.content_hash) == ("hostile", "container", ADDRESS)
        assert facts.engine == f"{port.engine.kind}:{port.entry.rpartition(':')[2][:32]}"
        assert (facts.slots_total, facts.slots_free) == (2, 2)
        async with cargo.run_lines(request("ignore signals")):
            assert cargo.facts().slots_free == 1
        assert cargo.facts().slots_free == 2


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff", b"{}{}", b"{" * 100_000])
async def test_input_that_is_no_object_starts_nothing(port: Port, data: bytes) -> None:
    broken = replace(port.engine, program="/bin/false")
    async with opened(port) as cargo:
        cargo._engine = broken
        with pytest.raises(Refused) as caught:
            async with cargo.run_lines(LineRequest("job", data, SEED)):
                pass
        assert caught.value.code is Code.BAD_INPUT


async def test_jobs_wait_their_turn_until_too_many_do(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINE_JOBS_WAITING_MAX", 1)
    results: list[object] = []

    async def job() -> None:
        results.append(await result_of(cargo, "fork bomb"))

    async with opened(port) as cargo, trio.open_nursery() as nursery, cargo.run_lines(request("ignore signals")):
        nursery.start_soon(job)
        await trio.testing.wait_all_tasks_blocked(0.01)
        with pytest.raises(Refused) as caught:
            await lines_of(cargo, "echo")
        assert caught.value.code is Code.NO_CAPACITY
        assert results == []
    assert len(results) == 1


async def test_closing_ends_jobs_and_takes_no_more(port: Port) -> None:
    async with opened(port) as cargo, trio.open_nursery() as nursery:
        begun = trio.Event()

        async def job() -> None:
            with pytest.raises(Refused) as caught:
                async with cargo.run_lines(request("ignore signals")) as run:
                    async for _ in run:
                        begun.set()
            assert caught.value.code is Code.CANCELLED

        nursery.start_soon(job)
        await begun.wait()
        await cargo.aclose()
        assert port.is_clean() and not cargo.alive and cargo.facts().slots_free == 0
        with pytest.raises(Refused) as caught:
            await lines_of(cargo, "echo")
        assert caught.value.code is Code.DRAINING


async def test_stderr_is_kept_for_the_publisher_up_to_a_limit(port: Port) -> None:
    async with opened(port) as cargo, cargo.run_lines(request("noisy stderr")) as run:
        with pytest.raises(Refused):
            async for _ in run:
                pass
        assert run.stderr.startswith(b"very-secret-word 0\n") and len(run.stderr) == STDERR_BYTES_MAX


async def test_leftovers_of_this_node_are_removed_and_no_others(port: Port) -> None:
    words = [*port.engine.prefix, "create", "--ulimit", "nofile=64:64", "--ulimit", "nproc=64:64"]
    reference = await bring_image(port.engine, port.entry, port.source)
    for node in (port.node, f"{port.node}0"):
        label = ["--label", f"archipelag.node={node}"]
        subprocess.run([*words, *label, reference], check=True, capture_output=True, timeout=30)
    try:
        assert await remove_leftovers(port.engine, port.node) == 1
        assert await remove_leftovers(port.engine, port.node) == 0
    finally:
        assert await remove_leftovers(port.engine, f"{port.node}0") == 1


async def test_removing_what_is_not_there_is_no_error(port: Port) -> None:
    await remove_containers(port.engine, ("archipelag-" + "ef" * 16,))


async def test_container_that_cannot_be_removed_closes_the_cargo(port: Port, tmp_path: Path) -> None:
    script = tmp_path / "engine"
    words = " ".join(port.engine.prefix)
    script.write_text(f'#!/bin/sh\n[ "$1" = rm ] && {{ echo broken >&2; exit 1; }}\nexec {words} "$@"\n')
    script.chmod(0o755)
    stuck = replace(port, engine=replace(port.engine, program=str(script), is_chosen=False))
    try:
        async with opened(stuck) as cargo:
            with pytest.raises(ContainerLeft, match=r"broken.*does it by hand"):
                await lines_of(cargo, "echo")
            assert not cargo.alive and cargo.facts().slots_free == 0
    finally:
        assert await remove_leftovers(port.engine, port.node) == 1


async def test_engine_that_breaks_is_not_the_cargos_fault(port: Port) -> None:
    async with opened(port) as cargo:
        cargo._image = "sha256:" + "00" * 32
        with pytest.raises(Refused) as caught:
            await lines_of(cargo, "echo")
        assert caught.value.code is Code.WORKER_DIED and "made no container" in caught.value.message
        cargo._engine = replace(port.engine, program="/nonexistent/engine")
        with pytest.raises(ContainerLeft):
            await lines_of(cargo, "echo")


async def test_image_is_loaded_once_and_removed_for_good(port: Port, tmp_path: Path) -> None:
    made = image([NO_PROGRAM], ("/job",), config={"created": "2026-01-01T00:00:00Z"})
    entry, source = f"example.org/none@sha256:{made.digest}", ImageSource(archive=made.write(tmp_path / "image.tar"))
    reference = await bring_image(port.engine, entry, source)
    try:
        assert reference == f"sha256:{made.config_digest}"
        names = [*port.engine.prefix, "image", "inspect", "--format", "{{.RepoTags}}", reference]
        known = subprocess.run(names, capture_output=True, check=True, text=True, timeout=30).stdout
        assert known.strip() == f"[{tag_of(made.config_digest)}]"
        assert await bring_image(replace(port.engine), entry, source) == reference
        none = manifest(entry)
        async with open_container_cargo(none, ADDRESS, port.engine, node=port.node, source=source) as cargo:
            with pytest.raises(Refused, match="program cannot be started") as caught:
                await lines_of(cargo, "echo")
            assert caught.value.code is Code.CARGO_FAILED
    finally:
        await remove_image(port.engine, reference)
    await remove_image(port.engine, reference)
    assert subprocess.run(names, capture_output=True, timeout=30).returncode != 0


async def test_image_of_another_digest_is_not_loaded(port: Port) -> None:
    entry = "localhost/hostile@sha256:" + "00" * 32
    with pytest.raises(ConfigError, match="hostile: the image's archive has no part 000000000000"):
        async with open_container_cargo(manifest(entry), ADDRESS, port.engine, node=port.node, source=port.source):
            pass


async def test_image_that_the_engine_has_is_run_by_its_digest(port: Port) -> None:
    if port.engine.kind is not Kind.PODMAN:
        pytest.skip("Docker knows digests only of images that it has pulled")
    reference = await bring_image(port.engine, port.entry, port.source)
    words = [*port.engine.prefix, "image", "inspect", "--format", "{{.Digest}}", reference]
    digest = subprocess.run(words, capture_output=True, check=True, text=True, timeout=30).stdout.strip()
    made = manifest(f"localhost/archipelag-cargo@{digest}")
    async with open_container_cargo(made, ADDRESS, port.engine, node=port.node) as cargo:
        assert (await result_of(cargo, "echo"))["seed_hex"] == SEED.hex()


@pytest.mark.parametrize(
    "name,registries,said",
    [
        ("docker.io/library/debian", frozenset(), "may not be pulled from docker.io: its publisher has to pack it"),
        ("debian", frozenset({"docker.io"}), "a registry that its entry does not name"),
        ("169.254.169.254/x", frozenset({"docker.io"}), "may not be pulled from 169.254.169.254"),
        ("localhost:1/x", frozenset({"localhost:1"}), "could not pull the image"),
    ],
)
async def test_image_comes_only_from_registries_that_the_operator_allows(
    port: Port, name: str, registries: frozenset[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        await bring_image(port.engine, f"{name}@sha256:{'12' * 32}", ImageSource(registries=registries))


async def test_cargo_that_cannot_run_is_refused_at_once(port: Port) -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        async with opened(port, needs=needs(gpu_memory_bytes=1)):
            pass
    with pytest.raises(LocalProtocolError):
        async with opened(port, slots=0):
            pass
