"""Pairs of questions that mean the same, made from templates with a seeded generator: what the cache should find.

Three sources. *Groups*: wordings of one question with slots, of which two are drawn; the kind says how they differ (``wording``:
contractions, inflection, indirect questions and the like; ``order``: a phrase moved to where it means the same; ``synonym``: light
ones; ``free``: as people really vary, which no rule promises to catch). *Frames*: politeness and filler put round a question of a
group. *Slips*: a word in the other spelling of English, a common misspelling, two letters that change places, carelessness in case and
punctuation.

As with ``cache_pairs``, one half was looked at while the guards were written and the other was not.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.coordinator.cache.cache_pairs import Words, fill

_TRIES_PER_PAIR = 20
_SLIP_LETTERS_MIN = 7  # a shorter word with two letters swapped is often another word


@dataclass(frozen=True, slots=True)
class Wordings:
    """``frames``: with ``{}`` for the question; ``spellings``: pairs of words that are one."""

    groups: Sequence[tuple[str, tuple[str, ...]]]
    frames: Sequence[str]
    spellings: Sequence[tuple[str, str]]
    spelt: Sequence[str]
    words: Words


@dataclass(frozen=True, slots=True)
class Paraphrase:
    asked: str
    kept: str
    kind: str


def paraphrases(half: Wordings, count: int, seed: int) -> list[Paraphrase]:
    """``count`` different ones: two fifths from groups, two from frames, one from slips."""
    rng = random.Random(seed)
    makers: Sequence[Callable[[Wordings, random.Random], Paraphrase]] = (_worded, _framed, _worded, _framed, _slipped)
    made: dict[tuple[str, str], Paraphrase] = {}
    for turn in range(count * _TRIES_PER_PAIR):
        if len(made) == count:
            break
        new = makers[turn % len(makers)](half, rng)
        if new.asked != new.kept:
            made.setdefault((new.asked, new.kept), new)
    return list(made.values())


def _worded(half: Wordings, rng: random.Random) -> Paraphrase:
    kind, texts = rng.choice(half.groups)
    asked, kept = fill(rng.sample(texts, 2), half.words, rng)
    return Paraphrase(asked, kept, kind)


def _framed(half: Wordings, rng: random.Random) -> Paraphrase:
    _, texts = rng.choice(half.groups)
    (kept,) = fill([texts[0]], half.words, rng)
    frame = rng.choice(half.frames)
    asked = kept[0].lower() + kept[1:] if not frame.startswith("{}") and frame[-4:-2] != ". " and rng.random() < 0.7 else kept
    return Paraphrase(frame.format(asked), kept, "frame")


def _slipped(half: Wordings, rng: random.Random) -> Paraphrase:
    kind = rng.choice(("spelling", "letters", "carelessness"))
    if kind == "spelling":
        pair = list(rng.choice(half.spellings))
        rng.shuffle(pair)
        (text,) = fill([rng.choice(half.spelt)], half.words, rng)
        return Paraphrase(text.replace("{}", pair[0]), text.replace("{}", pair[1]), kind)
    _, texts = rng.choice(half.groups)
    (kept,) = fill([texts[0]], half.words, rng)
    asked = _letters_swapped(kept, rng) if kind == "letters" else careless(kept, rng)
    return Paraphrase(asked, kept, kind)


def _letters_swapped(text: str, rng: random.Random) -> str:
    """Two inner letters of a long lower-case word in each other's place, or one left out of a double."""
    long = [match for match in re.finditer(r"[a-z]+", text) if len(match[0]) >= _SLIP_LETTERS_MIN]
    if not long:
        return text
    match = rng.choice(long)
    at = rng.randrange(1, len(match[0]) - 2) + match.start()
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def careless(text: str, rng: random.Random) -> str:
    """All in small letters, without the full stop or question mark, without apostrophes, or with a space too many."""
    small = text.rstrip("?.!").lower()
    return rng.choice((small, small.replace("'", ""), small.replace(" ", "  ", 1) + " ?", text.rstrip("?.") + "??"))


_TUNED_WORDS: Words = {
    "account": ["password", "email address", "PIN", "username", "profile picture"],
    "order": ["order", "subscription", "booking", "reservation", "appointment"],
    "code": "Python Java Rust Go Ruby Kotlin JavaScript PHP".split(),
    "place": "France Japan Canada Brazil Kenya Egypt Norway Peru".split(),
    "thing": ["laptop", "phone", "printer", "router", "dishwasher", "bike"],
    "food": ["rice", "pasta", "bread", "quinoa", "risotto", "lentils"],
    "topic": ["black holes", "photosynthesis", "inflation", "blockchain", "vaccines", "gravity"],
    "n": ["2", "3", "5", "8", "10", "20"],
    "structure": ["list", "dictionary", "string", "queue", "set"],
    "day": "Monday Tuesday Friday Saturday Sunday".split(),
    "animal": ["cats", "dogs", "whales", "bees", "owls", "penguins"],
}

_TUNED_GROUPS: Sequence[tuple[str, tuple[str, ...]]] = (
    (
        "wording",
        (
            "How do I reset my {account:1}?",
            "How can I reset my {account:1}?",
            "how to reset my {account:1}",
            "How do you reset a {account:1}?",
        ),
    ),
    (
        "wording",
        (
            "What is the capital of {place:1}?",
            "What's the capital of {place:1}?",
            "Could you tell me what the capital of {place:1} is?",
            "what is {place:1}'s capital",
        ),
    ),
    ("wording", ("Why does my {thing:1} not turn on?", "Why doesn't my {thing:1} turn on?", "Why does my {thing:1} not turn on at all?")),
    (
        "wording",
        (
            "How does the heart of {animal:1} work?",
            "Can you explain how the heart of {animal:1} works?",
            "Please explain how the heart of {animal:1} works.",
        ),
    ),
    (
        "wording",
        ("Where can I find my {order:1}?", "I'd like to know where I can find my {order:1}.", "Do you know where I can find my {order:1}?"),
    ),
    ("wording", ("Can I cancel my {order:1}?", "Is it possible to cancel my {order:1}?", "Am I able to cancel my {order:1}?")),
    (
        "wording",
        (
            "Give me {n:1} tips for cooking {food:1}",
            "Please give me {n:1} tips for cooking {food:1}",
            "Can you give me {n:1} tips for cooking {food:1}?",
        ),
    ),
    (
        "wording",
        (
            "Is your shop open on {day:1}?",
            "I was wondering if your shop is open on {day:1}",
            "Could you tell me whether your shop is open on {day:1}?",
        ),
    ),
    (
        "wording",
        ("What are three facts about {animal:1}?", "what are 3 facts about {animal:1}", "What are 3 facts about {animal:1}, please?"),
    ),
    ("wording", ("How long do {animal:1} live?", "I want to know how long {animal:1} live", "Tell me how long {animal:1} live.")),
    (
        "order",
        (
            "How do I sort a {structure:1} in {code:1}?",
            "In {code:1}, how do I sort a {structure:1}?",
            "in {code:1} how can I sort a {structure:1}",
        ),
    ),
    (
        "order",
        (
            "What should I do if my {thing:1} breaks?",
            "If my {thing:1} breaks, what should I do?",
            "if my {thing:1} breaks what should I do",
        ),
    ),
    (
        "order",
        (
            "What is the weather like in {place:1} today?",
            "Today, what is the weather like in {place:1}?",
            "In {place:1}, what is the weather like today?",
        ),
    ),
    ("order", ("How do I quickly clean a {thing:1}?", "How do I clean a {thing:1} quickly?", "Quickly, how do I clean a {thing:1}?")),
    ("order", ("What do {animal:1} eat during winter?", "During winter, what do {animal:1} eat?")),
    (
        "synonym",
        (
            "How do I delete my {order:1}?",
            "How do I remove my {order:1}?",
            "How can I get rid of my {order:1}?",
            "How do I erase my {order:1}?",
        ),
    ),
    (
        "synonym",
        ("How do I fix a broken {thing:1}?", "How do I repair a broken {thing:1}?", "What is the best way to fix a broken {thing:1}?"),
    ),
    ("synonym", ("Where can I buy a {thing:1}?", "Where can I purchase a {thing:1}?")),
    ("synonym", ("How much does a {thing:1} cost?", "What is the price of a {thing:1}?", "What does a {thing:1} cost?")),
    (
        "synonym",
        ("What are the biggest cities of {place:1}?", "What are the largest cities of {place:1}?", "What are {place:1}'s biggest cities?"),
    ),
    ("free", ("Explain {topic:1} simply", "Explain {topic:1} like I'm five", "What are {topic:1} in simple words?")),
    (
        "free",
        ("My {thing:1} is broken, what now?", "What do I do with a {thing:1} that does not work any more?", "Help, my {thing:1} broke!"),
    ),
    ("free", ("How many people live in {place:1}?", "What is the population of {place:1}?", "How big is the population of {place:1}?")),
)

_TUNED_FRAMES = (
    *("Hi, {}", "Hello there, {}", "Hey! {}", "Good morning, {}", "Please, {}", "um, {}", "So, {}", "ok so {}", "Quick question: {}"),
    *("{} Thanks!", "{} Thank you very much.", "{} Thanks in advance!", "{} Please and thank you.", "{} I appreciate your help."),
    *("Hi! I have a question. {}", "Hello, I hope you are well. {} Many thanks!", "Just wondering, {}", "Sorry to bother you, but {}"),
    *("Could you please help me? {}", "Hey there, quick question, {} thx", "I was just curious: {}", "Actually, {}", "Well, {} Cheers!"),
)

_TUNED_SPELLINGS = (
    *(("color", "colour"), ("favorite", "favourite"), ("center", "centre"), ("organization", "organisation"), ("catalog", "catalogue")),
    *(("canceled", "cancelled"), ("behavior", "behaviour"), ("receive", "recieve"), ("separate", "seperate"), ("address", "adress")),
    *(("definitely", "definately"), ("calendar", "calender"), ("necessary", "neccessary"), ("license", "licence"), ("gray", "grey")),
)
_TUNED_SPELT = (
    "What is a {} in {code:1}?",
    "How do I choose a {} {thing:1}?",
    "Is there a {} for {animal:1}?",
    "Show me the {} of {place:1}",
)

_HELD_WORDS: Words = {
    "login": ["passcode", "security question", "display name", "phone number", "avatar"],
    "service": ["membership", "policy", "delivery", "insurance", "contract", "plan"],
    "lang": "TypeScript Haskell Scala Lua Julia Perl Dart".split(),
    "land": "Italy Chile India Sweden Ghana Vietnam Iceland Mexico".split(),
    "gadget": ["tablet", "camera", "heater", "fridge", "scooter", "keyboard"],
    "dish": ["soup", "lasagna", "paella", "pancakes", "curry", "tofu"],
    "idea": ["dark matter", "machine learning", "the water cycle", "game theory", "evolution"],
    "k": ["4", "6", "7", "9", "12", "15"],
    "object": ["file", "window", "database", "folder", "table"],
    "when": ["Christmas", "weekends", "New Year's Day", "Thursdays", "Easter"],
    "bird": ["eagles", "ducks", "bats", "turtles", "sharks", "spiders"],
}

_HELD_GROUPS: Sequence[tuple[str, tuple[str, ...]]] = (
    (
        "wording",
        (
            "How do I change my {login:1}?",
            "How can I change my {login:1}?",
            "How would I change my {login:1}?",
            "How to change the {login:1}?",
        ),
    ),
    (
        "wording",
        (
            "Who is the president of {land:1}?",
            "Who's the president of {land:1}?",
            "Do you know who the president of {land:1} is?",
            "who is {land:1}'s president",
        ),
    ),
    ("wording", ("Why can I not open this {object:1}?", "Why can't I open this {object:1}?", "Why cannot I open this {object:1}?")),
    ("wording", ("How does {idea:1} work?", "Could you explain how {idea:1} works?", "I would like to understand how {idea:1} works")),
    ("wording", ("When does my {service:1} end?", "Can you tell me when my {service:1} ends?", "I need to know when my {service:1} ends.")),
    ("wording", ("Can I pause my {service:1}?", "Is it possible to pause my {service:1}?", "Is there a way to pause my {service:1}?")),
    (
        "wording",
        (
            "List {k:1} countries that border {land:1}",
            "Could you list {k:1} countries that border {land:1}?",
            "I'd like you to list {k:1} countries that border {land:1}",
        ),
    ),
    (
        "wording",
        ("Are you open on {when:1}?", "I wanted to ask if you are open on {when:1}", "Can you let me know if you are open on {when:1}?"),
    ),
    (
        "wording",
        ("Write four sentences about {bird:1}", "write 4 sentences about {bird:1}", "Would you write 4 sentences about {bird:1}, please?"),
    ),
    (
        "wording",
        ("Why do {bird:1} sleep so much?", "I'd love to know why {bird:1} sleep so much", "explain to me why {bird:1} sleep so much"),
    ),
    (
        "order",
        (
            "How do I close a {object:1} in {lang:1}?",
            "In {lang:1}, how do I close a {object:1}?",
            "Using {lang:1}, how do I close a {object:1}?",
        ),
    ),
    ("order", ("What happens when my {service:1} expires?", "When my {service:1} expires, what happens?")),
    ("order", ("Is it cold in {land:1} in January?", "In January, is it cold in {land:1}?", "Is it cold in January in {land:1}?")),
    ("order", ("How can I safely store a {gadget:1}?", "How can I store a {gadget:1} safely?")),
    ("order", ("For beginners, what is the easiest recipe for {dish:1}?", "What is the easiest recipe for {dish:1} for beginners?")),
    ("synonym", ("When does the {dish:1} course begin?", "When does the {dish:1} course start?")),
    ("synonym", ("How do I select a {gadget:1}?", "How do I choose a {gadget:1}?", "How should I choose a {gadget:1}?")),
    ("synonym", ("Do I need to renew my {service:1}?", "Do I have to renew my {service:1}?")),
    ("synonym", ("How much is a {gadget:1}?", "How much does a {gadget:1} cost?", "What's the cost of a {gadget:1}?")),
    ("synonym", ("Show a picture of {bird:1}", "Show me a photo of {bird:1}", "Can you show me a picture of {bird:1}?")),
    ("free", ("What is {idea:1}?", "Tell me about {idea:1}", "Can you give me an introduction to {idea:1}?")),
    (
        "free",
        (
            "My {gadget:1} makes a noise",
            "There is a strange noise coming from my {gadget:1}",
            "The {gadget:1} I own is loud all of a sudden",
        ),
    ),
    ("free", ("How large is {land:1}?", "What is the area of {land:1}?", "How many square kilometres does {land:1} cover?")),
)

_HELD_FRAMES = (
    *("Hey, {}", "Hi team, {}", "Good evening! {}", "Greetings. {}", "Kindly tell me, {}", "hmm, {}", "okay, {}", "One question: {}"),
    *("{} Thank you!", "{} Thanks a lot!", "{} thank you so much", "{} Any help is appreciated.", "{} Thanks for your help!"),
    *("Hello! I've got a question: {}", "Dear support team, {} Best regards", "I'm just curious, {}", "Excuse me, {}", "Pardon me, {}"),
    *(
        "Can you help me with this? {}",
        "Hi, hope you're doing well. {} Thank you in advance.",
        "uh, basically, {}",
        "By the way, {}",
        "Alright, {} ty",
    ),
)

_HELD_SPELLINGS = (
    *(("flavor", "flavour"), ("neighbor", "neighbour"), ("theater", "theatre"), ("realization", "realisation"), ("dialog", "dialogue")),
    *(("traveling", "travelling"), ("humor", "humour"), ("believe", "beleive"), ("occurrence", "occurence"), ("tomorrow", "tommorow")),
    *(("environment", "enviroment"), ("beginning", "begining"), ("government", "goverment"), ("defense", "defence"), ("mold", "mould")),
)
_HELD_SPELT = (
    "Where is the {} in {land:1}?",
    "How do I describe a {} {gadget:1}?",
    "Is {} common among {bird:1}?",
    "Tell me about {} with {dish:1}",
)

TUNED = Wordings(_TUNED_GROUPS, _TUNED_FRAMES, _TUNED_SPELLINGS, _TUNED_SPELT, _TUNED_WORDS)
HELD_OUT = Wordings(_HELD_GROUPS, _HELD_FRAMES, _HELD_SPELLINGS, _HELD_SPELT, _HELD_WORDS)
