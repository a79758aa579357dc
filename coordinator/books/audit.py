"""Whether the books add up. Each check is one question that no healthy database has an answer to; whatever it answers is a complaint.

Run it on one moment of the books (``Database.snapshot``). The questions read whole tables, so an audit of millions of transfers takes
seconds, and nobody who writes waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sql

from coordinator.books.ab_units import CACHE_SOURCE, GIVEN_UP, SAYS_NOTHING, SAYS_NOTHING_UNPLACED

SHOWN_MAX = 10  # rows of one check that are named
SILENT_MS_MAX = 7_200_000  # so long a job without an open ticket may be open: upkeep ends it much sooner
_ENDED = "'succeeded', 'failed', 'cancelled'"


@dataclass(frozen=True, slots=True)
class Check:
    """``query`` gives rows whose columns stand in ``says``."""

    says: str
    query: str


def _differing(key: str, left: str, right: str) -> str:
    """Rows of ``left`` and ``right``, (key, amount) each, that do not add up to the same for each key; either may lack keys."""
    sides = f"SELECT {key}, amount AS a, 0 AS b FROM ({left}) AS l UNION ALL SELECT {key}, 0 AS a, amount AS b FROM ({right}) AS r"
    return f"SELECT {key}, SUM(a) AS a, SUM(b) AS b FROM ({sides}) AS sides GROUP BY {key} HAVING SUM(a) <> SUM(b)"


def _listed(codes: Iterable[str]) -> str:
    return ", ".join(f"'{code}'" for code in sorted(codes))


# As ab_units.counts and is_abandoned say it.
_UNIT = "ab_test || '/' || ab_arm || '/' || ab_unit"
_TRIED = f"ab_test <> '' AND bid_source <> '{CACHE_SOURCE}'"
_COUNTED = (
    f"{_TRIED} AND tries = 1 AND (state = 'succeeded' OR (state = 'failed' AND error_code NOT IN ({_listed(SAYS_NOTHING)}) "
    f"AND NOT (island = '' AND error_code IN ({_listed(SAYS_NOTHING_UNPLACED)}))))"
)
_ABANDONED = f"{_TRIED} AND tries = 1 AND state = 'cancelled' AND error_code = '{GIVEN_UP}' AND island <> ''"
_CHARGES = "SELECT reference AS id, amount FROM transfers WHERE kind = 'charge'"

CHECKS = (
    Check(
        "all balances together are {total} micro-credits instead of 0",
        "SELECT total FROM (SELECT SUM(posted) AS total FROM balances) AS s WHERE total <> 0",
    ),
    Check(
        "the balance of {account} is {a} micro-credits, its transfers add up to {b}",
        _differing(
            "account",
            "SELECT account, posted AS amount FROM balances",
            "SELECT credit AS account, amount FROM transfers UNION ALL SELECT debit AS account, -amount AS amount FROM transfers",
        ),
    ),
    Check(
        "{account} has {a} micro-credits held, its pending holds add up to {b}",
        _differing(
            "account",
            "SELECT account, held AS amount FROM balances",
            "SELECT account, amount FROM holds WHERE state = 'pending'",
        ),
    ),
    Check(
        "{account} is below zero: {posted} micro-credits posted, {held} held",
        "SELECT account, posted, held FROM balances WHERE held < 0 OR (posted < held AND account NOT LIKE 'system:%')",
    ),
    Check(
        "transfer {id} moves {amount} micro-credits from {debit} to {credit}, which is no transfer",
        "SELECT id, amount, debit, credit FROM transfers WHERE amount <= 0 OR debit = credit",
    ),
    Check(
        "hold {id} was posted with {a} micro-credits, its charges add up to {b}",
        # what is claimed for a ticket beyond what was reported is paid without its hold
        _differing(
            "id",
            "SELECT id, posted AS amount FROM holds WHERE state = 'posted'",
            f"{_CHARGES} AND transfers.id NOT LIKE '%.late%'",
        ),
    ),
    Check(
        "ticket {id} was paid {a} micro-credits, its charges add up to {b}",
        _differing(
            "id", "SELECT id, paid_micros AS amount FROM tickets", f"{_CHARGES} AND reference IN (SELECT id FROM tickets)"
        ),
    ),
    Check(
        "ticket {id} is {state}, its hold is {hold}",
        "SELECT k.id, k.state, COALESCE(h.state, 'missing') AS hold FROM tickets k LEFT JOIN holds h ON h.id = k.id "
        "WHERE h.state IS NULL OR (k.state = 'open') <> (h.state = 'pending')",
    ),
    Check(
        "hold {id} is {state}, of {amount} micro-credits, and {posted} of them are posted",
        "SELECT id, state, amount, posted FROM holds WHERE posted < 0 OR posted > amount OR (state <> 'posted' AND posted <> 0)",
    ),
    Check(
        "charge {id} was taken from {debit}, its hold is of {account}",
        "SELECT t.id, t.debit, h.account FROM transfers t JOIN holds h ON h.id = t.reference "
        "WHERE t.kind = 'charge' AND t.debit <> h.account",
    ),
    Check(
        "{debit} was given back {back} micro-credits for {id}, and was charged {charged}",
        "SELECT id, debit, SUM(back) AS back, SUM(charged) AS charged FROM ("
        "SELECT reference AS id, credit AS debit, amount AS back, 0 AS charged FROM transfers WHERE kind = 'refund' "
        "UNION ALL SELECT reference AS id, debit, 0 AS back, amount AS charged FROM transfers WHERE kind = 'charge'"
        ") AS sides GROUP BY id, debit HAVING SUM(back) > SUM(charged)",
    ),
    Check(
        "job {id} is {state}, its hold is {hold}",
        "SELECT j.id, j.state, COALESCE(h.state, 'missing') AS hold FROM jobs j LEFT JOIN holds h ON h.id = j.id "
        # one whose tokens the Consumer takes himself has holds by its tickets, and one out of the cache of answers cost nothing
        f"WHERE j.holder = '' AND NOT (j.bid_source = 'cache' AND h.id IS NULL) "
        f"AND (h.state IS NULL OR (j.state IN ({_ENDED})) = (h.state = 'pending'))",
    ),
    Check(
        "job {id} is {state}, and none of its tickets has been open for {hours} hours",
        # its Consumer has gone without a word, and nobody has ended it; the newest ticket of all tells how late it is
        "SELECT id, state, (now_ms - at_ms) / 3600000 AS hours FROM ("
        "SELECT j.id, j.state, MAX(k.issued_at_ms) AS at_ms, (SELECT MAX(issued_at_ms) FROM tickets) AS now_ms "
        "FROM jobs j JOIN tickets k ON k.job_id = j.id "
        f"WHERE j.holder <> '' AND j.state NOT IN ({_ENDED}) "
        "GROUP BY j.id, j.state HAVING SUM(CASE WHEN k.state = 'open' THEN 1 ELSE 0 END) = 0"
        f") AS silent WHERE now_ms - at_ms > {SILENT_MS_MAX}",
    ),
    Check(
        "job {id} cost {a} micro-credits, what its holds were posted with and its tickets paid is {b}",
        _differing(
            "id",
            "SELECT id, price_micros AS amount FROM jobs",
            "SELECT j.id, h.posted AS amount FROM jobs j JOIN holds h ON h.id = j.id "
            "UNION ALL SELECT job_id AS id, paid_micros AS amount FROM tickets",
        ),
    ),
    Check(
        "job {id} is of account {job_account}, its hold of {hold_account}",
        "SELECT j.id, j.account AS job_account, h.account AS hold_account FROM jobs j JOIN holds h ON h.id = j.id "
        "WHERE h.account <> 'user:' || j.account",
    ),
    Check(
        "unit {id} of an A/B test has counted {a} jobs, there are {b}",
        _differing("id", "SELECT id, jobs AS amount FROM ab_units", f"SELECT {_UNIT} AS id, 1 AS amount FROM jobs WHERE {_COUNTED}"),
    ),
    Check(
        "unit {id} of an A/B test has counted {a} jobs that were given up, there are {b}",
        _differing(
            "id", "SELECT id, abandoned AS amount FROM ab_units", f"SELECT {_UNIT} AS id, 1 AS amount FROM jobs WHERE {_ABANDONED}"
        ),
    ),
    Check(
        "job {id} of an A/B test has ended, and its unit {unit} is not known",
        f"SELECT t.id, t.unit FROM (SELECT id, {_UNIT} AS unit FROM jobs WHERE {_TRIED} AND state IN ({_ENDED})) AS t "
        "LEFT JOIN ab_units u ON u.id = t.unit WHERE u.id IS NULL",
    ),
    Check(
        "the sums of unit {id} of an A/B test come to {a}, those of its jobs to {b}",
        _differing(
            "id",
            "SELECT id, succeeded + tokens + latency_us + first_word_us + cost_micros + ups + rated AS amount FROM ab_units",
            f"SELECT {_UNIT} AS id, 1 + completion_tokens + latency_us + first_word_us + price_micros "
            f"+ CASE rating WHEN 1 THEN 2 WHEN -1 THEN 1 ELSE 0 END AS amount FROM jobs WHERE {_COUNTED} AND state = 'succeeded'",
        ),
    ),
)


def audit(connection: sql.Connection) -> list[str]:
    """What does not add up, in sentences; nothing where all is well. A check that finds much names the first ``SHOWN_MAX`` rows."""
    complaints = []
    for check in CHECKS:
        rows = connection.execute(sql.text(f"{check.query} LIMIT {SHOWN_MAX + 1}")).mappings().all()
        complaints += [check.says.format(**row) for row in rows[:SHOWN_MAX]]
        if len(rows) > SHOWN_MAX:
            complaints.append(f"… and more like the last {SHOWN_MAX}")
    return complaints
