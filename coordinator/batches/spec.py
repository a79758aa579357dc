"""What a batch is to do: read from a request, and kept with its run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, TypeVar

from coordinator.exchange.parsing import parse_bid
from coordinator.http.errors import ApiError, bad_request, unsupported
from coordinator.http.job_input import lines_asked, read_body, text_asked, wants_text
from coordinator.regions import Residency, parse_policy
from protocol import limits

_NOT_FOR_BATCHES = {"quote": "names one job's price: send bid_price", "stream": "is for one job: a batch has /api/v1/jobs/{id}/stream"}


E = TypeVar("E", bound=StrEnum)


class Merge(StrEnum):
    CONCAT = "concat"
    FLATTEN = "flatten"


class FailMode(StrEnum):
    BEST_EFFORT = "best_effort"
    FAIL_FAST = "fail_fast"


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """``bids``: of each input, in micro-credits; empty: the market's when its turn comes. ``policy_text``: JSON, or empty."""

    cargo: str
    inputs: tuple[dict[str, Any], ...]
    merge: Merge = Merge.CONCAT
    fail_mode: FailMode = FailMode.BEST_EFFORT
    max_parallelism: int | None = None
    bids: tuple[int, ...] = ()
    policy_text: str = ""
    priority: int = 0

    @property
    def policy(self) -> Residency | None:
        return parse_policy(json.loads(self.policy_text)) if self.policy_text else None

    def pack(self) -> bytes:
        """JSON may hold half a surrogate pair."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def unpack(data: bytes) -> BatchSpec:
    value = json.loads(data.decode("utf-8", "surrogatepass"))
    return BatchSpec(
        value["cargo"],
        tuple(value["inputs"]),
        Merge(value["merge"]),
        FailMode(value["fail_mode"]),
        value["max_parallelism"],
        tuple(value["bids"]),
        value["policy_text"],
        value["priority"],
    )


def read_batch(body: Mapping[str, Any], bid_micros: int | None, policy_text: str, priority: int) -> BatchSpec:
    """A request's body; the terms that every request may name are read elsewhere. Raises ApiError 400."""
    for name, why in _NOT_FOR_BATCHES.items():
        if body.get(name):
            raise unsupported(name, why)
    inputs = body.get("inputs")
    if not isinstance(inputs, list):
        raise bad_request("you must provide inputs, an array of objects", "inputs", "missing_required_parameter")
    if not 1 <= len(inputs) <= limits.BATCH_INPUTS_MAX:
        text = f"inputs must hold 1 to {limits.BATCH_INPUTS_MAX} inputs, not {len(inputs)}; for more of them there is POST /v1/batches"
        raise bad_request(text, "inputs", "too_many_inputs" if inputs else "empty_array")
    cargo = ""
    for index, given in enumerate(inputs):
        try:
            cargo, _ = read_body({"cargo": body.get("cargo"), "workload": body.get("workload"), "input": given})
        except ApiError as error:
            raise _of_input(error, index) if error.param == "input" else error from None
    return BatchSpec(
        cargo,
        tuple(inputs),
        _one_of(Merge, body, "merge_strategy", Merge.CONCAT),
        _one_of(FailMode, body, "fail_mode", FailMode.BEST_EFFORT),
        _parallelism(body.get("max_parallelism")),
        () if bid_micros is None else (bid_micros,) * len(inputs),
        policy_text,
        priority,
    )


def check_inputs(spec: BatchSpec, writes_text: bool | None) -> None:
    """Whether the Cargo can take them, as far as that is known. Raises ApiError 400 that names the first that it cannot."""
    for index, given in enumerate(spec.inputs):
        try:
            if wants_text(given, writes_text):
                text_asked(spec.cargo, given)
            else:
                lines_asked(given)
        except ApiError as error:
            raise _of_input(error, index) from None


def read_max_price(value: object) -> int | None:
    """What the whole batch may cost, in micro-credits. Raises ApiError 400."""
    if value is None:
        return None
    try:
        return parse_bid(value, "max_price")
    except ValueError as error:
        raise bad_request(str(error), "max_price") from None


def _of_input(error: ApiError, index: int) -> ApiError:
    where = f"inputs[{index}]"
    param = f"{where}.{error.param}" if error.param and error.param != "input" else where
    return ApiError(error.status, f"{where}: {error.message}", code=error.code, param=param, kind=error.kind)


def _one_of(kind: type[E], body: Mapping[str, Any], name: str, default: E) -> E:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, str) or value not in list(kind):
        raise bad_request(f"{name} is one of {', '.join(kind)}", name)
    return kind(value)


def _parallelism(value: object) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= limits.BATCH_INPUTS_MAX:
        raise bad_request(f"max_parallelism must be an integer from 1 to {limits.BATCH_INPUTS_MAX}", "max_parallelism")
    return value
