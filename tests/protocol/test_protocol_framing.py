"""Frames: every way to cut them, too large ones, and streams that end in the middle."""

from __future__ import annotations

import random
import struct
from typing import Any

import pytest

from protocol import limits, messages
from protocol.errors import Code, LocalProtocolError, RemoteProtocolError
from protocol.framing import PREFIX_BYTES, FrameDecoder, encode_frame, parse_prefix
from protocol.generation import FinishReason
from tests.protocol import samples

STREAM = b"".join(encode_frame(messages.JOB, m) for m in samples.JOB_MESSAGES)


def decode(data: bytes, size: int) -> list[Any]:
    decoder = FrameDecoder(messages.JOB)
    out = [m for start in range(0, len(data), size) for m in decoder.feed(data[start : start + size])]
    assert decoder.pending_bytes == 0
    return out


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 64, len(STREAM)])
def test_reads_of_any_size_give_the_same_messages(size: int) -> None:
    assert decode(STREAM, size) == list(samples.JOB_MESSAGES)


def test_a_cut_at_every_byte() -> None:
    for cut in range(len(STREAM) + 1):
        decoder = FrameDecoder(messages.JOB)
        first = list(decoder.feed(STREAM[:cut]))
        assert first + list(decoder.feed(STREAM[cut:])) == list(samples.JOB_MESSAGES)


def test_a_truncated_stream_shows_as_pending_bytes() -> None:
    ends = {0}
    for message in samples.JOB_MESSAGES:
        ends.add(max(ends) + len(encode_frame(messages.JOB, message)))
    for cut in range(len(STREAM) + 1):
        decoder = FrameDecoder(messages.JOB)
        got = list(decoder.feed(STREAM[:cut]))
        assert (decoder.pending_bytes == 0) == (cut in ends)
        assert len(got) == len([end for end in ends if 0 < end <= cut])


@pytest.mark.parametrize("seed", range(3))
def test_random_reads(seed: int) -> None:
    chance = random.Random(seed)
    said = [chance.choice(samples.JOB_MESSAGES) for _ in range(200)]
    data = b"".join(encode_frame(messages.JOB, m) for m in said)
    decoder = FrameDecoder(messages.JOB)
    heard: list[Any] = []
    while data:
        size = chance.randint(1, 300)
        heard += decoder.feed(data[:size])
        data = data[size:]
    assert heard == said


def test_lengths_over_the_limits_are_refused_before_the_rest_comes() -> None:
    over = [
        (0, 0),
        (0, 1),
        (limits.FRAME_HEADER_BYTES_MAX + 1, 0),
        (1, limits.FRAME_BODY_BYTES_MAX + 1),
        (2**32 - 1, 2**32 - 1),
    ]
    for lengths in over:
        prefix = struct.pack(">II", *lengths)
        with pytest.raises(RemoteProtocolError, match="outside the limits"):
            parse_prefix(prefix)
        with pytest.raises(RemoteProtocolError, match="outside the limits"):
            list(FrameDecoder(messages.JOB).feed(prefix))
    at_limit = (limits.FRAME_HEADER_BYTES_MAX, limits.FRAME_BODY_BYTES_MAX)
    assert parse_prefix(struct.pack(">II", *at_limit)) == at_limit


def test_after_a_bad_frame_the_decoder_never_goes_on() -> None:
    good = encode_frame(messages.JOB, messages.JobCancel(1))
    bad = struct.pack(">II", 1, 0) + b"\xc0"
    decoder = FrameDecoder(messages.JOB)
    heard: list[Any] = []
    with pytest.raises(RemoteProtocolError):
        for message in decoder.feed(good + bad + good):
            heard.append(message)
    assert heard == [messages.JobCancel(1)]
    with pytest.raises(RemoteProtocolError):
        list(decoder.feed(good))


def test_bytes_count_even_if_nobody_asks_for_the_messages() -> None:
    """``feed`` takes its bytes when it is called; an iterator that is dropped loses nothing."""
    frame = encode_frame(messages.JOB, messages.JobCancel(1))
    decoder = FrameDecoder(messages.JOB)
    decoder.feed(frame[:5])
    assert decoder.pending_bytes == 5
    assert list(decoder.feed(frame[5:])) == [messages.JobCancel(1)]


def test_stopping_between_two_messages_keeps_the_second() -> None:
    decoder = FrameDecoder(messages.JOB)
    both = encode_frame(messages.JOB, messages.JobCancel(1)) + encode_frame(messages.JOB, messages.JobCancel(2))
    for message in decoder.feed(both):
        assert message == messages.JobCancel(1)
        break
    assert list(decoder.feed(b"")) == [messages.JobCancel(2)]


def test_a_frame_has_its_lengths_in_front() -> None:
    frame = encode_frame(messages.JOB, messages.JobOpen(1, b"t", input=b"body"))
    header, body = parse_prefix(frame[:PREFIX_BYTES])
    assert frame[PREFIX_BYTES + header :] == b"body" and body == 4
    assert len(frame) == PREFIX_BYTES + header + body


def test_too_large_a_message_is_our_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FRAME_BODY_BYTES_MAX", 3)
    with pytest.raises(LocalProtocolError, match="too large"):
        encode_frame(messages.JOB, messages.JobOpen(1, b"t", input=b"body"))


def test_every_message_at_its_limits_fits_into_a_frame() -> None:
    """What the checks of a message allow, the framing must carry: otherwise a legal message could not be sent."""
    name, text = "n" * limits.NAME_CHARS_MAX, "🏝" * limits.TEXT_CHARS_MAX
    envelope = bytes(limits.ENVELOPE_BYTES_MAX)
    reply = (envelope,) * (limits.BOOK_REPLY_BYTES_MAX // len(envelope))
    small = (bytes(limits.BOOK_REPLY_BYTES_MAX // limits.BOOK_REPLY_ENVELOPES_MAX),) * limits.BOOK_REPLY_ENVELOPES_MAX
    peers = sorted(samples.key(n).peer_id for n in range(limits.BOOK_REQUEST_PEERS_MAX))
    chunk = "é" * (limits.JOB_CHUNK_TEXT_BYTES_MAX // 2)
    largest = [
        (messages.JOB, messages.Hello(1000, messages.NodeRole.COORDINATOR, name, name, envelope)),
        (messages.JOB, messages.JobOpen(2**53, envelope, input=bytes(limits.JOB_INPUT_BYTES_MAX))),
        (
            messages.JOB,
            messages.JobChunk(2**53, 4096, chunk, bytes(limits.JOB_CHUNK_LOGPROBS_BYTES_MAX), bytes(4 * 4096)),
        ),
        (
            messages.JOB,
            messages.JobDone(2**53, FinishReason.STOP, chunk, 2**31, 0, 4096, 2**53, 2**53, envelope),
        ),
        (messages.JOB, messages.JobFailed(2**53, Code.CONTEXT_LENGTH, text)),
        (messages.ADS, messages.Announce(reply)),
        (messages.ADS, messages.Announce(small)),
        (messages.ADS, messages.AdAck(2**53, False, text)),
        (messages.ADS, messages.BookRequest(tuple(messages.Known(p, 2**53, True) for p in peers), "", peers[-1])),
    ]
    for registry, message in largest:
        assert list(FrameDecoder(registry).feed(encode_frame(registry, message))) == [message]


def test_more_than_the_limits_is_refused_when_a_message_is_made() -> None:
    envelope = bytes(limits.ENVELOPE_BYTES_MAX)
    with pytest.raises(ValueError, match="bytes announced"):
        messages.Announce((envelope,) * 4)
    with pytest.raises(ValueError, match="bytes in UTF-8"):
        messages.JobChunk(1, 0, "é" * limits.JOB_CHUNK_TEXT_BYTES_MAX, b"", b"\0" * 4)
    with pytest.raises(ValueError):
        messages.JobChunk(1, 0, "", b"", b"")
    with pytest.raises(ValueError):
        messages.JobChunk(1, 0, "", b"", b"123")
