"""Whether a kept question may stand in for the one that is asked: the guards before every semantic hit.

Vectors and shared words say that two questions are *about* the same; they are nearly blind for what turns a question round. So the guards
work the other way: both questions come down to a row of words and signs (``guard_reading``), and the rows must be one, word for word.
Only two things may differ: a slip of the pen that is no other word, and the third person of an indirect question's verb. Whatever else
stands in one question only is refused; the reason says which guard it was, for statistics and tests.

A false answer is worse than a miss: a wording that no rule explains is refused, however near it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from coordinator.cache import guard_antonyms as kinds
from coordinator.cache.guard_reading import Reading, read
from coordinator.cache.guard_words import CONFUSABLES, NOT_PLURALS
from coordinator.cache.normal import QUESTION_CHARS_MAX

__all__ = ["QUESTION_CHARS_MAX", "Reading", "Reason", "read", "same_word", "veto", "veto_of"]

_SWAP_LETTERS_MIN = 6
_DOUBLE_LETTERS_MIN = 7
_INFLECTED_LETTERS_MIN = 3
_DO_DROPPED = frozenset({"how", "why", "when", "where"})
_VERB_PLACE_MIN = 2  # behind the question word and a subject
_CONFUSABLE = frozenset(frozenset(pair.split("/")) for pair in CONFUSABLES)


class Reason(StrEnum):
    """Why a kept question may not stand in."""

    LENGTH = "length"
    LANGUAGE = "language"
    CODE = "code"
    QUOTE = "quote"
    NUMBER = "number"
    UNIT = "unit"
    DATE = "date"
    NEGATION = "negation"
    ANTONYM = "antonym"
    QUANTIFIER = "quantifier"
    MODALITY = "modality"
    QUESTION = "question"
    RELATION = "relation"
    PRONOUN = "pronoun"
    NAME = "name"
    ORDER = "order"
    UNEXPLAINED = "unexplained"


def veto(asked: str, kept: str) -> str:
    """Empty where the kept question may stand in for the asked one, else a ``Reason``. Deterministic; about 0.4 ms."""
    return veto_of(read(asked), read(kept))


def veto_of(asked: Reading, kept: Reading) -> str:
    """The same of two questions that were read already."""
    if asked.is_long or kept.is_long:
        return "" if asked.plain == kept.plain else Reason.LENGTH
    if asked.language != kept.language:
        return Reason.LANGUAGE
    if asked.spans != kept.spans:
        return Reason.CODE if any("`" in span or "~~~" in span for span in asked.spans + kept.spans) else Reason.QUOTE
    if any(asked.mixed[word] != kept.mixed[word] for word in asked.mixed.keys() & kept.mixed.keys()):
        return Reason.NAME
    if asked.is_literal or kept.is_literal:
        return "" if asked.plain == kept.plain else _why(asked.plain, kept.plain, frozenset(), asked.names | kept.names)
    names = asked.names | kept.names
    if _same_row(asked, kept, names):
        return ""
    return _why(asked.row, kept.row, names, names)


def _same_row(asked: Reading, kept: Reading, names: frozenset[str]) -> bool:
    """Word for word. After "how to" a participle is as good as the verb ("a way of sorting"), and "tell me how it works" has the third
    person where "how does it work" has none: the two places where the word is no noun."""
    if len(asked.row) != len(kept.row):
        return False
    both = list(zip(asked.row, kept.row, strict=True))
    differ = [place for place, (one, other) in enumerate(both) if not same_word(one, other, names)]
    if len(differ) != 1:
        return not differ
    (place,) = differ
    if place == 1 and asked.row[0] == "howto":
        return _is_participle(*both[place])
    if asked.asks_indirectly == kept.asks_indirectly or asked.row[0] not in _DO_DROPPED or place < _VERB_PLACE_MIN:
        return False
    told, put = both[place] if asked.asks_indirectly else both[place][::-1]
    return inflects(told, put)


def _is_participle(one: str, other: str) -> bool:
    base, longer = sorted((one, other), key=len)
    return longer.endswith("ing") and longer[:-3] in (base, base + base[-1], base.removesuffix("e"))


# -- words


def same_word(one: str, other: str, names: frozenset[str] = frozenset()) -> bool:
    """Whether two words may stand for one another: equal, or a slip of the pen; opposites never. Of ``names`` no letter may differ."""
    if one == other:
        return True
    if frozenset((one, other)) in kinds.OPPOSITES or not (one.isalpha() and other.isalpha()):
        return False
    return one not in names and other not in names and is_slip(one, other)


def inflects(longer: str, base: str) -> bool:
    """Whether ``longer`` is a plural or a third person of ``base``. Not a participle: training is no train."""
    if len(base) < _INFLECTED_LETTERS_MIN or longer in NOT_PLURALS:
        return False
    if longer.endswith("s"):
        if base.endswith(("s", "x", "z", "ch", "sh", "o")) and longer == base + "es":
            return True
        return longer == (base[:-1] + "ies" if base[-1] == "y" and base[-2] not in "aeiou" else base + "s") and not base.endswith("s")
    return False


def is_slip(one: str, other: str) -> bool:
    """Whether the words differ by two inner letters in each other's place, or by an inner consonant that is double in one of them, and are
    not two real words. A changed letter is no slip here: sulfate and sulfite."""
    if one[0] != other[0] or one[-1] != other[-1] or frozenset((one, other)) in _CONFUSABLE:
        return False
    if len(one) == len(other):
        if len(one) < _SWAP_LETTERS_MIN:
            return False
        places = [place for place in range(len(one)) if one[place] != other[place]]
        return len(places) == 2 and places[1] == places[0] + 1 and one[places[0]] == other[places[1]] and one[places[1]] == other[places[0]]
    short, long = sorted((one, other), key=len)
    if len(long) != len(short) + 1 or len(short) < _DOUBLE_LETTERS_MIN:
        return False
    at = next((place for place in range(len(short)) if short[place] != long[place]), len(short))
    is_double = at > 0 and long[at] == long[at - 1] and long[at] not in "aeiou"
    return is_double and at < len(short) - 1 and long[:at] + long[at + 1 :] == short


# -- reasons


def _why(asked: Sequence[str], kept: Sequence[str], loose: frozenset[str], names: frozenset[str]) -> Reason:
    """Which guard refuses two rows that are not one."""
    left, right = _unmatched(asked, kept, loose), _unmatched(kept, asked, loose)
    if not left and not right:
        return Reason.ORDER
    rest = left + right
    if any(sign.isdigit() for word in rest for sign in word):
        return Reason.NUMBER
    if any(frozenset((one, other)) in kinds.OPPOSITES for one in left for other in right):
        return Reason.ANTONYM
    if _is_negated(left, right):
        return Reason.NEGATION
    for reason, listed in _LISTS:
        if any(_is_in(word, listed) for word in rest):
            return reason
    return Reason.NAME if any(word.lower() in names for word in rest) else Reason.UNEXPLAINED


_LISTS = (
    (Reason.UNIT, kinds.UNITS),
    (Reason.DATE, kinds.DATES),
    (Reason.LANGUAGE, kinds.LANGUAGES),
    (Reason.QUESTION, kinds.QUESTIONS),
    (Reason.QUANTIFIER, kinds.QUANTIFIERS),
    (Reason.MODALITY, kinds.MODALS),
    (Reason.PRONOUN, kinds.PRONOUNS),
    (Reason.RELATION, kinds.RELATIONS),
)


def _is_form(one: str, other: str, names: frozenset[str]) -> bool:
    return same_word(one, other, names) or (not {one, other} & names and (inflects(one, other) or inflects(other, one)))


def _is_in(word: str, listed: frozenset[str]) -> bool:
    return word.lower() in listed or word.lower().removesuffix("s") in listed


def _unmatched(these: Sequence[str], those: Sequence[str], names: frozenset[str]) -> list[str]:
    """Words of the first row that have no fellow in the second."""
    free = list(those)
    lonely: list[str] = []
    for word in these:
        fellow = word if word in free else next((other for other in free if _is_form(word, other, names)), None)
        if fellow is None:
            lonely.append(word)
        else:
            free.remove(fellow)
    return lonely


def _is_negated(left: Sequence[str], right: Sequence[str]) -> bool:
    if any(word in kinds.NEGATIONS for word in (*left, *right)):
        return True
    both = ((one, other) for these, those in ((left, right), (right, left)) for one in these for other in those)
    return any(longer == prefix + shorter for longer, shorter in both for prefix in kinds.NEGATIVE_PREFIXES)
