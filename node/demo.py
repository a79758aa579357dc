"""The demo: a Coordinator and Islands as processes on this machine, a key, and one answer streamed through the OpenAI API.

Everything runs for real: each node is its own ``archipelag-node`` process with its own identity, on loopback. Their data lives in a
temporary folder that goes with them; the model stays in the user's cache.
"""

from __future__ import annotations

import json
import socket
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from node import demo_cache, demo_cargos
from node.demo_client import MODEL, DemoFailed, ask_json, chunks_of, open_answer, question, say, text_of
from node.localnet import LocalNetwork
from protocol.errors import ConfigError
from runtimes.store import ConsoleProgress, ModelStore


@dataclass(frozen=True, slots=True)
class DemoConfig:
    prompt: str
    islands: int = 2
    once: bool = False
    http: str = "127.0.0.1:8080"
    http_chosen: bool = False  # the user named the port, so another one would be a surprise


def run_demo(config: DemoConfig, out: TextIO) -> None:
    """Raises DemoFailed, NodeFailed or ConfigError; Ctrl-C ends it in order."""
    started = time.monotonic()
    say(out, f"1/4 model {MODEL}")
    with ConsoleProgress() as progress:
        ModelStore().fetch(MODEL, progress)
    with tempfile.TemporaryDirectory(prefix="archipelag-demo-") as folder, LocalNetwork(Path(folder)) as network:
        say(out, "2/4 Coordinator")
        network.start_coordinator(_free_address(config, out))
        more = demo_cargos.cargos()
        say(out, f"3/4 {config.islands} Islands, each loading the model with one thread; one of them {' and '.join(more)} too")
        islands = _start_islands(config.islands, network, more)
        key = network.make_key()
        say(out, f"4/4 answer ({time.monotonic() - started:.1f} s after the start)\n")
        told = _ask(network.url, key, config.prompt, islands, out)
        demo_cache.show(network.url, key, _data_dir(network), config.prompt, told, out)
        demo_cargos.show(network.url, key, more, out)
        if not config.once:
            _stay(network, key, out)
        say(out, "\nstopping …")


def _data_dir(network: LocalNetwork) -> str:
    assert network.coordinator is not None, "it was started"
    return str(network.coordinator.data_dir)


def _free_address(config: DemoConfig, out: TextIO) -> str:
    """The wanted address, or a free port where the default one is taken."""
    if config.http_chosen or _is_free(config.http):
        return config.http
    say(out, f"    {config.http} is taken, so a free port is used")
    return f"{config.http.rpartition(':')[0]}:0"


def _is_free(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError:
            return False
    return True


def _start_islands(count: int, network: LocalNetwork, more: Sequence[str]) -> dict[str, str]:
    """Names by peer id; the last one has ``more`` Cargos. One thread each: engines that spin on the same cores slow each other down many
    times."""
    nodes = []
    for number in range(1, count + 1):
        cargos = [MODEL, *(more if number == count else ())]
        named = [part for name in cargos for part in ("--cargo", name)]
        nodes.append(network.start_island(f"island-{number}", *named, "--threads", "1"))
    return {str(node.wait_ready()["peer_id"]): node.name for node in nodes}


def _ask(url: str, key: str, prompt: str, islands: dict[str, str], out: TextIO) -> demo_cache.Told:
    """Asks what the answer will cost at most, streams it as it comes, then says who gave it, what it did cost, and what is left."""
    quote = ask_json(url, key, "/api/v1/quotes", question(prompt))
    say(out, f"> {prompt}")
    quoted = islands.get(quote["island"], "an Island")
    say(out, f"quote: at most {quote['price']} credits at {quoted}, until {quote['expires_at']}\n")
    started = time.monotonic()
    with open_answer(url, key, prompt, stream_options={"include_usage": True}, quote=quote["id"]) as response:
        island = response.getheader("x-archipelag-island", "")
        last: dict[str, Any] = {}
        for last in chunks_of(response):
            out.write(text_of(last))
            out.flush()
    took_s = time.monotonic() - started
    say(out, f"\n\nfrom {islands.get(island, 'an Island')} ({island})")
    usage, metadata = last.get("usage") or {}, last.get("metadata") or {}
    say(
        out,
        f"{usage.get('completion_tokens')} tokens, price {metadata.get('price')} credits, job {metadata.get('job_id')}",
    )
    say(out, f"balance: {ask_json(url, key, '/api/v1/account')['credits']} credits")
    return demo_cache.Told(took_s, metadata)


def _stay(network: LocalNetwork, key: str, out: TextIO) -> None:
    url, nodes = network.url, network.nodes
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "stream": True})
    say(out, f"\nbase URL  {url}/v1\nAPI key   {key}\n")
    say(
        out,
        f"curl -N {url}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' -d '{body}'\n",
    )
    vectors = json.dumps({"model": demo_cargos.EMBEDDER, "input": "Hello!"})
    say(out, f"curl {url}/v1/embeddings -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' -d '{vectors}'\n")
    say(out, "Ctrl-C stops the demo.")
    try:
        while all(node.running for node in nodes):
            time.sleep(0.5)
    except KeyboardInterrupt:
        return
    ended = next(node for node in nodes if not node.running)
    raise DemoFailed(f"{ended.name} ended with status {ended.process.returncode}")


def check_islands(count: int) -> int:
    """Raises ConfigError for a number that makes no demo."""
    if not 1 <= count <= 16:
        raise ConfigError("--islands takes 1 to 16; each loads the model and runs one thread")
    return count
