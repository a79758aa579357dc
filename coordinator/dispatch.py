"""Runs jobs on Islands so that an Island that dies loses nothing.

Theory of operation. A choice is a loop of attempts. Before the first token another Island simply takes the job. Afterwards another
Island with the same model file continues behind the token ids that were already delivered (``GenerationRequest.resume``); ids and not
text, since text does not say how it was cut into tokens. What follows a refusal is decided by one pure function, ``verdict``.

Rules: a job that has ended two workers fails and is not sent to a third Island. Waiting is bounded, so is the number of attempts.
Leaving ``run`` early cancels what still runs on Islands. Every failure leaves as one ``Refused``.
"""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass, field, replace
from enum import Enum, auto

import trio

from coordinator.affinity import Affinity
from coordinator.books.errors import BooksRefused, BooksUnavailable
from coordinator.jobs import (
    Accepted,
    ChoiceResult,
    Emit,
    Event,
    JobSpec,
    Meter,
    Metered,
    Said,
    StageShare,
    Text,
    collected,
)
from coordinator.line_output import LineOutput
from coordinator.logprobs import read_logprobs
from coordinator.matching import Candidate, Wish, declared_tokens
from coordinator.placement import Placement, Placing
from coordinator.ports import Issuing, JobPort, JobRun, Mending
from coordinator.statistics import Statistics
from protocol import limits
from protocol.cargo_io import DoneLine, ErrorLine
from protocol.cargo_jobs import CargoInput
from protocol.errors import RETRYABLE, ArchipelagError, Code, Refused, RemoteProtocolError
from protocol.generation import GENERATION, GenerationRequest
from protocol.messages import JobAccepted, JobChunk, JobDone, JobLines, RouteBroken
from protocol.prices import Ask
from protocol.receipts import peek_receipt

log = logging.getLogger(__name__)

# Words of a pipeline's driver that say nothing against the Island itself: its route was planned anew, or a stage refused the job.
_PASSING = frozenset({Code.BAD_TICKET, Code.UNKNOWN_CARGO, Code.TIMEOUT, Code.NO_ISLAND})
_NEVER_NEWER = 2**63 - 1  # an ad's sequence: no ad is newer


class Verdict(Enum):
    """What follows a refusal."""

    FAIL = auto()
    ELSEWHERE = auto()  # this Island is out until it sends a newer ad
    REST = auto()  # it is full; ask it again a little later
    LARGER = auto()  # only a larger context would help


def verdict(code: Code, workers_ended: int, attempts: int) -> Verdict:
    """What to do after an Island's refusal, the counts including it."""
    if code is Code.NO_CAPACITY:
        return Verdict.REST
    if code is Code.CONTEXT_LENGTH:
        return Verdict.LARGER
    if (
        code not in RETRYABLE
        or attempts >= limits.JOB_ATTEMPTS_MAX
        or workers_ended >= limits.WORKERS_ENDED_PER_JOB_MAX
    ):
        return Verdict.FAIL
    return Verdict.ELSEWHERE


def price_of(receipt: bytes) -> int:
    """Micro-credits of a receipt whose signature the port has checked already; 0 where there is none."""
    if not receipt:
        return 0
    return peek_receipt(receipt).price_micros


@dataclass(slots=True)
class _Progress:
    """One choice on its way through its attempts."""

    index: int
    request: GenerationRequest | CargoInput
    wish: Wish
    started_s: float
    metered: Metered
    tokens: bytearray = field(default_factory=bytearray)
    output: LineOutput = field(default_factory=LineOutput)
    islands: list[str] = field(default_factory=list)
    engines: list[str] = field(default_factory=list)
    attempts: int = 0
    workers_ended: int = 0
    opened: bool = False  # whether this attempt got as far as the Island
    served: bool = False  # whether it has brought anything
    breaks: int = 0  # of the route, since it last brought a token
    tokens_at_break: int = -1
    tokens_before: int = 0  # what was delivered before this attempt
    mended: int = 0
    unmended: bool = False  # whether this attempt ended since its route could not be mended
    full_rest_s: float = limits.NO_CAPACITY_REST_S
    full_since_s: float | None = None
    price_micros: int = 0
    last_refusal: Refused | None = None

    def serve(self, island: str, engine: str) -> None:
        """The Island of this attempt has written a part of the answer."""
        self.served = True
        if not self.islands or self.islands[-1] != island:
            self.islands.append(island)
        if engine not in self.engines:
            self.engines.append(engine)


class Dispatcher:
    """Runs jobs. ``clock`` is trio's, in seconds."""

    def __init__(
        self,
        port: JobPort,
        placer: Placing,
        issuer: Issuing,
        affinity: Affinity,
        statistics: Statistics,
        job_timeout_s: float = limits.JOB_TIMEOUT_S,
        capacity_wait_s: float = limits.CAPACITY_WAIT_S,
        island_wait_s: float = limits.ISLAND_WAIT_S,
        pipelines: Mending | None = None,
    ) -> None:
        self._pipelines = pipelines
        self._port, self._placer, self._issuer, self._affinity = port, placer, issuer, affinity
        self._job_timeout_s = job_timeout_s
        self._capacity_wait_s, self._island_wait_s = capacity_wait_s, island_wait_s
        self.statistics = statistics
        self.running = 0

    def __repr__(self) -> str:
        return f"<Dispatcher {self.running} running, {self._placer.waiting} waiting>"

    async def run(self, spec: JobSpec, emit: Emit, meter: Meter | None = None) -> None:
        """Runs all choices of a job; each ends with its ChoiceResult. Raises Refused when one of them fails; the others are cancelled.

        ``meter`` shows what was used, also when this is cancelled.
        """
        meter = meter if meter is not None else Meter()
        self.running += 1
        self.statistics.jobs_started += 1
        try:
            with trio.fail_after(self._job_timeout_s):
                await self._run_choices(spec, emit, meter)
        except trio.TooSlowError:
            self.statistics.jobs_failed[Code.TIMEOUT] += 1
            raise Refused(Code.TIMEOUT, f"the job took longer than {self._job_timeout_s:g} s") from None
        except Refused as refusal:
            self.statistics.jobs_failed[refusal.code] += 1
            raise
        except (BooksRefused, BooksUnavailable) as error:  # said by whoever is told what happens
            self.statistics.jobs_failed[error.why if isinstance(error, BooksRefused) else "books_unavailable"] += 1
            raise
        except ArchipelagError as error:
            self.statistics.jobs_failed[Code.INTERNAL] += 1
            raise Refused(Code.INTERNAL, "the Island broke the protocol") from error
        except Exception as error:
            # the text of a foreign error may quote the input, so only its kind and place are written down
            self.statistics.jobs_failed[Code.INTERNAL] += 1
            log.error(
                "job %s: %s\n%s", spec.job_id, type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
            )
            raise Refused(Code.INTERNAL, "the Coordinator failed; its log says where") from error
        except BaseException:
            self.statistics.jobs_cancelled += 1
            raise
        else:
            self.statistics.jobs_done += 1
        finally:
            self.running -= 1

    async def collect(self, spec: JobSpec) -> list[Event]:
        """All events of a job at once, for answers that are not streamed."""
        return await collected(self.run, spec)

    async def _run_choices(self, spec: JobSpec, emit: Emit, meter: Meter) -> None:
        if len(spec.choices) == 1:
            await self._run_choice(spec, 0, emit, meter)
            return
        failed: list[Refused] = []

        async def one(index: int) -> None:
            try:
                await self._run_choice(spec, index, emit, meter)
            except Refused as refusal:
                failed.append(refusal)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for index in range(len(spec.choices)):
                nursery.start_soon(one, index)
        if failed:
            raise failed[0]

    async def _run_choice(self, spec: JobSpec, index: int, emit: Emit, meter: Meter) -> None:
        request = spec.choices[index]
        chain = self._affinity.chain(spec.cache_salt, spec.cargo, _parts(request))
        wish = self.wish_of(spec, request, self._affinity.find(chain))
        progress = _Progress(index, request, wish, trio.current_time(), meter.choice(index))
        while True:
            placement = await self._place(spec, progress)
            try:
                result = await self._attempt(spec, progress, placement, emit)
            except Refused as refusal:
                self._judge(refusal, progress, placement.candidate)
            else:
                self._affinity.served(chain, placement.island)
                self._count(result)
                standing, now_s = self._placer.standing, trio.current_time()
                standing.served(placement.island, placement.candidate.offer.name, progress.metered.tokens, result.decode_us, now_s)
                await emit(result)
                return
            finally:
                self._placer.release(placement)

    def wish_of(self, spec: JobSpec, request: GenerationRequest | CargoInput, affinity: str = "") -> Wish:
        """What one choice of a job needs of an Island."""
        tokens = declared_tokens(request.input_chars, request.max_tokens)
        return Wish(
            spec.cargo,
            tokens,
            affinity,
            excluded=dict.fromkeys(spec.avoid, _NEVER_NEWER),
            prompt_tokens=tokens - request.max_tokens,
            output_tokens=request.max_tokens,
            price_max_micros=spec.price_max_micros,
            policy=spec.policy,
            priority=spec.priority,
            account=spec.account,
            job_s_max=self._job_timeout_s,
            island=spec.island,
            waits_for_price=spec.patience_s is not None,
            job_id=spec.job_id,
            group=spec.group,
            content_hash=spec.content_hash,
        )

    async def _place(self, spec: JobSpec, progress: _Progress) -> Placement:
        capacity_wait_s, island_wait_s = self._capacity_wait_s, self._island_wait_s
        if spec.patience_s is not None:
            capacity_wait_s = island_wait_s = spec.patience_s
        if progress.full_since_s is not None:
            capacity_wait_s = max(0.0, progress.full_since_s + capacity_wait_s - trio.current_time())
        try:
            return await self._placer.place(progress.wish, capacity_wait_s, island_wait_s)
        except Refused as refusal:
            last = progress.last_refusal
            if last is None or refusal.code is Code.NO_CAPACITY:
                raise
            if last.code is Code.CONTEXT_LENGTH:
                raise last from None
            raise Refused(Code.NO_ISLAND, f"{refusal.message}; the last one said: {last.message}") from last

    async def _attempt(self, spec: JobSpec, progress: _Progress, placement: Placement, emit: Emit) -> ChoiceResult:
        candidate, request = placement.candidate, progress.request
        metered = progress.metered
        metered.island, metered.ask, metered.placed = candidate.island, candidate.offer.ask, placement.choice
        metered.region = self._placer.region_of(candidate.island)
        metered.tokens, metered.lines, metered.started_s = 0, 0, trio.current_time()
        payload = _payload(request, bytes(progress.tokens))
        ticket = self._ticket(spec, progress, candidate)
        progress.attempts += 1
        progress.tokens_before = len(progress.tokens)
        progress.output.begin()
        progress.opened = progress.served = progress.unmended = False
        self.statistics.attempts += 1
        async with self._port.run_job(candidate.island, ticket, payload) as run:
            progress.opened = True
            return await self._follow(spec, run, progress, candidate, emit)

    def _ticket(self, spec: JobSpec, progress: _Progress, candidate: Candidate) -> bytes:
        # stages tell the sequences of jobs apart by the job's id, so choices of one request need ids of their own there
        several = candidate.plan is not None and len(spec.choices) > 1
        job_id = f"{spec.job_id}.{progress.index}" if several else spec.job_id
        return self._issuer.issue(job_id, candidate, progress.wish, spec.cache_salt)

    async def _mend(
        self, spec: JobSpec, run: JobRun, progress: _Progress, candidate: Candidate, broken: RouteBroken
    ) -> Candidate:
        """Another Island takes the place of a stage, and the job goes on where it stood. Raises Refused."""
        if self._pipelines is None:
            raise Refused(Code.INTERNAL, "an Island reports a broken route, and there are no pipelines")
        self.statistics.routes_broken += 1
        progress.breaks = progress.breaks + 1 if len(progress.tokens) == progress.tokens_at_break else 1
        progress.tokens_at_break = len(progress.tokens)
        if progress.breaks > limits.JOB_ATTEMPTS_MAX:
            progress.unmended = True
            text = f"the route broke {progress.breaks} times without a token in between; the last time: {broken.message}"
            raise Refused(Code.NO_ISLAND, text)
        try:
            mended = await self._pipelines.mend(candidate, broken)
        except Refused:
            progress.unmended = True
            raise
        run.mend(self._ticket(spec, progress, mended))
        if mended.plan != candidate.plan:  # a slow stage may stay
            self.statistics.routes_mended += 1
            progress.mended += 1
        if progress.metered.placed is not None:  # who is paid is who stands in the route
            progress.metered.placed = replace(progress.metered.placed, candidate=mended)
        return mended

    async def _follow(
        self, spec: JobSpec, run: JobRun, progress: _Progress, candidate: Candidate, emit: Emit
    ) -> ChoiceResult:
        """Passes on what an Island sends, to the end of it: a generator that is left early costs trio a task to close it."""
        index, engine = progress.index, candidate.offer.engine
        done: JobDone | None = None
        async for message in run:
            if isinstance(message, JobChunk):
                if not progress.served:
                    progress.serve(candidate.island, engine)
                progress.tokens += message.tokens
                progress.metered.tokens += len(message.tokens) // 4
                if message.text or message.logprobs:
                    await emit(Text(index, message.text, read_logprobs(message.logprobs)))
            elif isinstance(message, JobLines):
                await self._tell(message, progress, candidate, emit)
            elif isinstance(message, JobAccepted):
                engine = message.engine if candidate.plan is None else candidate.offer.engine
                progress.full_since_s = None
                progress.metered.started_s = trio.current_time()
                self._note_takeover(progress, engine)
                placed_s = trio.current_time() - progress.started_s
                await emit(Accepted(index, candidate.island, engine, placed_s, _route(candidate)))
            elif isinstance(message, RouteBroken):
                candidate = await self._mend(spec, run, progress, candidate, message)
            else:
                done = message
        if done is None:
            raise Refused(Code.LINK_LOST, "the Island's stream ended before the job did")
        if isinstance(progress.request, CargoInput) and progress.output.done is None:
            raise RemoteProtocolError("an Island says that a job is done whose Cargo has not said so")
        if not progress.served:
            progress.serve(candidate.island, engine)
        if done.text:
            await emit(Text(index, done.text))
        return _result(progress, done, candidate)

    async def _tell(self, message: JobLines, progress: _Progress, candidate: Candidate, emit: Emit) -> None:
        if isinstance(progress.request, GenerationRequest):
            raise RemoteProtocolError("an Island sends lines for a text")
        if not progress.served:
            progress.serve(candidate.island, candidate.offer.engine)
        progress.metered.tokens += message.tokens
        for line in progress.output.take(message):
            if not isinstance(line, DoneLine | ErrorLine):
                progress.metered.lines += 1
                await emit(Said(progress.index, line))

    def _note_takeover(self, progress: _Progress, engine: str) -> None:
        if progress.attempts == 1:
            return
        if not (progress.tokens or progress.output.has_begun):
            self.statistics.takeovers_before_first_token += 1
            return
        self.statistics.takeovers_mid_stream += 1
        if engine not in progress.engines:
            self.statistics.splices_across_engines += 1

    def _judge(self, refusal: Refused, progress: _Progress, candidate: Candidate) -> None:
        """Draws the consequences of a refusal for the next attempt. Raises the refusal when there must be none."""
        self.statistics.refusals[refusal.code] += 1
        if refusal.code is Code.WORKER_DIED or (refusal.code is Code.LINK_LOST and progress.opened and candidate.plan is None):
            progress.workers_ended += 1
            progress.metered.failed.append(candidate.island)
            self._placer.standing.failed(candidate.island, trio.current_time())
            self.statistics.workers_ended += 1
        elif candidate.plan is not None and len(progress.tokens) > progress.tokens_before:
            progress.attempts = 1  # Islands of a pipeline come and go; as long as the answer grows, the job is not at fault
        progress.last_refusal = refusal
        what = verdict(refusal.code, progress.workers_ended, progress.attempts)
        wish, island = progress.wish, candidate.island
        if progress.unmended and refusal.code is not Code.LINK_LOST:
            raise refusal  # it has been waited for
        if what is Verdict.FAIL:
            if progress.workers_ended >= limits.WORKERS_ENDED_PER_JOB_MAX:
                text = f"the job ended {progress.workers_ended} workers and is not tried again; the last one said: "
                raise Refused(refusal.code, text + refusal.message) from refusal
            raise refusal
        if what is Verdict.REST or (candidate.plan is not None and refusal.code in _PASSING):
            self._rest(progress, island)
        elif progress.unmended:
            pass  # it begins anew, and that is no fault of the driver's
        elif what is Verdict.LARGER:
            smallest = max(wish.context_over, candidate.offer.context_tokens)
            progress.wish = replace(wish, context_over=smallest)
        else:
            # not the ad that it was chosen by: taking this very job has changed its room, and so made it send a newer one
            newest = max(candidate.sequence, self._placer.newest_sequence(island))
            progress.wish = replace(wish, excluded={**wish.excluded, island: newest})
            if refusal.code is Code.LINK_LOST and self._pipelines is not None:
                self._pipelines.driver_lost(candidate)
        if (progress.tokens or progress.output.has_begun) and not progress.wish.content_hash:
            offer = candidate.offer
            progress.wish = replace(progress.wish, content_hash=offer.content_hash, engine=progress.engines[-1])

    def _rest(self, progress: _Progress, island: str) -> None:
        """The Island is full; it does not count as an attempt. All the waiting together is bounded from the first refusal on."""
        now_s = trio.current_time()
        progress.attempts -= 1
        progress.full_since_s = progress.full_since_s if progress.full_since_s is not None else now_s
        progress.wish = replace(progress.wish, resting={**progress.wish.resting, island: now_s + progress.full_rest_s})
        progress.full_rest_s = min(2 * progress.full_rest_s, limits.NO_CAPACITY_REST_MAX_S)

    def _count(self, result: ChoiceResult) -> None:
        statistics = self.statistics
        statistics.prompt_tokens += result.prompt_tokens
        statistics.cached_tokens += result.cached_tokens
        statistics.completion_tokens += result.completion_tokens
        statistics.price_micros += result.price_micros


def _route(candidate: Candidate) -> tuple[str, ...]:
    return tuple(stage.island for stage in candidate.plan.stages) if candidate.plan is not None else ()


def _shares(done: JobDone, candidate: Candidate) -> tuple[StageShare, ...]:
    planned = {stage.island: stage for stage in candidate.plan.stages} if candidate.plan is not None else {}
    shares = []
    for use in done.stages:
        stage = planned.get(use.peer)
        layers, ask = (str(stage.layers), stage.ask) if stage is not None else ("", Ask())
        shares.append(StageShare(use.peer, layers, ask, use.compute_us, use.held_us))
    return tuple(shares)


def _result(progress: _Progress, done: JobDone, candidate: Candidate) -> ChoiceResult:
    return ChoiceResult(
        choice=progress.index,
        finish_reason=done.finish_reason,
        islands=tuple(progress.islands),
        engines=tuple(progress.engines),
        prompt_tokens=done.prompt_tokens,
        cached_tokens=done.cached_tokens,
        completion_tokens=done.completion_tokens if progress.output.done is not None else len(progress.tokens) // 4,
        price_micros=price_of(done.receipt),
        prefill_us=done.prefill_us,
        decode_us=done.decode_us,
        stages=_shares(done, candidate),
        wire_us=done.wire_us,
        mended=progress.mended,
        receipt=done.receipt,
        done=progress.output.done,
    )


def _payload(request: GenerationRequest | CargoInput, resume: bytes) -> bytes | CargoInput:
    """As it goes to an Island: a text goes on behind the tokens that are there, lines are made anew."""
    if isinstance(request, CargoInput):
        return request
    return GENERATION.encode(replace(request, resume=resume) if resume else request)


def _parts(request: GenerationRequest | CargoInput) -> list[tuple[str, str]]:
    """What another job may have in common with it; of a Cargo's input nothing is."""
    if isinstance(request, CargoInput):
        return []
    if request.messages:
        return [(message.role, message.content) for message in request.messages]
    return [("prompt", request.prompt)]
