"""The worker process of an ONNX Cargo (runtimes/lines/worker.py)."""

from __future__ import annotations

from runtimes.lines.worker import serve
from runtimes.onnx.engine import load

if __name__ == "__main__":
    serve(load)
