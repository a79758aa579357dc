"""Blobs in the store: a partial that grows in any order and outlives everything, and what is found of the cache by root and SHA-256."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from protocol import limits
from protocol.blobs import BlobKey, BlobTree, tree_of
from protocol.errors import LocalProtocolError
from runtimes.store import DiskFull, FetchCancelled, WrongContent
from runtimes.store.blob_partial import BlobPartial, stored_tree
from runtimes.store.blob_store import BlobStore
from runtimes.store.cache import Cache
from runtimes.store.partial import Partial

MIB = limits.BLOB_CHUNK_BYTES
DATA = random.Random(6).randbytes(6 * MIB + 321)
PARTS = [DATA[at : at + MIB] for at in range(0, len(DATA), MIB)]
TREE = tree_of(PARTS)
SHA256 = hashlib.sha256(DATA).hexdigest()
ORDER = [3, 6, 0, 5, 1, 4, 2]


def partial(folder: Path, tree: BlobTree = TREE) -> BlobPartial:
    return BlobPartial(folder / "key.partial", folder / "key.state", tree)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_any_order_makes_the_file(tmp_path: Path) -> None:
    with partial(tmp_path) as growing:
        for count, index in enumerate(ORDER):
            assert not growing.is_complete and sum(growing.there()) == count
            assert growing.put(index, PARTS[index]) and growing.put(index, PARTS[index])
            assert growing.bytes_there() == sum(len(PARTS[one]) for one in ORDER[: count + 1])
        assert growing.finish() == SHA256
    assert (tmp_path / "key.partial").read_bytes() == DATA


def test_the_whole_is_hashed_as_it_grows(tmp_path: Path) -> None:
    with partial(tmp_path) as growing:
        for index in (0, 1, 3):
            growing.put(index, PARTS[index])
        assert growing.hash_ahead(1), "there is more to hash"
        assert not growing.hash_ahead(10) and growing._hashed == 2
        for index in (2, 4, 5, 6):
            growing.put(index, PARTS[index])
        assert growing.finish() == SHA256


def test_a_bad_chunk_is_not_written(tmp_path: Path) -> None:
    with partial(tmp_path) as growing:
        growing.put(0, PARTS[0])
        assert not growing.put(1, PARTS[0]) and not growing.put(0, PARTS[1])
        assert not growing.put(7, PARTS[0]) and not growing.put(-1, PARTS[6]) and not growing.put(6, PARTS[6][:-1])
        assert growing.there() == [True] + [False] * 6 and growing.read(0) == PARTS[0]
        with pytest.raises(LocalProtocolError, match="not there"):
            growing.read(1)
        with pytest.raises(LocalProtocolError, match="not complete"):
            growing.finish()


def test_several_sources_write_at_once(tmp_path: Path) -> None:
    with partial(tmp_path) as growing:
        wrong = threading.Event()

        def source(seed: int) -> None:
            for index in random.Random(seed).sample(range(7), 7):
                if seed == 3:
                    growing.put(index, bytes(len(PARTS[index])))
                elif not growing.put(index, PARTS[index]):
                    wrong.set()

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(source, range(6)))
        assert not wrong.is_set() and growing.finish() == SHA256


@pytest.mark.parametrize("seed", range(5))
def test_what_was_there_is_there_again(tmp_path: Path, seed: int) -> None:
    there = set(random.Random(seed).sample(range(7), seed + 1))
    with partial(tmp_path) as growing:
        for index in there:
            growing.put(index, PARTS[index])
    assert stored_tree(tmp_path / "key.state") == TREE
    with partial(tmp_path) as again:
        assert {index for index, one in enumerate(again.there()) if one} == there
        for index in set(range(7)) - there:
            again.put(index, PARTS[index])
        assert again.finish() == SHA256


def test_what_a_power_cut_spoilt_does_not_count(tmp_path: Path) -> None:
    """Blocks that never reached the disk read as zeros, others may be of anybody."""
    with partial(tmp_path) as growing:
        for index in range(7):
            growing.put(index, PARTS[index])
    with open(tmp_path / "key.partial", "r+b") as file:
        file.seek(2 * MIB + 100)
        file.write(bytes(4096))
        file.seek(5 * MIB)
        file.write(b"?")
    with partial(tmp_path) as again:
        assert [index for index, one in enumerate(again.there()) if not one] == [2, 5]
        again.put(2, PARTS[2])
        again.put(5, PARTS[5])
        assert again.finish() == SHA256


@pytest.mark.parametrize("size", [0, 1, MIB, 3 * MIB + 5])
def test_a_file_cut_short(tmp_path: Path, size: int) -> None:
    with partial(tmp_path) as growing:
        for index in range(7):
            growing.put(index, PARTS[index])
    os.truncate(tmp_path / "key.partial", size)
    with partial(tmp_path) as again:
        assert sum(again.there()) == size // MIB


def test_a_process_that_is_killed_leaves_what_it_wrote(tmp_path: Path) -> None:
    writer = (
        "import sys, random; from pathlib import Path; from protocol import limits; from protocol.blobs import tree_of\n"
        "from runtimes.store.blob_partial import BlobPartial\n"
        "data = random.Random(6).randbytes(6 * limits.BLOB_CHUNK_BYTES + 321); size = limits.BLOB_CHUNK_BYTES\n"
        "parts = [data[at : at + size] for at in range(0, len(data), size)]; folder = Path(sys.argv[1])\n"
        "growing = BlobPartial(folder / 'key.partial', folder / 'key.state', tree_of(parts))\n"
        "[growing.put(index, parts[index]) for index in (6, 2, 4)]; print('written', flush=True); sys.stdin.read()\n"
    )
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", writer, str(tmp_path)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with partial(tmp_path) as again:
        assert [index for index, one in enumerate(again.there()) if one] == [2, 4, 6]


def test_checking_can_be_cancelled_and_loses_nothing(tmp_path: Path) -> None:
    with partial(tmp_path) as growing:
        growing.put(3, PARTS[3])
    with pytest.raises(FetchCancelled):
        BlobPartial(tmp_path / "key.partial", tmp_path / "key.state", TREE, cancelled=lambda: True)
    with partial(tmp_path) as again:
        assert again.there()[3]


def test_another_tree_keeps_what_is_alike(tmp_path: Path) -> None:
    with partial(tmp_path) as growing:
        for index in (0, 1):
            growing.put(index, PARTS[index])
    other = tree_of([PARTS[0], PARTS[2], b"end"])
    with partial(tmp_path, other) as again:
        assert again.there() == [True, False, False]
    assert stored_tree(tmp_path / "key.state") == other and (tmp_path / "key.partial").stat().st_size == other.size


def test_a_download_in_order_is_gone_on_with_and_back(tmp_path: Path) -> None:
    path, state = tmp_path / "key.partial", tmp_path / "key.state"
    with Partial(path, state) as plain:
        plain.begin_part(0)
        plain.write(DATA[: 2 * MIB + 50])
    with partial(tmp_path) as growing:
        assert [index for index, one in enumerate(growing.there()) if one] == [0, 1]
    with Partial(path, state) as plain:
        assert plain.size == 0, "a file with holes is no beginning"


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"kind": "blob/1"}', '{"kind": "blob/1", "size": true, "leaves": ""}'])
def test_states_that_are_none(tmp_path: Path, state: str) -> None:
    (tmp_path / "key.state").write_text(state)
    assert stored_tree(tmp_path / "key.state") is None
    with partial(tmp_path) as growing:
        assert sum(growing.there()) == 0


def _no_space(*_: object) -> int:
    raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", _no_space)
    with pytest.raises(DiskFull, match="is full"):
        partial(tmp_path)
    assert names(tmp_path) == []


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with partial(tmp_path) as growing:
        growing.put(0, PARTS[0])
        monkeypatch.setattr(os, "pwrite", _no_space)
        with pytest.raises(DiskFull, match="is full"):
            growing.put(1, PARTS[1])
        assert names(tmp_path) == []


# -- the store


def store_with(folder: Path, data: bytes = DATA) -> BlobStore:
    cache = Cache(folder, 2**30)
    source = folder / "source"
    source.write_bytes(data)
    cache.add(source, hashlib.sha256(data).hexdigest(), ".bin", "test", "test")
    return BlobStore(folder, 2**30)


def test_found_by_both_names(tmp_path: Path) -> None:
    store = store_with(tmp_path)
    assert store.find(BlobKey.ROOT, TREE.root()) is None, "nobody has asked for its tree"
    found = store.find(BlobKey.SHA256, SHA256)
    assert found is not None and found.tree == TREE and found.root == TREE.root() and found.model.name == "test"
    assert store.find(BlobKey.ROOT, TREE.root()) == found
    assert BlobStore(tmp_path, 2**30).find(BlobKey.ROOT, TREE.root()) == found, "and by a store that is new"
    assert store.find(BlobKey.SHA256, "0" * 64) is None and store.find(BlobKey.ROOT, "0" * 64) is None
    assert store.find(BlobKey.SHA256, SHA256, may=lambda sha256: False) is None
    with store.open(found) as opened:
        assert opened.read(2, 3) == PARTS[2:5] and opened.read(6, 1) == PARTS[6:]
        assert Cache(tmp_path, 2**30).evict(0) == [], "nobody evicts what is being read"
    Cache(tmp_path, 2**30).evict(0)
    assert not list(tmp_path.glob("*.tree")) and store.find(BlobKey.ROOT, TREE.root()) is None


def test_a_changed_file_is_not_handed_out(tmp_path: Path) -> None:
    store = store_with(tmp_path)
    found = store.find(BlobKey.SHA256, SHA256)
    assert found is not None
    with open(found.model.path, "r+b") as file:
        file.write(b"!")
    assert store.find(BlobKey.SHA256, SHA256) is None and store.find(BlobKey.ROOT, TREE.root()) is None


@pytest.mark.parametrize("kept", ["{}", '{"size": 1, "leaves": "00", "root": "x"}', "no JSON"])
def test_a_kept_tree_that_is_none_is_made_anew(tmp_path: Path, kept: str) -> None:
    store = store_with(tmp_path)
    (tmp_path / f"{SHA256}.tree").write_text(kept)
    found = store.find(BlobKey.SHA256, SHA256)
    assert found is not None and found.tree == TREE
    with pytest.raises(FetchCancelled):
        (tmp_path / f"{SHA256}.tree").unlink()
        store.find(BlobKey.SHA256, SHA256, cancelled=lambda: True)


def test_in_by_a_partial(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 2**30)
    with store.begin("key", TREE) as growing:
        for index in ORDER:
            growing.put(index, PARTS[index])
        blob = store.install(growing, SHA256, "test", ".bin", "peers")
    assert blob.model.path.read_bytes() == DATA and store.find(BlobKey.ROOT, TREE.root()) == blob
    assert names(tmp_path) == [f"{SHA256}.bin", f"{SHA256}.note", f"{SHA256}.tree", "cache.lock"]


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    store = store_with(tmp_path)
    (tmp_path / f"{SHA256}.bin").write_bytes(b"damaged")
    with store.begin("key", TREE) as growing:
        for index in ORDER:
            growing.put(index, PARTS[index])
        store.install(growing, SHA256, "test", ".bin", "peers")
    found = store.find(BlobKey.SHA256, SHA256)
    assert found is not None and found.model.path.read_bytes() == DATA


@pytest.mark.parametrize("expected, suffix", [("0" * 64, ".bin"), (SHA256, ".gguf")])
def test_what_is_not_what_it_should_be_does_not_get_in(tmp_path: Path, expected: str, suffix: str) -> None:
    store = BlobStore(tmp_path, 2**30)
    with store.begin("key", TREE) as growing:
        for index in ORDER:
            growing.put(index, PARTS[index])
        with pytest.raises(WrongContent):
            store.install(growing, expected, "test", suffix, "peers")
    assert names(tmp_path) == ["cache.lock"]


def test_one_fetches_at_a_time(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, 2**30)
    first = store.try_fetching("key")
    assert first is not None
    with first:
        assert store.try_fetching("key") is None and BlobStore(tmp_path, 2**30).try_fetching("key") is None
        other = store.try_fetching("other")
        assert other is not None
        with other:
            pass
    again = store.try_fetching("key")
    assert again is not None
    with again:
        pass
