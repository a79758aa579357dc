"""The manifest's options, read with their types: what is misspelt or out of range is a ConfigError at load, before any job."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from protocol.errors import ConfigError

LABELS_MAX = 100_000
LABEL_CHARS_MAX = 200
_LABEL_FILE_BYTES_MAX = 8 * 1024 * 1024


class OptionReader:
    """Hands out each option once. ``finish`` refuses what nobody asked for."""

    def __init__(self, options: Mapping[str, Any], files: Mapping[str, str]) -> None:
        self._options = options
        self._files = files
        self._asked: set[str] = set()

    def __repr__(self) -> str:
        return f"<OptionReader {len(self._asked)} of {len(self._options)} options read>"

    def has(self, name: str) -> bool:
        return self._options.get(name) is not None

    def _take(self, name: str) -> Any:
        self._asked.add(name)
        return self._options.get(name)

    def text(self, name: str, default: str = "") -> str:
        value = self._take(name)
        if value is None:
            return default
        if not isinstance(value, str) or not value or len(value) > LABEL_CHARS_MAX:
            raise ConfigError(f"option {name} must be a text of at most {LABEL_CHARS_MAX} characters")
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """The first is the default."""
        value = self._take(name)
        if value is None:
            return choices[0]
        if value not in choices:
            raise ConfigError(f"option {name} must be one of {', '.join(choices)}")
        return str(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"option {name} must be true or false")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self._take(name)
        if value is None:
            return default
        if not _is_number(value) or not low <= value <= high:
            raise ConfigError(f"option {name} must be a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        value = self._take(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise ConfigError(f"option {name} must be a whole number from {low} to {high}")
        return value

    def numbers(self, name: str, default: tuple[float, ...], length: int) -> tuple[float, ...]:
        value = self._take(name)
        if value is None:
            return default
        if not isinstance(value, list) or len(value) != length or not all(map(_is_number, value)):
            raise ConfigError(f"option {name} must be a list of {length} numbers")
        return tuple(float(each) for each in value)

    def file(self, name: str, default: str) -> str:
        """The place of the file whose path in the manifest the option names."""
        path = self.text(name, default)
        if path not in self._files:
            raise ConfigError(f"option {name} names {path}, which is none of the Cargo's files")
        return self._files[path]

    def labels(self, metadata: Mapping[str, str], default_key: str = "") -> tuple[str, ...]:
        """``labels``, ``labels_file`` or ``labels_metadata``; () where none of them is given. Order is the model's."""
        named = [name for name in ("labels", "labels_file", "labels_metadata") if self._take(name) is not None]
        if len(named) > 1:
            raise ConfigError(f"options {' and '.join(named)} say the same; keep one")
        if named == ["labels"]:
            return _checked_labels("labels", self._options["labels"])
        if named == ["labels_file"]:
            return _labels_of_file(self.file("labels_file", ""))
        key = self.text("labels_metadata", default_key)
        if key and key not in metadata and named:
            raise ConfigError(f"option labels_metadata names {key}, which the model's metadata does not have")
        return _lines(metadata[key]) if key in metadata else ()

    def finish(self) -> None:
        """Raises ConfigError for an option that this task does not have."""
        if unknown := sorted(set(self._options) - self._asked):
            raise ConfigError(f"option {unknown[0][:80]!r} is not known to this task; it has {', '.join(sorted(self._asked))}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checked_labels(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not 1 <= len(value) <= LABELS_MAX or not all(isinstance(each, str) for each in value):
        raise ConfigError(f"option {name} must be a list of 1 to {LABELS_MAX} texts")
    return tuple(value)


def _lines(text: str) -> tuple[str, ...]:
    """One label a line. ``splitlines`` would also split at characters that are labels of OCR models, such as U+2028."""
    lines = text.replace("\r\n", "\n").split("\n")
    return tuple(lines[:-1] if lines and not lines[-1] else lines)


def _labels_of_file(place: str) -> tuple[str, ...]:
    """A JSON list, a JSON object with ``id2label`` (as in Hugging Face's config.json), or one label a line."""
    try:
        with open(place, "rb") as file:
            data = file.read(_LABEL_FILE_BYTES_MAX + 1)
        if len(data) > _LABEL_FILE_BYTES_MAX:
            raise ConfigError(f"option labels_file names a file over {_LABEL_FILE_BYTES_MAX} bytes")
        text = data.decode()
        if not text.lstrip().startswith(("[", "{")):
            return _lines(text)
        value = json.loads(text)
    except OSError as error:
        raise ConfigError(f"the file of labels cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise ConfigError("option labels_file names a file that is neither JSON nor lines of UTF-8") from None
    if isinstance(value, dict):
        named = value.get("id2label")
        if not isinstance(named, dict) or set(named) != {str(index) for index in range(len(named))}:
            raise ConfigError("option labels_file names a JSON object without id2label for 0, 1, …")
        value = [named[str(index)] for index in range(len(named))]
    return _checked_labels("labels_file", value)
