"""What ``POST /api/v1/jobs`` asks for: a text, of a Cargo that writes texts, or lines, of any other."""

from __future__ import annotations

import json
import secrets
from typing import Any

from coordinator.cache.asking import CacheAsk
from coordinator.exchange.bids import Work
from coordinator.http import schema
from coordinator.http.errors import bad_request, unsupported
from coordinator.http.terms import Terms, need_cargo
from coordinator.jobs import JobSpec
from coordinator.matching import declared_tokens
from coordinator.orders import Order
from protocol import limits
from protocol.cargo_io import encode_input
from protocol.cargo_jobs import SEED_BYTES, CargoInput, is_packed_input, pack_input, unpack_input
from protocol.errors import LocalProtocolError
from protocol.generation import GENERATION, GenerationRequest

PATIENCE_SHARE = 0.95
KIND = "job"
Asked = GenerationRequest | CargoInput


def read_body(body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Cargo and input. ``workload`` means the same as ``cargo``. Raises ApiError 400."""
    cargo, given = body.get("cargo"), body.get("input")
    cargo = body.get("workload") if cargo is None else cargo
    if not isinstance(cargo, str) or not cargo:
        raise bad_request("you must provide cargo, the name of what is to run", "cargo", "missing_required_parameter")
    if not isinstance(given, dict):
        text = "you must provide input, an object: messages or prompt, or what the Cargo takes"
        raise bad_request(text, "input", "missing_required_parameter")
    need_cargo(cargo, "cargo")
    if _json_bytes(given) > limits.JOB_INPUT_JSON_BYTES_MAX:
        text = f"input is over {limits.JOB_INPUT_JSON_BYTES_MAX} bytes; send less at a time, or a smaller picture"
        raise bad_request(text, "input", "input_too_large")
    return cargo, given


def wants_text(given: dict[str, Any], writes_text: bool | None) -> bool:
    """Whether an input is for a Cargo that writes texts. ``writes_text``: what is known of it; None: nothing."""
    if writes_text is False:
        return False
    return given.get("messages") is not None or given.get("prompt") is not None or (writes_text is True and "input" not in given)


def text_asked(cargo: str, given: dict[str, Any]) -> GenerationRequest:
    """Raises ApiError 400."""
    if given.get("messages") is not None and given.get("prompt") is not None:
        raise bad_request("input takes messages or prompt, not both", "input")
    inner = {name: value for name, value in given.items() if name not in ("stream", "stream_options", "model")}
    parse = schema.parse_chat if given.get("messages") is not None else schema.parse_completion
    api = parse({**inner, "model": cargo}, secrets.randbits(63))
    if len(api.choices) != 1:
        raise bad_request("a job has one prompt and one answer: leave n at 1", "input")
    if api.choices[0].tools:
        raise unsupported("tools", "are for /v1/chat/completions; a job's answer is plain text")
    return api.choices[0]


def lines_asked(given: dict[str, Any]) -> CargoInput:
    """Raises ApiError 400."""
    try:
        return CargoInput(encode_input(given), secrets.token_bytes(SEED_BYTES))
    except (LocalProtocolError, ValueError) as error:
        raise bad_request(str(error), "input") from None


def _json_bytes(given: dict[str, Any]) -> int:
    """Size of an input as compact JSON. JSON may hold half a surrogate pair, which has no UTF-8; what is wrong with it is said later."""
    try:
        return len(json.dumps(given, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))
    except RecursionError:
        raise bad_request("input is nested too deeply", "input") from None


def pack_asked(asked: Asked) -> bytes:
    """For keeping, where the job may be run again."""
    return pack_input(asked) if isinstance(asked, CargoInput) else GENERATION.encode(asked)


def unpack_asked(data: bytes) -> Asked:
    """Raises RemoteProtocolError or ValueError."""
    return unpack_input(data) if is_packed_input(data) else GENERATION.decode(data)


def work_of(asked: Asked, job_timeout_s: float) -> Work:
    """What may be used at most, by which asks are priced beforehand."""
    if isinstance(asked, CargoInput):
        return Work(0, asked.max_tokens, job_s_max=job_timeout_s)
    return Work(declared_tokens(asked.input_chars, 0), asked.max_tokens, job_s_max=job_timeout_s)


def job_order(
    job_id: str,
    cargo: str,
    asked: Asked,
    terms: Terms,
    account: str,
    salt: bytes,
    keep_s: float,
    job_timeout_s: float,
    is_streamed: bool = False,
    cache: CacheAsk | None = None,
) -> Order:
    """A submitted job as the desk takes it: it waits for an Island nearly as long as it may run, so that it can say what it waited for.
    One that is streamed is like a chat: somebody waits for it, it is not run again, and lines of it are not kept for who comes again.
    ``cache``: how the cache of answers is to be asked."""
    spec = JobSpec(
        job_id,
        cargo,
        salt,
        (asked,),
        account=account,
        policy=terms.policy,
        priority=terms.priority,
        patience_s=None if is_streamed else PATIENCE_SHARE * job_timeout_s,
    )
    return Order(
        spec=spec,
        work=work_of(asked, job_timeout_s),
        kind=KIND,
        bid_micros=terms.bid_micros,
        quote_id=terms.quote_id,
        policy_text=terms.policy_text,
        delivers=is_streamed,
        keep_s=0.0 if is_streamed else keep_s,
        idempotency_key=terms.idempotency_key,
        fingerprint=terms.fingerprint,
        is_retry=terms.is_retry,
        input=b"" if is_streamed else pack_asked(asked),
        cache=cache,
        user=terms.user,
    )
