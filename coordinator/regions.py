"""Where Islands stand: policies that keep a job in some regions, and how near two regions are.

An Island says its region itself (``--region de``, ``de-berlin``, ``Switzerland``, ``eu-west``, ``us-east-1``), so a policy selects by what
is reported; it is no legal guarantee. A region is a path from large to small with ``-`` between its parts. The first part is a country by
its ISO 3166 code or its English name, ``eu``, or any other name that Consumers and Islands agree on.

A policy is strict: no region matches none, and of ``eu-…`` only what cannot be elsewhere does. "eu-west-2" is London and "eu-central-2"
Zurich in a well-known cloud, so ``eu`` is followed by a member state or by a point of the compass, and by no number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from protocol import limits

POLICY_REGIONS_MAX = 64
ALLOWED = 'a policy is "eu", "switzerland" or {"regions": ["de", "us-east", …]}'

_EU = frozenset("at be bg cy cz de dk ee es fi fr gr hr hu ie it lt lu lv mt nl pl pt ro se si sk".split())
_COMPASS = frozenset("north south east west central northeast northwest southeast southwest".split())
_EU_WHOLE = frozenset(f"eu-{part}" for part in _COMPASS)  # these alone, nothing behind them
_NAMES = {
    "europe": "eu",
    "el": "gr",
    "uk": "gb",
    "usa": "us",
    **{
        name: code
        for code, name in (
            pair.split(":")
            for pair in """at:austria be:belgium bg:bulgaria cy:cyprus cz:czechia de:germany dk:denmark ee:estonia es:spain fi:finland
            fr:france gr:greece hr:croatia hu:hungary ie:ireland it:italy lt:lithuania lu:luxembourg lv:latvia mt:malta nl:netherlands
            pl:poland pt:portugal ro:romania se:sweden si:slovenia sk:slovakia ch:switzerland no:norway is:iceland li:liechtenstein
            gb:britain ca:canada mx:mexico br:brazil jp:japan cn:china in:india au:australia sg:singapore""".split()
        )
    },
}
_CONTINENTS = {
    code: continent
    for continent, codes in {
        "europe": """eu ad al am at az ba be bg by ch cy cz de dk ee es fi fo fr gb ge gg gi gr hr hu ie im is it je li lt lu lv mc md
        me mk mt nl no pl pt ro rs ru se si sk sm tr ua va xk""",
        "america": """ag ai ar aw bb bm bo br bs bz ca cl co cr cu cw dm do ec fk gd gf gl gp gt gy hn ht jm kn ky lc mq ms mx ni pa pe
        pr py sr sv tc tt us uy vc ve vg vi""",
        "asia": """ae af ap bd bh bn bt cn hk id il in iq ir jo jp kg kh kp kr kw kz la lb lk mm mn mo mv my np om ph pk ps qa sa sg sy
        th tj tl tm tw uz vn ye""",
        "africa": """ao bf bi bj bw cd cf cg ci cm cv dj dz eg er et ga gh gm gn gq gw ke km lr ls ly ma mg ml mr mu mw mz na ne ng re rw
        sc sd sl sn so ss st sz td tg tn tz ug za zm zw""",
        "oceania": "as au ck fj fm gu ki mh mp nc nr nu nz pf pg pw sb to tv vu wf ws",
    }.items()
    for code in codes.split()
}
_REGION = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*\Z")


class Closeness(IntEnum):
    """How near two regions are: one within the other, neighbours, or neither known to be."""

    ANY = 0
    ADJACENT = 1
    SAME = 2


@dataclass(frozen=True, slots=True)
class Residency:
    """A policy: a job stays in these ``regions``, normal names, or in what lies within them. ``name`` is for messages."""

    name: str
    regions: frozenset[str]

    def __str__(self) -> str:
        return self.name

    def allows(self, region: str) -> bool:
        """Whether an Island that reports this region may take the job."""
        path = normal(region)
        if "eu" in self.regions and _is_in_eu(path):
            return True
        return any(whole != "eu" and whole in self.regions for whole in _wholes(path))

    def as_json(self) -> object:
        """What ``parse_policy`` reads as this policy again."""
        if self in (EU, SWITZERLAND):
            return self.name
        return {"regions": sorted(self.regions)}


def _is_in_eu(path: str) -> bool:
    return path == "eu" or path in _EU_WHOLE or path.partition("-")[0] in _EU


def _wholes(path: str) -> Iterator[str]:
    """The region itself, and all that it lies in."""
    while path:
        yield path
        path = path.rpartition("-")[0]


EU = Residency("eu", frozenset({"eu"}))
SWITZERLAND = Residency("switzerland", frozenset({"ch"}))
_NAMED = {"eu": EU, "switzerland": SWITZERLAND}


def parse_policy(value: object) -> Residency:
    """The policy of a job as it stands in JSON. Raises ValueError with a text that says what is allowed."""
    if isinstance(value, str):
        named = _NAMED.get(value.strip().lower())
        if named is None:
            raise ValueError(f"{ALLOWED}, not {value[:40]!r}")
        return named
    if not isinstance(value, dict) or value.keys() != {"regions"}:
        raise ValueError(ALLOWED)
    regions = value["regions"]
    if not isinstance(regions, list) or not 1 <= len(regions) <= POLICY_REGIONS_MAX:
        raise ValueError(f"{ALLOWED} with 1 to {POLICY_REGIONS_MAX} regions")
    found = frozenset(_parse_region(region) for region in regions)
    return Residency(", ".join(sorted(found)), found)


def _parse_region(value: object) -> str:
    if not isinstance(value, str) or len(value) > limits.NAME_CHARS_MAX:
        raise ValueError(f"a region is a name of at most {limits.NAME_CHARS_MAX} characters; {ALLOWED}")
    path = normal(value)
    if not path:
        raise ValueError(f"a region has letters, digits and -, such as de or us-east, unlike {value[:40]!r}")
    return path


def normal(region: str) -> str:
    """``" Germany_Berlin "`` and ``EU-DE-Berlin`` are ``de-berlin``. What cannot be a region is ``""``."""
    path = region.strip().lower().replace("_", "-").replace(" ", "-")
    if not _REGION.match(path):
        return ""
    head, dash, rest = path.partition("-")
    if head == "eu" and rest.partition("-")[0] in _EU:
        return rest
    return _NAMES.get(head, head) + dash + rest


def closeness(one: str, other: str) -> Closeness:
    """How near two reported regions are, for ties alone: adjacent are those on one continent, or that share the first part."""
    a, b = normal(one), normal(other)
    if not a or not b:
        return Closeness.ANY
    if a == b or a.startswith(b + "-") or b.startswith(a + "-"):
        return Closeness.SAME
    first, second = a.partition("-")[0], b.partition("-")[0]
    if first == second or (first in _CONTINENTS and _CONTINENTS[first] == _CONTINENTS.get(second)):
        return Closeness.ADJACENT
    return Closeness.ANY
