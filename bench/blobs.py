"""A blob of 98 MB from two peers, beside ``curl`` and ``sha256sum`` from a local HTTP server, in turns.

Two Islands run in processes of their own and serve the file out of their stores; this process fetches it into an empty store: trees
compared, every chunk verified, the whole hashed, on the disk and moved into place. Beside it ``curl`` brings the same file from Python's
HTTP server, in a process of its own, to the same disk, and ``sha256sum`` reads it. Both in the same rounds, so that whatever else the
machine does meets both; the figures are medians.

    python -m bench.blobs [--quick]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trio

from bench.bars import at_least
from node.blob_fetcher import BlobFetcher, BlobWanted
from node.blobs_served import BlobServer
from node.jobs_served import island_hello
from node.net.host import open_host
from protocol.blobs import BLOB, BLOB_PROTOCOL, BlobKey
from protocol.messages import Hello
from runtimes.store.blob_store import BlobStore
from runtimes.store.cache import Cache

SIZE_BYTES = 98_000_000
PEERS = 2
MB_S_MIN = 150.0  # the bars
RATIO_MIN = 0.8
_CACHE_BYTES = 2**33
_SEED_BYTES = 1_000_000


def _hello() -> Hello:
    return island_hello("", "bench")


# -- the other processes


async def _serve_blobs(number: int, folder: Path) -> None:
    async with open_host(bytes([number]) * 32) as host:
        host.set_handler(BLOB_PROTOCOL, BLOB, BlobServer(BlobStore(folder, _CACHE_BYTES), _hello).serve)
        print(json.dumps({"address": host.addresses()[0], "peer": host.peer_id}), flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)  # the parent closes it when it is done


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a line a request would be measured too."""


def _serve_http(folder: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server:
        print(json.dumps({"port": server.server_port}), flush=True)
        server.serve_forever()


@contextmanager
def _process(*arguments: str) -> Iterator[dict[str, Any]]:
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "bench.blobs", *arguments]
    process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.communicate(timeout=20)


# -- this process


def _make_file(path: Path) -> str:
    """SIZE_BYTES that no file system shortens; their SHA-256."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for number in range(SIZE_BYTES // _SEED_BYTES):
            part = hashlib.shake_128(number.to_bytes(4, "big")).digest(_SEED_BYTES)
            digest.update(part)
            file.write(part)
    return digest.hexdigest()


def _fill_store(folder: Path, source: Path, sha256: str) -> str:
    """A store with the file and its tree; the root."""
    folder.mkdir()
    copy = folder / "copy"
    shutil.copyfile(source, copy)
    Cache(folder, _CACHE_BYTES).add(copy, sha256, ".bin", "bench", "bench")
    found = BlobStore(folder, _CACHE_BYTES).find(BlobKey.SHA256, sha256)
    assert found is not None
    return found.root


async def _fetch_s(folder: Path, servers: list[dict[str, Any]], wanted: BlobWanted) -> float:
    store = BlobStore(folder, _CACHE_BYTES)
    async with open_host(bytes([99]) * 32) as host:
        for server in servers:
            await host.connect(server["address"])
        began_s = time.perf_counter()
        fetched = await BlobFetcher(host, store, _hello).fetch(wanted, [server["peer"] for server in servers])
        took_s = time.perf_counter() - began_s
    if fetched.faults or len(fetched.chunks_by_peer) != len(servers):
        raise RuntimeError(f"the blob did not come from both: {fetched}")
    return took_s


def _curl_s(url: str, target: Path, sha256: str) -> float:
    began_s = time.perf_counter()
    subprocess.run(["curl", "-sSf", "-o", str(target), url], check=True)
    said = subprocess.run(["sha256sum", str(target)], check=True, capture_output=True, text=True).stdout
    took_s = time.perf_counter() - began_s
    if not said.startswith(sha256):
        raise RuntimeError(f"curl brought something else: {said}")
    return took_s


def run(quick: bool = False) -> dict[str, Any]:
    """Measures everything; the dict is fit for JSON."""
    rounds = 3 if quick else 9
    peers_s, curl_s = [], []
    with tempfile.TemporaryDirectory(prefix="archipelag-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "http").mkdir()
        source = folder / "http" / "blob.bin"
        sha256 = _make_file(source)
        roots = [_fill_store(folder / f"peer{number}", source, sha256) for number in range(PEERS)]
        serve = [("--serve", str(number + 1), str(folder / f"peer{number}")) for number in range(PEERS)]
        servers = [stack.enter_context(_process(*arguments)) for arguments in serve]
        url = f"http://127.0.0.1:{stack.enter_context(_process('--serve-http', str(folder / 'http')))['port']}/blob.bin"
        wanted = BlobWanted("bench", roots[0], sha256, ".bin")
        for turn in range(rounds + 1):  # the first one warms up
            peers_s.append(trio.run(_fetch_s, folder / f"mine{turn}", servers, wanted))
            shutil.rmtree(folder / f"mine{turn}")
            curl_s.append(_curl_s(url, folder / "curled", sha256))
            (folder / "curled").unlink()
    return _report([SIZE_BYTES / 1e6 / s for s in peers_s[1:]], [SIZE_BYTES / 1e6 / s for s in curl_s[1:]])


def _report(peers: list[float], curl: list[float]) -> dict[str, Any]:
    ours, theirs = statistics.median(peers), statistics.median(curl)
    return {
        "bench": "blobs",
        "load_average_1min": round(os.getloadavg()[0], 2),
        "mb_s": {f"from {PEERS} peers": round(ours, 1), "curl + sha256sum": round(theirs, 1)},
        "mb_s_range": {f"from {PEERS} peers": [min(peers), max(peers)], "curl + sha256sum": [min(curl), max(curl)]},
        "bars": [
            at_least(f"a blob of 98 MB from {PEERS} peers on loopback, MB/s", ours, MB_S_MIN),
            at_least("a blob of 98 MB from peers / curl + sha256sum", ours / theirs, RATIO_MIN),
        ],
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"{'98 MB, verified, on the disk':<32}{'MB/s':>8}{'range':>18}"]
    for name, speed in result["mb_s"].items():
        low, high = result["mb_s_range"][name]
        lines.append(f"{name:<32}{speed:>8.0f}{f'{low:.0f} to {high:.0f}':>18}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="A blob from two peers beside curl")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--serve-http", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        trio.run(_serve_blobs, int(arguments.serve[0]), Path(arguments.serve[1]))
    elif arguments.serve_http:
        _serve_http(Path(arguments.serve_http))
    else:
        result = run(arguments.quick)
        print(table(result))
        print(json.dumps(result))


if __name__ == "__main__":
    main()
