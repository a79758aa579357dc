"""Batches as JSON and as server-sent events. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from coordinator.batches.board import BatchView, Change, Outputs
from coordinator.batches.progress import Item, ItemState
from coordinator.batches.spec import Merge
from coordinator.books.jobs import Job
from coordinator.books.runs import Run, RunState
from coordinator.http.answers import to_json
from coordinator.http.job_events import output_json
from coordinator.job_board import said_in
from coordinator.statement import time_text
from protocol.prices import format_credits

KIND = "batch"


def batch_json(view: BatchView) -> dict[str, Any]:
    """A batch as its account sees it; without outputs, which have an address of their own."""
    counts = view.progress.counts
    return {
        **run_json(view.run),
        "batch": {
            "chunk_count": len(view.progress),
            "merge_strategy": view.merge,
            "fail_mode": view.fail_mode,
            "completed": counts[ItemState.SUCCEEDED],
            "failed": counts[ItemState.FAILED],
            "cancelled": counts[ItemState.CANCELLED],
        },
        "price": price_text(view),
        "children": children_json(view),
    }


def run_json(run: Run) -> dict[str, Any]:
    """What stands of a batch in a list."""
    return {
        "id": run.id,
        "object": "job",
        "kind": KIND,
        "cargo": run.name,
        "state": run.state.value,
        "chunk_count": run.total,
        "error": {"code": run.error_code, "message": run.error_message} if run.error_code else None,
        "created_at": _time(run.created_at_ms),
        "completed_at": _time(run.finished_at_ms),
        "output_until": _time(run.expires_at_ms),
    }


def status_json(view: BatchView) -> dict[str, Any]:
    return {
        "parent_id": view.run.id,
        "parent_state": view.run.state.value,
        "chunk_count": len(view.progress),
        "merge_strategy": view.merge,
        "fail_mode": view.fail_mode,
        "child_states": states_json(view),
        "stragglers": view.progress.stragglers,
        "children": children_json(view),
    }


def states_json(view: BatchView) -> dict[str, int]:
    return {state.value: view.progress.counts[state] for state in ItemState if view.progress.counts[state]}


def children_json(view: BatchView) -> list[dict[str, Any]]:
    return [child_json(index, item) for index, item in enumerate(view.progress)]


def child_json(index: int, item: Item) -> dict[str, Any]:
    return {
        "id": item.job_id or None,
        "batch_index": index,
        "state": item.state.value,
        "error": {"code": item.error_code, "message": item.error_message} if item.error_code else None,
        "host_id": item.island or None,
        "island": item.island or None,
        "price": format_credits(item.price_micros) if item.ended else None,
        "started_at": _time(item.started_ms),
        "completed_at": _time(item.ended_ms),
    }


def price_text(view: BatchView) -> str:
    """Of the inputs that have succeeded; nothing else of a batch costs anything."""
    return format_credits(sum(item.price_micros for item in view.progress))


def outputs_json(outputs: Outputs) -> dict[str, Any]:
    """One output for each input in order, null where there is none, and all of them together."""
    view, jobs = outputs.view, {job.id: job for job in outputs.jobs}
    each = [
        output_json(said_in(events), _usage([jobs[item.job_id]])) if events is not None and item.job_id in jobs else None
        for item, events in zip(view.progress, outputs.events, strict=True)
    ]
    errors = [
        {"batch_index": index, "code": item.error_code, "message": item.error_message}
        for index, item in enumerate(view.progress)
        if item.error_code
    ]
    return {
        "job_id": view.run.id,
        "state": view.run.state.value,
        "outputs": each,
        "merged": merged([output for output in each if output is not None], view.merge or Merge.CONCAT),
        "errors": errors,
        "completed": view.run.ended,
        "usage": _usage(outputs.jobs),
        "price": price_text(view),
    }


def merged(outputs: Iterable[dict[str, Any]], strategy: Merge) -> str | list[Any]:
    """Outputs joined in the order of their inputs. ``concat``: texts become one text, a line each; anything else a list with one entry for
    each. ``flatten``: a list, in which an output that is a list itself counts by its entries."""
    pieces = [_piece(output) for output in outputs]
    if strategy is Merge.FLATTEN:
        return [entry for piece in pieces for entry in (piece if isinstance(piece, list) else [piece])]
    return "\n".join(pieces) if all(isinstance(piece, str) for piece in pieces) else pieces


def _piece(output: dict[str, Any]) -> Any:
    """What an output says: its images, else its result (what stands alone in it, if something does), else its text."""
    if "images" in output:
        return output["images"]
    result = output.get("result")
    if not result:
        return output["text"]
    return next(iter(result.values())) if len(result) == 1 else result


def _usage(jobs: Sequence[Job]) -> dict[str, Any]:
    prompt, completion = sum(job.prompt_tokens for job in jobs), sum(job.completion_tokens for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "compute_ms": sum(job.compute_ms for job in jobs),
        "credits_used": format_credits(sum(job.price_micros for job in jobs)),
    }


def sse(change: Change, is_first: bool) -> bytes:
    """The batch's state at first; each child that has changed, how far it is, and its end."""
    view = change.view
    events = [_event("state", state=view.run.state.value, **_counts(view))] if is_first else []
    events += [_event("child", **child_json(index, item)) for index, item in change.items]
    if change.items and not is_first:
        events.append(_event("progress", step=view.progress.ended, total=len(view.progress), child_states=states_json(view)))
    if view.run.state is RunState.FAILED:
        error = {"code": view.run.error_code, "message": view.run.error_message}
        events.append(_event("error", state=view.run.state.value, **_counts(view), error=error))
    elif view.run.ended:
        events.append(_event("complete", state=view.run.state.value, **_counts(view), price=price_text(view)))
    return b"".join(events)


def _counts(view: BatchView) -> dict[str, Any]:
    return {"chunk_count": len(view.progress), "child_states": states_json(view)}


def _event(name: str, **fields: object) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), to_json({"type": name, **fields}))


def _time(unix_ms: int) -> str | None:
    return time_text(unix_ms) if unix_ms else None
