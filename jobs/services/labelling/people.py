"""People and their links. A link holds a random token, of which the store keeps the hash."""

from __future__ import annotations

import hashlib
import secrets
import time
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from jobs.services.labelling.tables import ADMIN, LABELLER, people
from orchestrator.errors import DataError

_ADMIN_NAME = "admin"
_MAX_NAME = 80


@dataclass(frozen=True)
class Person:
    id: int
    name: str
    role: str
    paused: bool


def token_hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def link(address: str, token: str) -> str:
    """The link of a token's owner. Browsers do not send what follows the #."""
    return f"{address.rstrip('/')}/#{token}"


def invite(connection: Connection, name: str) -> str:
    """The token of a new labeller; of a known one a new token, which ends the old one and a revocation.

    Raises DataError: the name is unusable.
    """
    if not (0 < len(name) <= _MAX_NAME and name.isprintable() and name == name.strip() and name != _ADMIN_NAME):
        raise DataError(f"{name!r} is no name of a labeller: give 1 to {_MAX_NAME} printable characters, not 'admin'.")
    return _new_token(connection, name, LABELLER)


def new_admin(connection: Connection) -> str:
    """A new token of the admin, which ends the old one."""
    return _new_token(connection, _ADMIN_NAME, ADMIN)


def has_admin(connection: Connection) -> bool:
    return connection.scalar(select(people.c.id).where(people.c.role == ADMIN)) is not None


def revoke(connection: Connection, name: str) -> None:
    """Ends the link of a labeller. What they judged stays. Raises DataError: nobody has this name."""
    _set(connection, name, revoked_at=time.time())


def pause(connection: Connection, name: str, *, paused: bool) -> None:
    """A paused labeller gets no tasks. Raises DataError: nobody has this name."""
    _set(connection, name, paused=paused)


def person_of(connection: Connection, token: str) -> Person | None:
    """The owner of a token. None: it is unknown or was revoked."""
    found = connection.execute(
        select(people.c.id, people.c.name, people.c.role, people.c.paused).where(
            people.c.token_hash == token_hash(token), people.c.revoked_at.is_(None)
        )
    ).first()
    return None if found is None else Person(*found)


def valid_hashes(connection: Connection) -> frozenset[str]:
    """Hashes of all tokens that `person_of` knows."""
    return frozenset(connection.scalars(select(people.c.token_hash).where(people.c.revoked_at.is_(None))))


def _new_token(connection: Connection, name: str, role: str) -> str:
    token = secrets.token_urlsafe(32)
    fresh = {"token_hash": token_hash(token), "revoked_at": None}
    if not connection.execute(update(people).where(people.c.name == name).values(**fresh)).rowcount:
        values = {"name": name, "role": role, "created_at": time.time(), "paused": False, **fresh}
        connection.execute(insert(people).values(**values))
    return token


def _set(connection: Connection, name: str, **values: object) -> None:
    if not connection.execute(update(people).where(people.c.name == name).values(**values)).rowcount:
        raise DataError(f"nobody is called {name!r}; rlhf label people lists the names.")
