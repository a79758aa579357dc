"""The cache: least recently used goes first, what is in use stays, and nothing half-made is ever taken for a model."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from protocol.errors import ConfigError
from protocol.limits import CACHE_BYTES_DEFAULT
from runtimes.store import DiskFull, FetchCancelled, ModelStore, StoredModel, WrongContent, default_cache_dir
from runtimes.store import cache as cache_module
from runtimes.store.files import locked, try_lock

CONTENT = random.Random(2).randbytes(3_000_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
DEADLINE_S = 20.0


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "cache", cap_bytes=1000)


def add(store: ModelStore, folder: Path, letter: str, size: int = 300) -> StoredModel:
    """A model of two parts, so that it is joined in the cache; used a second later than the one before."""
    for index in (0, 1):
        (folder / f"{letter}.bin.part{index}").write_bytes(letter.encode() * (size // 2))
    model = store.fetch([f"file:{folder}/{letter}.bin.part{index}" for index in (0, 1)])
    set_used(store, model, ord(letter))
    return model


def set_used(store: ModelStore, model: StoredModel, when: float) -> None:
    os.utime(store.cache_dir / f"{model.sha256}.note", (when, when))


def names(store: ModelStore) -> list[str]:
    return [entry.model.name for entry in store.list()]


# Room


def test_the_least_recently_used_goes_first(store: ModelStore, tmp_path: Path) -> None:
    first, _, third = (add(store, tmp_path, letter) for letter in "abc")
    with store.hold(first):
        pass
    assert names(store) == ["b", "c", "a"]
    add(store, tmp_path, "d")
    assert names(store) == ["c", "d", "a"]
    assert [model.name for model in store.evict(300)] == ["c", "d"]
    assert not third.path.exists()
    assert sorted(path.suffix for path in store.cache_dir.iterdir() if path.name.startswith(third.sha256)) == []


def test_a_fetch_counts_as_use(store: ModelStore, tmp_path: Path) -> None:
    first = add(store, tmp_path, "a")
    add(store, tmp_path, "b")
    assert store.fetch([f"file:{tmp_path}/a.bin.part{index}" for index in (0, 1)]) == first
    assert names(store) == ["b", "a"]


def test_what_is_in_use_stays_whatever_the_cap_says(store: ModelStore, tmp_path: Path) -> None:
    first, second = add(store, tmp_path, "a"), add(store, tmp_path, "b")
    with store.hold(first), store.hold(first) as path:
        assert [entry.in_use for entry in store.list()] == [False, True]
        assert [model.name for model in ModelStore(store.cache_dir).evict(0)] == ["b"]
        assert path.read_bytes() == b"a" * 300
    assert [model.name for model in store.evict(0)] == ["a"]
    for gone in (first, second):
        with pytest.raises(ConfigError, match=r"Fetch . again"), store.hold(gone):
            pass


def test_a_holder_in_another_process_counts(store: ModelStore, tmp_path: Path) -> None:
    model = add(store, tmp_path, "a")
    holder = child(
        store,
        "with store.hold(StoredModel(Path(arguments[0]), arguments[1], 'a', 300)):\n"
        "    print('held', flush=True); sys.stdin.readline()",
        str(model.path),
        model.sha256,
    )
    try:
        assert read_until(holder, "held")
        assert store.evict(0) == []
        holder.kill()  # no goodbye: the kernel lets the lock go
        holder.wait()
        assert [gone.name for gone in store.evict(0)] == ["a"]
    finally:
        end(holder)


def test_an_eviction_between_open_and_lock_is_noticed(
    store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = add(store, tmp_path, "a")

    def evicted_meanwhile(descriptor: int, *, shared: bool) -> bool:
        model.path.unlink(missing_ok=True)
        return try_lock(descriptor, shared=shared)

    monkeypatch.setattr(cache_module, "try_lock", evicted_meanwhile)
    with pytest.raises(ConfigError, match="was evicted from the cache in between"), store.hold(model):
        pass


def test_a_model_larger_than_the_cache_is_refused(store: ModelStore) -> None:
    with pytest.raises(DiskFull, match=r"98,362,432 bytes, the cache may hold 1,000. Raise ARCHIPELAG_CACHE_BYTES"):
        store.fetch("smollm2-135m")


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_is_nearly_full(store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store, tmp_path, "a")

    def usage(path: Path) -> Usage:
        held = sum(file.stat().st_size for file in store.cache_dir.iterdir() if file.suffix == ".bin")
        return Usage(10**12, 0, cache_module.DISK_MARGIN_BYTES + 400 - held)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert store._cache.make_room(300, 0) == 400, "the older model made room"
    assert names(store) == []
    with pytest.raises(
        DiskFull, match=r"400 bytes to spare, 500 are needed. Free some room, or set ARCHIPELAG_CACHE_DIR"
    ):
        store._cache.make_room(500, 0)
    assert store._cache.make_room(500, 100) == 400, "what is there already needs no room"


def test_abandoned_downloads_go_after_a_week(store: ModelStore) -> None:
    for key in ("old", "new", "busy"):
        (store.cache_dir / f"{key}.partial").write_bytes(b"x")
        (store.cache_dir / f"{key}.state").write_text("{}")
    for key in ("old", "busy"):
        before = time.time() - cache_module.PARTIAL_LIFETIME_S - 60
        os.utime(store.cache_dir / f"{key}.partial", (before, before))
    with locked(store.cache_dir / "busy.lock"):
        store.evict()
    assert sorted(path.stem for path in store.cache_dir.glob("*.partial")) == ["busy", "new"]
    assert sorted(path.stem for path in store.cache_dir.glob("*.state")) == ["busy", "new"]


# Trust


def test_a_damaged_blob_is_noticed_and_brought_again(store: ModelStore, tmp_path: Path) -> None:
    model = add(store, tmp_path, "a")
    model.path.write_bytes(b"x" * 300)
    again = add(store, tmp_path, "a")
    assert again == model
    assert model.path.read_bytes() == b"a" * 300


def test_a_blob_is_hashed_again_only_when_it_has_changed(store: ModelStore, tmp_path: Path) -> None:
    add(store, tmp_path, "a")
    parts = [f"file:{tmp_path}/a.bin.part{index}" for index in (0, 1)]
    stages: list[str] = []
    model = store.fetch(parts, lambda stage, done, total: stages.append(stage))
    assert stages == []
    os.utime(model.path, (1, 1))
    store.fetch(parts, lambda stage, done, total: stages.append(stage))
    assert stages == ["a: checking"]
    store.fetch(parts, lambda stage, done, total: stages.append(stage))
    assert stages == ["a: checking"]


def test_a_blob_whose_note_is_gone_is_not_trusted(store: ModelStore, tmp_path: Path) -> None:
    model = add(store, tmp_path, "a")
    (store.cache_dir / f"{model.sha256}.note").unlink()
    model.path.write_bytes(b"x" * 300)
    assert add(store, tmp_path, "a").path.read_bytes() == b"a" * 300


def test_own_files_are_used_where_they_lie(store: ModelStore, tmp_path: Path) -> None:
    own = tmp_path / "my model.bin"
    own.write_bytes(CONTENT)
    stages: list[str] = []
    model = store.fetch(f"file:{own}#sha256={DIGEST}", lambda stage, done, total: stages.append(stage))
    assert (model.path, model.sha256, model.name) == (own, DIGEST, "my-model")
    assert set(stages) == {"my-model: checking"}
    assert store.fetch(str(own), lambda stage, done, total: pytest.fail("hashed twice")) == model
    with store.hold(model) as path:
        assert path == own
    own.write_bytes(CONTENT[:-1])
    with pytest.raises(WrongContent, match=r"is asked for: it is cut short, changed, or another file. Get it again"):
        store.fetch(f"file:{own}#sha256={DIGEST}")
    assert own.exists(), "a user's file is never deleted"
    assert store.evict(0) == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing-of-that-name", "Known are: gemma3-270m, minilm-l6-v2, minilm-l6-v2-tokenizer, smollm2-135m"),
        ("./missing.gguf", "is not a file. Check the path"),
        ("file:/missing", "is not a file. Check the path"),
        ("", "no model that is known"),
        ("peer:" + "ab" * 32, "no Island gives it. Possible are: file:PATH, https://"),
    ],
)
def test_what_is_not_there_is_named(store: ModelStore, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace(".", r"\.")):
        store.fetch(name)


def test_a_peer_address_finds_what_the_cache_holds(store: ModelStore, tmp_path: Path) -> None:
    model = add(store, tmp_path, "a")
    assert store.fetch(f"peer:{model.sha256}").path == model.path


def test_a_part_that_is_missing_leaves_nothing(store: ModelStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        store.fetch([f"file:{tmp_path}/x.part0", f"file:{tmp_path}/x.part1"])
    assert [path.name for path in store.cache_dir.iterdir() if path.suffix in (".partial", ".state")] == []


@pytest.mark.parametrize(
    "state", ["", "[]", '{"starts": "x"}', '{"starts": [5]}', '{"starts": [0, 9e9]}', '{"starts": [0, 99999]}']
)
def test_a_state_that_makes_no_sense_begins_again(store: ModelStore, tmp_path: Path, state: str) -> None:
    parts = [f"file:{tmp_path}/a.bin.part{index}" for index in (0, 1)]
    key = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    (store.cache_dir / f"{key}.partial").write_bytes(b"rubbish")
    (store.cache_dir / f"{key}.state").write_text(state)
    assert add(store, tmp_path, "a").path.read_bytes() == b"a" * 300


# Settings


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARCHIPELAG_CACHE_DIR", str(tmp_path / "a"))
    assert default_cache_dir() == tmp_path / "a"
    monkeypatch.delenv("ARCHIPELAG_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert default_cache_dir() == tmp_path / "b" / "archipelag" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert default_cache_dir() == tmp_path / "c" / ".cache" / "archipelag" / "models"


def test_how_large_the_cache_may_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ARCHIPELAG_CACHE_BYTES", raising=False)
    assert f"at most {CACHE_BYTES_DEFAULT} " in repr(ModelStore(tmp_path))
    monkeypatch.setenv("ARCHIPELAG_CACHE_BYTES", "5000")
    assert "at most 5000 " in repr(ModelStore(tmp_path))
    for wrong in ("0", "-1", "20GB", "²"):
        monkeypatch.setenv("ARCHIPELAG_CACHE_BYTES", wrong)
        with pytest.raises(ConfigError, match="must be a number of bytes"):
            ModelStore(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="Set ARCHIPELAG_CACHE_DIR"):
        ModelStore(tmp_path / "file" / "cache")


# Processes


class Gated(http.server.ThreadingHTTPServer):
    """Sends a megabyte, then waits for ``gate``; counts requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), GatedHandler)
        self.gate = threading.Event()
        self.ranges: list[str | None] = []


class GatedHandler(http.server.BaseHTTPRequestHandler):
    server: Gated

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        try:
            self.wfile.write(CONTENT[start : start + 1_000_000])
            self.server.gate.wait(DEADLINE_S)
            self.wfile.write(CONTENT[start + 1_000_000 :])
        except ConnectionError:
            self.close_connection = True  # the client was killed


@pytest.fixture
def gated() -> Iterator[Gated]:
    server = Gated()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.gate.set()
    server.shutdown()
    thread.join()
    server.server_close()


PREAMBLE = """
import json, resource, sys
from pathlib import Path
from runtimes.store import DiskFull, ModelStore, StoredModel
store, arguments = ModelStore(Path(sys.argv[1])), sys.argv[2:]
told = set()
def progress(stage, done, total):
    if stage not in told:
        told.add(stage)
        print(stage, flush=True)
"""


def child(store: ModelStore, program: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREAMBLE + program, str(store.cache_dir), *arguments]
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
        env=environment,
    )


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def read_until(process: subprocess.Popen[str], text: str) -> bool:
    assert process.stdout is not None
    return any(text in line for line in process.stdout)


FETCH = "print(store.fetch(arguments[0], progress).sha256, flush=True)"


def source(server: Gated) -> str:
    return f"http://127.0.0.1:{server.server_port}/m.bin#sha256={DIGEST}"


def test_a_process_that_is_killed_leaves_only_what_can_be_resumed(gated: Gated, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "cache")
    process = child(store, FETCH, source(gated))
    partial = store.cache_dir / f"{DIGEST}.partial"
    try:
        assert read_until(process, "m: downloading")
        wait_for(lambda: partial.stat().st_size == 1_000_000)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        end(process)
    left = sorted(path.name for path in store.cache_dir.iterdir())
    assert left == [f"{DIGEST}.lock", f"{DIGEST}.partial", f"{DIGEST}.state", "cache.lock"]
    assert store.list() == []
    gated.gate.set()
    assert store.fetch(source(gated)).path.read_bytes() == CONTENT
    assert gated.ranges == [None, "bytes=1000000-"]


def test_two_processes_fetch_once(gated: Gated, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "cache")
    first = child(store, FETCH, source(gated))
    try:
        assert read_until(first, "m: downloading")
        second = child(store, FETCH, source(gated))
        try:
            assert read_until(second, "another process is fetching it")
            gated.gate.set()
            assert read_until(second, DIGEST)
            assert read_until(first, DIGEST)
            assert (first.wait(), second.wait()) == (0, 0)
        finally:
            end(second)
    finally:
        end(first)
    assert gated.ranges == [None]


def test_who_waits_can_be_cancelled(tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "cache")
    with locked(store.cache_dir / f"{DIGEST}.lock"), pytest.raises(FetchCancelled):
        store.fetch(f"https://127.0.0.1:1/m.bin#sha256={DIGEST}", cancelled=lambda: True)


def test_a_full_disk_is_a_clear_sentence_and_leaves_no_half_file(gated: Gated, tmp_path: Path) -> None:
    """The kernel itself refuses the byte after the second million (a limit on file sizes; a full disk takes the same way)."""
    gated.gate.set()
    store = ModelStore(tmp_path / "cache")
    program = """
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
try:
    store.fetch(arguments[0])
except DiskFull as error:
    print(json.dumps([str(error), sorted(path.name for path in store.cache_dir.iterdir())]))
"""
    process = child(store, program, source(gated))
    output, _ = process.communicate(timeout=DEADLINE_S)
    text, left = json.loads(output)
    assert "is full. Free some room there, or set ARCHIPELAG_CACHE_DIR" in text
    assert left == [f"{DIGEST}.lock", "cache.lock"]


def wait_for(condition: object) -> None:
    end_s = time.monotonic() + DEADLINE_S
    assert callable(condition)
    while not condition():
        assert time.monotonic() < end_s, "waited too long"
        time.sleep(0.01)
