"""The newcomer's first command on a clean checkout: a new folder, a new virtual environment, and an answer from a real model.

The second command, ``make test``, is what runs this; on a clean checkout it is .ci/run that runs it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_TIMEOUT_S = 1200  # a machine without a wheel of llama.cpp compiles it


@pytest.mark.network
@pytest.mark.timeout(_TIMEOUT_S + 60)
def test_make_demo_on_a_clean_checkout(tmp_path: Path) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout, so there is nothing to clone")
    clone = tmp_path / "archipelag"
    subprocess.run(["git", "clone", "-q", "--depth", "1", f"file://{ROOT}", str(clone)], check=True, timeout=60)
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    demo = subprocess.run(
        ["make", "demo", "ARGS=--once"],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    said = demo.stdout + demo.stderr
    assert demo.returncode == 0, said[-3000:]
    assert "Paris" in demo.stdout, said[-3000:]
    assert "from island-" in demo.stdout, "it says which Island gave the answer"
