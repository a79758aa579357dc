"""Which units are in a test, and in which arm: by hashes alone, so every Coordinator says the same at any time. Pure.

A unit is known by a keyed hash of what names it (``unit_key``), so neither the books nor a log have the name. Whether it is enrolled, and
where, are two independent hashes of that: as a test ramps up more units come in, and none changes its arm.
"""

from __future__ import annotations

import hashlib
import hmac

from coordinator.abtests.plan import SHARE_WHOLE, Arm, Plan, RampStep, UnitKind

UNIT_BYTES = 12
_WHOLE = 1 << 64
_UNIT_LABEL = b"archipelag/ab-unit/1\0"
_MS_PER_HOUR = 3_600_000


def unit_key(secret: bytes, kind: UnitKind, test: str, account: str, user: str, job_id: str) -> str:
    """24 hex digits. ``user``: as the request says it; where it says none the account is the unit."""
    if kind is UnitKind.JOB:
        parts: tuple[str, ...] = ("job", job_id)
    elif kind is UnitKind.USER and user:
        parts = ("user", account, user)
    else:
        parts = ("account", account)
    message = _UNIT_LABEL + "\0".join((test, *parts)).encode("utf-8", "surrogatepass")
    return hmac.digest(secret, message, "sha256")[:UNIT_BYTES].hex()


def _place(purpose: str, test: str, unit: str) -> int:
    """Uniform in [0, 2^64)."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{test}\0{unit}".encode()).digest()[:8])


def is_enrolled(test: str, unit: str, percent: float) -> bool:
    """Whether a unit takes part while so many percent of all do. Whoever does at one percentage does at every higher one."""
    return percent >= 100 or _place("enrol", test, unit) < percent / 100 * _WHOLE


def arm_of(plan: Plan, test: str, unit: str) -> Arm:
    """The arm of an enrolled unit."""
    place = _place("arm", test, unit) * SHARE_WHOLE >> 64
    for arm in plan.arms:
        if place < arm.share:
            return arm
        place -= arm.share
    return plan.arms[-1]


def exposure_percent(ramp: tuple[RampStep, ...], active_ms: int) -> float:
    """How many percent of all units are enrolled after a test has run so long."""
    left_ms = float(active_ms)
    for step in ramp:
        if left_ms < step.hours * _MS_PER_HOUR:
            return step.percent
        left_ms -= step.hours * _MS_PER_HOUR
    return 100.0
