"""Models on this machine: brought from their sources, verified, cached, held while in use. Begin with ``ModelStore``."""

from runtimes.store.errors import DiskFull, FetchCancelled, FetchError, WrongContent
from runtimes.store.progress import ConsoleProgress, Progress, no_progress
from runtimes.store.store import CacheEntry, ModelStore, StoredModel, default_cache_dir

__all__ = [
    "CacheEntry",
    "ConsoleProgress",
    "DiskFull",
    "FetchCancelled",
    "FetchError",
    "ModelStore",
    "Progress",
    "StoredModel",
    "WrongContent",
    "default_cache_dir",
    "no_progress",
]
