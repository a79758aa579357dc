"""Addresses of pictures that are kept: ``JOB-INDEX-UNTIL-SIGNATURE.png``, which nobody can guess and nobody can lengthen.

The signature is HMAC-SHA-256 under the secret that all Coordinators of a database share, so each of them knows an address of another. Who
has an address sees the picture, without a key, until its time is over.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass

_LABEL = b"archipelag/image-address/1\0"
_NAME = re.compile(r"(?P<job>[0-9a-f]{24})-(?P<index>[0-9]{1,2})-(?P<until>[0-9a-f]{1,12})-(?P<signature>[0-9a-f]{64})\.[a-z]{1,8}")
CONTENT_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


@dataclass(frozen=True, slots=True)
class ImageAddress:
    """A picture of a job: its place among them, and Unix milliseconds until which it is shown."""

    job_id: str
    index: int
    until_ms: int

    def name(self, secret: bytes, image_format: str) -> str:
        """The last part of its URL. How it ends is for people; what a picture is, its answer says."""
        suffix = image_format if image_format in CONTENT_TYPES else "bin"
        return f"{self._signed}-{self._signature(secret)}.{suffix}"

    @property
    def _signed(self) -> str:
        return f"{self.job_id}-{self.index}-{self.until_ms:x}"

    def _signature(self, secret: bytes) -> str:
        return hmac.digest(secret, _LABEL + self._signed.encode(), "sha256").hex()


def read_name(name: str, secret: bytes, now_ms: int) -> ImageAddress | None:
    """None for a name that was not made here, or whose time is over."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    address = ImageAddress(found["job"], int(found["index"]), int(found["until"], 16))
    is_ours = hmac.compare_digest(found["signature"], address._signature(secret))
    return address if is_ours and now_ms < address.until_ms else None
