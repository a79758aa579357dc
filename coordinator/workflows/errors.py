"""What is wrong with a workflow, and where."""

from __future__ import annotations

from protocol.errors import ArchipelagError

_WHERE_CHARS_MAX = 200


class FlowError(ArchipelagError):
    """A definition, a template or a value that a step gets is wrong. ``where`` names the field, such as ``steps[2].depends_on[0]``; the
    message quotes names and rules, never what was computed. ``is_transient``: the same could go well another time."""

    def __init__(self, where: str, message: str, is_transient: bool = False) -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.where, self.message, self.is_transient = where[:_WHERE_CHARS_MAX], message, is_transient

    def __repr__(self) -> str:
        return f"<FlowError {self}>"

    def at(self, where: str) -> FlowError:
        """The same, further out: ``where`` is put before what is known already."""
        between = "." if self.where and not self.where.startswith("[") else ""
        return FlowError(f"{where}{between}{self.where}", self.message, self.is_transient)
