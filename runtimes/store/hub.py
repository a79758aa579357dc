"""A model in a hub repository: which file it is, and the https address it lies at.

HF_ENDPOINT names a mirror and HF_TOKEN a token for repositories that ask for one, as other programs know them.
"""

from __future__ import annotations

import os
import re
import time
from urllib.parse import quote

import httpx

from protocol.errors import ConfigError
from runtimes.store.errors import FetchError
from runtimes.store.sources import HubSource, check_url, choose_gguf
from runtimes.store.web import WebPolicy, get_json

_HASH = re.compile(r"[0-9a-f]{64}")
_LISTING_BYTES_MAX = 8 * 1024 * 1024


def hub_token(policy: WebPolicy) -> str | None:
    """The operator's, for what he names himself: a stranger's manifest does not read in his name."""
    return None if policy.public is not None else os.environ.get("HF_TOKEN") or None


def published_hash(url: str, client: httpx.Client, policy: WebPolicy) -> str | None:
    """The SHA-256 that the hub itself publishes for a large file, None where it does not. Raises FetchError."""
    token = hub_token(policy)
    headers = {"authorization": f"Bearer {token}"} if token else {}
    for attempt in range(policy.tries):
        try:
            response = client.head(url, headers=headers)
        except httpx.HTTPError as error:
            if attempt + 1 < policy.tries:
                time.sleep(policy.backoff_s)
                continue
            raise FetchError(f"{url} cannot be reached ({error}). Check the network and start again.") from error
        break
    found = response.headers.get("x-linked-etag", "").strip('"')
    return found if _HASH.fullmatch(found) else None


def resolve_hub(source: HubSource, client: httpx.Client, policy: WebPolicy) -> str:
    """The file's address. Raises FetchError, ConfigError."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    check_url(endpoint + "/")
    file = source.file or _best_file(source, endpoint, client, policy)
    return f"{endpoint}/{source.repository}/resolve/main/{quote(file)}"


def _best_file(source: HubSource, endpoint: str, client: httpx.Client, policy: WebPolicy) -> str:
    listing = get_json(client, f"{endpoint}/api/models/{source.repository}", policy, _LISTING_BYTES_MAX, hub_token(policy))
    siblings = listing.get("siblings") if isinstance(listing, dict) else None
    if not isinstance(siblings, list):
        raise FetchError(
            f"{endpoint} does not list the files of {source.repository}. Name one: hf:{source.repository}:FILE."
        )
    names = [
        entry["rfilename"] for entry in siblings if isinstance(entry, dict) and isinstance(entry.get("rfilename"), str)
    ]
    chosen = choose_gguf(names)
    if chosen is None or ".." in chosen.split("/"):
        raise ConfigError(
            f"{source.repository} holds no GGUF file that stands alone. Look for a repository that ends in -GGUF."
        )
    return chosen
