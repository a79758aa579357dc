"""Cargos on the network: publish them, take them back, see which there are; and what an operator decides about them."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from node.commands.common import add_data_dir, data_home, need_coordinator, need_key
from node.settings import defaults, settle
from protocol import checks, limits
from protocol.errors import ConfigError, RemoteProtocolError

if TYPE_CHECKING:
    from coordinator.books.database import Database
    from privacy.keys import NodeKey
    from protocol.cargos import CargoManifest, Revocation

_PUBLISH = """\
Publish a .cargo file at a Coordinator, which tells all Islands of the network. Your API key's account owns the name from the first release
on. Releases only go up, and each is used once.

With --candidate the name goes on to stand for what it stands for, and the new release is run by Islands that name it, NAME@RELEASE, such as
for an A/B test that tries it. From then on Islands that were started with the name alone follow it: to what a test promotes, and to what is
published without --candidate. A name that never had a candidate they take as it stands when they start."""
_REVOKE = """\
Take a Cargo off the network, for good: no Island runs it any more, and what runs of it is ended. WHAT is NAME@RELEASE or an address; with
--key PEER_ID it is everything that this publisher's key has ever signed (for a key that was lost). There is no way back: what was mended is
a new release, a key that was lost a new key.

You revoke your own with publisher.key in the data folder. --as-operator revokes anybody's, with the Coordinator's data folder, and works
beside the running Coordinator."""
_LIST = """\
Show which Cargos a Coordinator lists; without --coordinator, which ones the node with this data folder has heard of."""
_REVIEW = """\
Decide about a Cargo that was published, beside the running Coordinator. WHAT is NAME@RELEASE or an address, STATE approved, rejected or
suspended (jobs are given to it no more, until it is approved again)."""
_LEVEL = """\
Set what an account may publish: individual (3 active Cargos, as long as nothing else is said), verified (10), organization or partner."""
_ADDRESS_CHARS = 64


def add_actions(add: Callable[..., argparse.ArgumentParser]) -> None:
    """``add(name, perform, brief, text)`` makes the parser of one action."""
    publish = add("publish", _publish, "publish a .cargo file at a Coordinator", _PUBLISH)
    publish.add_argument("file", metavar="FILE", help="a .cargo file, which `cargo sign` writes")
    publish.add_argument("--candidate", action="store_true", default=None, help="its name goes on to stand for an earlier release")
    _add_coordinator(publish, "where to publish")
    revoke = add("revoke", _revoke, "take a Cargo off the network, for good", _REVOKE)
    revoke.add_argument("what", nargs="?", metavar="WHAT", help="NAME@RELEASE or an address")
    revoke.add_argument("--key", metavar="PEER_ID", help="instead of WHAT: everything that this publisher's key has signed")
    revoke.add_argument("--reason", metavar="TEXT", help="why; Islands show it")
    revoke.add_argument("--as-operator", action="store_true", default=None, help="the kill switch: anybody's, as the Coordinator")
    _add_coordinator(revoke, "where it was published")
    _add_books(revoke)
    listing = add("list", _list, "show which Cargos there are", _LIST)
    listing.add_argument("--shipped", action="store_true", default=None, help="those that ship with this program instead")
    listing.add_argument("--runtime", metavar="R", help="only those of gguf, onnx, wasm, container or diffusers")
    listing.add_argument("--json", action="store_true", default=None, help="print JSON")
    _add_coordinator(listing, "whose Cargos to show", key=False)
    add_data_dir(listing, "island")
    review = add("review", _review, "approve, reject or suspend a published Cargo", _REVIEW)
    review.add_argument("what", metavar="WHAT", help="NAME@RELEASE or an address")
    review.add_argument("state", metavar="STATE", choices=("approved", "rejected", "suspended"), help="approved, rejected or suspended")
    _add_books(review)
    level = add("level", _level, "set how much an account may publish", _LEVEL)
    level.add_argument("account", metavar="ACCOUNT", help="the account's name")
    level.add_argument("level", metavar="LEVEL", help="individual, verified, organization or partner")
    _add_books(level)


def _add_coordinator(parser: argparse.ArgumentParser, what: str, key: bool = True) -> None:
    parser.add_argument("--coordinator", metavar="URL", help=f"{what}: the Coordinator's URL")
    parser.add_argument("--ca-file", metavar="F", help="certificates to trust for https, PEM")
    if key:
        parser.add_argument("--api-key", metavar="KEY", help="API key with the scope write; better in ARCHIPELAG_API_KEY")


def _add_books(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", metavar="D", help="folder with the key that signs: the publisher's, or the Coordinator's")
    parser.add_argument("--database-url", metavar="URL", help="the Coordinator's database, where it is not in its data folder")


def _settled(arguments: argparse.Namespace, role: str) -> argparse.Namespace:
    return defaults(settle(arguments.parser, arguments, strict=False), data_dir=str(data_home() / role))


def _client(settings: argparse.Namespace) -> Any:
    from node.registry_client import RegistryClient

    return RegistryClient(need_coordinator(settings), getattr(settings, "api_key", None) or "", settings.ca_file)


# -- publish


def _publish(arguments: argparse.Namespace) -> int:
    settings = defaults(settle(arguments.parser, arguments, strict=False), candidate=False)
    client, data = _client(settings), _read(Path(settings.file))
    need_key(settings)
    cargo = _checked(settings.file, data)
    told = client.publish(data, settings.candidate)
    name = f"{cargo.manifest.name} {cargo.manifest.release}"
    if told["address"] != cargo.address:
        raise ConfigError(f"{settings.coordinator} has taken another Cargo than was sent; do not trust it")
    if told["state"] == "approved":
        is_live = told.get("current", True)
        more = "" if is_live else f"; it is a candidate, {cargo.manifest.name} stands for another release"
        offered = cargo.manifest.name if is_live else f"{cargo.manifest.name}@{cargo.manifest.release}"
        print(f"{name} is published; Islands hear of it within seconds{more}\naddress {cargo.address}")
        print(f"Next: an Island offers it with\n  archipelag-node start --coordinator {settings.coordinator} --cargo {offered}")
    else:
        print(f"{name} is {told['state']}; the Coordinator's operator looks at it first\naddress {cargo.address}")
        print(f"Next: its operator says archipelag-node cargo review {cargo.manifest.name}@{cargo.manifest.release} approved")
    return 0


def _checked(file: str, data: bytes) -> Any:
    """What a Coordinator would refuse anyway is said before anything is sent. Raises ConfigError."""
    from protocol.cargos import read_cargo, unexpired

    try:
        cargo = read_cargo(data)
        unexpired(cargo.manifest, _now_ms())
    except RemoteProtocolError as error:
        raise ConfigError(f"{file}: {error}; build and sign it again") from error
    return cargo


# -- revoke


def _revoke(arguments: argparse.Namespace) -> int:
    if (arguments.what is None) == (arguments.key is None):
        raise ConfigError("say what to revoke: NAME@RELEASE, an address, or --key PEER_ID")
    settings = defaults(settle(arguments.parser, arguments, strict=False), reason="", as_operator=False)
    return _revoke_any(settings) if settings.as_operator else _revoke_own(settings)


def _revoke_own(settings: argparse.Namespace) -> int:
    from node.datadir import DataDir
    from protocol.cargos import sign_revocation

    client = _client(settings)
    need_key(settings)
    defaults(settings, data_dir=str(data_home() / "publisher"))
    if not (Path(settings.data_dir).expanduser() / "publisher.key").exists():
        raise ConfigError(f"{settings.data_dir} has no publisher.key; name the folder that the Cargo was signed with: --data-dir")
    key: NodeKey = DataDir.open(settings.data_dir).key("publisher")
    if settings.key not in (None, key.peer_id):
        raise ConfigError(f"the key in {settings.data_dir} is {key.peer_id}; only its own publisher revokes {settings.key}")
    address = "" if settings.key else _address(settings.what) or str(client.show(_reference(settings.what))["address"])
    told = client.revoke(sign_revocation(_revocation(key.peer_id, address, "", settings.reason), key))
    _say_revoked(told["revoked"])
    return 0


def _revoke_any(settings: argparse.Namespace) -> int:
    """The kill switch: into the books, from where every Coordinator of the database takes it within a second."""
    from coordinator.books import cargos as rows
    from node.database import open_books
    from node.datadir import DataDir
    from protocol.cargos import peek_cargo, peek_revocation, sign_revocation
    from protocol.tickets import Delegation, network_id_of, sign_delegation

    defaults(settings, data_dir=str(data_home() / "coordinator"))
    with open_books(settings.data_dir, settings.database_url) as database:
        data = DataDir.open(settings.data_dir)
        if not (data.path / "network.key").exists():
            raise ConfigError(f"{data.path} is no Coordinator's data folder; name it with --data-dir")
        key, network_key = data.key("identity"), data.key("network")
        network = network_id_of(network_key.public_key)
        address = "" if settings.key else _address_in(database, settings.what)
        with database.writing() as connection:
            if rows.network_of(connection) not in ("", network):
                raise ConfigError(f"{data.path} is of another network than the database; name the folder of one of its Coordinators")
            row = rows.cargo_row(connection, address) if address else None
            publisher = settings.key if row is None else peek_cargo(row.envelope).manifest.publisher
            signed = peek_revocation(sign_revocation(_revocation(publisher, address, network, settings.reason), key))
            expires_at_ms = _now_ms() + int(limits.DELEGATION_LIFETIME_S * 1000)
            delegation = sign_delegation(Delegation(network, key.peer_id, expires_at_ms), network_key)
            hit = rows.revoke(connection, signed, delegation, _now_ms())
    _say_revoked(hit)
    return 0


def _revocation(publisher: str, address: str, network: str, reason: str) -> Revocation:
    """Raises ConfigError."""
    from protocol.cargos import REVOCATION_VERSION, Revocation

    try:
        return Revocation(REVOCATION_VERSION, publisher, address, network, reason, _now_ms())
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _say_revoked(addresses: Sequence[str]) -> None:
    if not addresses:
        print("revoked; nothing that is published was still running under it")
    for address in addresses:
        print(f"revoked {address}")
    print("Islands end it within seconds; one that is away, when it comes back. Next: publish what was mended as a new release.")


def _address(what: str) -> str:
    """Empty where it is a name."""
    try:
        checks.content_hash("WHAT", what)
    except ValueError:
        return ""
    return what


def _reference(what: str) -> str:
    """A name alone would stand for another release tomorrow. Raises ConfigError."""
    from protocol.cargos import check_name, release_of

    name, _, release = what.partition("@")
    try:
        check_name(name)
        release_of(release)
    except ValueError:
        raise ConfigError(f"WHAT is NAME@RELEASE, such as text-stats@1.0.0, or an address, not {what[:80]!r}") from None
    return what


def _address_in(database: Database, what: str) -> str:
    """Of a Cargo in the books. Raises ConfigError."""
    from coordinator.books import cargos as rows

    with database.reading() as connection:
        address = _address(what)
        found = [address] if address else rows.addresses_of(connection, *_reference(what).split("@"))
        if found and rows.cargo_row(connection, found[0]) is not None:
            return found[0]
    raise ConfigError(f"the registry has no Cargo {what[:80]}; see archipelag-node cargo list --coordinator URL")


# -- list


def _list(arguments: argparse.Namespace) -> int:
    from protocol.cargos import Runtime

    folder, arguments.data_dir = arguments.data_dir, None  # the file in there is the node's, which names Coordinators in its own way
    settings = defaults(settle(arguments.parser, arguments, strict=False), runtime="", json=False, shipped=False)
    settings.data_dir = folder or settings.data_dir or str(data_home() / "island")
    if settings.runtime and settings.runtime not in list(Runtime):
        raise ConfigError(f"--runtime is one of {', '.join(Runtime)}, not {settings.runtime[:40]!r}")
    if settings.shipped:
        found = _shipped(settings.runtime)
    elif settings.coordinator:
        found = _client(settings).list(settings.runtime)
    else:
        found = [one for one in _heard(settings.data_dir) if settings.runtime in ("", one["runtime"])]
    if settings.json:
        print(json.dumps(found, indent=1))
    else:
        print(_table(found, bool(settings.coordinator)))
    return 0


def _shipped(runtime: str) -> list[dict[str, Any]]:
    from node.shipped import shipped, shipped_names

    found = [one for one in map(shipped, shipped_names()) if one is not None]
    return [_facts(one.manifest, one.address) | {"state": "ships"} for one in found if runtime in ("", one.manifest.runtime)]


def _table(found: Iterable[dict[str, Any]], from_coordinator: bool) -> str:
    """Only what is printable: it is strangers' text."""
    rows = [("name", "release", "runtime", "ask", "size", "address", "")]
    for one in found:
        size = f"{one['size_bytes'] / 1e6:,.1f} MB"
        state = f"{one['state']}, current" if one.get("current") else one["state"]
        rows.append((one["name"], one["release"], one["runtime"], one["ask"], size, one["address"][:16], state))
    if len(rows) == 1:
        more = "" if from_coordinator else " here yet; ask a Coordinator with --coordinator URL"
        return f"no Cargos{more}. Make one with archipelag-node cargo new NAME"
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(str(text).ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(checks.made_printable(line) for line in lines)


def _heard(data_dir: str) -> list[dict[str, Any]]:
    """What a node's data folder says, whether or not the node runs; newest release of a name first."""
    from node.datadir import DataDir
    from node.notice_store import NEWS_FOLDER, NoticeStore
    from node.trust import Pins
    from protocol.cargo_news import read_notice
    from protocol.cargo_shelf import CargoShelf
    from protocol.cargos import release_of
    from protocol.tickets import network_id_of

    if not (Path(data_dir).expanduser() / NEWS_FOLDER).is_dir():
        return []
    data = DataDir.open(data_dir)
    is_coordinator = (data.path / "network.key").exists()
    network = network_id_of(data.key("network").public_key) if is_coordinator else Pins(data).network
    told = NoticeStore(data.path / NEWS_FOLDER).load(lambda notice: read_notice(notice, network, _now_ms()), tidies=False)
    shelf = CargoShelf(network, lambda peer: True)
    for one in told:
        if one.revocation is not None:
            shelf.restore(one.revocation)
        elif one.promotion is not None and shelf.is_newer(one.promotion):
            shelf.promote(one.promotion)
        elif one.cargo is not None and not shelf.is_revoked(one.cargo.address, one.cargo.manifest.publisher):
            shelf.add(one.cargo)
    cargos = [one.cargo for one in told if one.cargo is not None and not shelf.is_revoked(one.cargo.address, one.cargo.manifest.publisher)]
    cargos.sort(key=lambda one: (one.manifest.name, [-part for part in release_of(one.manifest.release)]))
    live = {name: shelf.stands_for(name, _now_ms()) for name in {one.manifest.name for one in cargos}}
    return [{**_facts(one.manifest, one.address), "current": live[one.manifest.name] == one} for one in cargos]


def _facts(manifest: CargoManifest, address: str) -> dict[str, Any]:
    from protocol.prices import format_ask

    return {
        "address": address,
        "name": manifest.name,
        "release": manifest.release,
        "publisher": manifest.publisher,
        "runtime": str(manifest.runtime),
        "state": "expired" if 0 < manifest.expires_at_ms < _now_ms() else "listed",
        "ask": format_ask(manifest.ask),
        "size_bytes": manifest.size_bytes,
    }


# -- what an operator decides


def _review(arguments: argparse.Namespace) -> int:
    from coordinator.books import cargos as rows
    from coordinator.cargo_rules import CargoState, RegistryRefused
    from node.database import open_books

    settings = _settled(arguments, "coordinator")
    with open_books(settings.data_dir, settings.database_url) as database:
        address = _address_in(database, settings.what)
        try:
            with database.writing() as connection:
                row = rows.set_state(connection, address, CargoState(settings.state), _now_ms())
        except RegistryRefused as refused:
            raise ConfigError(f"{settings.what}: {refused}") from None
    print(f"{address} is {row.state}; running Coordinators notice within seconds")
    return 0


def _level(arguments: argparse.Namespace) -> int:
    from coordinator.books import cargos as rows
    from coordinator.books.queries import account_view
    from coordinator.cargo_rules import NAMES_MAX, PublisherLevel
    from node.database import open_books

    settings = _settled(arguments, "coordinator")
    if settings.level not in list(PublisherLevel):
        raise ConfigError(f"LEVEL is one of {', '.join(PublisherLevel)}, not {settings.level[:40]!r}")
    level = PublisherLevel(settings.level)
    with open_books(settings.data_dir, settings.database_url) as database, database.writing() as connection:
        if account_view(connection, settings.account) is None:
            raise ConfigError(f"there is no account {settings.account}; see archipelag-node accounts list")
        rows.set_level(connection, settings.account, level)
    print(f"{settings.account} is {level}: at most {NAMES_MAX[level]:,} active Cargos")
    return 0


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _read(file: Path) -> bytes:
    try:
        with open(file, "rb") as opened:
            return opened.read(limits.ENVELOPE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}; cargo sign writes it") from error
