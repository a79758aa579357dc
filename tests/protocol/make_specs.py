"""Fills in the parts of specs/*.md that the code decides: ``python -m tests.protocol.make_specs``.

A page says ``<!-- schema: JobOpen JobCancel -->``, ``<!-- transitions -->`` or ``<!-- codes -->``; what follows, up to an empty line or the
end of the fence, is written from the code. A test says when a page and the code differ.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

from protocol import (
    ads,
    blobs,
    book,
    cargo_news,
    cargo_promotions,
    cargos,
    counts,
    direct,
    envelope,
    errors,
    generation,
    hold,
    messages,
    prices,
    receipts,
    shards,
    stage_messages,
    tickets,
)
from protocol.jobs import SENT_BY, TRANSITIONS, JobState

FOLDER = Path(__file__).parents[2] / "specs"
_MODULES = (
    ads,
    blobs,
    book,
    cargo_news,
    cargo_promotions,
    cargos,
    counts,
    direct,
    envelope,
    generation,
    hold,
    messages,
    prices,
    receipts,
    shards,
    stage_messages,
    tickets,
)
REGISTRIES = (messages.JOB, messages.ADS, stage_messages.STAGE, hold.HOLD, direct.SETTLE, direct.DESK, blobs.BLOB, cargo_news.CARGOS)
_SCHEMA = re.compile(r"<!-- schema: ([\w ]+) -->\n```\n.*?```\n", re.DOTALL)
_TRANSITIONS = re.compile(r"<!-- transitions -->\n(?:\|.*\n)*")
_CODES = re.compile(r"<!-- codes -->\n(?:\|.*\n)*")

# When an Island gives this code; the table's other columns come from the code.
CODE_MEANINGS: dict[errors.Code, str] = {
    errors.Code.BAD_INPUT: "the input is no valid request for this Cargo: a schema that is none, a prompt that the template refuses",
    errors.Code.NO_TOOLS: "the request brings tools, and the model's chat template has no place for them or writes calls in an unknown way",
    errors.Code.BAD_TICKET: "the ticket is missing, forged, expired, used, or for somebody or something else",
    errors.Code.UNKNOWN_CARGO: "the Cargo of the ticket is not loaded here, or has another content hash",
    errors.Code.CONTEXT_LENGTH: "prompt and answer together do not fit into the model's context",
    errors.Code.NO_CAPACITY: "no slot, no KV room, or too many jobs at the moment",
    errors.Code.NO_ISLAND: "said by a Coordinator to its client, never by an Island",
    errors.Code.DRAINING: "the Island is about to stop and takes no new jobs",
    errors.Code.CANCELLED: "the holder cancelled it",
    errors.Code.WORKER_DIED: "the worker process ended while it had the job; counts against WORKERS_ENDED_PER_JOB_MAX",
    errors.Code.LINK_LOST: "said by the holder to itself when the connection ended before JobDone or JobFailed",
    errors.Code.LEASE_LOST: "said by the holder to itself when the Island has said nothing of the job for LEASE_S",
    errors.Code.UNSIGNED: "the holder has not signed for what it got, and no more leaves without",
    errors.Code.TIMEOUT: "the job took longer than it may",
    errors.Code.CARGO_FAILED: "the Cargo itself is at fault: what it said, or that what it wrote is no line",
    errors.Code.INTERNAL: "a bug on the Island; its log knows more",
}


def class_named(name: str) -> type[Any]:
    for module in _MODULES:
        found = vars(module).get(name)
        if isinstance(found, type) and dataclasses.is_dataclass(found):
            return found
    raise LookupError(f"no message is called {name}")


def schema(names: str) -> str:
    return f"<!-- schema: {names} -->\n```\n" + "\n".join(map(_one_schema, names.split())) + "```\n"


def _one_schema(name: str) -> str:
    cls = class_named(name)
    numbers = [f"{r.name} {n}" for r in REGISTRIES for n, c in r.numbers().items() if c is cls]
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    width = max(len(field.name) for field in fields)
    lines = [f"{name}{' = ' + ', '.join(numbers) if numbers else ''}"]
    for field in fields:
        body = "  (body)" if field.metadata.get("body") else ""
        lines.append(f"    {field.name:{width}}  {_type(hints[field.name])}{body}")
    return "\n".join(lines) + "\n"


def _type(hint: Any) -> str:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        inner = [_type(a) for a in arguments if a is not Ellipsis]
        return f"[{inner[0]}, …]" if Ellipsis in arguments else f"[{', '.join(inner)}]"
    return str(hint.__name__)


def transitions() -> str:
    lines = ["<!-- transitions -->", "| state | message | said by | next state |", "|---|---|---|---|"]
    for state in JobState:
        for (before, kind), after in TRANSITIONS.items():
            if before is state:
                lines.append(f"| {state.name} | {kind.__name__} | {SENT_BY[kind].name.lower()} | {after.name} |")
    return "\n".join(lines) + "\n"


def codes() -> str:
    lines = ["<!-- codes -->", "| code | another Island may be asked | when |", "|---|---|---|"]
    for code in errors.Code:
        retryable = "yes" if code in errors.RETRYABLE else "no"
        lines.append(f"| `{code}` | {retryable} | {CODE_MEANINGS[code]} |")
    return "\n".join(lines) + "\n"


def filled_in(page: str) -> str:
    page = _SCHEMA.sub(lambda match: schema(match[1]), page)
    page = _TRANSITIONS.sub(lambda _: transitions(), page)
    return _CODES.sub(lambda _: codes(), page)


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.md")):
        page = path.read_text()
        if filled_in(page) != page:
            path.write_text(filled_in(page))
            print(f"filled in {path}")
