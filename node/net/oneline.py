"""Errors as they stand in logs: one line each, whatever a peer put into them."""

from __future__ import annotations

from collections.abc import Iterator

_CHARS_MAX = 200


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group, or the error itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def one_line(error: BaseException) -> str:
    """Class and text of the first error at the root of ``error``."""
    first = next(leaves(error))
    while first.__cause__ is not None:
        first = next(leaves(first.__cause__))
    text = " ".join(str(first)[:_CHARS_MAX].split())
    return f"{type(first).__name__}: {text}" if text else type(first).__name__
