"""The container Cargo that ships: one small program in an image of its own, for linux/amd64.

    echo.c       the program, without a C library
    image.tar    the image in the OCI's layout; ``python -m runtimes.container.echo.build`` makes it, the same bytes each time
    cargo.toml   names the image by its digest
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
