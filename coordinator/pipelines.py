"""Pipelines of models that no single Island holds: planned when somebody asks for one, loaded, offered like an Island, mended.

Theory of operation. ``planning`` decides; this shell gives it facts out of the book, has Islands load what was decided, and remembers the
result. There is one pipeline for a model. The first request for it begins a plan and waits while it is loaded; afterwards it is a
candidate for placement like any Island, named by its last stage, with the offer of all stages together.

A stage is lost when its Island leaves the book or comes back as another run, or when the driver reports it. The pipeline is then mended:
another Island takes exactly its layers and the other stages stay, so that what they have computed is of use. Many jobs may report the same
break; it is mended once. Where that is impossible, the pipeline is given up, and the next request plans anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from coordinator.matching import Candidate, Refusal
from coordinator.planning import Held, NoPlan, Plan, PlannedStage, Site, plan
from coordinator.planning import replace as replace_stage
from coordinator.planning_ready import plan_ready_made, ready_chain
from coordinator.ports import IslandPort
from protocol import limits
from protocol.ads import Ad, CargoOffer, ShardOffer
from protocol.errors import ArchipelagError, Code, Refused
from protocol.hold import DropShard, HoldProgress, HoldShard
from protocol.messages import RouteBroken
from protocol.shards import LayerRange, ShardManifest

log = logging.getLogger(__name__)

_PLANS_TRIED_MAX = 6
_SUSPECT_S = 60.0  # an Island that broke a route is not planned with again for so long, unless it restarts
_ORDER_LIFETIME_S = 60.0
_SECOND_CHANCE_S = 3.0  # a suspect whom nobody can replace is tried again after so long


@dataclass(eq=False)
class Pipeline:
    """``held``: what the ads of the stages' Islands say, by stage; ``is_ready``: all stages are loaded and none is known to be lost."""

    manifest: ShardManifest
    plan: Plan | None = None
    is_ready: bool = False
    is_working: bool = True  # a task loads or mends it
    held: dict[int, ShardOffer] = field(default_factory=dict)
    changed: trio.Event = field(default_factory=trio.Event)
    progress: dict[str, HoldProgress] = field(default_factory=dict)
    refusal: Refusal | None = None
    mended: int = 0

    def __repr__(self) -> str:
        stages = len(self.plan.stages) if self.plan is not None else 0
        return f"<Pipeline {self.manifest.name} over {stages} stages, {'ready' if self.is_ready else 'not ready'}>"

    @property
    def route(self) -> tuple[str, ...]:
        return tuple(stage.island for stage in self.plan.stages) if self.plan is not None else ()

    @property
    def engine(self) -> str:
        """One name where all stages compute alike, which decides about splicing."""
        names = sorted({offer.engine for offer in self.held.values()})
        return names[0] if len(names) == 1 else "mixed/" + "+".join(names)[: limits.NAME_CHARS_MAX - 6]

    @property
    def slots(self) -> int:
        """Of the stage that takes the fewest jobs."""
        return min((offer.slots for offer in self.held.values()), default=1)

    def tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


class Pipelines:
    """``manifests``: of the models that may be cut, by name. ``clock``: Unix time in seconds. ``run`` must be running."""

    def __init__(self, manifests: Mapping[str, ShardManifest], port: IslandPort, clock: Callable[[], float]) -> None:
        self._manifests, self._port, self._clock = dict(manifests), port, clock
        self._pipelines: dict[str, Pipeline] = {}
        self._suspects: dict[tuple[str, int], float] = {}  # (Island, boot) -> trio time when it may be tried again
        self._slow: set[tuple[str, int]] = set()  # those among them that only were slow
        self._cannot: set[tuple[str, int, str, LayerRange]] = set()  # (Island, boot, model, layers): it does not have that file
        self._failed: dict[str, tuple[Refusal, float]] = {}  # model -> why its last plan failed, and until when that is told
        self._searched: dict[str, tuple[Any, Plan | NoPlan]] = {}  # model -> facts of its last search, and what was found
        self._nursery: trio.Nursery | None = None
        self.on_change: Callable[[], None] = lambda: None
        self.planned = self.mended = self.given_up = 0

    def __repr__(self) -> str:
        return f"<Pipelines {len(self._pipelines)} of {len(self._manifests)} models>"

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await trio.sleep_forever()

    # -- for placement

    def names(self) -> list[str]:
        """Models that are ready or on their way, or could be planned: some Island offers memory, or holds a part."""
        ads = [ad for ad in self._ads() if not ad.draining]
        offered = any(ad.memory_free_bytes for ad in ads)
        held = {offer.content_hash for ad in ads for offer in ad.shards}
        return [
            name
            for name, manifest in self._manifests.items()
            if offered or manifest.model_sha256 in held or self._ready(name) is not None or self.is_working(name)
        ]

    def is_working(self, name: str) -> bool:
        """Whether waiting for this model makes sense: it is being loaded or mended."""
        pipeline = self._pipelines.get(name)
        return pipeline is not None and pipeline.is_working

    def candidate(self, name: str) -> Candidate | None:
        """The pipeline of a model as placement sees it; its busy counts are the caller's to add."""
        pipeline = self._ready(name)
        if pipeline is None or pipeline.plan is None:
            return None
        driver = pipeline.plan.stages[-1]
        entry = self._port.book().entries[driver.island]
        return Candidate(driver.island, driver.boot, entry.ad.sequence, entry.ad.draining, _offer(pipeline), 0, 0, pipeline.plan)

    def want(self, name: str, tokens: int) -> Refusal | None:
        """Somebody asks for a model that nobody offers: begins to plan, where it is known and not under way. Says why it cannot be had
        now; None for a model without a manifest."""
        manifest = self._manifests.get(name)
        if manifest is None:
            return None
        pipeline = self._pipelines.get(name)
        if pipeline is None or not (pipeline.is_working or pipeline.is_ready):
            found = self._plan(manifest, tokens)
            if isinstance(found, NoPlan):
                failed, until_s = self._failed.get(name, (None, 0.0))  # what an Island said tells more than that nobody is left
                if failed is not None and until_s > trio.current_time():
                    return failed
                return Refusal(found.code, found.message, is_lasting=True)
            self._failed.pop(name, None)
            pipeline = self._pipelines[name] = Pipeline(manifest)
            self._start(self._load, pipeline, tokens)
        loading = ", ".join(f"{item.what} {item.done}/{item.total}" for item in pipeline.progress.values() if item.total)
        return Refusal(Code.NO_CAPACITY, f"the model {name!r} is being loaded on several Islands{': ' + loading if loading else ''}")

    def _ready(self, name: str) -> Pipeline | None:
        pipeline = self._pipelines.get(name)
        if pipeline is None or not pipeline.is_ready:
            return None
        if self._lost_stages(pipeline):
            self._begin_mending(pipeline)
            return None
        return pipeline

    # -- for running jobs

    async def mend(self, candidate: Candidate, report: RouteBroken) -> Candidate:
        """Another route for a job of which a stage has failed, with all other stages as they were. Raises Refused: the job has to begin
        anew, or cannot be done now."""
        broken, index = candidate.plan, report.index
        pipeline = self._pipelines.get(candidate.offer.name)
        if broken is None or pipeline is None or pipeline.plan is None:
            raise Refused(Code.NO_ISLAND, "the pipeline was given up")
        if not 0 <= index < len(broken.stages):
            raise Refused(Code.INTERNAL, f"Island {candidate.island} names a stage {index} that its route does not have")
        stage = broken.stages[index]
        if pipeline.plan == broken and pipeline.is_ready and stage.boot == report.boot:  # or else somebody has reported it already
            if report.code is Code.NO_CAPACITY and not self._can_replace(pipeline, index):
                return candidate  # slow is better than nothing
            self._suspect(pipeline, stage.island, stage.boot, report.code)
        found: Candidate | None = None
        with trio.move_on_after(limits.MEND_WAIT_S):
            while self._pipelines.get(candidate.offer.name) is pipeline:
                found = self.candidate(candidate.offer.name)
                if found is not None:
                    break
                await pipeline.changed.wait()
        if found is None or found.plan is None:
            refusal = pipeline.refusal or Refusal(Code.NO_ISLAND, f"stage {index} failed ({report.message}) and was not replaced in time")
            raise Refused(refusal.code, refusal.message)
        if found.offer.engine != candidate.offer.engine:
            raise Refused(Code.LINK_LOST, "the replacement computes with another engine: the rest of the answer begins anew")
        is_same = [stage.layers for stage in found.plan.stages] == [stage.layers for stage in broken.stages]
        if not is_same or found.island != candidate.island:
            raise Refused(Code.LINK_LOST, "the pipeline was planned anew")
        return found

    def driver_lost(self, candidate: Candidate) -> None:
        """The link to a job's driver was lost, which the book need not show yet: another Island takes its place, where one can."""
        pipeline, lost = self._pipelines.get(candidate.offer.name), candidate.plan
        if pipeline is None or lost is None or pipeline.plan != lost or not pipeline.is_ready:
            return
        if self._can_replace(pipeline, len(lost.stages) - 1):
            self._suspect(pipeline, candidate.island, candidate.boot, Code.LINK_LOST)

    def _can_replace(self, pipeline: Pipeline, index: int) -> bool:
        old, sites = pipeline.plan, self._sites(pipeline.manifest)
        if old is None:
            return False
        return isinstance(replace_stage(pipeline.manifest, old, index, sites, self._round_trips_s()), Plan)

    def _suspect(self, pipeline: Pipeline, island: str, boot: int, code: Code) -> None:
        self._suspects[island, boot] = trio.current_time() + _SUSPECT_S
        if code is Code.NO_CAPACITY:
            self._slow.add((island, boot))
        log.info("pipeline of %s: Island %s is suspected (%s)", pipeline.manifest.name, island, code)
        self._begin_mending(pipeline)

    def _begin_mending(self, pipeline: Pipeline) -> None:
        if pipeline.is_ready or not pipeline.is_working:
            pipeline.is_ready, pipeline.is_working, pipeline.refusal = False, True, None
            self._start(self._mend, pipeline)

    def _start(self, task: Callable[..., Any], *arguments: Any) -> None:
        if self._nursery is None:
            raise RuntimeError("Pipelines.run is not running")
        self._nursery.start_soon(task, *arguments)

    # -- tasks

    async def _load(self, pipeline: Pipeline, tokens: int) -> None:
        taken: list[PlannedStage] = []  # by tries that failed elsewhere
        try:
            for _ in range(_PLANS_TRIED_MAX):
                found = self._plan(pipeline.manifest, tokens)
                if isinstance(found, NoPlan):
                    told = f"; the last Island that was asked said: {pipeline.refusal.message}" if pipeline.refusal else ""
                    pipeline.refusal = Refusal(found.code, found.message + told, is_lasting=True)
                    self._failed[pipeline.manifest.name] = pipeline.refusal, trio.current_time() + _SUSPECT_S
                    return
                self.planned += 1
                log.info("plan for %s: %s", pipeline.manifest.name, "; ".join(found.reasons))
                pipeline.plan = found
                pipeline.held.clear()
                if await self._hold_all(pipeline, found):
                    if len(found.stages) > 1:
                        pipeline.plan, pipeline.is_ready = _asked(found, pipeline.held), True
                    return  # a whole model is offered by its Island's own ad
                taken += [found.stages[index] for index in pipeline.held if not found.stages[index].held]
        finally:
            used = pipeline.plan.stages if pipeline.plan is not None and pipeline.is_ready else ()
            kept = {(stage.island, stage.layers) for stage in used}
            self._start(self._drop, pipeline.manifest, [stage for stage in taken if (stage.island, stage.layers) not in kept])
            self._end_task(pipeline)

    async def _mend(self, pipeline: Pipeline) -> None:
        before = pipeline.plan
        try:
            alone_s = trio.current_time()  # since when nobody could take a place: loading may take its time
            while lost := self._lost_stages(pipeline):
                if await self._mend_stage(pipeline, lost[0]):
                    alone_s = trio.current_time()
                elif trio.current_time() - alone_s > limits.MEND_WAIT_S - _SECOND_CHANCE_S:
                    return
            pipeline.is_ready = True
            pipeline.mended += pipeline.plan != before
            self.mended += pipeline.plan != before
        finally:
            self._end_task(pipeline)

    async def _drop(self, manifest: ShardManifest, stages: Sequence[PlannedStage]) -> None:
        """Gives memory back that a plan has taken for nothing. An Island that is away has given it back itself."""
        for stage in stages:
            with trio.move_on_after(limits.HELLO_TIMEOUT_S):
                try:
                    await self._port.drop_shard(stage.island, DropShard(manifest.model_sha256, stage.layers))
                except Refused as refusal:
                    log.debug("layers %s on %s are not dropped: %s", stage.layers, stage.island, refusal.message)

    def _end_task(self, pipeline: Pipeline) -> None:
        pipeline.is_working = False
        pipeline.progress.clear()
        if not pipeline.is_ready and self._pipelines.get(pipeline.manifest.name) is pipeline:
            self.given_up += pipeline.plan is not None and len(pipeline.plan.stages) > 1
            del self._pipelines[pipeline.manifest.name]
        pipeline.tell()
        self.on_change()

    async def _mend_stage(self, pipeline: Pipeline, index: int) -> bool:
        """One try; waits a little where there is nobody. Whether an Island was asked to take the place."""
        old = pipeline.plan
        if old is None:
            return False
        gone = old.stages[index]
        stages = list(old.stages)
        stages[index] = replace(gone, island="")  # the same Island may take its place again, as another run
        nameless = replace(old, stages=tuple(stages))
        found = replace_stage(pipeline.manifest, nameless, index, self._sites(pipeline.manifest), self._round_trips_s())
        if isinstance(found, NoPlan):
            if (gone.island, gone.boot) in self._slow:  # slow is better than nothing
                self._slow.discard((gone.island, gone.boot))
                self._suspects.pop((gone.island, gone.boot), None)
                return False
            pipeline.refusal = Refusal(found.code, found.message)
            with trio.move_on_after(_SECOND_CHANCE_S):
                await self._port.wait_book_changed()
                return False
            self._suspects.pop((gone.island, gone.boot), None)  # if it is still there, it may have been the link alone
            return False
        stage = found.stages[index]
        found = replace(found, reasons=(*old.reasons, f"island {stage.island} has taken layers {stage.layers} over from {gone.island}"))
        if await self._hold(pipeline, found, index):
            pipeline.plan = _asked(found, pipeline.held)
            log.info("pipeline of %s: Island %s takes layers %s", pipeline.manifest.name, stage.island, stage.layers)
        return True

    async def _hold_all(self, pipeline: Pipeline, found: Plan) -> bool:
        held: list[bool] = []

        async def one(index: int) -> None:
            held.append(await self._hold(pipeline, found, index))

        async with trio.open_nursery() as nursery:
            for index in range(len(found.stages)):
                nursery.start_soon(one, index)
        return all(held)

    async def _hold(self, pipeline: Pipeline, found: Plan, index: int) -> bool:
        """Has a stage loaded; False where the Island would not, which is then left out of the next plan."""
        stage = found.stages[index]
        expires_at_ms = int((self._clock() + _ORDER_LIFETIME_S) * 1000)
        order = HoldShard(pipeline.manifest, stage.layers, found.cells, stage.boot, expires_at_ms)

        def note(progress: HoldProgress) -> None:
            pipeline.progress[stage.island] = progress

        try:
            with trio.fail_after(limits.SHARD_LOAD_S):
                held = await self._port.hold_shard(stage.island, order, note)
            await self._wait_ad(stage.island, held.sequence)
            self._check_held(pipeline, found, index)
        except (ArchipelagError, trio.TooSlowError) as error:
            why = str(error) or "it takes too long"
            log.warning("Island %s does not hold layers %s of %s: %s", stage.island, stage.layers, pipeline.manifest.name, why)
            pipeline.refusal = Refusal(Code.NO_CAPACITY, f"layers {stage.layers} of {pipeline.manifest.name}: {why}")
            is_file_missing = isinstance(error, Refused) and error.code is Code.UNKNOWN_CARGO
            if is_file_missing and stage.layers in pipeline.manifest.shard_layers:
                self._cannot.add((stage.island, stage.boot, pipeline.manifest.model_sha256, stage.layers))  # it may have another one
            else:
                self._suspects[stage.island, stage.boot] = trio.current_time() + _SUSPECT_S
            return False
        finally:
            pipeline.progress.pop(stage.island, None)
        return True

    def _check_held(self, pipeline: Pipeline, found: Plan, index: int) -> None:
        """Whether the Island's ad shows what it says that it holds. Raises Refused."""
        stage, manifest = found.stages[index], pipeline.manifest
        entry = self._port.book().entries.get(stage.island)
        if entry is None or entry.ad.boot != stage.boot:
            raise Refused(Code.LINK_LOST, "the Island has left or restarted")
        if len(found.stages) == 1:
            whole = entry.ad.offer(manifest.name)
            if whole is None or whole.content_hash != manifest.model_sha256:
                raise Refused(Code.UNKNOWN_CARGO, "its ad does not show the model")
            return
        offer = self._shard_offer(stage.island, pipeline, index, found)
        if offer is None:
            raise Refused(Code.UNKNOWN_CARGO, "its ad does not show them")
        if offer.shard_hash != (manifest.shard_hash(stage.layers) or offer.shard_hash):
            raise Refused(Code.UNKNOWN_CARGO, "it holds another file")
        pipeline.held[index] = offer

    async def _wait_ad(self, island: str, sequence: int) -> None:
        """Raises TooSlowError when the ad that names the shard does not come."""
        with trio.fail_after(limits.OPEN_TIMEOUT_S):
            while (entry := self._port.book().entries.get(island)) is None or entry.ad.sequence < sequence:
                await self._port.wait_book_changed()

    # -- facts

    def _ads(self) -> list[Ad]:
        return [entry.ad for entry in self._port.book().entries.values()]

    def _shard_offer(self, island: str, pipeline: Pipeline, index: int, found: Plan) -> ShardOffer | None:
        entry = self._port.book().entries.get(island)
        wanted = (pipeline.manifest.model_sha256, found.stages[index].layers)
        offers = entry.ad.shards if entry is not None else ()
        return next((offer for offer in offers if (offer.content_hash, offer.layers) == wanted), None)

    def _lost_stages(self, pipeline: Pipeline) -> list[int]:
        if pipeline.plan is None:
            return []
        return [index for index, stage in enumerate(pipeline.plan.stages) if self._is_lost(pipeline, index, stage.island, stage.boot)]

    def _is_lost(self, pipeline: Pipeline, index: int, island: str, boot: int) -> bool:
        entry = self._port.book().entries.get(island)
        if entry is None or entry.ad.boot != boot or entry.ad.draining or self._is_suspected(island, boot):
            return True
        if pipeline.plan is None or self._shard_offer(island, pipeline, index, pipeline.plan) is not None:
            return False
        return not self._restarts(entry.ad)

    @staticmethod
    def _restarts(ad: Ad) -> bool:
        """Its engine may be on its way back: the layers are out of the ad for a moment, the memory is still taken."""
        return ad.memory_free_bytes < ad.memory_offered_bytes

    def _is_suspected(self, island: str, boot: int) -> bool:
        return self._suspects.get((island, boot), 0.0) > trio.current_time()

    def _plan(self, manifest: ShardManifest, tokens: int) -> Plan | NoPlan:
        """A plan is a search, so the same facts are searched once. ``tokens`` is a guess of the length: a plan has to hold the whole
        context at most, and the Island counts."""
        tokens = min(tokens, manifest.context_tokens)
        sites, round_trips_s = self._sites(manifest), self._round_trips_s()
        facts = (tokens, sites, round_trips_s, len(self._cannot))
        known = self._searched.get(manifest.name)
        if known is None or known[0] != facts:
            known = self._searched[manifest.name] = (facts, self._search(manifest, sites, tokens, round_trips_s))
        return known[1]

    def _search(
        self, manifest: ShardManifest, sites: list[Site], tokens: int, round_trips_s: dict[tuple[str, str], float]
    ) -> Plan | NoPlan:
        """Ready shards where there is nothing else, or where they cost no further hop; else wherever it is best to cut."""
        if not ready_chain(manifest):
            return plan(manifest, sites, tokens, round_trips_s)
        runs = {(site.island, site.boot) for site in sites}
        known = [entry for entry in self._cannot if entry[:2] in runs and entry[2] == manifest.model_sha256]
        cannot = [(island, layers) for island, _, _, layers in known]
        ready = plan_ready_made(manifest, sites, tokens, round_trips_s, cannot)
        if not manifest.model_sources:
            return ready
        free = plan(manifest, sites, tokens, round_trips_s)
        if isinstance(ready, Plan) and (isinstance(free, NoPlan) or len(ready.stages) <= len(free.stages)):
            return ready
        return free

    def _round_trips_s(self) -> dict[tuple[str, str], float]:
        return {(ad.peer, path.peer): path.round_trip_us / 1e6 for ad in self._ads() for path in ad.paths}

    def _sites(self, manifest: ShardManifest) -> list[Site]:
        sites = []
        now_s = trio.current_time()
        self._suspects = {key: until for key, until in self._suspects.items() if until > now_s}
        self._slow &= self._suspects.keys()
        for ad in self._ads():
            if self._is_suspected(ad.peer, ad.boot):
                continue
            offers = [offer for offer in ad.shards if offer.content_hash == manifest.model_sha256]
            if offers or ad.memory_free_bytes:
                sites.append(_site(ad, offers))
        return sites

    def status(self) -> list[dict[str, Any]]:
        """For ``archipelag-node status`` on a Coordinator."""
        return [
            {
                "name": pipeline.manifest.name,
                "state": "ready" if pipeline.is_ready else "working",
                "cells": pipeline.plan.cells if pipeline.plan is not None else 0,
                "token_ms": round(pipeline.plan.token_s * 1e3, 3) if pipeline.plan is not None else 0,
                "mended": pipeline.mended,
                "reasons": list(pipeline.plan.reasons) if pipeline.plan is not None else [],
                "stages": [
                    {
                        "island": stage.island,
                        "layers": str(stage.layers),
                        "ask": [stage.ask.per_job, stage.ask.per_1k_output, stage.ask.per_second],
                        "bytes_needed": stage.bytes_needed,
                    }
                    for stage in (pipeline.plan.stages if pipeline.plan is not None else ())
                ],
                "loading": {island: f"{item.what} {item.done}/{item.total}" for island, item in pipeline.progress.items()},
            }
            for pipeline in self._pipelines.values()
        ]


def _asked(found: Plan, held: Mapping[int, ShardOffer]) -> Plan:
    """With what the Islands ask for this very model, which their ads say as soon as they hold it."""
    stages = (replace(stage, ask=held[index].ask) if index in held else stage for index, stage in enumerate(found.stages))
    return replace(found, stages=tuple(stages))


def _site(ad: Ad, offers: list[ShardOffer]) -> Site:
    held = tuple(
        Held(
            layers=offer.layers,
            cells_free=offer.kv_tokens_total if offer.is_free else 0,
            compute_bytes=offer.compute_bytes,
            token_s=offer.token_us / 1e6,
        )
        for offer in offers
    )
    speeds = [offer.token_us / 1e6 / len(offer.layers) for offer in offers if offer.token_us]
    ask = offers[0].ask if offers else ad.default_ask
    return Site(ad.peer, ad.boot, ad.memory_free_bytes, ask, held, min(speeds, default=0.0), 0, ad.draining)


def _offer(pipeline: Pipeline) -> CargoOffer:
    """All stages together."""
    found, manifest = pipeline.plan, pipeline.manifest
    assert found is not None, "a pipeline that is ready has a plan"
    cells = found.cells
    return CargoOffer(
        name=manifest.name,
        content_hash=manifest.model_sha256,
        runtime="gguf",
        engine=pipeline.engine,
        ask=found.ask,
        context_tokens=min(cells, manifest.context_tokens),
        kv_tokens_total=cells,
        kv_tokens_free=cells,
        slots_total=pipeline.slots,
        slots_free=pipeline.slots,
        weights_bytes=sum(manifest.weights_bytes(stage.layers) for stage in found.stages),
        kv_bytes_per_token=sum(manifest.kv_bytes),
        compute_bytes=0,
        tokens_per_s=1.0 / found.token_s if found.token_s else 0.0,
    )
