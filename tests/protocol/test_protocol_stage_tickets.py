"""Tickets of pipelines: what they say of the stages, and how each Island of a route holds its neighbours to it."""

from __future__ import annotations

from typing import Any

import pytest

from privacy.keys import NodeKey
from protocol import limits
from protocol.activations import Activations
from protocol.errors import Code, Refused
from protocol.prices import Ask
from protocol.shards import LayerRange
from protocol.tickets import Ticket, TicketGuard, TicketStage, network_id_of, read_ticket, sign_ticket, total_ask
from tests.protocol import samples
from tests.protocol.samples import BOOT_MS, COORDINATOR, FIRST, HOLDER, ISLAND, MIDDLE, NETWORK, NOW_MS, OTHER

SKEW_MS = int(limits.CLOCK_SKEW_S * 1000)
ROUTE = (FIRST, MIDDLE, ISLAND)
BOOTS = (BOOT_MS - 2, BOOT_MS - 1, BOOT_MS)
USE = b"session" + (1).to_bytes(8, "big")


def guard(key: NodeKey = FIRST, boot: int | None = None, network: str = NETWORK) -> TicketGuard:
    known = dict(zip([k.peer_id for k in ROUTE], BOOTS, strict=True))
    made = TicketGuard(key.peer_id, known.get(key.peer_id, BOOT_MS) if boot is None else boot, network)
    if network == NETWORK:
        made.trust(samples.delegation())
    return made


def signed(signer: Any = COORDINATOR, **changes: Any) -> bytes:
    return sign_ticket(samples.pipeline_ticket(**changes), signer)


def refusal(made: TicketGuard, data: bytes, index: int = 0, sender: str = ISLAND.peer_id, now_ms: int = NOW_MS) -> str:
    """The words in which both ``check_stage`` and ``use_stage`` refuse; neither counts as a use."""
    before = made.refused
    with pytest.raises(Refused) as checked:
        made.check_stage(data, index, sender, now_ms)
    with pytest.raises(Refused) as used:
        made.use_stage(data, index, sender, USE, now_ms)
    assert checked.value.code is used.value.code is Code.BAD_TICKET
    assert made.refused == before + 2 and not made._uses
    assert checked.value.message == used.value.message
    return checked.value.message


def test_a_pipeline_ticket_round_trip() -> None:
    ticket = samples.pipeline_ticket()
    assert read_ticket(sign_ticket(ticket, COORDINATOR)) == ticket
    assert ticket.driver == ISLAND.peer_id and ticket.activations is Activations.F16
    assert samples.ticket().driver == ISLAND.peer_id, "one Island drives itself"
    assert samples.ticket().stages == () and samples.ticket().activations is Activations.F32


def test_the_ask_of_a_route_is_that_of_its_stages_together() -> None:
    asks = (Ask(1, 2, 3), Ask(10, 20, 30), Ask(100, 200, 300))
    parts = samples.pipeline_ticket().stages
    stages = tuple(TicketStage(stage.layers, ask) for stage, ask in zip(parts, asks, strict=True))
    assert total_ask(samples.pipeline_ticket(stages=stages)) == Ask(111, 222, 333)
    assert total_ask(samples.ticket()) == Ask()


def stages(*ranges: tuple[int, int]) -> tuple[TicketStage, ...]:
    return tuple(TicketStage(LayerRange(low, high), Ask()) for low, high in ranges)


BAD_STAGES: dict[str, tuple[TicketStage, ...]] = {
    "none": (),
    "one too few": stages((0, 10), (10, 20)),
    "one too many": stages((0, 10), (10, 20), (20, 30), (30, 40)),
    "not from 0 on": stages((1, 10), (10, 20), (20, 30)),
    "a gap": stages((0, 10), (11, 20), (20, 30)),
    "an overlap": stages((0, 10), (9, 20), (20, 30)),
    "out of order": stages((10, 20), (0, 10), (20, 30)),
    "twice the same": stages((0, 10), (0, 10), (10, 30)),
}


@pytest.mark.parametrize("bad", BAD_STAGES.values(), ids=BAD_STAGES)
def test_stages_match_the_route_and_follow_one_another(bad: tuple[TicketStage, ...]) -> None:
    with pytest.raises(ValueError, match=r"what each of them computes|follow one another"):
        samples.pipeline_ticket(stages=bad)


def test_a_single_island_may_be_told_its_layers() -> None:
    """A route of one is whole with or without a stage; a stage that does not begin at 0 is none."""
    samples.ticket(stages=stages((0, 30)))
    with pytest.raises(ValueError, match="follow one another"):
        samples.ticket(stages=stages((1, 30)))
    with pytest.raises(ValueError, match="what each of them computes"):
        samples.ticket(stages=stages((0, 10), (10, 20)))


@pytest.mark.parametrize("index", range(3))
def test_each_stage_takes_the_ticket_from_the_one_before(index: int) -> None:
    """Before the first stage of the ring comes the last of the route, which drives."""
    made, before = guard(ROUTE[index]), ROUTE[index - 1].peer_id
    assert made.check_stage(signed(), index, before, NOW_MS) == samples.pipeline_ticket()
    assert made.use_stage(signed(), index, before, USE, NOW_MS) == samples.pipeline_ticket()
    assert made.refused == 0


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("sender", [FIRST, MIDDLE, ISLAND, OTHER, HOLDER, COORDINATOR], ids=lambda value: getattr(value, "peer_id", None))
def test_only_the_stage_before_may_open_one(index: int, sender: NodeKey) -> None:
    made = guard(ROUTE[index])
    if sender is ROUTE[index - 1]:
        made.check_stage(signed(), index, sender.peer_id, NOW_MS)
    else:
        assert "stage before" in refusal(made, signed(), index, sender.peer_id)


@pytest.mark.parametrize(("key", "index"), [(k, i) for k in ROUTE for i in range(limits.ROUTE_STAGES_MAX) if ROUTE[i : i + 1] != (k,)])
def test_a_stage_has_one_index(key: NodeKey, index: int) -> None:
    for sender in (*ROUTE, OTHER):
        assert f"stage {index}" in refusal(guard(key), signed(), index, sender.peer_id)


def test_a_peer_that_is_not_on_the_route_is_no_stage() -> None:
    for index in range(3):
        assert "another Island" in refusal(guard(OTHER), signed(), index)


def test_a_ticket_of_one_island_opens_no_stage() -> None:
    for data in (sign_ticket(samples.ticket(), COORDINATOR), sign_ticket(samples.ticket(boots=(BOOT_MS,)), COORDINATOR)):
        for sender in (ISLAND, HOLDER):
            assert "stage 0" in refusal(guard(ISLAND), data, 0, sender.peer_id)


def test_of_another_run() -> None:
    assert "earlier run" in refusal(guard(boot=BOOT_MS), signed())
    assert "earlier run" in refusal(guard(), signed(boots=(BOOTS[0] - 1, *BOOTS[1:])))
    guard().check_stage(signed(boots=(BOOTS[0], 1, 1)), 0, ISLAND.peer_id, NOW_MS)  # the others look at their own


def test_of_another_network() -> None:
    elsewhere = network_id_of(OTHER.public_key)
    assert "another network" in refusal(guard(), signed(network=elsewhere))
    assert "no Coordinator" in refusal(guard(network=elsewhere), signed())


def test_expiry_and_the_future() -> None:
    end_ms = samples.pipeline_ticket().expires_at_ms
    guard().use_stage(signed(), 0, ISLAND.peer_id, USE, end_ms)
    assert "expired" in refusal(guard(), signed(), now_ms=end_ms + 1)
    ahead = {"issued_at_ms": NOW_MS + SKEW_MS + 1, "expires_at_ms": NOW_MS + SKEW_MS + 1000}
    assert "future" in refusal(guard(), signed(**ahead))


def test_forged() -> None:
    assert "no Coordinator" in refusal(guard(), signed(OTHER, issuer=OTHER.peer_id))
    assert "somebody else" in refusal(guard(), signed(OTHER))
    assert "signature" in refusal(guard(), signed()[:-1] + b"\x00")
    for data in (b"", b"\x00" * 200):
        refusal(guard(), data)


def test_every_bit_counts() -> None:
    made, data = guard(), signed()
    for place in range(len(data)):
        altered = bytearray(data)
        altered[place] ^= 1 << (place % 8)
        with pytest.raises(Refused):
            made.use_stage(bytes(altered), 0, ISLAND.peer_id, USE, NOW_MS)
    made.use_stage(data, 0, ISLAND.peer_id, USE, NOW_MS)


def test_checking_uses_nothing_up() -> None:
    made = guard()
    for _ in range(3):
        made.check_stage(signed(), 0, ISLAND.peer_id, NOW_MS)
    made.use_stage(signed(), 0, ISLAND.peer_id, USE, NOW_MS)
    made.check_stage(signed(), 0, ISLAND.peer_id, NOW_MS)


def test_a_stage_takes_a_ticket_for_one_use_and_that_again() -> None:
    """After a loss the driver says the same sequence again; another sequence, or the same of another session, is another use."""
    made = guard()
    for _ in range(3):
        made.use_stage(signed(), 0, ISLAND.peer_id, USE, NOW_MS)
    for other in (b"session" + (2).to_bytes(8, "big"), b"another" + (1).to_bytes(8, "big"), b""):
        with pytest.raises(Refused) as caught:
            made.use_stage(signed(), 0, ISLAND.peer_id, other, NOW_MS)
        assert caught.value.code is Code.BAD_TICKET and "used before" in caught.value.message
    assert made.refused == 3
    made.use_stage(signed(nonce=b"\x02" * 16), 0, ISLAND.peer_id, USE, NOW_MS)  # a mended route: a newer ticket for the same use


def test_a_nonce_counts_not_the_bytes_around_it() -> None:
    made = guard()
    made.use_stage(signed(), 0, ISLAND.peer_id, USE, NOW_MS)
    with pytest.raises(Refused, match="used before"):
        made.use_stage(signed(job_id="job-2"), 0, ISLAND.peer_id, b"another use", NOW_MS)


def test_a_clock_that_is_set_back_does_not_make_an_old_ticket_new() -> None:
    made = guard()
    made.use_stage(signed(), 0, ISLAND.peer_id, USE, NOW_MS)
    later_ms = samples.pipeline_ticket().expires_at_ms + SKEW_MS
    late = {"nonce": b"\x02" * 16, "issued_at_ms": later_ms, "expires_at_ms": later_ms + 1000}
    made.use_stage(signed(**late), 0, ISLAND.peer_id, USE, later_ms)
    with pytest.raises(Refused, match="used before"):
        made.use_stage(signed(), 0, ISLAND.peer_id, b"another use", NOW_MS)


def test_uses_are_forgotten_after_their_tickets() -> None:
    made = guard()
    for number in range(50):
        issued_ms = NOW_MS + number * 10_000
        data = signed(nonce=number.to_bytes(16, "big"), issued_at_ms=issued_ms, expires_at_ms=issued_ms + 20_000)
        made.use_stage(data, 0, ISLAND.peer_id, number.to_bytes(8, "big"), issued_ms)
        assert len(made._uses) <= 2 + (SKEW_MS + 10_000) // 10_000 + 2


def test_the_table_of_uses_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full means busy; a live use is never forgotten to make room, and may be said again even then."""
    monkeypatch.setattr(limits, "NONCES_REMEMBERED_MAX", 5)
    made = guard()
    data = [signed(nonce=number.to_bytes(16, "big")) for number in range(6)]
    for number, one in enumerate(data[:5]):
        made.use_stage(one, 0, ISLAND.peer_id, number.to_bytes(8, "big"), NOW_MS)
    with pytest.raises(Refused) as caught:
        made.use_stage(data[5], 0, ISLAND.peer_id, USE, NOW_MS)
    assert caught.value.code is Code.NO_CAPACITY and caught.value.retryable
    made.use_stage(data[0], 0, ISLAND.peer_id, (0).to_bytes(8, "big"), NOW_MS)
    with pytest.raises(Refused, match="used before"):
        made.use_stage(data[0], 0, ISLAND.peer_id, USE, NOW_MS)
    assert len(made._uses) == 5


def test_a_pipelines_job_is_opened_with_its_driver_only() -> None:
    driver = guard(ISLAND)
    assert driver.admit(signed(), HOLDER.peer_id, NOW_MS) == samples.pipeline_ticket()
    for key in (FIRST, MIDDLE):
        made = guard(key)
        with pytest.raises(Refused) as caught:
            made.admit(signed(), HOLDER.peer_id, NOW_MS)
        assert caught.value.code is Code.BAD_TICKET and "last Island" in caught.value.message
        assert made.admitted == 0 and not made._nonces


def test_the_driver_admits_the_job_and_takes_its_link_with_one_ticket() -> None:
    """The nonce of the job and the use of the stage are two tables: the driver meets its own ticket in both roles."""
    made = guard(ISLAND)
    made.admit(signed(), HOLDER.peer_id, NOW_MS)
    made.check_stage(signed(), 2, MIDDLE.peer_id, NOW_MS)
    with pytest.raises(Refused, match="used before"):
        made.admit(signed(), HOLDER.peer_id, NOW_MS)


def test_a_stage_is_not_the_holder() -> None:
    """Who is on the route cannot open the job itself."""
    for sender in (FIRST, MIDDLE, ISLAND):
        with pytest.raises(Refused, match="another peer"):
            guard(ISLAND).admit(signed(), sender.peer_id, NOW_MS)


def test_the_ring_of_two() -> None:
    """Each is before the other; which of them is asked as what is in the index."""
    two: dict[str, Any] = {"route": (FIRST.peer_id, ISLAND.peer_id), "boots": (BOOTS[0], BOOTS[2]), "stages": stages((0, 1), (1, 2))}
    ticket: Ticket = samples.pipeline_ticket(**two)
    data = sign_ticket(ticket, COORDINATOR)
    guard(FIRST).check_stage(data, 0, ISLAND.peer_id, NOW_MS)
    guard(ISLAND).check_stage(data, 1, FIRST.peer_id, NOW_MS)
    assert "stage 1" in refusal(guard(FIRST), data, 1, ISLAND.peer_id)
    assert "stage 0" in refusal(guard(ISLAND), data, 0, FIRST.peer_id)
