"""Residency policies: what they mean, what they refuse to mean, and what is no policy."""

from __future__ import annotations

import json
import string
from random import Random

import pytest

from coordinator.regions import (
    EU,
    POLICY_REGIONS_MAX,
    SWITZERLAND,
    Closeness,
    Residency,
    closeness,
    normal,
    parse_policy,
)
from protocol import limits

LIST = {"regions": ["DE", "us-east", "Switzerland"]}
ALLOWED: list[tuple[object, str, bool]] = [
    ("eu", "eu", True),
    ("eu", "EU", True),
    ("eu", "Europe", True),
    ("eu", "de", True),
    ("eu", "DE-Berlin", True),
    ("eu", "germany", True),
    ("eu", "eu-de", True),
    ("eu", "eu_fr paris", True),
    ("eu", "eu-west", True),
    ("eu", "eu-west-2", False),  # London
    ("eu", "eu-central-2", False),  # Zurich
    ("eu", "eu-moon", False),
    ("eu", "gb", False),
    ("eu", "uk", False),
    ("eu", "ch", False),
    ("eu", "us-east", False),
    ("eu", "us-de", False),  # Delaware
    ("eu", "", False),
    ("eu", "  ", False),
    ("eu", "de;drop table", False),
    ("eu", "de--berlin", False),
    ("EU", "nl", True),
    ("switzerland", "CH", True),
    ("Switzerland", "ch-zh", True),
    ("switzerland", "Switzerland", True),
    ("switzerland", "li", False),
    ("switzerland", "eu", False),
    ("switzerland", "", False),
    (LIST, "de", True),
    (LIST, "de-hamburg", True),
    (LIST, "den-haag", False),
    (LIST, "us-east", True),
    (LIST, "us-east-1", True),
    (LIST, "us-eastern", False),
    (LIST, "us", False),  # larger than what is allowed
    (LIST, "ch-ge", True),
    (LIST, "fr", False),
    (LIST, "", False),
    ({"regions": ["eu"]}, "it", True),
    ({"regions": ["eu"]}, "eu-west-2", False),
    ({"regions": ["eu-west-2"]}, "eu-west-2", True),
    ({"regions": ["basement"]}, "Basement-Left", True),
]


@pytest.mark.parametrize(("policy", "region", "allowed"), ALLOWED)
def test_what_a_policy_allows(policy: object, region: str, allowed: bool) -> None:
    assert parse_policy(policy).allows(region) is allowed


BAD: list[object] = [
    "",
    "mars",
    "de",
    "x" * 10_000,
    None,
    7,
    1.5,
    True,
    [],
    ["de"],
    {},
    {"regions": []},
    {"regions": "de"},
    {"regions": {"de": 1}},
    {"regions": [""]},
    {"regions": ["de", 7]},
    {"regions": ["de", None]},
    {"regions": ["de' OR 1=1 --"]},
    {"regions": ["-"]},
    {"regions": ["d" * (limits.NAME_CHARS_MAX + 1)]},
    {"regions": ["de"] * (POLICY_REGIONS_MAX + 1)},
    {"regions": ["de"], "but": "not really"},
    {"region": ["de"]},
]


@pytest.mark.parametrize("value", BAD, ids=[repr(value)[:40] for value in BAD])
def test_what_is_no_policy_is_refused_with_what_would_be_one(value: object) -> None:
    with pytest.raises(ValueError, match="region") as refused:
        parse_policy(value)
    assert len(str(refused.value)) < 250


@pytest.mark.parametrize("value", ["eu", "switzerland", LIST, {"regions": ["ch"]}, {"regions": ["eu", "gb"]}])
def test_a_policy_goes_through_json_and_back(value: object) -> None:
    policy = parse_policy(value)
    again = parse_policy(json.loads(json.dumps(policy.as_json())))
    assert again.regions == policy.regions
    assert hash(again) == hash(parse_policy(policy.as_json()))


def test_names_of_policies_are_what_messages_say() -> None:
    assert (str(EU), str(SWITZERLAND), str(parse_policy(LIST))) == ("eu", "switzerland", "ch, de, us-east")


CLOSENESS = [
    ("de", "de", Closeness.SAME),
    ("de", "Germany", Closeness.SAME),
    ("de-berlin", "DE", Closeness.SAME),
    ("de-berlin", "de-hamburg", Closeness.ADJACENT),
    ("de", "fr", Closeness.ADJACENT),
    ("de", "eu-west", Closeness.ADJACENT),
    ("ch", "it", Closeness.ADJACENT),
    ("us-east", "us-west", Closeness.ADJACENT),
    ("us-east", "ca", Closeness.ADJACENT),
    ("de", "us-east", Closeness.ANY),
    ("jp", "za", Closeness.ANY),
    ("moon", "moon", Closeness.SAME),
    ("moon", "mars", Closeness.ANY),
    ("", "", Closeness.ANY),
    ("", "de", Closeness.ANY),
    ("?", "?", Closeness.ANY),
]


@pytest.mark.parametrize(("one", "other", "wanted"), CLOSENESS)
def test_closeness(one: str, other: str, wanted: Closeness) -> None:
    assert closeness(one, other) is closeness(other, one) is wanted


def test_any_text_may_be_a_region_of_an_ad_but_matches_only_as_a_region() -> None:
    rng = Random(4)
    alphabet = string.printable + "äß日"
    everywhere = Residency("test", frozenset({"eu", "ch", "us"}))
    for _ in range(2000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(12)))
        path = normal(text)
        assert normal(path) == path
        if everywhere.allows(text):
            assert path and everywhere.allows(path)
