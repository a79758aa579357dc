"""How the guards read a question: a row of words in one spelling and one order, with what was quoted and what may be a name beside it.

Two questions that are to share an answer must come down to the same row. So everything that may be said in another way is settled here,
once for each text: "In Python, how can I sort a list?" and "how to sort a list in Python" both read ``howto sort list in python``. A rule
may change a row only so that no two rows of different meaning become one; where English leaves a doubt the row stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coordinator.cache import guard_words as words
from coordinator.cache.guard_order import arranged
from coordinator.cache.normal import (
    QUESTION_CHARS_MAX,
    SYNONYMS,
    Parts,
    folded_word,
    in_digits,
    is_shouted,
    parts,
    spelt,
    starts_sentence,
)
from coordinator.cache.normal_words import CAPITONYMS

_TOKEN = re.compile(
    r"(?P<link>https?://[^\s<>\"]*[^\s<>\".,?!;:)\]])|(?P<mail>[\w.+-]+@[\w-]+(?:\.[\w-]+)+)|"
    r"(?P<path>(?:~|[A-Za-z]:)?[\\/](?=\w)[\w.\\/-]*\w|\w[\w-]*(?:[\\/][\w.-]*\w)+)|"
    r"(?P<lang>\b[A-Za-z](?:\+\+|\#)(?!\w)|(?<!\w)\.[A-Z]{2,}\b)|(?P<dotted>\w+(?:\.\w+)+|(?<!\w)\.\w{2,5}\b)|(?P<snake>\w*[^\W_]_\w+|_+\w+)|"
    r"(?P<number>(?<![\w)])-\d+(?=\s|$)|\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:st|nd|rd|th)\b|\d+)|"
    r"(?P<word>[^\W\d_][^\W_]*(?:'[^\W\d_]+)*)|(?P<sign>\S)"
)
_SHORT_MIXED_LETTERS_MAX = 3  # pH, kW, mW, Mb
_FINAL = re.compile(r"(?<=[^\W\d_])[.?!]+$|(?<=[\d\W_])[.?]$")  # "5!?" keeps its mark, and so does "the operator ??" one of them
_PARTICIPLE = re.compile(
    r"[a-z]{2,}(?:ed|en|wn)|been|gone|got|done|made|had|said|left|lost|found|sold|built|sent|kept|won|put|cut|hit|run|become|come"
)
_SUBJECTS = frozenset("i you he she it we they this that".split())
_ALIKE: Mapping[str, str] = {"an": "a", "whom": "who"}
# Written after a number.
_UNITS: Mapping[str, str] = {
    **{"km": "kilometers", "kms": "kilometers", "cm": "centimeters", "kg": "kilograms", "kgs": "kilograms", "mm": "millimeters"},
    **{"mi": "miles", "ft": "feet", "hr": "hours", "hrs": "hours", "min": "minutes", "mins": "minutes"},
    **{"sec": "seconds", "secs": "seconds", "lbs": "lb", "yr": "years", "yrs": "years", "percent": "%"},
}
_NUMBER = re.compile(r"-?\d[\d.]*$")


@dataclass(frozen=True, slots=True)
class Reading:
    """``row``: the words in their settled order; ``plain``: words and signs as they stand, in small letters. ``names``: words of the row
    with a capital in the middle of a sentence; ``mixed``: how words with capitals inside were written. ``is_long``: too long to be read;
    ``plain`` is the text."""

    language: str
    is_literal: bool
    row: tuple[str, ...]
    plain: tuple[str, ...]
    spans: tuple[str, ...]
    names: frozenset[str]
    mixed: Mapping[str, str]
    is_long: bool = False
    asks_indirectly: bool = False


def read(text: str) -> Reading:
    """Some 200 µs for a question of a dozen words."""
    if len(text) > QUESTION_CHARS_MAX:
        return Reading("", True, (), (text,), (), frozenset(), {}, True)
    found = parts(text)
    shouts = is_shouted(found.bare)
    plain, names, mixed = _split(found.bare if ":" in found.bare else _ended(found.bare), shouts)
    if found.is_literal:
        return Reading(found.language, True, plain, plain, found.spans, names, mixed)
    return Reading(found.language, False, _row(found, shouts), plain, found.spans, names, mixed, asks_indirectly=found.asks_indirectly)


def _ended(text: str) -> str:
    """The text without the mark that ends it; every other sign stays, for it may be what is asked about."""
    return _FINAL.sub("", text.rstrip(" ,")).rstrip(" ,")


def _split(text: str, shouts: bool) -> tuple[tuple[str, ...], frozenset[str], dict[str, str]]:
    """Words as they stand, with all signs, names, and words of mixed case."""
    row: list[str] = []
    names: set[str] = set()
    mixed: dict[str, str] = {}
    for match in _TOKEN.finditer(text):
        raw = match[0]
        is_first = starts_sentence(text, match.start())
        word = raw if match.lastgroup in ("link", "mail", "path", "dotted", "snake") else _cased(raw, is_first, shouts)
        row.append(word.replace(",", "") if match.lastgroup == "number" else word)
        if raw[:1].isupper() and not shouts and not is_first:
            names.add(raw.lower().removesuffix("'s"))
        if raw[1:] != raw[1:].lower() and raw != raw.upper():
            mixed[raw.lower()] = raw
    return tuple(row), frozenset(names), mixed


def _cased(raw: str, is_first: bool, shouts: bool) -> str:
    small = raw.lower()
    if raw == small or shouts:
        return small
    if raw.endswith("'s"):
        return _cased(raw[:-2], is_first, shouts) + "'s"
    folded = folded_word(raw, is_first, shouts)
    if folded == small:
        return small
    if len(raw) == 1 or (len(raw) <= _SHORT_MIXED_LETTERS_MAX and raw != raw.upper()) or folded.lower() in CAPITONYMS:
        return raw
    return raw if raw == raw.upper() and small in words.CAPITALS else small


def _row(found: Parts, shouts: bool) -> tuple[str, ...]:
    """The words in one spelling and order."""
    tokens, names, _ = _split(in_digits(_joined(_ended(found.bare))), shouts)
    said: list[str] = []
    for place, token in enumerate(tokens):
        said += _expanded(token, names, tokens[place + 1 :])
    row = arranged(" ".join(_with_units(said)), found.asks_indirectly).split()
    return tuple(settled(word) for word in row)


_COMPOUNDS = re.compile(r"\b(?:e-mails?|wi-fi|log-in|sign-up|set-up|back-up|on-line|off-line|web site|smart phone)\b", re.IGNORECASE)


def _joined(text: str) -> str:
    return _COMPOUNDS.sub(lambda match: re.sub(r"[ -]", "", match[0]), text)


def _expanded(token: str, names: frozenset[str], after: Sequence[str]) -> list[str]:
    """One word as the words that it stands for: contractions, possessives, misspellings. A name is never respelt, and an 's that may be
    "has" stays."""
    if token.lower() in names and "'" not in token:
        return [token]
    better = spelt(token)
    if better != token:
        is_subject_next = bool(after) and after[0] in _SUBJECTS
        may_have = better.endswith(" is") and (is_subject_next or any(_PARTICIPLE.fullmatch(word) for word in after))
        return [token.replace("'", "")] if may_have else better.split()
    head, mark, tail = token.partition("'")
    return [head, "'s"] if mark and tail == "s" else [token]


def _with_units(said: list[str]) -> list[str]:
    """Units after a number in full, and a currency's sign behind its number."""
    row: list[str] = []
    for word in said:
        row.append(_UNITS.get(word, word) if row and _NUMBER.match(row[-1]) else word)
        if len(row) > 1 and row[-2] in ("$", "€") and _NUMBER.match(row[-1]):
            row[-2:] = [row[-1], "dollar" if row[-2] == "$" else "euro"]
    return row


def settled(word: str) -> str:
    """A word of the row for those that are used for it."""
    word = _ALIKE.get(word, word)
    return SYNONYMS.get(word, word)
