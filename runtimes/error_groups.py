"""Errors out of a nursery that is nobody's business but ours."""

from __future__ import annotations


def only_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error in a group of one, however deep; a group of several stays one."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
