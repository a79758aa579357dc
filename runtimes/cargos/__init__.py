"""Cargos that ship with the program, beside the models of runtimes/catalogue.py.

    NAME.toml            what ``archipelag-node cargo new`` writes (node/cargo_folder.py), its files named by hash and source
    NAME.example.json    {"input": …, "output": [line, …], "tolerance": 0.001}: what it is given, with 16 bytes of 0 as
                         its seed, and what comes of it

Where an answer hangs on the machine or is too long to be told, "..." stands in an output for any value, as the last of a list for any
further ones, and as a member ("...": "...") for any further members. ``tolerance`` is that of numbers which are
not whole, relative to the larger and at least to 1; without it they are the same everywhere.

The WASM modules of runtimes/wasm/modules are Cargos too; theirs are made from their pins and examples. A Cargo whose files ship has a
folder of its own with its cargo.toml (node/shipped.py); its example stands here.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
