"""The data folder: identity, pins and remembered peers of one node, used by one process at a time.

    format.json    {"format": 1}; a newer program migrates the folder, an older one refuses it
    lock           held with flock while a node runs
    identity.key   32-byte Ed25519 seed, mode 0600
    network.key    Coordinator only: the key that the network is named after, the same for all its Coordinators
    salt.key       Coordinator only: secret behind the cache salts and the kept answers, the same for all Coordinators of one database
    peers.json     peers of the last run
    pins.json      what was learned at first contact: network, Coordinator's peer id by URL
    cargo-news/    what was heard of Cargos and revocations
    claims/        Island only: what Consumers owe for jobs, until a Coordinator has settled it

Everything is written to a temporary file and renamed, so a power cut leaves the old or the new, never half.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from privacy.keys import SEED_BYTES, NodeKey
from protocol.errors import ConfigError

FORMAT = 1
PEERS_FILE = "peers.json"
SHARED_SECRETS = ("network", "salt")  # of all Coordinators of a network
_PRIVATE_DIR, _PRIVATE_FILE = 0o700, 0o600


def write_atomically(path: Path, data: bytes, mode: int = _PRIVATE_FILE, flush: bool = True) -> None:
    """Write beside, flush to disk, rename. Raises OSError; then the old file is untouched.

    Without ``flush`` it survives the death of this process as well, but not a power cut within the next half minute.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            if flush:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _read_secret(file: Path) -> bytes:
    """Raises ConfigError when others could read it, or it is none."""
    try:
        mode = stat.S_IMODE(file.stat().st_mode)
        if mode & 0o077:
            raise ConfigError(f"{file} can be read by others (mode {mode:o}); run: chmod 600 {file}")
        seed = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from error
    if len(seed) != SEED_BYTES:
        raise ConfigError(f"{file} has {len(seed)} bytes instead of {SEED_BYTES}; restore it from a back-up")
    return seed


class DataDir:
    """An opened data folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"<DataDir {self.path}>"

    @classmethod
    def open(cls, path: str | Path) -> DataDir:
        """Creates the folder where there is none, migrates an older one. Raises ConfigError with the way out."""
        folder = Path(path).expanduser()
        try:
            folder.mkdir(mode=_PRIVATE_DIR, parents=True, exist_ok=True)
            opened = cls(folder)
            opened._check_format()
        except OSError as error:
            raise ConfigError(
                f"cannot use the data folder {folder}: {error.strerror}; choose another with --data-dir"
            ) from error
        return opened

    def _check_format(self) -> None:
        file = self.path / "format.json"
        if not file.exists():
            write_atomically(file, json.dumps({"format": FORMAT}).encode())
            return
        try:
            found = json.loads(file.read_text())["format"]
            if type(found) is not int or found < 1:
                raise ValueError("no version number")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f'{file} is damaged ({error}); restore it from a back-up or write {{"format": {FORMAT}}}'
            ) from error
        if found > FORMAT:
            raise ConfigError(
                f"{self.path} was written by a newer archipelag-node (format {found}, this one knows {FORMAT}); upgrade"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process. Raises ConfigError when another node runs on it."""
        with open(self.path / "lock", "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(
                    f"another node already runs on {self.path}; stop it or choose another --data-dir"
                ) from error
            yield

    def key(self, name: str) -> NodeKey:
        """The key in ``NAME.key``, made on first use."""
        return NodeKey(self.secret(name))

    def secret(self, name: str) -> bytes:
        """32 random bytes kept with mode 0600, drawn on first use. Raises ConfigError when others could read them."""
        file = self.path / f"{name}.key"
        if not file.exists():
            write_atomically(file, secrets.token_bytes(SEED_BYTES))
        return _read_secret(file)

    def join(self, other: Path) -> None:
        """Makes this Coordinator one of the network of the Coordinator whose folder ``other`` is, by taking over the secrets that all of
        a network share. Does nothing where that was done before. Raises ConfigError with the way out."""
        taken = {}
        for name in SHARED_SECRETS:
            theirs, ours = other / f"{name}.key", self.path / f"{name}.key"
            if not theirs.exists():
                raise ConfigError(f"{other} has no {name}.key; --network-of takes the data folder of a Coordinator that has been started")
            taken[ours] = _read_secret(theirs)
            if ours.exists() and _read_secret(ours) != taken[ours]:
                raise ConfigError(f"{ours} is another than {theirs}: this folder is of another network; choose a new one with --data-dir")
        theirs, ours = (folder / "identity.key" for folder in (other, self.path))
        if theirs.exists() and ours.exists() and not ours.samefile(theirs) and _read_secret(ours) == _read_secret(theirs):
            raise ConfigError(f"{ours} is a copy of {theirs}, and each Coordinator needs an identity of its own: delete the copy")
        for file, secret in taken.items():
            if not file.exists():
                write_atomically(file, secret)

    def folder(self, name: str) -> Path:
        """A private folder inside, made on first use. Raises ConfigError."""
        folder = self.path / name
        try:
            folder.mkdir(mode=_PRIVATE_DIR, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from error
        return folder

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object, empty where there is no file. Raises ConfigError for a damaged one."""
        file = self.path / name
        if not file.exists():
            return {}
        try:
            value = json.loads(file.read_text())
        except ValueError as error:
            raise ConfigError(f"{file} is damaged ({error}); delete it to start afresh") from error
        if not isinstance(value, dict):
            raise ConfigError(f"{file} holds no JSON object; delete it to start afresh")
        return value

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        write_atomically(self.path / name, json.dumps(value, indent=1).encode())
