"""The first words of every stream between nodes: a Hello each way, of a version that both know."""

from __future__ import annotations

from collections.abc import Callable

import trio

from node.net.frames import FrameStream
from protocol import limits
from protocol.errors import RemoteProtocolError
from protocol.messages import PROTOCOL_VERSION, Hello


async def exchange_hello(stream: FrameStream, hello: Hello) -> Hello:
    """Says hello first. Raises RemoteProtocolError for another answer than a Hello of our version, TooSlowError, LinkLost; the stream is
    then aborted."""
    try:
        with trio.fail_after(limits.HELLO_TIMEOUT_S):
            await stream.send(hello)
            answer = await stream.receive()
        if not isinstance(answer, Hello):
            raise RemoteProtocolError(f"{stream.remote_peer} answered hello with {type(answer).__name__}")
        if answer.version != PROTOCOL_VERSION:
            raise RemoteProtocolError(f"{stream.remote_peer} speaks version {answer.version}, this node {PROTOCOL_VERSION}")
    except BaseException:
        stream.abort()
        raise
    return answer


async def answer_hello(
    stream: FrameStream, hello: Callable[[], Hello], check: Callable[[Hello, str], object] = lambda hello, sender: None
) -> Hello:
    """Waits for the other's Hello and answers it, unless ``check`` (of the Hello and its sender) raises; the answer is made then, since
    ``check`` may have learnt the network. Returns ours. Raises RemoteProtocolError, TooSlowError, LinkLost."""
    with trio.fail_after(limits.HELLO_TIMEOUT_S):
        theirs = await stream.receive()
        if not isinstance(theirs, Hello) or theirs.version != PROTOCOL_VERSION:
            raise RemoteProtocolError("the first message of a stream is a Hello of a version that both know")
        check(theirs, stream.remote_peer)
        ours = hello()
        await stream.send(ours)
    return ours
