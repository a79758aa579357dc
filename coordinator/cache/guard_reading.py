"""How the guards read a question: a row of words in one spelling and one order, with what was quoted and what may be a name beside it.

Two questions that are to share an answer must come down to the same row. So everything that may be said in another way is settled here,
once for each text: "In Python, how can I sort a list?" and "how to sort a list in Python" both read ``howto sort list in python``. A rule
may change a row only so that no two rows of different meaning become one; where English leaves a doubt the row stays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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

_TOKEN = re.compile(
    r"(?P<link>https?://[^\s<>\"]*[^\s<>\".,?!;:)\]])|(?P<mail>[\w.+-]+@[\w-]+(?:\.[\w-]+)+)|"
    r"(?P<path>(?:~|[A-Za-z]:)?[\\/](?=\w)[\w.\\/-]*\w|\w[\w-]*(?:[\\/][\w.-]*\w)+)|"
    r"(?P<lang>\b[A-Za-z](?:\+\+|\#)(?!\w)|(?<!\w)\.[A-Z]{2,}\b)|(?P<dotted>\w+(?:\.\w+)+|(?<!\w)\.\w{2,5}\b)|(?P<snake>\w*[^\W_]_\w+|_+\w+)|"
    r"(?P<number>(?<![\w)])-\d+(?=\s|$)|\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:st|nd|rd|th)\b|\d+)|"
    r"(?P<word>[^\W\d_][^\W_]*(?:'[^\W\d_]+)*)|(?P<sign>\S)"
)
_NO_WORDS = frozenset(".?!;:'\"…¿¡“”‘’")
_SHORT_MIXED_LETTERS_MAX = 3  # pH, kW, mW, Mb
_MISSPELT_NAME_LETTERS_MIN = 5
_ARTICLES = frozenset({"a", "an", "the"})
_BEFORE_NO_NOUN = frozenset("for in on at to of with from by and or is are ,".split())
_ALIKE: Mapping[str, str] = {
    **{"are": "is", "am": "is", "were": "was", "does": "do", "has": "have", "these": "this", "those": "that", "whom": "who"},
    **{"km": "kilometer", "kms": "kilometer", "cm": "centimeter", "kg": "kilogram", "kgs": "kilogram"},
    **{"percent": "%", "&": "and", "$": "dollar", "€": "euro", "colour": "color"},
}
# Written after a number; those before may stand anywhere.
_UNITS: Mapping[str, str] = {
    **{"mm": "millimeter", "mi": "mile", "ft": "foot", "hr": "hour", "hrs": "hour", "min": "minute", "mins": "minute"},
    **{"sec": "second", "secs": "second", "lbs": "lb", "yr": "year", "yrs": "year"},
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


def read(text: str) -> Reading:
    """Some 200 µs for a question of a dozen words."""
    if len(text) > QUESTION_CHARS_MAX:
        return Reading("", True, (), (text,), (), frozenset(), {}, True)
    found = parts(text)
    shouts = is_shouted(found.bare)
    plain, names, mixed = _split(found.bare if ":" in found.bare else found.bare.rstrip(" .?!,"), shouts, all_signs=True)
    if found.is_literal:
        return Reading(found.language, True, plain, plain, found.spans, names, mixed)
    return Reading(found.language, False, _row(found, shouts), plain, found.spans, names, mixed)


def _split(text: str, shouts: bool, all_signs: bool = False) -> tuple[tuple[str, ...], frozenset[str], dict[str, str]]:
    """Words as they stand, with those signs that may mean something or all, names, and words of mixed case."""
    row: list[str] = []
    names: set[str] = set()
    mixed: dict[str, str] = {}
    for match in _TOKEN.finditer(text):
        raw = match[0]
        if not all_signs and not _counts(match, text):
            continue
        is_first = starts_sentence(text, match.start())
        word = raw if match.lastgroup in ("link", "mail", "path", "dotted", "snake") else _cased(raw, is_first, shouts)
        row.append(word.replace(",", "") if match.lastgroup == "number" else word)
        if raw[:1].isupper() and not shouts and not is_first:
            names.add(raw.lower().removesuffix("'s"))
        if raw[1:] != raw[1:].lower() and raw != raw.upper():
            mixed[raw.lower()] = raw
    return tuple(row), frozenset(names), mixed


def _counts(match: re.Match[str], text: str) -> bool:
    """Whether it is more than punctuation: a dash before a number is, and an exclamation mark behind one."""
    sign = match[0]
    if sign == "-":
        after, spaced = text[match.end() :].lstrip()[:1], text[match.start() - 1 : match.start()].isspace()
        return after.isdigit() or (spaced and text[match.end() : match.end() + 1].isspace())
    if sign == "!":
        return text[match.start() - 1 : match.start()].isdigit()
    return sign == "," or sign not in _NO_WORDS


def _cased(raw: str, is_first: bool, shouts: bool) -> str:
    small = raw.lower()
    if raw == small or shouts:
        return small
    if raw.endswith("'s"):
        return _cased(raw[:-2], is_first, shouts) + "'s"
    folded = folded_word(raw, is_first, shouts)
    if folded == small:
        return small
    if len(raw) == 1 or (len(raw) <= _SHORT_MIXED_LETTERS_MAX and raw != raw.upper()) or folded.lower() in words.CAPITONYMS:
        return raw
    return raw if raw == raw.upper() and small in words.CAPITALS else small


def _row(found: Parts, shouts: bool) -> tuple[str, ...]:
    """The words in one spelling and order."""
    tokens, names, _ = _split(in_digits(_joined(found.bare)), shouts)
    said: list[str] = []
    for token in tokens:
        said += _expanded(token, names)
    said = _without_articles(_with_units(said))
    row = arranged(" ".join(said), found.asks_indirectly).split()
    return tuple(settled(word) for word in row)


_COMPOUNDS = re.compile(r"\b(?:e-mails?|wi-fi|log-in|sign-up|set-up|back-up|on-line|off-line|web site|smart phone)\b", re.IGNORECASE)


def _joined(text: str) -> str:
    return _COMPOUNDS.sub(lambda match: re.sub(r"[ -]", "", match[0]), text)


def _expanded(token: str, names: frozenset[str]) -> list[str]:
    """One word as the words that it stands for: contractions, possessives, misspellings."""
    if token.lower() in names and "'" not in token:
        better = words.MISSPELLINGS.get(token, token) if len(token) >= _MISSPELT_NAME_LETTERS_MIN else token
        return [words.SPELLINGS.get(better, better)]
    better = spelt(token)
    if better != token:
        return better.split()
    head, mark, tail = token.partition("'")
    return [head, "'s"] if mark and tail == "s" else [token]


def _with_units(said: list[str]) -> list[str]:
    """Units after a number in full, and a currency's sign behind its number."""
    row: list[str] = []
    for word in said:
        row.append(_UNITS.get(word, word) if row and _NUMBER.match(row[-1]) else word)
        if len(row) > 1 and row[-2] in ("$", "€") and _NUMBER.match(row[-1]):
            row[-2:] = [row[-1], row[-2]]
    return row


def _without_articles(said: list[str]) -> list[str]:
    """An article goes where a noun can follow; "vitamin a for ..." keeps its letter."""
    row: list[str] = []
    for place, word in enumerate(said):
        after = said[place + 1] if place + 1 < len(said) else ","
        if word in _ARTICLES and after not in _BEFORE_NO_NOUN:
            if word == "a" and after in ("few", "little", "lot", "bit"):
                row.append("a_")
            continue
        row.append(word)
    return row


def settled(word: str) -> str:
    """A word of the row for those that are used for it."""
    word = _ALIKE.get(word, word)
    word = SYNONYMS.get(word, word)
    return words.IRREGULAR_PLURALS.get(word, word)
