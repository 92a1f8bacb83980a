"""The tables of a labelling store (docs/adr/0022-labelling.md). Times are seconds since the epoch."""

from __future__ import annotations

from sqlalchemy import JSON, Boolean, Column, Float, ForeignKey, Index, Integer, MetaData, String, Table, Text, text

VERSION = 1
LABELLER, ADMIN = "labeller", "admin"
# States of a showing. A returned one was taken back before an answer, and its item may be shown to the person again.
OPEN, ANSWERED, SKIPPED, RETURNED = "open", "answered", "skipped", "returned"

metadata = MetaData()
_json = JSON(none_as_null=True)

about = Table("about", metadata, Column("version", Integer, primary_key=True, autoincrement=False))

people = Table(
    "people",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(80), nullable=False, unique=True),
    Column("role", String(10), nullable=False),
    Column("token_hash", String(64), nullable=False, unique=True),
    Column("created_at", Float, nullable=False),
    Column("revoked_at", Float),
    Column("paused", Boolean, nullable=False),
)

items = Table(
    "items",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("key", String(64), nullable=False, unique=True),  # digest of the content
    Column("prompt_id", String(200), nullable=False),
    Column("kind", String(10), nullable=False),
    Column("gold", _json),  # the known answer, as in judgements; null: none
    Column("batch", String(200), nullable=False),
    Column("priority", Float, nullable=False),
    Column("overlap", Integer, nullable=False),  # number of people who shall judge it
    Column("num_judgements", Integer, nullable=False),  # without those that were undone
    Column("added_at", Float, nullable=False),
    # Long values come last: SQLite reads a row from its start.
    Column("messages", _json, nullable=False),
    Column("tools", _json, nullable=False),
    Column("replies", _json, nullable=False),  # [{reply, source}]: what the page shows, and where it comes from
    Column("source", _json, nullable=False),  # file, or run, stage and sampling settings
)
_waiting = text("gold IS NULL AND num_judgements < overlap")
Index("waiting_items", items.c.priority.desc(), items.c.id, sqlite_where=_waiting, postgresql_where=_waiting)

# Trees of messages that items are parts of, as they came; `source` of such items names tree and messages.
trees = Table(
    "trees",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("key", String(200), nullable=False, unique=True),  # message_tree_id
    Column("batch", String(200), nullable=False),
    Column("content", Text, nullable=False),  # JSON
)

# Items whose judgements somebody waits for, such as a stage of a run.
batches = Table(
    "batches",
    metadata,
    Column("name", String(200), primary_key=True),
    Column("opened_at", Float, nullable=False),
    Column("finished_at", Float),  # by an admin, who wants no more judgements
    Column("closed_by", String(200)),  # why nobody waits any more
)

# An item may be in several batches: judgements of one count in all of them.
members = Table(
    "members",
    metadata,
    Column("batch", ForeignKey("batches.name"), primary_key=True),
    Column("item", ForeignKey("items.id"), primary_key=True),
)

showings = Table(
    "showings",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("item", ForeignKey("items.id"), nullable=False),
    Column("person", ForeignKey("people.id"), nullable=False),
    Column("order", _json, nullable=False),  # at each place of the page the index of a reply
    Column("shown_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("state", String(10), nullable=False),
)
Index("showings_of_item", showings.c.item, showings.c.person, showings.c.state)
Index("showings_of_person", showings.c.person, showings.c.state)

judgements = Table(
    "judgements",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("person", ForeignKey("people.id"), nullable=False),
    Column("client_id", String(64), nullable=False),  # made by the page, before it sends
    Column("showing", ForeignKey("showings.id"), nullable=False),
    Column("item", ForeignKey("items.id"), nullable=False),
    Column("answer", _json, nullable=False),  # by index of the item's replies
    Column("digest", String(64), nullable=False),  # of the request
    Column("made_at", Float, nullable=False),
    Column("seconds", Float, nullable=False),  # that the person looked at the task, by the page
    Column("undone_at", Float),
)
Index("judgement_ids", judgements.c.person, judgements.c.client_id, unique=True)
Index(
    "one_judgement_per_person",
    judgements.c.item,
    judgements.c.person,
    unique=True,
    sqlite_where=text("undone_at IS NULL"),
    postgresql_where=text("undone_at IS NULL"),
)

# Items of the kind `review`, and the judgement whose text they show.
reviews = Table(
    "reviews",
    metadata,
    Column("item", ForeignKey("items.id"), primary_key=True),
    Column("judgement", ForeignKey("judgements.seq"), nullable=False, unique=True),
    Column("accepted", Boolean),  # null: reviews are missing
)
