"""Models on this machine: brought from their sources, verified, cached, held while in use. Begin with ``ModelStore``."""

from runtimes.store.cache import CacheEntry, StoredModel
from runtimes.store.errors import DiskFull, FetchCancelled, FetchError, WrongContent
from runtimes.store.progress import ConsoleProgress, Progress, no_progress
from runtimes.store.store import ModelStore, default_cache_dir
from runtimes.store.web import WebPolicy

__all__ = [
    "CacheEntry",
    "ConsoleProgress",
    "DiskFull",
    "FetchCancelled",
    "FetchError",
    "ModelStore",
    "Progress",
    "StoredModel",
    "WebPolicy",
    "WrongContent",
    "default_cache_dir",
    "no_progress",
]
