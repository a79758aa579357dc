"""Pairs of questions that look alike and mean different things, made from templates with a seeded generator.

A template is two texts with slots. ``{city:1}`` and ``{city:2}`` are two different words of the list ``city``; ``{onoff:a}`` and
``{onoff:b}`` are the two sides of one pair of the list ``onoff``, drawn in either order. Words are drawn afresh for every pair, and a
third of the pairs gets a polite frame round one of the texts, so that what is taken off cannot hide what is different. The idea of
swapped words is that of PAWS (Zhang, Baldridge and He, 2019, arXiv:1904.01130); the templates are our own.

There are two halves with templates and words of their own: ``TUNED`` was looked at while the guards were written, ``HELD_OUT`` was
written before the guards and only its figure was read.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Words = Mapping[str, Sequence[str] | Sequence[tuple[str, str]]]
Templates = Sequence[tuple[str, str, str]]

_SLOT = re.compile(r"\{(\w+):(\w+)\}")
_TRIES_PER_PAIR = 20
_FRAMED_SHARE = 1 / 3
FRAMES = (
    "Hi there, {}",
    "Could you please tell me: {}",
    "{} Thanks in advance!",
    "um, {}",
    "Quick question: {}",
    "{} Please.",
    "Hello! {} Thank you.",
)


@dataclass(frozen=True, slots=True)
class Half:
    templates: Templates
    words: Words


@dataclass(frozen=True, slots=True)
class Pair:
    """``kind``: what differs; ``template``: its place in the half."""

    asked: str
    kept: str
    kind: str
    template: int


def pairs(half: Half, count: int, seed: int) -> list[Pair]:
    """``count`` different pairs, the templates by turns as long as they have new ones."""
    rng = random.Random(seed)
    made: dict[tuple[str, str], Pair] = {}
    for turn in range(count * _TRIES_PER_PAIR):
        if len(made) == count:
            break
        number = turn % len(half.templates)
        kind, first, second = half.templates[number]
        asked, kept = fill((first, second), half.words, rng)
        if rng.random() < 0.5:
            asked, kept = kept, asked
        if (asked, kept) not in made and (kept, asked) not in made:
            framed = rng.choice(FRAMES).format(asked) if rng.random() < _FRAMED_SHARE else asked
            made[asked, kept] = Pair(framed, kept, kind, number)
    return list(made.values())


def fill(texts: Sequence[str], words: Words, rng: random.Random) -> list[str]:
    """The texts with one draw of words in all of them."""
    drawn: dict[tuple[str, str], str] = {}
    for name in dict.fromkeys(match[1] for text in texts for match in _SLOT.finditer(text)):
        drawn |= _draw(name, words[name], rng)
    return [_SLOT.sub(lambda match: drawn[match[1], match[2]], text) for text in texts]


def _draw(name: str, choices: Sequence[str] | Sequence[tuple[str, str]], rng: random.Random) -> dict[tuple[str, str], str]:
    if isinstance(choices[0], tuple):
        sides = list(rng.choice(choices))
        rng.shuffle(sides)
        return dict(zip(((name, "a"), (name, "b")), sides, strict=True))
    some = rng.sample(list(choices), min(3, len(choices)))
    return {(name, str(place)): str(word) for place, word in enumerate(some, 1)}


_TUNED_WORDS: Words = {
    "city": "Paris London Berlin Madrid Rome Vienna Oslo Dublin Prague Warsaw Lisbon Athens".split(),
    "person": "Alice Bob Carol David Emma Frank Grace Henry Julia Kevin Laura Martin".split(),
    "animal": "dog cat horse lion wolf bear tiger snake spider shark eagle rabbit".split(),
    "verb": ["bite", "chase", "follow", "attack", "fear", "watch", "help", "hurt"],
    "language": "German English French Spanish Italian Dutch Portuguese Swedish Czech Polish".split(),
    "code": "Python Java Rust Go Ruby Kotlin Swift JavaScript C C++ PHP Perl".split(),
    "thing": ["a phone", "a laptop", "a car", "a bike", "a sofa", "a camera", "a printer", "a watch"],
    "setting": ["dark mode", "notifications", "two-factor login", "auto-save", "the firewall", "Bluetooth", "the alarm"],
    "onoff": [("turn on", "turn off"), ("enable", "disable"), ("switch on", "switch off"), ("activate", "deactivate")],
    "trade": [("buy", "sell"), ("lend", "borrow"), ("rent", "let")],
    "move": [("open", "close"), ("lock", "unlock"), ("install", "uninstall"), ("mount", "unmount"), ("connect", "disconnect")],
    "grow": [("increase", "decrease"), ("raise", "lower"), ("maximize", "minimize"), ("speed up", "slow down")],
    "size": [("bigger", "smaller"), ("heavier", "lighter"), ("older", "younger"), ("faster", "slower"), ("more", "less")],
    "extreme": [("largest", "smallest"), ("highest", "lowest"), ("fastest", "slowest"), ("oldest", "newest"), ("best", "worst")],
    "planet": "Mercury Venus Mars Jupiter Saturn Neptune Uranus".split(),
    "n": ["2", "3", "4", "5", "7", "10", "12", "20", "50", "100"],
    "nword": "two three four five six seven eight nine ten twelve".split(),
    "year": "1914 1939 1945 1969 1989 1999 2001 2008 2016 2020".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "month": "January February April June July September October November December".split(),
    "length": ["kilometers", "miles", "meters", "feet", "inches", "centimeters", "yards"],
    "money": ["dollars", "euros", "pounds", "yen", "francs"],
    "food": ["rice", "pasta", "bread", "milk", "eggs", "honey", "cheese", "garlic"],
    "drug": ["aspirin", "ibuprofen", "paracetamol", "insulin", "penicillin", "codeine"],
    "when": [("before", "after"), ("during", "after"), ("since", "until")],
    "quantity": [("all", "some"), ("all", "no"), ("most", "few"), ("every", "no")],
    "modal": [("must", "may"), ("should", "can"), ("always", "never"), ("often", "rarely")],
    "version": ["3.8", "3.9", "3.11", "2.7", "3.12"],
    "file": ["config.yaml", "settings.json", "main.py", "index.html", "Makefile"],
    "tool": ["Excel", "Word", "Photoshop", "Outlook", "Slack", "Gmail", "Zoom"],
    "company": ["Apple", "Google", "Amazon", "Tesla", "Netflix", "Intel", "Sony"],
    "document": ["invoice", "contract", "report", "letter", "resume", "essay"],
    "plant": ["roses", "tomatoes", "orchids", "ferns", "tulips", "cactuses"],
    "wh": [("When", "Where"), ("Why", "How"), ("When", "Why"), ("Where", "How")],
    "time": ["3 pm", "3 am", "5 pm", "7:30", "8:15", "noon", "midnight"],
    "call": ["`sort()`", "`sorted()`", "`list.append`", "`len(x)`", "`map()`", "`filter()`"],
    "said": ['"good morning"', '"good night"', '"thank you"', '"see you soon"', '"I love you"'],
}

_TUNED: Templates = (
    ("swap", "What are the cheapest flights from {city:1} to {city:2}?", "What are the cheapest flights from {city:2} to {city:1}?"),
    ("swap", "How long is the train ride from {city:1} to {city:2}?", "How long is the train ride from {city:2} to {city:1}?"),
    ("swap", "Why did {person:1} {verb:1} {person:2}?", "Why did {person:2} {verb:1} {person:1}?"),
    ("swap", "Can a {animal:1} {verb:1} a {animal:2}?", "Can a {animal:2} {verb:1} a {animal:1}?"),
    ("swap", "Translate this sentence from {language:1} to {language:2}.", "Translate this sentence from {language:2} to {language:1}."),
    ("swap", "How do I port a program from {code:1} to {code:2}?", "How do I port a program from {code:2} to {code:1}?"),
    ("swap", "Is {planet:1} {size:a} than {planet:2}?", "Is {planet:2} {size:a} than {planet:1}?"),
    ("swap", "Convert {n:1} {length:1} to {length:2}", "Convert {n:1} {length:2} to {length:1}"),
    ("swap", "How many {money:1} are {n:1} {money:2}?", "How many {money:2} are {n:1} {money:1}?"),
    ("swap", "Should I eat {food:1} before {food:2}?", "Should I eat {food:2} before {food:1}?"),
    ("swap", "Did {person:1} owe {person:2} money?", "Did {person:2} owe {person:1} money?"),
    ("swap", "What can I use instead of {food:1} when I have {food:2}?", "What can I use instead of {food:2} when I have {food:1}?"),
    ("swap", "Did {company:1} sue {company:2}?", "Did {company:2} sue {company:1}?"),
    ("swap", "Which {animal:1} looks like a {animal:2}?", "Which {animal:2} looks like a {animal:1}?"),
    ("swap", "Subtract {n:1} from {n:2}", "Subtract {n:2} from {n:1}"),
    ("swap", "How do I call {code:1} from {code:2}?", "How do I call {code:2} from {code:1}?"),
    ("swap", "Is {drug:1} stronger than {drug:2}?", "Is {drug:2} stronger than {drug:1}?"),
    ("antonym", "How do I {onoff:a} {setting:1}?", "How do I {onoff:b} {setting:1}?"),
    ("antonym", "Please {onoff:a} {setting:1} on my tablet", "Please {onoff:b} {setting:1} on my tablet"),
    ("antonym", "Where can I {trade:a} {thing:1}?", "Where can I {trade:b} {thing:1}?"),
    ("antonym", "How do I {move:a} this on my computer?", "How do I {move:b} this on my computer?"),
    ("antonym", "What can I do to {grow:a} my blood pressure?", "What can I do to {grow:b} my blood pressure?"),
    ("antonym", "What is the {extreme:a} city in Europe?", "What is the {extreme:b} city in Europe?"),
    ("antonym", "Is a {animal:1} {size:a} than a {animal:2}?", "Is a {animal:1} {size:b} than a {animal:2}?"),
    ("antonym", "What should I take {when:a} surgery?", "What should I take {when:b} surgery?"),
    ("antonym", "How do I sort a list in ascending order in {code:1}?", "How do I sort a list in descending order in {code:1}?"),
    ("antonym", "What are the advantages of {code:1}?", "What are the disadvantages of {code:1}?"),
    ("antonym", "How do I gain weight with {food:1}?", "How do I lose weight with {food:1}?"),
    ("antonym", "Is it legal to own a {animal:1} in {city:1}?", "Is it illegal to own a {animal:1} in {city:1}?"),
    ("antonym", "How do I export contacts from {tool:1}?", "How do I import contacts from {tool:1}?"),
    ("negation", "Which foods contain {food:1}?", "Which foods do not contain {food:1}?"),
    ("negation", "Is {drug:1} safe for children?", "Is {drug:1} not safe for children?"),
    ("negation", "Why does {tool:1} start by itself?", "Why doesn't {tool:1} start by itself?"),
    ("negation", "How do I make a cake with {food:1}?", "How do I make a cake without {food:1}?"),
    ("negation", "Should I tell {person:1} the truth?", "Should I never tell {person:1} the truth?"),
    ("negation", "List countries that are in the EU and like {city:1}", "List countries that aren't in the EU and like {city:1}"),
    ("negation", "Delete all files except {file:1}", "Delete all files and {file:1}"),
    ("number", "What is {n:1} percent of 340?", "What is {n:2} percent of 340?"),
    ("number", "Give me {nword:1} tips for growing {plant:1}", "Give me {nword:2} tips for growing {plant:1}"),
    ("number", "Who won the election in {year:1}?", "Who won the election in {year:2}?"),
    ("number", "What is new in Python {version:1}?", "What is new in Python {version:2}?"),
    ("number", "Write a {n:1}-line poem about {plant:1}", "Write a {n:2}-line poem about {plant:1}"),
    ("number", "How much is ${n:1} in {money:3}?", "How much is ${n:2} in {money:3}?"),
    ("number", "What is {n:1}*{n:2}?", "What is {n:1}+{n:2}?"),
    ("number", "Who was the first president of {city:1}?", "Who was the third president of {city:1}?"),
    ("unit", "How far is {city:1} from {city:2} in {length:1}?", "How far is {city:1} from {city:2} in {length:2}?"),
    ("unit", "Is {n:1} grams of {food:1} a day too much?", "Is {n:1} kilograms of {food:1} a day too much?"),
    ("unit", "How many minutes are in {n:1} hours?", "How many seconds are in {n:1} hours?"),
    ("date", "Is the museum in {city:1} open on {day:1}?", "Is the museum in {city:1} open on {day:2}?"),
    ("date", "What is the weather like in {city:1} in {month:1}?", "What is the weather like in {city:1} in {month:2}?"),
    ("date", "Book a table for {n:1} at {time:1}", "Book a table for {n:1} at {time:2}"),
    ("date", "What happened today in {city:1}?", "What happened yesterday in {city:1}?"),
    ("name", "What is the population of {city:1}?", "What is the population of {city:2}?"),
    ("name", "Who founded {company:1}?", "Who founded {company:2}?"),
    ("name", "How do I reverse a string in {code:1}?", "How do I reverse a string in {code:2}?"),
    ("name", "Does {person:1} work at {company:1}?", "Does {person:2} work at {company:1}?"),
    ("name", "How do I open {file:1}?", "How do I open {file:2}?"),
    ("name", "How do I undo a change in {tool:1}?", "How do I undo a change in {tool:2}?"),
    ("name", "What are the side effects of {drug:1}?", "What are the side effects of {drug:2}?"),
    ("question", "{wh:a} did {person:1} leave {city:1}?", "{wh:b} did {person:1} leave {city:1}?"),
    ("question", "Can I cancel my {document:1}?", "How can I cancel my {document:1}?"),
    ("question", "How many {animal:1}s live in {city:1}?", "How do {animal:1}s live in {city:1}?"),
    ("question", "Who invented {food:1}?", "Who discovered {food:1}?"),
    ("question", "What is {code:1} used for?", "What is used for {code:1}?"),
    ("question", "Is {company:1} hiring?", "Why is {company:1} hiring?"),
    ("quantifier", "Do {quantity:a} {animal:1}s sleep at night?", "Do {quantity:b} {animal:1}s sleep at night?"),
    ("quantifier", "{modal:a} a tenant pay for the {document:1}?", "{modal:b} a tenant pay for the {document:1}?"),
    ("quantifier", "Who are only some of the heroes of {city:1}?", "Who are all of the heroes of {city:1}?"),
    ("quantifier", "Who is the president of {city:1}?", "Who was the president of {city:1}?"),
    ("language", "What is the capital of Peru? Answer in {language:1}.", "What is the capital of Peru? Answer in {language:2}."),
    ("language", "How do you say {said:1} in {language:1}?", "How do you say {said:1} in {language:2}?"),
    ("language", "What is the weather in {city:1}?", "Wie ist das Wetter in {city:1}?"),
    ("code", "What does {call:1} do in Python?", "What does {call:2} do in Python?"),
    ("code", "Explain `a[{n:1}:{n:2}]`", "Explain `a[{n:2}:{n:1}]`"),
    ("quote", "Translate {said:1} into {language:1}", "Translate {said:2} into {language:1}"),
    ("extra", "Write a {document:1} for my landlord", "Write a {document:1} for my neighbour"),
    ("extra", "How do I grow {plant:1}?", "How do I grow {plant:1} indoors?"),
    ("extra", "What is the price of {thing:1}?", "What is the price of {thing:1} repair?"),
)

_HELD_WORDS: Words = {
    "town": "Kyoto Osaka Nairobi Lima Toronto Seattle Mumbai Seoul Sydney Cairo Helsinki Geneva".split(),
    "name": "Sofia Omar Priya Chen Marta Ivan Leila Noah Yuki Pedro Anna Tom".split(),
    "job": ["teacher", "lawyer", "doctor", "nurse", "pilot", "waiter", "driver", "farmer", "baker", "painter"],
    "act": ["pay", "thank", "blame", "trust", "teach", "visit", "forgive", "hire", "invite", "call"],
    "tongue": "Japanese Korean Arabic Hindi Turkish Greek Finnish Russian Chinese Hebrew".split(),
    "lang": "TypeScript Scala Haskell Lua Julia Dart Elixir R MATLAB SQL".split(),
    "device": ["router", "printer", "thermostat", "smartwatch", "tablet", "speaker", "doorbell"],
    "feature": ["location sharing", "read receipts", "airplane mode", "automatic updates", "cookies", "subtitles", "roaming"],
    "toggle": [("start", "stop"), ("show", "hide"), ("allow", "block"), ("mute", "unmute"), ("add", "remove"), ("pause", "resume")],
    "flow": [("upload", "download"), ("send", "receive"), ("encrypt", "decrypt"), ("push", "pull"), ("compress", "decompress")],
    "adj": [("hot", "cold"), ("wet", "dry"), ("hard", "soft"), ("sweet", "bitter"), ("thick", "thin"), ("raw", "cooked")],
    "cmp": [("taller", "shorter"), ("richer", "poorer"), ("safer", "riskier"), ("stronger", "weaker"), ("cheaper", "pricier")],
    "sup": [("longest", "shortest"), ("richest", "poorest"), ("deepest", "shallowest"), ("hottest", "coldest"), ("earliest", "latest")],
    "metal": "gold silver copper iron lead zinc nickel tin".split(),
    "amount": ["6", "8", "15", "25", "30", "45", "60", "75", "90", "250"],
    "amountword": "eleven fifteen thirty forty sixty seventy eighty ninety thirteen nineteen".split(),
    "decade": "1066 1492 1776 1815 1848 1871 1917 1957 1963 2012".split(),
    "weekday": "Mondays Tuesdays Wednesdays Thursdays Fridays Saturdays Sundays".split(),
    "season": ["spring", "summer", "winter", "August", "May", "March"],
    "weight": ["grams", "ounces", "kilograms", "tons", "carats", "stones"],
    "heat": ["Celsius", "Fahrenheit", "Kelvin"],
    "dish": ["soup", "curry", "pizza", "salad", "lasagna", "paella", "sushi"],
    "illness": ["flu", "asthma", "measles", "malaria", "diabetes", "migraine", "gout"],
    "sport": ["football", "tennis", "cricket", "hockey", "rugby", "golf"],
    "brand": ["Nike", "Adidas", "Samsung", "Toyota", "Honda", "Pepsi", "Nokia"],
    "app": ["WhatsApp", "Instagram", "Spotify", "Telegram", "LinkedIn", "Dropbox", "Notion"],
    "path": ["/etc/hosts", "/var/log/syslog", "~/.bashrc", "C:\\temp\\a.txt", "src/app.ts"],
    "site": ["https://example.org/a", "https://example.org/b", "example.com", "help@example.com", "sales@example.com"],
    "snippet": ["`git reset --hard`", "`git reset --soft`", "`rm -r x`", "`rm -f x`", "`chmod 644 f`", "`chmod 755 f`"],
    "words": ['"to be or not to be"', '"carpe diem"', '"break a leg"', '"piece of cake"', '"spill the beans"'],
    "rel": [("his", "her"), ("my", "your"), ("our", "their")],
    "count": [("all", "none"), ("both", "neither"), ("many", "few"), ("each", "no")],
    "can": [("can", "must"), ("will", "should"), ("might", "must"), ("usually", "seldom")],
    "ask": [("Who", "What"), ("When", "How"), ("Where", "Why"), ("How", "Why")],
    "tense": [("is", "was"), ("was", "will be"), ("does", "did")],
    "place": [("above", "below"), ("inside", "outside"), ("left of", "right of"), ("in front of", "behind")],
}

_HELD: Templates = (
    ("swap", "Which bus goes from {town:1} to {town:2}?", "Which bus goes from {town:2} to {town:1}?"),
    ("swap", "Why does the {job:1} {act:1} the {job:2}?", "Why does the {job:2} {act:1} the {job:1}?"),
    ("swap", "Will {name:1} {act:1} {name:2} tomorrow?", "Will {name:2} {act:1} {name:1} tomorrow?"),
    ("swap", "How do I translate a menu from {tongue:1} into {tongue:2}?", "How do I translate a menu from {tongue:2} into {tongue:1}?"),
    ("swap", "Can I embed {lang:1} in {lang:2}?", "Can I embed {lang:2} in {lang:1}?"),
    ("swap", "Does {metal:1} melt at a higher temperature than {metal:2}?", "Does {metal:2} melt at a higher temperature than {metal:1}?"),
    ("swap", "What is {amount:1} {weight:1} in {weight:2}?", "What is {amount:1} {weight:2} in {weight:1}?"),
    ("swap", "Convert {amount:1} degrees {heat:1} to {heat:2}", "Convert {amount:1} degrees {heat:2} to {heat:1}"),
    ("swap", "Is {sport:1} more popular than {sport:2} in {town:1}?", "Is {sport:2} more popular than {sport:1} in {town:1}?"),
    ("swap", "Did {brand:1} buy shares of {brand:2}?", "Did {brand:2} buy shares of {brand:1}?"),
    ("swap", "Can {illness:1} cause {illness:2}?", "Can {illness:2} cause {illness:1}?"),
    ("swap", "Write a letter from {name:1} to {name:2}", "Write a letter from {name:2} to {name:1}"),
    ("swap", "Divide {amount:1} by {amount:2}", "Divide {amount:2} by {amount:1}"),
    ("swap", "How do I move photos from {app:1} to {app:2}?", "How do I move photos from {app:2} to {app:1}?"),
    ("swap", "Is {name:1} the boss of {name:2}?", "Is {name:2} the boss of {name:1}?"),
    ("swap", "Should {dish:1} be served after {dish:2}?", "Should {dish:2} be served after {dish:1}?"),
    ("swap", "What does the {job:1}'s {job:2} earn?", "What does the {job:2}'s {job:1} earn?"),
    ("swap", "Replace {metal:1} with {metal:2} in my text", "Replace {metal:2} with {metal:1} in my text"),
    ("antonym", "How can I {toggle:a} {feature:1} on my {device:1}?", "How can I {toggle:b} {feature:1} on my {device:1}?"),
    ("antonym", "How can I {flow:a} a file with {app:1}?", "How can I {flow:b} a file with {app:1}?"),
    ("antonym", "Is {dish:1} better {adj:a}?", "Is {dish:1} better {adj:b}?"),
    ("antonym", "Why is a {job:1} {cmp:a} than a {job:2}?", "Why is a {job:1} {cmp:b} than a {job:2}?"),
    ("antonym", "What is the {sup:a} river near {town:1}?", "What is the {sup:b} river near {town:1}?"),
    ("antonym", "What stands {place:a} the church in {town:1}?", "What stands {place:b} the church in {town:1}?"),
    ("antonym", "How do I accept the offer of {brand:1}?", "How do I reject the offer of {brand:1}?"),
    ("antonym", "What are the pros of using {app:1}?", "What are the cons of using {app:1}?"),
    ("antonym", "What causes {illness:1}?", "What prevents {illness:1}?"),
    ("antonym", "Which vitamins help against {illness:1}?", "Which vitamins worsen {illness:1}?"),
    ("antonym", "How do I get into {app:1}?", "How do I get out of {app:1}?"),
    ("antonym", "Why did shares of {brand:1} rise?", "Why did shares of {brand:1} fall?"),
    ("antonym", "What is the minimum age for {sport:1}?", "What is the maximum age for {sport:1}?"),
    ("antonym", "Is {metal:1} a good conductor?", "Is {metal:1} a bad conductor?"),
    ("antonym", "Who was the predecessor of the mayor of {town:1}?", "Who was the successor of the mayor of {town:1}?"),
    ("negation", "Is {illness:1} contagious?", "Is {illness:1} non-contagious?"),
    ("negation", "What happens if I pay my {device:1} bill?", "What happens if I don't pay my {device:1} bill?"),
    ("negation", "Which cities have a metro like {town:1}?", "Which cities have no metro like {town:1}?"),
    ("negation", "Can I use {app:1} with an account?", "Can I use {app:1} without an account?"),
    ("negation", "What are common {sport:1} rules?", "What are uncommon {sport:1} rules?"),
    ("negation", "Why can {name:1} vote?", "Why can't {name:1} vote?"),
    ("negation", "Name players of {sport:1} who ever won", "Name players of {sport:1} who never won"),
    ("negation", "What should I cook instead of {dish:1}?", "What should I cook with {dish:1}?"),
    ("number", "How do I boil an egg for {amount:1} minutes?", "How do I boil an egg for {amount:2} minutes?"),
    ("number", "Summarize the history of {town:1} in {amountword:1} words", "Summarize the history of {town:1} in {amountword:2} words"),
    ("number", "What happened in {town:1} in {decade:1}?", "What happened in {town:1} in {decade:2}?"),
    ("number", "Is {amount:1}% interest high?", "Is {amount:2}% interest high?"),
    ("number", "Which {device:1} costs less than {amount:1} euros?", "Which {device:1} costs less than {amount:2} euros?"),
    ("number", "Explain chapter {amount:1} of the book", "Explain chapter {amount:2} of the book"),
    ("number", "What is {amount:1} / {amount:2}?", "What is {amount:1} - {amount:2}?"),
    ("number", "Is it the second time that {town:1} hosts the games?", "Is it the fourth time that {town:1} hosts the games?"),
    ("unit", "How many {weight:1} of {metal:1} fit into a cup?", "How many {weight:2} of {metal:1} fit into a cup?"),
    ("unit", "Will it be {amount:1} degrees {heat:1} in {town:1}?", "Will it be {amount:1} degrees {heat:2} in {town:1}?"),
    ("unit", "Can I run {amount:1} km in {amount:2} days?", "Can I run {amount:1} km in {amount:2} weeks?"),
    ("date", "Does the office in {town:1} close early on {weekday:1}?", "Does the office in {town:1} close early on {weekday:2}?"),
    ("date", "Is it cheap to fly to {town:1} in {season:1}?", "Is it cheap to fly to {town:1} in {season:2}?"),
    ("date", "Which matches of {sport:1} are on this week?", "Which matches of {sport:1} are on next week?"),
    ("name", "What language is spoken in {town:1}?", "What language is spoken in {town:2}?"),
    ("name", "How do I delete my {app:1} account?", "How do I delete my {app:2} account?"),
    ("name", "Where are {brand:1} products made?", "Where are {brand:2} products made?"),
    ("name", "What is in {path:1}?", "What is in {path:2}?"),
    ("name", "Should I write to {site:1}?", "Should I write to {site:2}?"),
    ("name", "How is {illness:1} treated?", "How is {illness:2} treated?"),
    ("name", "When was {name:1} born?", "When was {name:2} born?"),
    ("name", "What does a {job:1} earn in {town:1}?", "What does a {job:2} earn in {town:1}?"),
    ("question", "{ask:a} broke the window of {name:1}?", "{ask:b} broke the window of {name:1}?"),
    ("question", "Does {brand:1} repair a {device:1}?", "Where does {brand:1} repair a {device:1}?"),
    ("question", "How much {dish:1} should I eat?", "How often should I eat {dish:1}?"),
    ("question", "How old is {name:1}?", "How tall is {name:1}?"),
    ("question", "{tense:a} the shop of {name:1} open late?", "{tense:b} the shop of {name:1} open late?"),
    ("quantifier", "Are {count:a} of these {device:1}s waterproof?", "Are {count:b} of these {device:1}s waterproof?"),
    ("quantifier", "What {can:a} a {job:1} wear?", "What {can:b} a {job:1} wear?"),
    ("quantifier", "Is only {name:1} allowed to sign?", "Is {name:1} only allowed to sign?"),
    ("quantifier", "What is the phone number of {rel:a} {job:1}?", "What is the phone number of {rel:b} {job:1}?"),
    ("language", "Write a greeting to {name:1} in {tongue:1}", "Write a greeting to {name:1} in {tongue:2}"),
    ("language", "Explain {words:1}, but reply in {tongue:1}", "Explain {words:1}"),
    ("language", "Where is the station in {town:1}?", "¿Dónde está la estación en {town:1}?"),
    ("code", "What does {snippet:1} do?", "What does {snippet:2} do?"),
    ("code", "In {lang:1}, is `x == {amount:1}` right?", "In {lang:1}, is `x = {amount:1}` right?"),
    ("quote", "What does {words:1} mean?", "What does {words:2} mean?"),
    ("extra", "Recommend a {device:1} for a {job:1}", "Recommend a {device:1} for a retired {job:1}"),
    ("extra", "What is the best {dish:1} in {town:1}?", "What is the best vegan {dish:1} in {town:1}?"),
    ("extra", "How do I join a {sport:1} club?", "How do I leave a {sport:1} club?"),
)

TUNED = Half(_TUNED, _TUNED_WORDS)
HELD_OUT = Half(_HELD, _HELD_WORDS)
