"""One order of words for questions that may be asked in several: fronted phrases, indirect questions, possessives, ways of asking how.

Works on a row of small-letter words with commas, articles off, as one string; so each rule can be read as a pattern. A rule that moves
words moves a whole phrase to a place where every other wording has it; it never exchanges two things of one kind, for "from A to B" is not
"from B to A".
"""

from __future__ import annotations

import re

_WH = r"(?:how|what|when|where|why|who|whose|whom|which)"
_AUX = r"(?:is|are|am|was|were|do|does|did|can|could|should|shall|will|would|may|might|must|have|has|had)"
_PRONOUN = r"(?:i|you|we|he|she|it|they)"
_PREPOSITIONS = (
    r"(?:in|on|at|for|with|without|of|to|from|by|about|during|under|over|after|before|since|until|near|as|than|and|or|if|when|while|because)"
)

# -- ways of asking for the same

_SAID_AS = tuple(
    (re.compile(pattern), better)
    for pattern, better in (
        (r"\b(?:turn|switch)(s|es|ed|ing)? on\b", r"enable\1"),
        (r"\b(?:turn|switch)(s|es|ed|ing)? off\b", r"disable\1"),
        (r"\bget(?:ting)? rid of\b", "remove"),
        (r"\b(?:log|sign)(?:ging|ing)? (?:in(?= to\b)|into)(?: to)?\b", "login to"),
        (r"\b(?:log|sign)(?:ging|ing)? in\b", "login"),
        (r"\b(?:log|sign)(?:ging|ing)? (?:out|off)\b", "logout"),
        (r"\bset up\b", "setup"),
        (r"\bsign up\b", "signup"),
        (r"\bback up\b", "backup"),
        (r"\b(?:look|search)(ing)? for\b", r"search\1 for"),
        (r"\bget my money back\b", "get my refund"),
        (r"\bin order to\b", "to"),
        (r"\bhow come\b", "why"),
        (r"\bwhat (?:type|sort) of\b", "what kind of"),
        (r"\b(?:cell|mobile) phone\b", "cellphone"),
        (r"\bright now\b|\bat moment\b|\bcurrently\b|\bat present\b", "now"),
        (r"\b(?:have|has) to(?! (?:do with|offer|say|show|give|lose|gain|hide|contribute))\b", "need to"),
        (r"\b(give|show|tell|send|write|find|get|make|draw|recommend|suggest|list) me\b(?: some\b)?", r"\1"),
        (r"^((?:give|show|tell|send|write|find|make|draw|recommend|suggest|list|explain|describe) .+) (?:for|to) me$", r"\1"),
        (r"^what is cost of\b", "what is price of"),
        (r"^((?!what|who|where|when|how|why|which).+) is (what|where|who|when)$", r"\2 is \1"),
    )
)

_ONE = r"(?:i|one)"  # not "we" or "someone": "How can someone open my account?"
# "How do you sleep?" asks the one who is asked; with these verbs it asks nobody in particular.
_ANYBODY_DOES = (
    r"(?:reset|boil|cook|bake|fry|roast|peel|repair|fix|install|uninstall|sort|convert|tie|reverse|clean|wash|grow|draw|format|compile|debug|"
    r"iterate|loop|declare|parse|merge|concatenate|split|solve|calculate|change|replace|remove|delete|insert|round)"
)
_HOWTO = re.compile(
    rf"^(?:how (?:do|can|could|would|does|may) {_ONE} (?:go about )?|how {_ONE} (?:can|could) |how to (?:go about )?|"
    rf"how (?:do|would) you (?={_ANYBODY_DOES}\b)(?!.*\b(?:me|my|you|your|yourself)\b)|"
    r"what is (?:best |right |proper |correct |good )?(?:way|method|procedure|process) (?:to|of|for) |"
    r"what are steps to |what steps (?:do|should) i (?:take|follow) to |what do i need to do to |"
    r"i do not know how to |i can not figure out how to |(?:show|teach|tell|explain) (?:me )?how to )"
)
_HELP = re.compile(
    r"^(?:help me (?:to )?|help me with |i need help (?:with |to )?)(?!write|draft|with\b|translate|summari|make|create|generate|find|plan)"
)
_CAN_I = re.compile(r"^(?:is it possible (?:for me )?to|am i able to|is there (?:any )?way (?:for me )?to) ")
_PRICE = re.compile(r"^(?:how much (?:do|does) ([^\d]+) cost|what (?:do|does) ([^\d]+) cost|how much (?:is|are) ([^\d]+))$")

# -- what stands in front

_FRONTED = re.compile(
    r"^((?:in|on|at|for|with|using|during|under|within|after|before|since|until|without|if|when|while|once|because|as)"
    rf"(?! (?:{_AUX}|{_WH})\b) (?:[^ ,]+ ){{0,11}}?[^ ,]+|"
    r"today|tomorrow|tonight|yesterday|now|this (?:week|month|year)|next (?:week|month|year)) , (?:then )?(.+)$"
)
_FRONTED_BARE = re.compile(
    rf"^((?:in|on|at|for|with|using)(?! {_WH}\b)(?: [^ ,]+){{1,3}}?) ((?:how|what|why) (?:{_AUX}|to)\b.+)$"
    rf"|^((?:if|when)(?! (?:{_AUX}|{_WH})\b)(?: [^ ,]+){{2,9}}?) "
    r"((?:what (?:should|can|do|could|would|happens)|how (?:do|can|should|to)|why (?:do|is)|can i|should i)\b.*)$"
    rf"|^(today|tomorrow|tonight|yesterday|now) ((?:{_WH}|{_AUX})\b.+)$"
)
_ASIDE = re.compile(rf"^({_WH}(?: {_AUX})?) , ((?:in|on|for|with|using) [^,]+) , (.+)$")
_ADVERBS = (
    "quickly|easily|safely|properly|correctly|efficiently|permanently|temporarily|manually|automatically|securely|remotely|cheaply|effectively|"
    "today|tomorrow|tonight|now"
)
_ADVERB = re.compile(rf"(?:^| )({_ADVERBS})(?= |$)")
_SUBORDINATE = re.compile(r" (?:that|which|who|whose|if|when|because|while|and|or|but|before|after|until|since|than|not|if|where)(?= )")

# -- indirect questions

_WHETHER = re.compile(rf"^(?:if|whether) ((?:[^ ]+ ){{1,6}}?)({_AUX}|need)(?= |$)")
_WH_AUX = re.compile(rf"^({_WH})((?: [^ ,]+){{1,12}}?) ({_AUX})(?= |$)(.*)$")
_NOT_EARLY = re.compile(rf"^({_WH}(?: {_AUX})?|{_AUX}) not ({_PRONOUN}|(?:my|your|our|his|her|their|this|that) [^ ]+) (.+)$")

# -- possessives

_OWN = r"(?:(?:my|your|his|her|our|their|this|that) )?"
_OWNED = re.compile(rf"({_OWN}[^ ,]+) 's ((?:[^ ,]+)(?: [^ ,]+)?)(?= {_PREPOSITIONS} | (?:{_AUX}) | ,|$)")

# -- platforms: "in Python" may stand anywhere, if nothing is moved from or to another

_LANGUAGE = (
    "python|java|javascript|typescript|rust|ruby|kotlin|swift|php|perl|go|golang|scala|haskell|lua|julia|dart|elixir|matlab|sql|bash|c\\+\\+|c#"
)
_PLATFORM = re.compile(
    rf" (?:in|using|with) ({_LANGUAGE}|excel|word|outlook|gmail|photoshop|postgres|mysql)(?= |$)| (?:in|on|using|with) "
    r"(?:windows|linux|ubuntu|mac|macos|android|iphone|ios|git|docker)(?= |$)",
    re.IGNORECASE,
)
_TWO_PLACES = re.compile(
    r" (in|on|during) ((?:january|february|march|april|may|june|july|august|september|october|november|december|monday|tuesday|wednesday|"
    r"thursday|friday|saturday|sunday|spring|summer|autumn|winter|christmas|easter|\d{4})s?) (in|at) ([^ ]+)$",
    re.IGNORECASE,
)


def arranged(row: str, asks_indirectly: bool) -> str:
    """The row in its settled order, without commas; ``asks_indirectly``: it followed on "tell me" or the like."""
    row = row.strip(" ,")
    row = _fronted_back(row)
    row = re.sub(r" ?,(?= |$)|^, ", "", row)
    for pattern, better in _SAID_AS:
        row = pattern.sub(better, row).strip()
    row = _owned(row)
    if asks_indirectly:
        row = _WHETHER.sub(r"\2 \1", row).replace("  ", " ")
    row = _asked_alike(row)
    row = _aux_forward(row)
    row = _platform_back(_adverb_back(row))
    return _TWO_PLACES.sub(r" \3 \4 \1 \2", row)


def _fronted_back(row: str) -> str:
    """A phrase before the question goes behind it."""
    if match := _FRONTED.match(row):
        return f"{match[2].rstrip(' ,')} {match[1]}"
    if match := _ASIDE.match(row):
        return f"{match[1]} {match[3]} {match[2]}"
    if re.match(rf"(?:{_ADVERBS}) , ", row):
        head, _, rest = row.partition(" , ")
        return f"{rest} {head}"
    if match := _FRONTED_BARE.match(row):
        front, rest = (part for part in match.groups() if part is not None)
        return f"{rest} {front}"
    return row


def _owned(row: str) -> str:
    """"France's capital" as "capital of France"."""
    return _OWNED.sub(r"\2 of \1", row)


def _asked_alike(row: str) -> str:
    if match := _HOWTO.match(row):
        return "howto " + re.sub(r"\bmy ", "", row[match.end() :])
    if match := _HELP.match(row):
        return "howto " + re.sub(r"\bmy ", "", row[match.end() :])
    if match := _CAN_I.match(row):
        return "can i " + row[match.end() :]
    if match := _PRICE.match(row):
        thing = next(part for part in match.groups() if part is not None)
        return f"what is price of {thing}"
    return re.sub(r"^do i have to\b", "do i need to", row)


def _aux_forward(row: str) -> str:
    """The first auxiliary right behind the question word, as a direct question has it; "do" goes, for an indirect one has none."""
    row = re.sub(rf"^({_WH}) (?:do|does)(?= )", r"\1", row)
    match = _WH_AUX.match(row)
    if match and not re.match(rf"{_WH} {_AUX}\b", row):
        wh, between, aux, rest = match.groups()
        row = f"{wh}{between}{rest}" if aux in ("do", "does") else f"{wh} {aux}{between}{rest}"
    return _NOT_EARLY.sub(r"\1 \2 not \3", row)


def _adverb_back(row: str) -> str:
    """An adverb goes to the end, where there is one, and one clause."""
    found = _ADVERB.findall(row)
    if len(found) != 1 or _SUBORDINATE.search(row):
        return row
    return f"{_ADVERB.sub('', row, count=1).strip()} {found[0]}"


def _platform_back(row: str) -> str:
    found = list(_PLATFORM.finditer(row))
    if len(found) != 1 or re.search(r" (?:from|to|into|between|than|and|or|not)(?= )", row.removeprefix("how to")):
        return row
    (match,) = found
    phrase = f" in {match[1]}" if match[1] else match[0]
    return row[: match.start()] + row[match.end() :] + phrase
