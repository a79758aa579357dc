"""A Coordinator and Islands as processes that run one model between them, asked through the OpenAI API."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai

from node.control import ask_node
from node.localnet import LocalNetwork, LocalNode

MODEL = "smollm2-135m"
LISTEN = "/ip4/127.0.0.1/tcp/0"
STORY = "Write a short story about an island."


@dataclass
class Answer:
    text: str = ""
    route: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)


class Net:
    """A Coordinator and Islands that offer memory."""

    def __init__(
        self, network: LocalNetwork, islands: int, memory: str, *more: str, http: str = "127.0.0.1:0", listen: str = LISTEN
    ) -> None:
        self.network = network
        network.start_coordinator(http, *more, listen=listen)
        nodes = [network.start_island(f"island-{n}", "--memory-limit", memory, "--threads", "1") for n in range(islands)]
        self.by_peer = {str(node.wait_ready()["peer_id"]): node for node in nodes}
        self.key = network.make_key()
        self.client = openai.OpenAI(base_url=network.url + "/v1", api_key=self.key, max_retries=0, timeout=120)

    def ask(
        self, text: str = STORY, tokens: int = 60, watch: Callable[[int], None] = lambda pieces: None, model: str = MODEL, **more: Any
    ) -> Answer:
        messages: Any = [{"role": "system", "content": "You are a helpful AI assistant."}, {"role": "user", "content": text}]
        fields: dict[str, Any] = {"temperature": 0, "max_tokens": tokens, "stream_options": {"include_usage": True}} | more
        raw = self.client.chat.completions.with_raw_response.create(model=model, messages=messages, stream=True, **fields)
        answer = Answer(route=tuple(raw.headers["x-archipelag-route"].split(",")))
        pieces = 0
        for chunk in raw.parse():
            plain = chunk.model_dump()
            answer.metadata = plain.get("metadata") or answer.metadata
            answer.usage = plain.get("usage") or answer.usage
            for choice in chunk.choices:
                if choice.delta.content:
                    answer.text += choice.delta.content
                    pieces += 1
                    watch(pieces)
        return answer

    def node(self, peer: str) -> LocalNode:
        return self.by_peer[peer]

    def shard(self, peer: str) -> dict[str, Any]:
        """What an Island says of its one shard."""
        (shard,) = ask_node(str(self.node(peer).data_dir), "status")["shards"]
        return dict(shard)

    def counts(self, peer: str) -> dict[str, int]:
        shard = self.shard(peer)
        return dict(shard["stage"]["counts"] if "stage" in shard else shard["driver"]["counts"])
