"""One order of words for questions that may be asked in several: fronted phrases, indirect questions, possessives, ways of asking how.

Works on a row of small-letter words and signs as one string; so each rule can be read as a pattern. A rule that moves
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

_SETTING = (
    r"(?:bluetooth|wifi|dark mode|airplane mode|notifications|two - factor authentication|parental controls|automatic updates|"
    r"location sharing|cookies|javascript|subtitles|autosave|autocorrect)"
)
_SAID_AS = tuple(
    (re.compile(pattern), better)
    for pattern, better in (
        (rf"\b(?:turn|switch) on (?={_SETTING}\b)", "enable "),
        (rf"\b(?:turn|switch) off (?={_SETTING}\b)", "disable "),
        (r"\blog in(?: to|to)\b", "login to"),
        (r"\blog in\b", "login"),
        (r"\blog out\b", "logout"),
        (r"\bset up\b", "setup"),
        (r"\bsign up\b", "signup"),
        (r"\bback up\b", "backup"),
        (r"^how come (.+)$", r"why \1"),
        (r"\b(?:cell|mobile) phone\b", "cellphone"),
        (r"^(give|show|tell) me\b", r"\1"),
        (r"^write me (?=an? )", "write "),
        (r"^do i have to\b", "do i need to"),
    )
)

# "How do you sleep?" asks the one who is asked; with these verbs it asks nobody in particular.
_ANYBODY_DOES = (
    r"(?:reset|boil|cook|bake|fry|roast|peel|repair|install|uninstall|sort|convert|tie|reverse|clean|wash|format|compile|debug|"
    r"iterate|loop|declare|parse|merge|concatenate|split|solve|calculate)"
)
# "How do I look?" asks for no way of looking.
_NO_DEED = (
    r"(?!(?:look|sound|seem|feel|smell|taste|appear|compare|rank|rate|do|differ|relate|know|die|"
    r"live|affect|stand|fare|sleep|be|have)\b)"
)
_HOWTO = re.compile(
    rf"^(?:how (?:do|can) (?:i|one) (?:go about )?|how does one (?:go about )?|how i can |how to (?:go about )?|"
    rf"how do you (?={_ANYBODY_DOES}\b)(?!.*\b(?:me|my|you|your|yourself)\b)|"
    r"what is the (?:best |right |proper |correct )?way (?:to |of (?=[^ ]+ing\b))|"
    r"what are the steps to |what steps (?:do|should) i (?:take|follow) to |"
    rf"i do not know how to |i can not figure out how to |(?:show|teach|tell|explain) (?:me )?how to ){_NO_DEED}"
)
# Of one's own things what is possible is what one may do; elsewhere "can I" may ask for leave.
_CAN_I = re.compile(r"^(?:is it possible (?:for me )?to|am i able to|is there a way (?:for me )?to) (?=[^ ]+ my )")
_PRICE = re.compile(r"^(?:how much (?:do|does) ([^\d]+) cost|what (?:do|does) ([^\d]+) cost)$")

# -- what stands in front

_FRONTED = re.compile(
    r"^((?:in|on|at|for|with|using|during|under|within|after|before|since|until|without|if|when|while|once|because|as)"
    rf"(?! (?:{_AUX}|{_WH})\b) (?:[^ ,]+ ){{0,11}}?[^ ,]+|"
    rf"today|tomorrow|tonight|yesterday|this (?:week|month|year)|next (?:week|month|year)) , (?:then )?((?:{_WH}|{_AUX})\b[^,]+)$"
)
# A phrase that would hang on another verb or noun at the end stays in front.
_HANGS = re.compile(
    r" (?:to|that|which|who|whose|what|why|how|if|when|because|while|and|or|but|before|after|until|since|than|not|where|about|by)(?= )"
)
_LANGUAGE = (
    "python|java|javascript|typescript|rust|ruby|kotlin|swift|php|perl|go|golang|scala|haskell|lua|julia|dart|elixir|matlab|sql|bash|excel"
)
_FRONTED_BARE = re.compile(rf"^(in (?:{_LANGUAGE})) ((?:how|what|why) (?:{_AUX}|to)\b[^,]+)$", re.IGNORECASE)
_ADVERBS = (
    "quickly|easily|safely|properly|correctly|efficiently|permanently|temporarily|manually|automatically|securely|remotely|cheaply|"
    "effectively"
)
_ADVERB_FIRST = re.compile(rf"^howto ({_ADVERBS}) ([^ ]+ .+)$")
_OTHER_VERB = re.compile(r" [^ ]+(?:ing|ed|en)(?= |$)")

# -- indirect questions

_WHETHER = re.compile(rf"^(?:if|whether) ((?:[^ ,]+ ){{1,6}}?)({_AUX})(?= |$)")
_DETERMINER = r"(?:the|a|an|my|your|his|her|our|their|this|that)"
# The subject begins with a determiner or is a pronoun: so "how old the man is" and "how the old man is" stay two.
_WH_SUBJECT_AUX = re.compile(rf"^({_WH}(?: [^ ,]+)?) ({_PRONOUN}|{_DETERMINER} [^,]+?) ((?!do |does ){_AUX})(?= |$)([^,]*)$")
_NOT_EARLY = re.compile(rf"^(why {_AUX}) not ({_PRONOUN}|{_DETERMINER} [^ ,]+) (.+)$")
# "Which do dogs bite?" needs its auxiliary; after these words nothing else can be the subject.
_DO = re.compile(r"^(why|how|when|where|how long|how often) (?:do|does)(?= )")

# -- possessives

_OWNED = re.compile(
    rf"((?:(?:my|your|his|her|our|their|this|that) )?(?!{_DETERMINER} )[^ ,]+) 's "
    rf"([^ ,]+(?: [^ ,]+)?)(?= {_PREPOSITIONS} | (?:{_AUX}) | ,|$)"
)

_TWO_PLACES = re.compile(
    r" (in|on|during) ((?:january|february|march|april|may|june|july|august|september|october|november|december|monday|tuesday|wednesday|"
    r"thursday|friday|saturday|sunday|spring|summer|autumn|winter|christmas|easter|\d{4})s?) (in|at) ([^ ]+)$",
    re.IGNORECASE,
)


def arranged(row: str, asks_indirectly: bool) -> str:
    """The row in its settled order; ``asks_indirectly``: it followed on "tell me" or the like."""
    row = _fronted_back(row)
    for pattern, better in _SAID_AS:
        row = pattern.sub(better, row).strip()
    row = _OWNED.sub(r"the \2 of \1", row)
    if asks_indirectly:
        row = _WHETHER.sub(r"\2 \1", row).replace("  ", " ").strip()
        row = _WH_SUBJECT_AUX.sub(r"\1 \3 \2\4", row)
    row = _adverb_back(_asked_alike(row))
    row = _DO.sub(r"\1", _NOT_EARLY.sub(r"\1 \2 not \3", row))
    return _TWO_PLACES.sub(r" \3 \4 \1 \2", row)


def _fronted_back(row: str) -> str:
    """A phrase before the question goes behind it."""
    match = _FRONTED.match(row) or _FRONTED_BARE.match(row)
    if match is None or _HANGS.search(match[2].removeprefix("how to")):
        return row
    return f"{match[2].strip()} {match[1]}"


def _asked_alike(row: str) -> str:
    if match := _HOWTO.match(row):
        return "howto " + row[match.end() :]
    if match := _CAN_I.match(row):
        return "can i " + row[match.end() :]
    if match := _PRICE.match(row):
        thing = next(part for part in match.groups() if part is not None)
        return f"what is the price of {thing}"
    return row


def _adverb_back(row: str) -> str:
    """An adverb right after "how to" goes to the end, where there is one verb only."""
    match = _ADVERB_FIRST.match(row)
    if match is None or _HANGS.search(match[2]) or _OTHER_VERB.search(match[2]):
        return row
    return f"howto {match[2]} {match[1]}"
