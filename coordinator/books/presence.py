"""Whose books these are, and which Coordinators keep them now.

Theory of operation. The first Coordinator that opens a database writes into it which network's it is, and a print of the secret that seals
what is kept of answers. One of another network is refused at its start, and one with another secret too: it could not open what the
others have sealed. Each Coordinator has a row with the run (``boot``) that it is in and when it was seen last, by the database's clock.
Two with the same identity must not be: a newcomer waits whether the other says something, and should both run in spite of that, the
newer run puts the older one out.

``connection`` is inside ``Database.writing``, but for the questions at the end.
"""

from __future__ import annotations

import hmac

import sqlalchemy as sql

from coordinator.books.schema import coordinators, networks
from protocol.errors import ConfigError

_PRINT_LABEL = b"archipelag/salt-print/1"


class Superseded(ConfigError):
    """A newer run of this Coordinator's identity keeps the books; this one has to end."""


def salt_print(salt_secret: bytes) -> str:
    """Tells two secrets apart and says nothing about them; hex."""
    return hmac.digest(salt_secret, _PRINT_LABEL, "sha256").hex()[:32]


def claim_books(connection: sql.Connection, network: str, print_of_salt: str) -> None:
    """Makes them this network's where they are nobody's yet. Raises ConfigError where they are another's."""
    found = connection.execute(sql.select(networks.c.id, networks.c.salt_print)).first()
    if found is None:
        connection.execute(sql.insert(networks), {"id": network, "salt_print": print_of_salt})
        return
    if found.id != network:
        raise ConfigError(
            f"the books in this database are of network {found.id}, and this Coordinator is of {network}; "
            "give it network.key and salt.key of that network's Coordinator (--network-of, or from a back-up), or another database"
        )
    if found.salt_print != print_of_salt:
        raise ConfigError(
            "the books in this database were sealed with another salt.key; all Coordinators of one database need the same: "
            "copy it from another Coordinator's data folder or from a back-up"
        )


def enter(connection: sql.Connection, peer: str, now_ms: int) -> int:
    """Begins a run of a Coordinator; its boot, which is greater than that of any run before, whatever the clock says."""
    known = connection.execute(sql.select(coordinators.c.boot).where(coordinators.c.peer == peer)).scalar()
    if known is None:
        connection.execute(sql.insert(coordinators), {"peer": peer, "boot": now_ms, "url": "", "seen_at_ms": now_ms})
        return now_ms
    boot = max(now_ms, int(known) + 1)
    connection.execute(sql.update(coordinators).where(coordinators.c.peer == peer).values(boot=boot, url="", seen_at_ms=now_ms))
    return boot


def beat(connection: sql.Connection, peer: str, boot: int, url: str, now_ms: int) -> None:
    """This run lives. Raises Superseded."""
    known = connection.execute(sql.select(coordinators.c.boot).where(coordinators.c.peer == peer)).scalar()
    if known is not None and known > boot:
        raise Superseded(
            f"another Coordinator with this one's identity ({peer}) has started since; each needs a data folder of its own: "
            "delete identity.key in the copied one"
        )
    if known is None:
        connection.execute(sql.insert(coordinators), {"peer": peer, "boot": boot, "url": url, "seen_at_ms": now_ms})
        return
    connection.execute(sql.update(coordinators).where(coordinators.c.peer == peer).values(boot=boot, url=url, seen_at_ms=now_ms))


def leave(connection: sql.Connection, peer: str, boot: int) -> None:
    """This run has ended in good order: what it has left open is free to be taken at once."""
    mine = (coordinators.c.peer == peer) & (coordinators.c.boot == boot)
    connection.execute(sql.update(coordinators).where(mine).values(seen_at_ms=0))


def seen_at_ms(connection: sql.Connection, peer: str) -> int:
    """When a Coordinator was seen last; 0: never, or it has said goodbye."""
    return connection.execute(sql.select(coordinators.c.seen_at_ms).where(coordinators.c.peer == peer)).scalar() or 0


def live_coordinators(connection: sql.Connection, since_ms: int) -> dict[str, int]:
    """Peer id -> boot of every Coordinator that was seen since."""
    chosen = sql.select(coordinators.c.peer, coordinators.c.boot).where(coordinators.c.seen_at_ms >= since_ms)
    return {row.peer: row.boot for row in connection.execute(chosen)}
