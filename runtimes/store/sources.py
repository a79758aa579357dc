"""Where a model can come from, as text: parsing only, nothing is opened here.

    file:PATH                                     a file of this machine, used where it lies
    https://HOST/PATH                             http:// only to this machine itself, for tests and local mirrors
    hf:OWNER/NAME[:FILE]                          a hub repository; without FILE the best GGUF is chosen
    pypi:NAME==VERSION/PATH[!MEMBER]              a file in a wheel, or in a zip inside it, by the user's own pip
    peer:SHA256                                   from another Island, by content hash

Each may end in ``#sha256=HEX``. A model may be several sources, joined in order.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from protocol.errors import ConfigError
from protocol.limits import MODEL_PARTS_MAX

POSSIBLE = "file:PATH, https://…, hf:OWNER/NAME[:FILE], pypi:NAME==VERSION/PATH[!MEMBER]"
SCHEMES = frozenset({"file", "http", "https", "hf", "pypi", "peer"})
QUANTISATIONS = ("Q4_K_M", "Q4_K_S", "Q5_K_M", "Q8_0")  # mission.md, Islands: the order of choice

# What the cache calls its own files (store.py); a model's file may not be mistaken for one.
RESERVED_SUFFIXES = frozenset({".note", ".tree", ".origin", ".file", ".lock", ".partial", ".state", ".wheel", ".tmp"})

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_HASH = re.compile(r"[0-9a-f]{64}")
_HASH_MARK = "#sha256="
# Both must start with a letter or digit: the text becomes an argument of pip and may not look like an option.
_PROJECT = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.!+_-]*")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_SUFFIX = re.compile(r"\.[a-z0-9]{1,8}")
_PART_SUFFIX = re.compile(r"\.part[-_]?\d+$")


@dataclass(frozen=True, slots=True)
class FileSource:
    path: str


@dataclass(frozen=True, slots=True)
class WebSource:
    url: str


@dataclass(frozen=True, slots=True)
class HubSource:
    """``file`` is None where the repository's files have to be looked at first."""

    repository: str
    file: str | None


@dataclass(frozen=True, slots=True)
class WheelSource:
    """``member`` names a file of the zip at ``path``, where the wheel holds a zip."""

    project: str
    version: str
    path: str
    member: str | None


@dataclass(frozen=True, slots=True)
class PeerSource:
    content_hash: str


Source = FileSource | WebSource | HubSource | WheelSource | PeerSource


@dataclass(frozen=True, slots=True)
class Part:
    """One source with what it must hash to, if that is known. ``text`` is the URI without its hash."""

    text: str
    source: Source
    sha256: str | None

    @property
    def file_name(self) -> str:
        """The last piece of the path, for names and suffixes; never used as a path."""
        match self.source:
            case FileSource(path):
                return PurePosixPath(path).name
            case WebSource(url):
                return PurePosixPath(unquote(urlsplit(url).path)).name
            case HubSource(repository, file):
                return PurePosixPath(file).name if file else PurePosixPath(repository).name + ".gguf"
            case WheelSource(_, _, path, member):
                return PurePosixPath(member or path).name
            case PeerSource(digest):
                return digest


@dataclass(frozen=True, slots=True)
class Origin:
    """All parts of a model in order, and the hash of the joined file if it is known."""

    parts: tuple[Part, ...]
    sha256: str | None

    def __post_init__(self) -> None:
        if not 1 <= len(self.parts) <= MODEL_PARTS_MAX:
            raise ConfigError(f"A model has 1 to {MODEL_PARTS_MAX} parts, not {len(self.parts)}.")

    @property
    def text(self) -> str:
        return " ".join(part.text for part in self.parts)

    @property
    def suffix(self) -> str:
        """``.gguf`` of ``model.gguf.part03``; empty where there is none worth keeping."""
        return suffix_of(_PART_SUFFIX.sub("", self.parts[0].file_name.lower()))

    @property
    def stem(self) -> str:
        """A readable name that may stand in ads, logs and headers (``protocol.checks.label``)."""
        name = PurePosixPath(_PART_SUFFIX.sub("", self.parts[0].file_name))
        stem = name.stem if _SUFFIX.fullmatch(name.suffix.lower()) else name.name
        return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-")[:100] or "model"


def suffix_of(name: str) -> str:
    """The ending under which the cache keeps a file of that name; empty where there is none worth keeping."""
    found = PurePosixPath(name.lower()).suffix
    return found if _SUFFIX.fullmatch(found) and found not in RESERVED_SUFFIXES else ""


def scheme_of(text: str) -> str | None:
    """The scheme if ``text`` is a source URI, None if it is a name or a path."""
    found = _SCHEME.match(text)
    return found.group(1).lower() if found else None


def parse_origin(texts: str | Sequence[str], sha256: str | None = None) -> Origin:
    """``sha256`` is that of the joined file; a single source's own hash serves as well. Raises ConfigError."""
    parts = tuple(parse_part(text) for text in ([texts] if isinstance(texts, str) else texts))
    whole = _checked_hash(sha256, "the model") if sha256 is not None else None
    if len(parts) == 1 and parts[0].sha256 is not None:
        if whole not in (None, parts[0].sha256):
            raise ConfigError(f"Two different hashes are given for {parts[0].text}.")
        whole = parts[0].sha256
    return Origin(parts, whole)


def parse_part(text: str) -> Part:
    """Raises ConfigError that says what is wrong and what is possible."""
    body, mark, digest = text.partition(_HASH_MARK)
    expected = _checked_hash(digest, body) if mark else None
    if any(ord(character) < 32 for character in body):
        raise ConfigError(f"A source may not hold control characters: {body!r}.")
    scheme = scheme_of(body)
    if "#" in body and scheme != "file":
        raise ConfigError(f"{body!r} ends in something that is no hash. Write #sha256= and 64 hexadecimal digits.")
    rest = body.partition(":")[2]
    match scheme:
        case "file":
            return Part(body, _parse_file(rest, body), expected)
        case "https" | "http":
            check_url(body)
            return Part(body, WebSource(body), expected)
        case "hf":
            return Part(body, _parse_hub(rest, body), expected)
        case "pypi":
            return Part(body, _parse_wheel(rest, body), expected)
        case "peer":
            return Part(body, PeerSource(_checked_hash(rest, body)), expected or rest.lower())
        case _:
            raise ConfigError(f"{body!r} is not a source that can be read. Possible are: {POSSIBLE}.")


def check_url(url: str) -> None:
    """An address we may talk to: https, or http to this machine itself. Raises ConfigError."""
    try:
        split = urlsplit(url)
        host, _ = split.hostname, split.port
    except ValueError as error:
        raise ConfigError(f"{url!r} is not a web address: {error}.") from error
    if split.scheme not in ("https", "http") or not host:
        raise ConfigError(f"{url!r} is not a web address. Write https://HOST/PATH.")
    if split.username is not None or split.password is not None:
        raise ConfigError(
            f"The address of {host} holds a user name or password; addresses are logged and shared, so take it out."
        )
    if split.scheme == "http" and not is_loopback(host):
        raise ConfigError(f"{url!r} is not encrypted; anybody on the way could swap the model. Use https://.")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_redirect(origin: str, target: str) -> None:
    """A redirect may leave the host but never the encryption, nor reach into this machine from outside. Raises ConfigError."""
    check_url(target)
    before, after = urlsplit(origin), urlsplit(target)
    if before.scheme == "https" and after.scheme == "http":
        raise ConfigError(f"{before.hostname} redirects from https to http, which could swap the model. Refused.")
    if is_loopback(after.hostname or "") and not is_loopback(before.hostname or ""):
        raise ConfigError(f"{before.hostname} redirects to an address on this machine. Refused.")


def choose_gguf(names: Iterable[str]) -> str | None:
    """The file that a repository's name alone stands for: by quantisation, else the first; None where there is none.

    Files that go beside a model (projectors, importance matrices) and models split over files are passed over.
    """
    models = sorted(name for name in names if name.lower().endswith(".gguf") and not _is_side_file(name))
    for wanted in QUANTISATIONS:
        for name in models:
            if re.search(rf"(?<![a-z0-9]){wanted.lower()}(?![a-z0-9_])", name.lower()):
                return name
    return models[0] if models else None


def _is_side_file(name: str) -> bool:
    base = PurePosixPath(name).name.lower()
    return "mmproj" in base or "imatrix" in base or re.search(r"-\d{5}-of-\d{5}\.gguf$", base) is not None


def _checked_hash(text: str, what: str) -> str:
    if not _HASH.fullmatch(text.lower()):
        raise ConfigError(f"The SHA-256 of {what} must be 64 hexadecimal digits, not {text[:80]!r}.")
    return text.lower()


def _parse_file(rest: str, text: str) -> FileSource:
    if rest.startswith("//"):
        split = urlsplit("file:" + rest)
        if split.netloc not in ("", "localhost"):
            raise ConfigError(f"{text!r} names another machine. Write file:/PATH.")
        rest = unquote(split.path)
    if not rest or "\0" in rest:
        raise ConfigError(f"{text!r} names no file. Write file:/PATH.")
    return FileSource(rest)


def _parse_hub(rest: str, text: str) -> HubSource:
    rest = rest.removeprefix("//")
    repository, colon, file = rest.partition(":")
    if not _REPOSITORY.fullmatch(repository) or (colon and not _is_inner_path(file)):
        raise ConfigError(f"{text!r} is not a hub repository. Write hf:OWNER/NAME or hf:OWNER/NAME:FILE.")
    return HubSource(repository, file or None)


def _parse_wheel(rest: str, text: str) -> WheelSource:
    requirement, slash, path = rest.partition("/")
    project, equals, version = requirement.partition("==")
    path, bang, member = path.partition("!")
    sound = slash and equals and _PROJECT.fullmatch(project) and _VERSION.fullmatch(version) and _is_inner_path(path)
    if not sound or (bang and not _is_inner_path(member)):
        raise ConfigError(
            f"{text!r} is not a file in a wheel. Write pypi:NAME==VERSION/PATH or pypi:NAME==VERSION/PATH!MEMBER."
        )
    return WheelSource(project, version, path, member or None)


def _is_inner_path(path: str) -> bool:
    """A relative path with no way up."""
    return bool(path) and not path.startswith("/") and ".." not in PurePosixPath(path).parts
