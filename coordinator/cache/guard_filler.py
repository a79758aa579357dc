"""Politeness, greetings and habits of speech, taken off a question in English; case and everything else stay as they are.

Each rule is a pattern at the beginning or the end of the text, and rules are tried until none fits: "Hi! I was wondering if you could
please tell me what a monad is, thanks" comes down to "what a monad is", with the note that it was asked indirectly. A rule may only take
off what no answer hangs on. Where a phrase can also be the matter ("Hello world in Python", "How do you say thank you?") it asks for a
comma or for the beginning of a question after it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

# What the sentence that is meant begins with; after it a greeting without comma is one.
_START = (
    r"(?:how|what|what's|whats|when|where|who|who's|why|which|can|could|would|will|should|is|are|am|do|does|did|i|i'm|im|i've|i'd|my|please|pls|"
    r"plz|kindly|so|ok|um|uh|tell|give|show|explain|write|list|quick|sorry|thanks|help|was|were|may)\b"
)
# What sets a clause off; a dash only between spaces: "hi-fi" greets nobody.
_OFF = r"(?:\s*[,.:;!]+\s*|\s+-+\s+)"
_BREAK = rf"(?:{_OFF}|\s+(?={_START}))"
_QUESTION_WORD = r"(?:how|what|what's|whats|when|where|who|who's|whom|whose|why|which|if|whether)\b"

# Verbs by which one asks an assistant to do something: "can you list ..." is a request, "can you swim" is not.
REQUESTS = (
    "write|list|give|show|explain|describe|summarize|summarise|translate|calculate|compute|convert|generate|draft|suggest|recommend|provide|"
    "compare|rewrite|rephrase|proofread|define|outline|solve|tell|help|classify|extract|compose|draw|recite|analyze|analyse|simplify|elaborate"
)

_OPENERS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?:hi|hiya|hello|hey|howdy|yo|greetings|good\s+(?:morning|afternoon|evening|day)|to\s+whom\s+it\s+may\s+concern|"
        r"dear\s+(?:sir|madam|all|team|support|support\s+team|customer\s+service|sir\s+or\s+madam))"
        r"(?:\s+(?:there|all|everyone|everybody|guys|folks|team|support|again|assistant|bot|chatbot))?" + _BREAK,
        r"(?:thanks|thank\s+you)(?:\s+in\s+advance)?(?:\s*[.!]+\s*|\s*,\s*(?=" + _START + "))",
        r"(?:um+|uh+|uhm+|er+m*|hm+|ah+|uh-huh)\s*[,.!]+\s*",
        r"(?:so|well|ok|okay|alright|all\s+right|right|now|also|oh|look|listen|anyway|like|then|and|but)\s*,\s*",
        r"(?:so|(?:ok|okay|alright)(?:\s+so(?=\s))?|anyway|but|and)\s+(?=" + _START + ")",
        r"(?:actually|basically|honestly|btw|by\s+the\s+way)\s*,\s*",
        r"you\s+know\s*,\s*",
        rf"(?:please|pls|plz|kindly)(?:\s*,\s*|\s+(?=(?:{REQUESTS}|help|can|could|how|what|when|where|who|why|which|is|are|do|does)\b))",
        r"(?:(?:i'm\s+|i\s+am\s+|im\s+)?(?:so\s+|very\s+)?sorry(?:\s+(?:to\s+bother|for\s+bothering|to\s+disturb|for\s+disturbing)\s+you)?|"
        r"excuse\s+me|pardon(?:\s+me)?|apologies)" + _OFF + r"(?:but\s+)?",
        r"(?:(?:i\s+have|i've\s+got|i've|i\s+got|got|just|one|a|another|this\s+is|here\s+is|here's|my)\s+)*(?:quick\s+|simple\s+|small\s+|short\s+|"
        r"brief\s+|silly\s+|stupid\s+|dumb\s+)?(?:question|(?<=quick\s)one)(?:\s+for\s+you)?" + _OFF,
        r"(?:i\s+)?hope\s+(?:(?:you\s+are|you're|youre|everyone\s+is|all\s+is|everything\s+is)\s+(?:all\s+)?(?:well|fine|doing\s+(?:well|great|fine|good))|"
        r"(?:this|this\s+(?:message|email|mail)|my\s+(?:message|email))\s+finds\s+you\s+well|you\s+can\s+help(?:\s+me)?)\s*[.!,;]+\s*",
        r"(?:i'm\s+|i\s+am\s+|im\s+|i\s+was\s+|was\s+)?(?:just\s+)?(?:wondering|curious|asking)" + _OFF,
        r"out\s+of\s+curiosity\s*,\s*",
        r"(?:if\s+you\s+(?:don't|dont|do\s+not)\s+mind(?:\s+me\s+asking)?|if\s+(?:it's\s+)?possible|if\s+you\s+(?:can|could)|"
        r"when\s+you\s+(?:have|get)\s+(?:a\s+)?(?:moment|minute|chance|time))\s*,\s*",
        r"(?:(?:can|could|would|will)\s+(?:you|someone|anyone|somebody|anybody)\s+)(?:please\s+|kindly\s+)*help(?:\s+me)?(?:\s+out)?"
        r"(?:\s+with\s+(?:this|something|a\s+question))?(?:,?\s*please)?\s*[?.!:]+\s*",
        r"(?:i\s+need\s+(?:some\s+|your\s+|a\s+bit\s+of\s+)?help|help(?:\s+me)?(?:\s+out)?|please\s+help)\s*[.:,!]+\s*",
    )
)

_YOU = (
    r"(?:(?:can|could|would|will)\s+(?:you|someone|anyone|somebody|anybody)\s+"
    r"(?:please\s+|kindly\s+|possibly\s+|maybe\s+|perhaps\s+|just\s+|be\s+so\s+kind\s+as\s+to\s+)*)"
)
_YOU_ALONE = r"(?:(?:can|could|would|will)\s+you\s+(?:please\s+|kindly\s+|just\s+|be\s+so\s+kind\s+as\s+to\s+)*)"
_WISH_OF_YOU = rf"(?:{_YOU}|(?:i'd\s+like|i\s+would\s+like|i\s+want|i\s+need)\s+you\s+to\s+)"
_TELL = (
    r"(?:tell\s+me|let\s+me\s+know|explain(?:\s+to\s+me)?|describe(?:\s+to\s+me)?|teach\s+me|show\s+me|clarify|help\s+me\s+(?:to\s+)?understand)\s+"
)
_KNOW = (
    r"(?:(?:(?:i'd|i\s+would)\s+(?:really\s+|just\s+)?(?:like|love)\s+to|(?:i\s+)?(?:just\s+|really\s+)?(?:want|wanted|need|needed|wish)\s+to|"
    r"(?:i'm|i\s+am|im)\s+(?:just\s+)?(?:trying|hoping|looking)\s+to)\s+(?:know|ask(?:\s+you)?|find\s+out|figure\s+out|understand|learn|hear)|"
    r"do\s+you\s+(?:happen\s+to\s+)?know|does\s+any(?:one|body)\s+(?:here\s+)?know|(?:may|can|could)\s+i\s+ask(?:\s+you)?)\s+"
)
_WONDER = (
    r"(?:(?:i\s+was|i\s+am|i'm|im|was|am|just)\s+(?:just\s+)?(?:wondering|curious)|i\s+(?:just\s+)?wonder|(?:do\s+you\s+have\s+)?any\s+idea|"
    r"i(?:'d|\s+would)\s+(?:really\s+)?(?:appreciate\s+it|be\s+(?:very\s+|so\s+)?(?:grateful|thankful|happy|glad))|"
    r"it\s+would\s+be\s+(?:really\s+|very\s+|so\s+)?(?:great|nice|helpful|lovely|awesome)|"
    r"(?:i\s+have\s+)?no\s+idea|(?:i'm|i\s+am|im)\s+not\s+sure|i\s+(?:don't|do\s+not|dont)\s+(?:know|understand)|"
    r"i\s+(?:can't|cannot|cant)\s+figure\s+out)(?:\s+(?:about|as\s+to))?\s+"
)
_MIND = r"would\s+you\s+mind\s+(?:telling\s+me|explaining(?:\s+to\s+me)?|letting\s+me\s+know)\s+"
_DIRECT = r"(?:is|are|was|were|do|does|did|can|could|should|will|would)\s+(?:the|a|an|my|your|it|there|this|that|these|i|we|they|he|she)\b"
_INDIRECT = re.compile(rf"(?:{_WISH_OF_YOU}?{_TELL}|{_KNOW}|{_WONDER}|{_MIND})(?={_QUESTION_WORD}|{_DIRECT})", re.IGNORECASE)
_TELL_THIS = re.compile(
    rf"{_WISH_OF_YOU}?(?:tell\s+me|let\s+me\s+know|answer(?:\s+me)?)(?:\s+please|\s+this)?\s*[,:;]+\s*", re.IGNORECASE
)
_IF_YOU = re.compile(
    rf"(?:if|whether)\s+you\s+(?:could|can|would|will|might)\s+(?:please\s+|kindly\s+|possibly\s+)*(?=(?:{REQUESTS})\b)", re.IGNORECASE
)
_TELLING = re.compile(rf"{_TELL}(?={_QUESTION_WORD})", re.IGNORECASE)
_REQUEST = re.compile(
    rf"(?:{_YOU_ALONE}(?=(?:{REQUESTS})\b)|(?:can|could|would|will)\s+you\s+(?:please|kindly)\s+|"
    rf"(?:i'd\s+like|i\s+would\s+like|i\s+want|i\s+need)\s+you\s+to\s+)",
    re.IGNORECASE,
)

_THANKS = (
    r"(?:(?:many\s+)?thanks|thank\s+you|thx|thnx|tnx|ty|tia|cheers|much\s+appreciated|please(?:\s+and\s+thank\s+you)?|pls|plz)"
    r"(?:\s+(?:so\s+much|very\s+much|a\s+lot|a\s+bunch|a\s+million|in\s+advance|again|for\s+(?:your|the|any|all\s+your)\s+"
    r"(?:help|time|support|answer|answers|assistance)|guys|all|everyone|you))*"
)
_CLOSING = (
    r"(?:i(?:'d|\s+would)?\s+(?:really\s+)?appreciate\s+(?:it|your\s+help|any\s+help)|"
    r"any\s+(?:help|advice)\s+(?:is|would\s+be)\s+(?:much\s+|greatly\s+|very\s+)?"
    r"(?:appreciated|welcome)|if\s+you\s+(?:don't\s+mind(?:\s+me\s+asking)?|can|could)|(?:if|when)\s+you\s+(?:have|get)\s+(?:a\s+)?(?:moment|minute|chance|time)|"
    r"please\s+(?:answer|help|advise|explain|reply)(?:\s+me)?(?:\s+(?:asap|soon|quickly))?|if\s+possible|lol|"
    r"haha|(?:best|kind|warm|with\s+kind)?\s*regards|have\s+a\s+(?:nice|great|good)\s+day|just\s+(?:curious|wondering)|hope\s+you\s+can\s+help)"
)
_SIGNS_OFF = r"[\s.!,;:?)]*$"
_SMILE = re.compile(r"(?<=[.?!])(?:\s+(?:[:;]-?[)D]|\^\^|[🙏😊🙂😀👍❤️]+))+\s*$")
_AFTER_COMMA = re.compile(
    rf"(?<=,)\s*(?:thank\s+you|thanks|thx|please|pls|plz)(?:\s+(?:so\s+much|very\s+much|a\s+lot|in\s+advance))?{_SIGNS_OFF}", re.IGNORECASE
)
_AFTER_SENTENCE = re.compile(rf"(?<=[.?!\ue100-\uf8ff])\s*(?:-+\s*)?(?:{_THANKS}|{_CLOSING}){_SIGNS_OFF}", re.IGNORECASE)
# A text in which a polite word may be the matter.
_POLITE_MATTER = re.compile(
    r"\b(?:say|says|saying|words?|phrase|spell\w*|means?|meaning|pronounc\w*|translat\w*|write|type|print|reply|respond|answer|text|call|called|"
    r"define|definition|synonyms?|rewrite|rephrase|sentence|grammar|sing|song|title|lyrics|card|note|message|letter)\b|:",
    re.IGNORECASE,
)
# ... in which "please" may be, at the end.
_PLEASE_MATTER = re.compile(
    r"\b(?:say|says|saying|words?|phrase|spell\w*|means?|meaning|pronounc\w*|type|print|reply|respond|answer|define|definition|synonyms?)\b|:",
    re.IGNORECASE,
)
_PLEASE_LAST = re.compile(rf"(?<=\w),\s*(?:please|pls|plz){_SIGNS_OFF}", re.IGNORECASE)
_INNER = re.compile(r",\s*(?:um+|uh+|uhm+|erm|please|you know|i mean)\s*,", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Stripped:
    """``asks``: the text is an indirect question, as in "(tell me) what the time is"."""

    text: str
    asks: bool


def outer_filler_off(text: str) -> Stripped:
    """The text without what stands before and after the matter. If nothing would be left, the text as it was."""
    asks = False
    rest = text.strip()
    while True:
        shorter, indirect = _front_off(rest)
        if shorter == rest or not shorter.strip():
            break
        rest, asks = shorter, asks or indirect
    rest = _back_off(_SMILE.sub("", rest) or rest)
    return Stripped(rest, asks)


def _front_off(text: str) -> tuple[str, bool]:
    """One thing less, and whether it asked indirectly."""
    for opener in _OPENERS:
        if match := opener.match(text):
            return text[match.end() :], False
    if match := _INDIRECT.match(text):
        rest = text[match.end() :]
        if polite := _IF_YOU.match(rest):  # "I was wondering if you could ..." is a request
            after = rest[polite.end() :]
            if match := _TELLING.match(after):
                return after[match.end() :], True
            return after, False
        return rest, True
    if match := _TELL_THIS.match(text) or _REQUEST.match(text):
        return text[match.end() :], False
    return text, False


def _back_off(text: str) -> str:
    patterns: tuple[re.Pattern[str], ...] = (_AFTER_SENTENCE, _AFTER_COMMA)
    if _POLITE_MATTER.search(text):
        patterns = (_AFTER_SENTENCE,) if _PLEASE_MATTER.search(text) else (_AFTER_SENTENCE, _PLEASE_LAST)
    while True:
        shorter = text
        for pattern in patterns:
            cut = pattern.sub("", shorter)
            shorter = cut if cut.strip(" ,.?!;:-") else shorter
        if shorter == text:
            return text
        text = shorter


def inner_filler_off(text: str) -> str:
    """The text without words of habit in its middle."""
    if _POLITE_MATTER.search(text) is None:
        text = _INNER.sub("", text)
    return text
