"""A support chat's log, made with a seeded generator: what customers of a shop for devices and subscriptions ask, with what each line
means.

An intent is what somebody wants to know, with slots for what it is about; two lines have the same answer if, and only if, intent and
slots are equal. The first wording is how it is mostly asked. A line either asks something new or repeats an earlier one: word for word,
with care for neither case nor punctuation, with another polite frame, or in another wording. Many intents have a neighbour that differs
in one word (turn on, turn off), and slots hold numbers, names and days; those are what a careless cache mixes up.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tests.coordinator.cache.cache_paraphrases import HELD_OUT, TUNED, careless

_SLOT = re.compile(r"\{(\w+)\}")
FRAMES = (*TUNED.frames, *HELD_OUT.frames)
REPEATED = 0.35  # of all lines
# How a repeat is made, and how often: assumed, for no log that may be shown says it.
MANNERS = (("same", 0.40), ("careless", 0.15), ("framed", 0.20), ("reworded", 0.25))

SLOTS: dict[str, Sequence[str]] = {
    "device": "router laptop tablet camera printer speaker headset monitor drone thermostat doorbell smartwatch".split(),
    "part": ["battery", "charger", "screen", "cable", "lens", "keyboard", "remote", "power adapter", "memory card"],
    "plan": ["Basic", "Family", "Premium", "Student", "Business", "Starter"],
    "country": "Germany France Spain Italy Poland Sweden Norway Austria Ireland Portugal Greece Finland".split(),
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split(),
    "n": ["2", "3", "5", "7", "10", "14", "30", "60", "90"],
    "app": ["Android", "iPhone", "Windows", "Linux", "iPad", "Chromebook"],
    "setting": ["dark mode", "notifications", "two-factor authentication", "parental controls", "automatic updates", "location sharing"],
    "card": ["Visa", "Mastercard", "PayPal", "Klarna", "Apple Pay", "bank transfer"],
    "code": ["E01", "E02", "E17", "E23", "F3", "F4", "0x80", "0x81"],
    "color": ["red", "blue", "green", "orange", "white", "yellow"],
}

INTENTS: dict[str, Sequence[str]] = {
    "password.reset": (
        "How do I reset my {app} app password?",
        "How can I reset my {app} app password?",
        "I forgot the password of my {app} app",
    ),
    "password.change": (
        "How do I change my {app} app password?",
        "how to change my {app} app password",
        "What's the best way to change my {app} app password?",
    ),
    "setting.on": (
        "How do I turn on {setting} on my {device}?",
        "How can I enable {setting} on my {device}?",
        "How do I switch on {setting} on my {device}?",
    ),
    "setting.off": (
        "How do I turn off {setting} on my {device}?",
        "How can I disable {setting} on my {device}?",
        "How do I switch off {setting} on my {device}?",
    ),
    "setting.why": ("What does {setting} do on a {device}?", "Could you explain what {setting} does on a {device}?"),
    "plan.price": ("How much does the {plan} plan cost?", "What is the price of the {plan} plan?", "How much is the {plan} plan?"),
    "plan.upgrade": ("How do I upgrade to the {plan} plan?", "How can I upgrade to the {plan} plan?", "I want to move up to {plan}"),
    "plan.downgrade": (
        "How do I downgrade to the {plan} plan?",
        "How can I downgrade to the {plan} plan?",
        "I want to move down to {plan}",
    ),
    "plan.cancel": ("How do I cancel my {plan} plan?", "How can I cancel my {plan} plan?", "What is the way to cancel my {plan} plan?"),
    "plan.can_cancel": ("Can I cancel my {plan} plan within {n} days?", "Is it possible to cancel my {plan} plan within {n} days?"),
    "plan.pause": ("Can I pause my {plan} plan for {n} days?", "Is it possible to pause my {plan} plan for {n} days?"),
    "plan.devices": ("How many devices can I use with the {plan} plan?", "Tell me how many devices I can use with the {plan} plan"),
    "plan.with": ("Can I use a {device} with the {plan} plan?", "Is it possible to use a {device} with the {plan} plan?"),
    "plan.without": ("Can I use a {device} without the {plan} plan?", "Is it possible to use a {device} without the {plan} plan?"),
    "ship.to": (
        "Do you ship a {device} to {country}?",
        "Can you tell me if you ship a {device} to {country}?",
        "{country} shipping for {device}?",
    ),
    "ship.from": ("Do you ship a {device} from {country}?", "Can you tell me if you ship a {device} from {country}?"),
    "ship.cost": (
        "How much is shipping to {country}?",
        "How much does shipping to {country} cost?",
        "What is the price of shipping to {country}?",
    ),
    "ship.time": ("How long does delivery to {country} take?", "I'd like to know how long delivery to {country} takes"),
    "ship.day": (
        "Do you deliver in {country} on {day}?",
        "On {day}, do you deliver in {country}?",
        "I was wondering if you deliver in {country} on {day}",
    ),
    "ship.express": (
        "Is express delivery available in {country}?",
        "Could you tell me whether express delivery is available in {country}?",
    ),
    "order.cancel": (
        "How do I cancel an order for a {device}?",
        "How can I cancel an order for a {device}?",
        "how to cancel an order for a {device}",
    ),
    "order.change": (
        "How do I change an order for a {device}?",
        "How can I modify an order for a {device}?",
        "how to change an order for a {device}",
    ),
    "order.add": ("How do I add a {part} to my {device} order?", "How can I add a {part} to my {device} order?"),
    "order.remove": ("How do I remove a {part} from my {device} order?", "How can I delete a {part} from my {device} order?"),
    "order.late": ("Why is my {device} late?", "Can you tell me why my {device} is late?", "Where on earth is my {device}?"),
    "return.how": (
        "How do I return a {device}?",
        "How can I return a {device}?",
        "What do I need to do to return a {device}?",
        "I want to send back a {device}",
    ),
    "return.days": (
        "Can I return a {device} after {n} days?",
        "After {n} days, can I return a {device}?",
        "Is it possible to return a {device} after {n} days?",
    ),
    "return.opened": ("Can I return an opened {device}?", "Is it possible to return an opened {device}?"),
    "return.unopened": ("Can I return an unopened {device}?", "Is it possible to return an unopened {device}?"),
    "return.cost": (
        "Who pays for the return of a {device} from {country}?",
        "I want to know who pays for the return of a {device} from {country}",
    ),
    "refund.when": ("When do I get my refund for the {device}?", "Could you tell me when I get my refund for the {device}?"),
    "refund.card": ("How long does a refund to {card} take?", "Do you know how long a refund to {card} takes?"),
    "pay.with": (
        "Can I pay with {card} in {country}?",
        "In {country}, can I pay with {card}?",
        "Is it possible to pay with {card} in {country}?",
    ),
    "pay.why_not": ("Why can't I pay with {card}?", "Why can I not pay with {card}?", "{card} payment does not go through"),
    "pay.instalments": ("Can I pay for a {device} in {n} installments?", "Can I pay for a {device} in {n} instalments?"),
    "invoice.get": ("Where can I find the invoice for my {device}?", "I'd like to know where I can find the invoice for my {device}"),
    "warranty.length": ("How long is the warranty of a {device} in {country}?", "How long is a {device}'s warranty in {country}?"),
    "warranty.part": ("Does the warranty of the {device} cover the {part}?", "Does the {device}'s warranty cover the {part}?"),
    "warranty.not": ("Which parts does the warranty of the {device} not cover?", "Which {device} parts are left out of the warranty?"),
    "warranty.extend": ("How do I extend the warranty of my {device}?", "How can I extend my {device}'s warranty?"),
    "repair.how": (
        "How do I fix the {part} of my {device}?",
        "How can I repair the {part} of my {device}?",
        "how to fix the {part} of my {device}",
    ),
    "repair.cost": ("How much does a new {part} for my {device} cost?", "What is the price of a new {part} for my {device}?"),
    "repair.where": ("Where can I have my {device} repaired in {country}?", "In {country}, where can I have my {device} repaired?"),
    "part.replace": (
        "How do I replace the {part} of a {device}?",
        "How can I replace a {device}'s {part}?",
        "My {device} needs another {part}, how?",
    ),
    "part.buy": ("Where can I buy a {part} for a {device}?", "Where can I purchase a {part} for a {device}?"),
    "part.sell": ("Where can I sell a {part} of a {device}?", "Could you tell me where I can sell a {part} of a {device}?"),
    "error.mean": ("What does error {code} on my {device} mean?", "Can you tell me what error {code} on my {device} means?"),
    "error.fix": ("How do I fix error {code} on my {device}?", "How can I fix error {code} on my {device}?", "{device} shows {code}, help"),
    "light.mean": ("Why is the {color} light of my {device} on?", "Do you know why the {color} light of my {device} is on?"),
    "light.off": ("Why is the {color} light of my {device} off?", "Do you know why the {color} light of my {device} is off?"),
    "start.not": ("Why does my {device} not turn on?", "Why doesn't my {device} turn on?", "My {device} is dead"),
    "stop.not": ("Why does my {device} not turn off?", "Why doesn't my {device} turn off?", "My {device} stays on for ever"),
    "heat": ("Is it normal that my {device} gets hot?", "Could you tell me if it is normal that my {device} gets hot?"),
    "connect": ("How do I connect my {device} to my {app} device?", "How can I connect my {device} to my {app} device?"),
    "disconnect": ("How do I disconnect my {device} from my {app} device?", "How can I disconnect my {device} from my {app} device?"),
    "update.how": ("How do I update my {device}?", "How can I update my {device}?", "what are the steps to update my {device}"),
    "update.undo": ("How do I undo an update of my {device}?", "How can I undo an update of my {device}?"),
    "factory": ("How do I reset my {device} to factory settings?", "How can I reset my {device} to factory settings?"),
    "install": ("How do I install the app on {app}?", "How can I install the app on {app}?", "how to install the app on {app}"),
    "uninstall": ("How do I uninstall the app on {app}?", "How can I uninstall the app on {app}?", "how to uninstall the app on {app}"),
    "account.delete": (
        "How do I delete my account on {app}?",
        "How can I remove my account on {app}?",
        "How do I get rid of my account on {app}?",
    ),
    "account.open": ("How do I open an account on {app}?", "How can I open an account on {app}?"),
    "user.add": ("How do I add {n} users to the {plan} plan?", "How can I add {n} users to the {plan} plan?"),
    "user.remove": ("How do I remove {n} users from the {plan} plan?", "How can I delete {n} users from the {plan} plan?"),
    "hours": (
        "Is the store in {country} open on {day}?",
        "On {day}, is the store in {country} open?",
        "I was wondering if the store in {country} is open on {day}",
    ),
    "phone": ("What is the phone number of the store in {country}?", "What's the phone number of the store in {country}?"),
    "stock": ("When is the {color} {device} available again?", "Could you tell me when the {color} {device} is available again?"),
    "compare": (
        "Is the {color} {device} cheaper than the {part}?",
        "Could you tell me if the {color} {device} is cheaper than the {part}?",
    ),
}


@dataclass(frozen=True, slots=True)
class Line:
    """``meaning``: intent and slots. ``manner``: new, or how the repeat was made. ``cost``: of a fresh answer, in tokens."""

    question: str
    meaning: str
    manner: str
    cost: int


def support_log(count: int, seed: int) -> list[Line]:
    """``count`` lines, of which ``REPEATED`` repeat an earlier one."""
    rng = random.Random(seed)
    costs = {intent: rng.randrange(60, 400) for intent in INTENTS}
    asked: dict[str, Line] = {}
    lines: list[Line] = []
    for _ in range(count):
        if asked and rng.random() < REPEATED:
            first = rng.choice(list(asked.values()))
            lines.append(_again(first, rng))
            continue
        while (line := _new(costs, rng)).meaning in asked:
            pass
        asked[line.meaning] = line
        lines.append(line)
    return lines


def _new(costs: dict[str, int], rng: random.Random) -> Line:
    intent = rng.choice(list(INTENTS))
    wordings = INTENTS[intent]
    names = sorted({name for text in wordings for name in _SLOT.findall(text)})
    slots = {name: rng.choice(SLOTS[name]) for name in names}
    text = wordings[0] if rng.random() < 0.6 else rng.choice(wordings)
    meaning = "|".join([intent, *(f"{name}={value}" for name, value in slots.items())])
    return Line(_filled(text, slots), meaning, "new", costs[intent] + rng.randrange(60))


def _again(first: Line, rng: random.Random) -> Line:
    (manner,) = rng.choices([name for name, _ in MANNERS], [share for _, share in MANNERS])
    question = first.question
    if manner == "careless":
        question = careless(question, rng)
    elif manner == "framed":
        question = rng.choice(FRAMES).format(question)
    elif manner == "reworded":
        intent, *slots = first.meaning.split("|")
        values = dict(slot.split("=") for slot in slots)
        others = [text for text in (_filled(wording, values) for wording in INTENTS[intent]) if text != question]
        question = rng.choice(others)
    return Line(question, first.meaning, manner, first.cost)


def _filled(text: str, slots: dict[str, str]) -> str:
    return _SLOT.sub(lambda match: slots[match[1]], text)
