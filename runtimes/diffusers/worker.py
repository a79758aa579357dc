"""The worker process of diffusers: ``python -m runtimes.diffusers.worker FD PARENT``, see runtimes/lines/worker.py."""

from __future__ import annotations

import os

from runtimes.diffusers.engine import load
from runtimes.lines.worker import serve

# Read by the libraries when they are imported: they ask no hub, neither for files nor to count themselves, and are quiet.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}


def main() -> None:
    os.environ.update(OFFLINE)
    serve(load)


if __name__ == "__main__":
    main()
