"""Issues the tickets that open jobs on Islands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coordinator.matching import Candidate, Wish
from coordinator.pricing import price_max
from protocol import limits
from protocol.activations import Activations
from protocol.identity import Signer
from protocol.tickets import TICKET_VERSION, Ticket, TicketStage, sign_ticket


def count_every(tokens_per_s: float) -> int:
    """How many tokens an Island of this speed (0.0: unknown) sends beyond what its Consumer has signed for: ``COUNT_EVERY_S`` of its work,
    at least ``COUNT_EVERY_TOKENS`` and at most ``COMPLETION_TOKENS_MAX``."""
    tokens = min(tokens_per_s * limits.COUNT_EVERY_S, limits.COMPLETION_TOKENS_MAX)
    return max(int(tokens), limits.COUNT_EVERY_TOKENS)


@dataclass(frozen=True, slots=True)
class TicketIssuer:
    """Signs with the Coordinator's key; the Coordinator is also the holder of tickets to jobs that it opens itself.

    ``clock`` gives Unix time in seconds, ``random_bytes(n)`` n unpredictable bytes, ``job_s_max`` the longest time a job may run (for the
    price limit of asks per second).
    """

    key: Signer
    network: str
    job_s_max: float
    clock: Callable[[], float]
    random_bytes: Callable[[int], bytes]
    activations: Activations = Activations.F32

    def issue(
        self, job_id: str, candidate: Candidate, wish: Wish, cache_salt: bytes, holder: str = "", count_every: int = 0
    ) -> bytes:
        """The signed envelope of a fresh ticket for one Island, or for the Islands of a pipeline.

        ``holder``: whose peer id may use it, where it is not ours; he signs a count every ``count_every`` tokens.
        """
        now_ms = int(self.clock() * 1000)
        offer, plan = candidate.offer, candidate.plan
        price_limit = price_max(offer.ask, wish.prompt_tokens, wish.output_tokens, offer.tokens_per_s, self.job_s_max)
        if wish.price_max_micros is not None:
            price_limit = min(price_limit, wish.price_max_micros)
        ticket = Ticket(
            version=TICKET_VERSION,
            network=self.network,
            issuer=self.key.peer_id,
            holder=holder or self.key.peer_id,
            job_id=job_id,
            route=(candidate.island,) if plan is None else tuple(stage.island for stage in plan.stages),
            boots=(candidate.boot,) if plan is None else tuple(stage.boot for stage in plan.stages),
            cargo=offer.name,
            content_hash=offer.content_hash,
            token_limit=wish.output_tokens,
            price_limit_micros=price_limit,
            cache_salt=cache_salt,
            nonce=self.random_bytes(limits.NONCE_BYTES),
            issued_at_ms=now_ms,
            expires_at_ms=now_ms + int(limits.TICKET_LIFETIME_S * 1000),
            stages=() if plan is None else tuple(TicketStage(stage.layers, stage.ask) for stage in plan.stages),
            activations=self.activations,
            count_every=count_every,
        )
        return sign_ticket(ticket, self.key)
