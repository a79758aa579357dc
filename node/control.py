"""How ``status`` and ``peers`` ask a running node: a loopback socket whose port and token stand in the data folder with mode 0600.

One JSON line each way. Loopback TCP with a token works on every platform, where Unix sockets stop at paths of 107 characters.
"""

from __future__ import annotations

import hmac
import json
import logging
import secrets
import socket
from collections.abc import Callable, Mapping
from typing import Any

import trio

from node.datadir import DataDir, write_atomically
from protocol.errors import ConfigError

log = logging.getLogger(__name__)

CONTROL_FILE = "control.json"
_REQUEST_BYTES_MAX = 4096
_REQUEST_TIMEOUT_S = 5.0
_ANSWER_BYTES_MAX = 16 * 1024 * 1024

Question = Callable[[], Mapping[str, Any]]


async def serve_control(
    data: DataDir, questions: Mapping[str, Question], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Answers the named questions until cancelled, then takes its file away."""
    token = secrets.token_urlsafe(32)

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            with trio.move_on_after(_REQUEST_TIMEOUT_S):
                try:
                    await _answer(stream, token, questions)
                except (trio.BrokenResourceError, ValueError) as error:
                    log.debug("control request failed: %s", type(error).__name__)

    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    write_atomically(data.path / CONTROL_FILE, json.dumps({"port": port, "token": token}).encode())
    try:
        task_status.started()
        await trio.serve_listeners(answer, listeners)
    finally:
        (data.path / CONTROL_FILE).unlink(missing_ok=True)


async def _answer(stream: trio.SocketStream, token: str, questions: Mapping[str, Question]) -> None:
    line = b""
    while not line.endswith(b"\n"):
        piece = await stream.receive_some(_REQUEST_BYTES_MAX)
        line += piece
        if not piece or len(line) > _REQUEST_BYTES_MAX:
            raise ValueError("no request")
    request = json.loads(line)
    if not isinstance(request, dict) or not hmac.compare_digest(str(request.get("token", "")).encode(), token.encode()):
        await stream.send_all(b'{"error": "wrong token"}\n')
        return
    question = questions.get(str(request.get("ask")))
    reply: Mapping[str, Any] = question() if question else {"error": f"unknown question; known: {', '.join(questions)}"}
    await stream.send_all(json.dumps(reply).encode() + b"\n")


def ask_node(data_dir: str, question: str) -> dict[str, Any]:
    """What a running node answers. Raises ConfigError when none runs on that folder."""
    data = DataDir.open(data_dir)
    control = data.read_json(CONTROL_FILE)
    if not control:
        raise ConfigError(f"no node runs on {data.path}; start one, or name its folder with --data-dir")
    try:
        with socket.create_connection(("127.0.0.1", int(control["port"])), timeout=_REQUEST_TIMEOUT_S) as connection:
            connection.sendall(json.dumps({"token": control["token"], "ask": question}).encode() + b"\n")
            with connection.makefile("rb") as file:
                reply = json.loads(file.readline(_ANSWER_BYTES_MAX))
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"the node on {data.path} does not answer; it was probably killed, start it again") from error
    if not isinstance(reply, dict) or "error" in reply:
        raise ConfigError(
            f"the node on {data.path} refuses: {reply.get('error') if isinstance(reply, dict) else reply}"
        )
    return reply
