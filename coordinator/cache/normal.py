"""A question as the cache reads it: for the exact key, for the semantic step, and for the index of words.

``normalise`` makes equal what is written carelessly, and nothing that could be meant differently: the exact key is made of it, so two texts
that are equal afterwards get one answer without any further look. ``core`` takes off what is said to be polite or by habit; it is what is
embedded, and what the guards read. ``content_words`` are the stems by which candidates are found. All three are pure and know English; of
other languages only white space, case and punctuation are touched.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

from coordinator.cache import guard_words as words
from coordinator.cache import normal_words as keys
from coordinator.cache.guard_filler import Stripped, inner_filler_off, outer_filler_off

_FENCE = r"```.*?```|~~~.*?~~~"
_SPANS = re.compile(rf"{_FENCE}|`[^`\n]+`|\"[^\"]+\"|«[^«»]+»|„[^„“”]+[“”]|“[^“”]+”|‘[^‘’]+’(?!\w)|(?<!\w)'[^'\n]+'(?!\w)", re.DOTALL)
# A line of a program, a list, a table or a quotation; where it breaks matters.
_SHAPED_LINE = re.compile(
    r"^(?:[ \t]+\S|\s*(?:[-*+•|#>$]|\d+[.)])\s?\S|.*[;{}]\s*$|\s*(?:def|class|import|from|SELECT|for|if|return)\b.*[:(,;]\s*$)"
)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"[.?!:;]['\")\]]*\s*$")
# What a question brings with it: from a line break on, or from a colon that is not of a time.
_PAYLOAD = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]|(?<!\d)[:\uff1a]|[:\uff1a](?!\d)")
_JOINS = frozenset(r"0123456789_@/\#$=<>.")  # before a word: part of a name, a path, a program
_JOINED = re.compile(r"[\d_@/\\#$=<>(\[]|\.\w")  # behind it
_PLACE_FIRST = 0xE100  # private use: stands for a span while the words round it are read
_SPANS_MAX = 200
QUESTION_CHARS_MAX = 2_000  # a longer one carries a text of its own, and the model that embeds it reads its beginning only
_LOOK_BACK_CHARS = 8
_FOREIGN_WORDS_MIN = 2  # of the commonest words of a language, in a text of plain Latin letters
_CAPS_WORDS_MIN = 3  # fewer words, all capital: an acronym rather than a raised voice


@dataclass(frozen=True, slots=True)
class Parts:
    """``bare``: the text without politeness, one character for each of ``spans`` (code and quotations as written). ``language``: of
    ISO 639-1, or a script's name. ``is_literal``: nothing but case and space may differ, as the text is about words, holds a payload, or
    is not English. ``asks_indirectly``: what was taken off asked for it ("tell me what the time is")."""

    bare: str
    spans: tuple[str, ...]
    language: str
    is_literal: bool
    asks_indirectly: bool


def normalise(text: str) -> str:
    """The text of the exact key: NFC, white space collapsed, small letters, but for what may carry meaning: a text about letters and one
    whose lines have a shape stay as they are, so does all from a line break or a colon on, code and quotations; words of mixed case,
    all-capital words in a text that is not, single capitals and words that mean something else with a capital keep theirs."""
    if is_shaped(text) or is_about_letters(text):
        return text
    text = text.lstrip()
    head, tail = _parted(text)
    head = unicodedata.normalize("NFC", head if tail else head.rstrip())
    shouts = is_shouted(head)
    pieces: list[str] = []
    end = 0
    for match in _SPANS.finditer(head):
        pieces += [_folded(head[end : match.start()], _last_sign(head, end), shouts), match[0]]
        end = match.end()
    pieces.append(_folded(head[end:], _last_sign(head, end), shouts))
    return unicodedata.normalize("NFC", "".join(pieces)) + tail


def is_exact(text: str) -> bool:
    """Whether letters or spaces of it may count, so that no other wording may stand in for it."""
    return is_shaped(text) or is_about_letters(text) or _parted(text.lstrip())[1] != ""


def is_about_letters(text: str) -> bool:
    """Whether it may be about how a text is written: encoding, spelling, counting of letters, and the like."""
    if keys.LETTER_WORDS.search(text):
        return True
    return keys.PASSWORD.search(text) is not None and keys.OWN_PASSWORD.search(text) is None


def _parted(text: str) -> tuple[str, str]:
    """The question, and what it brings with it: all from the first line break or colon on that something follows, or from the beginning of
    the quotation in which that stands."""
    found = _PAYLOAD.search(text)
    if found is None or not text[found.end() :].strip():
        return text, ""
    at = found.start()
    around = next((span.start() for span in _SPANS.finditer(text) if span.end() > at), at)
    return text[: min(at, around)], text[min(at, around) :]


def _last_sign(text: str, at: int) -> str:
    """The quotation mark that ends there: what follows begins no sentence."""
    return text[at - 1 : at]


def is_shaped(text: str) -> bool:
    """Whether line breaks or indents seem to mean something."""
    lines = text.splitlines()
    return len(lines) > 1 and any(_SHAPED_LINE.match(line) for line in lines)


def is_shouted(text: str) -> bool:
    """All in capitals, long enough to be read as a habit rather than an acronym, and without words that may be acronyms or names."""
    if text != text.upper():
        return False
    said = [match.lower() for match in _WORD.findall(text)]
    return len(said) >= _CAPS_WORDS_MIN and not any(word in keys.ACRONYM_WORDS or _may_be_name(word) for word in said)


def _folded(piece: str, before: str, shouts: bool) -> str:
    text = before + re.sub(r"\s+", " ", piece)

    def small(match: re.Match[str]) -> str:
        if text[match.start() - 1 : match.start()] in _JOINS or _JOINED.match(text, match.end()):
            return match[0]
        return folded_word(match[0], starts_sentence(text, match.start()), shouts)

    return _WORD.sub(small, text)[len(before) :]


def starts_sentence(text: str, at: int) -> bool:
    """Whether a word at this place begins a sentence, as far as the signs before it tell."""
    before = text[max(0, at - _LOOK_BACK_CHARS) : at]
    return not before.strip() or _SENTENCE_END.search(before) is not None


_SHORT_WORDS = frozenset("am an as at be by do go he if in is it me my no of on or so to up us we".split())  # as in a title


def folded_word(word: str, is_first: bool, shouts: bool) -> str:
    """A word in small letters, unless its capitals may mean something. Not ``casefold``: that makes Masse of Maße."""
    small = word.lower()
    if shouts or word == small:
        return small
    if len(word) == 1:
        return small if is_first or word == "I" else word
    if len(word) == 2 and small not in _SHORT_WORDS and not is_first:  # units and symbols: Pa, Mb, Hz, Xi
        return word
    if word[1:] != word[1:].lower():  # USA, iPhone, getValue, McDonald
        return word
    return word if not is_first and _may_be_name(small) else small


def _may_be_name(small: str) -> bool:
    """Whether a word means something else with a capital; of several or of its own, too."""
    owner = small.replace("’", "'").removesuffix("'s").removesuffix("'")
    return owner in keys.CAPITONYMS or owner.removesuffix("s") in keys.CAPITONYMS


def parts(text: str) -> Parts:
    """What the text consists of, politeness taken off; never empty if the text is not. One that is too long is left as it is."""
    if len(text) > QUESTION_CHARS_MAX:
        return Parts(text, (), "", True, False)
    text = unicodedata.normalize("NFC", text).strip().replace("’", "'")
    spans: list[str] = []

    def place(match: re.Match[str]) -> str:
        spans.append(_plain_quotes(match[0]))
        return f" {chr(_PLACE_FIRST + len(spans) - 1)} " if match[0].startswith(("```", "~~~")) else chr(_PLACE_FIRST + len(spans) - 1)

    is_odd = is_shaped(text) or any(unicodedata.category(sign) in ("Co", "Cc") and sign not in "\n\t\r" for sign in text)
    if is_odd or len(_SPANS.findall(text)) > _SPANS_MAX:
        return Parts(text, (), language(text), True, False)
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"[^\S\n]+", " ", _SPANS.sub(place, text)))  # no pattern walks over long gaps
    tongue = language(text)
    stripped = outer_filler_off(text) if tongue == "en" else Stripped(text, False)
    lines = stripped.text.splitlines()
    is_literal = tongue != "en" or len(lines) > 1 or is_about_words(stripped.text)
    bare = stripped.text if is_literal else re.sub(r"\s+", " ", inner_filler_off(stripped.text))
    return Parts(bare.strip() or text, tuple(spans), tongue, is_literal, stripped.asks)


def _plain_quotes(span: str) -> str:
    """Quotation marks of one kind, as they differ by keyboard."""
    return f'"{span[1:-1]}"' if span[0] in "\"'«„“‘" else span


_ABOUT_WORDS = re.compile(
    r"\b(?:say|says|saying|words?|phrases?|spell|spelled|spelling|spelt|means?|meaning|pronounc\w+|defin(?:e|ition)|synonyms?|antonyms?|rhymes?|"
    r"translat\w+|rewrite|rephrase|paraphrase|proofread|grammar|grammatical\w*|sentence|lyrics|differences?|differ|versus|vs|compare|opposite|"
    r"abbreviation|acronym|stands? for)\b|:\s+\S+\s+\S",
    re.IGNORECASE,
)


def is_about_words(text: str) -> bool:
    """Whether it asks about a word or a wording, or has a payload after a colon: then "begin" and "start" are two things."""
    return _ABOUT_WORDS.search(text) is not None


_SCRIPTS = tuple("CYRILLIC GREEK ARABIC HEBREW DEVANAGARI HANGUL HIRAGANA KATAKANA CJK THAI BENGALI TAMIL ARMENIAN".split())


def language(text: str) -> str:
    """``en``, or another language by its commonest words, or a script's name; English where nothing speaks against it."""
    foreign = [sign for sign in text if sign > "\u024f" and sign.isalpha()]
    for script in _SCRIPTS if foreign else ():
        if any(unicodedata.name(sign, "").startswith(script) for sign in foreign[:50]):
            return script.lower()
    said = [word.lower() for word in _WORD.findall(text)]
    counts = {name: sum(word in common and word not in words.ENGLISH for word in said) for name, common in words.FOREIGN.items()}
    best = max(counts, key=lambda name: counts[name])
    enough = 1 if any(sign > "\x7f" and sign.isalpha() for sign in text) else _FOREIGN_WORDS_MIN
    return best if counts[best] >= max(enough, 1 + sum(word in words.ENGLISH for word in said)) else "en"


# -- words one by one

_ISE = re.compile(r"^([a-z]{4,})(is)(e|es|ed|ing|ation|ations|er|ers)$")


def spelt(word: str) -> str:
    """A small-letter word as American English spells it, mended and without contraction; may become two words."""
    word = words.MISSPELLINGS.get(word, word)
    word = words.CONTRACTIONS.get(word, word)
    word = words.SPELLINGS.get(word, word)
    found = _ISE.match(word)
    return f"{found[1]}iz{found[3]}" if found else word


def core(text: str) -> str:
    """What is left of a question when politeness, greetings, filler and spelling are off: the text that is embedded. Code and quotations
    are in it as written."""
    read = parts(text)
    bare = read.bare if read.is_literal else respelt(read.bare)
    for number, span in enumerate(read.spans):
        bare = bare.replace(chr(_PLACE_FIRST + number), span)
    return bare.rstrip(" ,;:-") or bare


def respelt(text: str) -> str:
    """Each word in one spelling, numbers in digits; case stays where the word does."""
    pieces: list[str] = []
    end = 0
    for match in _WORD.finditer(text):
        pieces.append(text[end : match.start()])
        small = match[0].lower()
        better = spelt(small)
        pieces.append(match[0] if better == small else better)
        end = match.end()
    return in_digits("".join([*pieces, text[end:]]))


_NUMBER_WORD = "|".join([*words.CARDINALS, *words.SCALES])
_NUMBER_RUN = re.compile(rf"\b(?:{_NUMBER_WORD})(?:(?:\s+and\s+|\s+|-)(?:{_NUMBER_WORD}))*\b", re.IGNORECASE)
_ORDINAL = re.compile(rf"\b(?:{'|'.join(words.ORDINALS)})\b", re.IGNORECASE)
_TWO_FOLLOW = re.compile(r"\b(?:between|both|either|neither)\s+$", re.IGNORECASE)
_THOUSAND = 1000


def in_digits(text: str) -> str:
    """Number words as digits: "twenty five" is 25, "third" is 3rd. "second" stays, for it may be of time; so do words of which it is not
    sure which numbers they say."""

    def digits(match: re.Match[str]) -> str:
        return _run_in_digits(match[0], _TWO_FOLLOW.search(text[max(0, match.start() - 20) : match.start()]) is not None)

    return _ORDINAL.sub(lambda match: words.ORDINALS[match[0].lower()], _NUMBER_RUN.sub(digits, text))


def _run_in_digits(run: str, after_between: bool) -> str:
    """Each number of a run of number words in digits, with what stands between them: one, or several that only stand side by side."""
    said = re.split(r"(\s+and\s+|\s+|-)", run.lower())  # words at even places
    pieces: list[str] = []
    at = 0
    while at < len(said):
        value, end = _number(said, at)
        if value is None or (after_between and end == len(said) and not at and "and" in run.lower()):
            return run
        pieces += [str(value), *said[end : end + 1]]
        at = end + 1
    return "".join(pieces)


def _number(said: list[str], at: int) -> tuple[int | None, int]:
    """The number that begins at a place, and the place behind it. None where it may be read in two ways."""
    total, scale_before = 0, 0
    while True:
        value, end = _group(said, at)
        scale = words.SCALES.get(said[end + 1], 0) if end + 1 < len(said) and _joins(said[end]) else 0
        if value is None:  # "thousand" alone
            value, end, scale = 1, at - 1, words.SCALES[said[at]]
        if scale >= _THOUSAND:
            end += 2
            value *= scale
        elif scale:
            return None, end
        total, scale_before = total + value, scale
        if scale_before < _THOUSAND or end >= len(said):
            return total, end
        rest, stop = _number(said, end + 1)
        if rest is None or words.SCALES.get(said[end + 1], 0) >= _THOUSAND:
            return None, end
        if rest >= scale or not rest or ("and" in said[end] and rest >= 100):
            return total, end
        return total + rest, stop


def _joins(between: str) -> bool:
    return "and" not in between


def _group(said: list[str], at: int) -> tuple[int | None, int]:
    """The number below a thousand, or of hundreds or dozens, that begins at a place; None where none does."""
    if said[at] in words.SCALES:
        if words.SCALES[said[at]] >= _THOUSAND:
            return None, at
        value, end = 1, at - 1
    else:
        value, end = _below_hundred(said, at)
    if end + 1 >= len(said) or (end >= at and not _joins(said[end])) or said[end + 1] not in ("hundred", "dozen"):
        return value, end
    value, end, unit = value * words.SCALES[said[end + 1]], end + 2, said[end + 1]
    if unit == "dozen" or end >= len(said) or said[end + 1] not in words.CARDINALS:
        return value, end
    rest, stop = _below_hundred(said, end + 1)
    is_whole = stop >= len(said) or not _joins(said[stop]) or said[stop + 1] not in words.SCALES
    if not rest or (not is_whole and ("and" in said[end] or said[stop + 1] == "hundred")):
        return value, end
    return value + rest, stop


def _below_hundred(said: list[str], at: int) -> tuple[int, int]:
    value, end = words.CARDINALS[said[at]], at + 1
    if value >= 20 and end < len(said) and _joins(said[end]) and 0 < words.CARDINALS.get(said[end + 1], 0) < 10:
        return value + words.CARDINALS[said[end + 1]], end + 2
    return value, end


# -- the index

def _verb_forms(verb: str) -> tuple[str, ...]:
    """Base, third person, participle, past; as the rule makes them."""
    if verb in ("begin", "shut", "permit", "occur"):
        stem = verb + verb[-1]
        return verb, verb + "s", stem + "ing", stem + "ed"
    stem = verb.removesuffix("e")
    return verb, verb + "s", stem + "ing", stem + "ed"


def _noun_forms(noun: str) -> tuple[str, ...]:
    return noun, noun[:-1] + "ies" if noun.endswith("y") else noun + "s"


def _synonyms() -> dict[str, str]:
    table: dict[str, str] = {}
    for forms, rows in ((_verb_forms, words.VERB_SYNONYMS), (_noun_forms, words.NOUN_SYNONYMS)):
        for row in rows:
            first, *others = row.split()
            for other in others:
                table |= dict(zip(forms(other), forms(first), strict=True))
    for row in words.OTHER_SYNONYMS:
        first, *others = row.split()
        table |= dict.fromkeys(others, first)
    return table


SYNONYMS = _synonyms()


def stem(word: str) -> str:
    """A rough stem: enough to find candidates by, not enough to call two words one."""
    word = SYNONYMS.get(words.IRREGULAR_PLURALS.get(word, word), word)
    word = words.IRREGULAR_PLURALS.get(word, word)
    for ending in ("ations", "ation", "ingly", "edly", "ings", "ing", "ied", "ies", "ed", "ly", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            word = word.removesuffix(ending) + ("y" if ending in ("ied", "ies") else "")
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiouls":
        word = word[:-1]
    return word.removesuffix("e") if len(word) > 3 else word


def content_words(text: str) -> tuple[str, ...]:
    """The different stems of a core that tell it from others, in their order; stop words too where there is nothing else. None of a text
    that is too long to be compared with others."""
    if len(text) > QUESTION_CHARS_MAX:
        return ()
    said = [match.lower() for match in re.findall(r"[^\W_]+(?:['’][^\W\d_]+)*", text)]
    kept = [word for word in said if word not in words.STOP_WORDS]
    return tuple(dict.fromkeys(stem(word) for word in kept or said))
