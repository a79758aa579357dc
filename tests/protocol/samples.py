"""Valid things to start from, with keys and times that never change; tests alter one field at a time."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from privacy.keys import NodeKey
from protocol import (
    ads,
    blobs,
    cargo_news,
    counts,
    direct,
    hold,
    limits,
    messages,
    receipts,
    shards,
    stage_messages,
    tickets,
)
from protocol.activations import Activations
from protocol.errors import Code
from protocol.generation import (
    ChatMessage,
    FinishReason,
    GenerationRequest,
    Role,
    Sampling,
    Tool,
    ToolCall,
    ToolChoice,
    pack_tokens,
)
from protocol.prices import Ask
from protocol.shards import LayerRange

NOW_MS = 1_795_000_000_000  # 2026-11-18
BOOT_MS = NOW_MS - 60_000


def key(number: int) -> NodeKey:
    """The key whose seed is ``number``, big-endian."""
    return NodeKey(number.to_bytes(32, "big"))


NETWORK_KEY = key(1)
COORDINATOR = key(2)
ISLAND = key(3)
HOLDER = key(4)
OTHER = key(5)
FIRST = key(6)  # stages 0 and 1 of the pipeline; its driver is ISLAND
MIDDLE = key(7)
NETWORK = tickets.network_id_of(NETWORK_KEY.public_key)
CONTENT_HASH = "ab" * 32
SHARD_HASH = "cd" * 32
SESSION = b"\x05" * stage_messages.SESSION_BYTES


def offer(**changes: Any) -> ads.CargoOffer:
    fields = ads.CargoOffer(
        name="smollm2-135m",
        content_hash=CONTENT_HASH,
        runtime="gguf",
        engine="gguf/1",
        ask=Ask(per_job=1_000, per_1k_output=20_000),
        context_tokens=8192,
        kv_tokens_total=32_768,
        kv_tokens_free=30_000,
        slots_total=16,
        slots_free=15,
        weights_bytes=98_000_000,
        kv_bytes_per_token=23_040,
        compute_bytes=50_000_000,
        tokens_per_s=140.5,
    )
    return replace(fields, **changes)


def shard(**changes: Any) -> ads.ShardOffer:
    fields = ads.ShardOffer(
        name="smollm2-135m",
        content_hash=CONTENT_HASH,
        shard_hash=SHARD_HASH,
        layers=LayerRange(0, 16),
        total_layers=30,
        engine="gguf/1",
        ask=Ask(per_1k_output=10_000),
        slots=16,
        kv_tokens_total=32_768,
        weights_bytes=60_000_000,
        kv_bytes_per_token=12_288,
        compute_bytes=30_000_000,
        process_bytes=90_000_000,
        token_us=4_200,
        is_free=True,
    )
    return replace(fields, **changes)


def ad(signer: NodeKey = ISLAND, **changes: Any) -> ads.Ad:
    sequence = changes.get("sequence", NOW_MS)
    fields = ads.Ad(
        version=ads.AD_VERSION,
        network=NETWORK,
        peer=signer.peer_id,
        boot=min(BOOT_MS, sequence),
        sequence=sequence,
        expires_at_ms=sequence + int(limits.AD_LIFETIME_S * 1000),
        agent="archipelag/0.1.0",
        addresses=("/ip4/192.0.2.1/tcp/4001",),
        region="EU",
        hardware=ads.Hardware(8, 16 * 2**30, 100 * 2**30, (ads.Gpu("Example GPU", "cuda", 8 * 2**30),)),
        runtimes=("echo", "gguf"),
        memory_offered_bytes=8 * 2**30,
        default_ask=Ask(per_job=1_000),
        offers=(offer(),),
        paths=(ads.PathMeasure(COORDINATOR.peer_id, 1_200),),
        shards=(shard(),),
        memory_free_bytes=2 * 2**30,
        loading=(ads.CargoLoading("text-stats", "ee" * 32, 1_000_000, 3_000_000),),
        sandbox="namespaces+seccomp",
        sandbox_reason="bubblewrap was tried and holds",
    )
    return replace(fields, **changes)


def lost(peer: str = ISLAND.peer_id, sequence: int = NOW_MS, **changes: Any) -> ads.Lost:
    return replace(ads.Lost(NETWORK, peer, sequence, max(NOW_MS, sequence)), **changes)


def delegation(coordinator: str = COORDINATOR.peer_id, **changes: Any) -> tickets.Delegation:
    return replace(tickets.Delegation(NETWORK, coordinator, NOW_MS + 86_400_000), **changes)


def ticket(**changes: Any) -> tickets.Ticket:
    fields = tickets.Ticket(
        version=tickets.TICKET_VERSION,
        network=NETWORK,
        issuer=COORDINATOR.peer_id,
        holder=HOLDER.peer_id,
        job_id="job-1",
        route=(ISLAND.peer_id,),
        boots=(BOOT_MS,),
        cargo="smollm2-135m",
        content_hash=CONTENT_HASH,
        token_limit=256,
        price_limit_micros=50_000,
        cache_salt=b"\x07" * 32,
        nonce=b"\x01" * limits.NONCE_BYTES,
        issued_at_ms=NOW_MS,
        expires_at_ms=NOW_MS + 120_000,
        count_every=8,
    )
    return replace(fields, **changes)


def pipeline_ticket(**changes: Any) -> tickets.Ticket:
    """FIRST, MIDDLE and, as the driver, ISLAND hold a model of 30 layers between them."""
    stages = tuple(
        tickets.TicketStage(LayerRange(low, high), Ask(per_1k_output=ask))
        for low, high, ask in ((0, 10, 9_000), (10, 20, 8_000), (20, 30, 11_000))
    )
    fields: dict[str, Any] = {
        "route": (FIRST.peer_id, MIDDLE.peer_id, ISLAND.peer_id),
        "boots": (BOOT_MS - 2, BOOT_MS - 1, BOOT_MS),
        "stages": stages,
        "activations": Activations.F16,
    }
    return ticket(**(fields | changes))


def manifest(**changes: Any) -> shards.ShardManifest:
    """A small model whose figures are all different, so that a sum of the wrong ones shows."""
    fields = shards.ShardManifest(
        version=shards.MANIFEST_VERSION,
        name="tiny",
        architecture="llama",
        model_sha256=CONTENT_HASH,
        model_bytes=40_000,
        model_sources=("https://models.example/tiny.gguf",),
        total_layers=4,
        width=64,
        vocabulary=512,
        context_tokens=2_048,
        embedding_bytes=10_000,
        head_bytes=5_000,
        shared_bytes=7,
        layer_bytes=(1_000, 1_100, 1_200, 1_400),
        kv_bytes=(100, 110, 120, 140),
        micro_batch=60,
        compute_bytes=(50_000, 40_000, 90_000),
        shard_layers=(LayerRange(0, 2), LayerRange(2, 4)),
        shard_hashes=(SHARD_HASH, "ef" * 32),
        shard_bytes=(12_500, 8_000),
        shard_urls=("https://models.example/tiny.0-1.gguf", ""),
    )
    return replace(fields, **changes)


def receipt(**changes: Any) -> receipts.Receipt:
    fields = receipts.Receipt(
        version=receipts.RECEIPT_VERSION,
        network=NETWORK,
        island=ISLAND.peer_id,
        job_id="job-1",
        ticket_hash=b"\x11" * 32,
        content_hash=CONTENT_HASH,
        prompt_tokens=30,
        cached_tokens=10,
        sent_tokens=8,
        output_hash=b"\x22" * 32,
        compute_ms=700,
        price_micros=1_160,
        finish_reason=receipts.Ending.STOP,
        finished_at_ms=NOW_MS + 700,
    )
    return replace(fields, **changes)


def count(**changes: Any) -> counts.Count:
    """Of the tokens 0 to 4 of the job that ``ticket`` opens."""
    fields = counts.Count(
        version=counts.COUNT_VERSION,
        network=NETWORK,
        holder=HOLDER.peer_id,
        ticket_hash=tickets.ticket_hash(tickets.sign_ticket(ticket(), COORDINATOR)),
        tokens=5,
        output_hash=output_hash(5),
    )
    return replace(fields, **changes)


def generation_with_tools(**changes: Any) -> GenerationRequest:
    call = ToolCall("call_1", "weather", '{"city":"Bern"}')
    fields = GenerationRequest(
        messages=(
            ChatMessage(Role.USER, "Is it warm in Bern?"),
            ChatMessage(Role.ASSISTANT, "", tool_calls=(call,)),
            ChatMessage(Role.TOOL, "21 °C", tool_call_id="call_1"),
        ),
        max_tokens=64,
        sampling=Sampling(temperature=0.0, seed=7),
        tools=(
            Tool("weather", "The weather in a city.", '{"type":"object","properties":{"city":{"type":"string"}}}'),
            Tool("now"),
        ),
        tool_choice=ToolChoice.NAMED,
        tool="weather",
        parallel_calls=False,
    )
    return replace(fields, **changes)


def output_hash(tokens: int) -> bytes:
    """Of the ids 0, 1, 2, …"""
    return hashlib.sha256(pack_tokens(list(range(tokens)))).digest()


def generation(**changes: Any) -> GenerationRequest:
    fields = GenerationRequest(
        messages=(ChatMessage(Role.SYSTEM, "You are a helpful AI assistant."), ChatMessage(Role.USER, "Grüße, 世界 🏝")),
        max_tokens=64,
        sampling=Sampling(temperature=0.0, logit_bias=((11, -2.5),), seed=7),
        stop=("\n\n",),
        resume=pack_tokens([1, 2, 3]),
    )
    return replace(fields, **changes)


JOB_MESSAGES: tuple[Any, ...] = (
    messages.Hello(1, messages.NodeRole.ISLAND, NETWORK, "archipelag/0.1.0"),
    messages.JobOpen(1, b"ticket", input=b"input"),
    messages.JobAccepted(1, "gguf/1", 30, 10),
    messages.JobChunk(1, 0, "Pa", b"", pack_tokens([5, 6])),
    messages.JobDone(
        job=1,
        finish_reason=FinishReason.STOP,
        text=".",
        prompt_tokens=30,
        cached_tokens=10,
        completion_tokens=2,
        prefill_us=1_000,
        decode_us=2_000,
        receipt=b"receipt",
        stages=(messages.StageUse(FIRST.peer_id, 400, 1_500), messages.StageUse(ISLAND.peer_id, 700, 1_900)),
        wire_us=350,
    ),
    messages.JobFailed(1, Code.NO_CAPACITY, "full"),
    messages.JobCancel(1),
    messages.RouteBroken(1, 0, BOOT_MS, Code.LINK_LOST, "stage 0 is gone"),
    messages.RouteMended(1, b"ticket"),
    messages.JobCount(1, b"count"),
    messages.JobAlive(1),
    messages.JobLines(1, 0, 1, b'{"type":"token","content":"Pa"}\n'),
    messages.JobMore(1, 65_536),
)
ADS_MESSAGES: tuple[Any, ...] = (
    messages.Hello(1, messages.NodeRole.COORDINATOR, NETWORK, "archipelag/0.1.0", b"delegation"),
    messages.Announce((b"one", b"two")),
    messages.AdAck(NOW_MS, True),
    messages.BookRequest((messages.Known(COORDINATOR.peer_id, 5), messages.Known(ISLAND.peer_id, 7, True))),
    messages.Coordinators((f"/ip4/192.0.2.2/tcp/4001/p2p/{COORDINATOR.peer_id}",)),
)
STAGE_MESSAGES: tuple[Any, ...] = (
    messages.Hello(1, messages.NodeRole.ISLAND, NETWORK, "archipelag/0.1.0"),
    stage_messages.StageOpen(SESSION, 1, 0, b"ticket"),
    stage_messages.StageOpened(("gguf/1", "gguf/1")),
    stage_messages.StageRows(
        step=7,
        spans=(stage_messages.Span(1, 30, 2), stage_messages.Span(2, 5, 1)),
        times=(stage_messages.StageTime(900, 800),),
        rows=bytes(range(24)),
    ),
    stage_messages.SequenceOpen(2, 300, 12, 1, 20, b"ticket"),
    stage_messages.SequenceEnd((1, 2)),
    stage_messages.RowsWanted(1, 0, 30),
    stage_messages.StageProbe(3),
    stage_messages.StageReport(3, 1, 40, 2, 5_000),
    stage_messages.StageFault(1, 0, Code.WORKER_DIED, "the engine has ended"),
)
HOLD_MESSAGES: tuple[Any, ...] = (
    messages.Hello(1, messages.NodeRole.COORDINATOR, NETWORK, "archipelag/0.1.0", b"delegation"),
    hold.HoldShard(manifest(), LayerRange(1, 3), 8_192, BOOT_MS, NOW_MS + 60_000),
    hold.HoldProgress("cutting", 10, 100),
    hold.ShardHeld(SHARD_HASH, NOW_MS + 1),
    hold.HoldRefused(Code.NO_CAPACITY, "no memory is offered"),
    hold.DropShard(CONTENT_HASH, LayerRange(1, 3)),
    hold.SetAsk("smollm2-135m", Ask(1_000, 2_000, 3)),
    hold.AskSet(NOW_MS + 1),
)
SETTLE_MESSAGES: tuple[Any, ...] = (
    messages.Hello(1, messages.NodeRole.ISLAND, NETWORK, "archipelag/0.1.0"),
    direct.Claim(b"ticket", b"receipt", b"count"),
    direct.ClaimAnswer(b"\x11" * 32, direct.Verdict.SETTLED, 1_160),
)
JOB_ID = "0123456789abcdef01234567"
API_KEY = "ak_" + "A" * 43
STANDING = direct.RateStanding(100, 99, 60)
ATTEMPT = direct.Attempt(b"ticket", b"receipt", b"count")
DESK_MESSAGES: tuple[Any, ...] = (
    messages.Hello(1, messages.NodeRole.CONSUMER, NETWORK, "archipelag/0.1.0"),
    direct.TicketWanted(
        request=1,
        api_key=API_KEY,
        job_id=JOB_ID,
        choices=2,
        kind="chat",
        cargo="smollm2-135m",
        prompt_tokens=30,
        output_tokens=256,
        content_hash=CONTENT_HASH,
        engine="gguf/1",
        context_over=2_048,
        affinity=ISLAND.peer_id,
        excluded=(direct.Excluded(OTHER.peer_id, NOW_MS), direct.Excluded(MIDDLE.peer_id, 0, 250)),
        wait_ms=30_000,
        bid="0.25",
        policy='{"regions":["EU"]}',
        quote="q_1",
        priority=10,
    ),
    direct.TicketGranted(
        request=1,
        ticket=b"ticket",
        addresses=("/ip4/192.0.2.1/tcp/4001",),
        sequence=NOW_MS,
        region="EU",
        offer=offer(),
        price_max_micros=50_000,
        placement='{"score":71.5}',
        standing=STANDING,
    ),
    direct.DeskRefused(1, Code.NO_CAPACITY, "all are busy", 503, "server_error", "no_capacity", "", 2, STANDING),
    direct.PlaceFreed(JOB_ID, b"\x11" * 32, Code.LINK_LOST, b"count"),
    direct.JobSettled(2, JOB_ID, (ATTEMPT,)),
    direct.JobDropped(3, JOB_ID, Code.CANCELLED, (ATTEMPT,)),
    direct.JobBilled(2, 1_160, 9_999_998_840),
    direct.ModelsWanted(4, API_KEY),
    direct.Models(4, (direct.OfferedModel("smollm2-135m", NOW_MS // 1000),), 2, STANDING),
    direct.RequestWithdrawn(1),
    direct.MendWanted(5, JOB_ID, b"\x11" * 32, 0, BOOT_MS, Code.LINK_LOST, "stage 0 is gone"),
)
BLOB_TREE = blobs.tree_of([b"the only chunk"])
BLOB_MESSAGES: tuple[Any, ...] = (
    messages.Hello(1, messages.NodeRole.ISLAND, NETWORK, "archipelag/0.1.0"),
    blobs.TreeWanted(1, blobs.BlobKey.SHA256, CONTENT_HASH),
    blobs.Tree(1, CONTENT_HASH, BLOB_TREE.size, BLOB_TREE.leaves),
    blobs.HaveWanted(2, BLOB_TREE.root()),
    blobs.Have(2, blobs.Held.SOME, blobs.pack_held([True, False, True])),
    blobs.ChunksWanted(3, BLOB_TREE.root(), 0, 1),
    blobs.Chunk(3, 0, b"the only chunk"),
    blobs.BlobRefused(4, blobs.BlobCode.OUT_OF_RANGE, "the blob has 1 chunks"),
)
CARGOS_MESSAGES: tuple[Any, ...] = (
    messages.Hello(1, messages.NodeRole.ISLAND, NETWORK, "archipelag/0.1.0"),
    cargo_news.CargosWanted(cargo_news.About.CARGO, b"\x01" * 32, b"\x03" * 32, b"\x02" * 32 + b"\x03" * 32),
    cargo_news.CargosKnown((cargo_news.Notice(cargo_news.About.CARGO, b"envelope", b"listing", b"delegation"),), True),
    cargo_news.CargoNews(
        (
            cargo_news.Notice(cargo_news.About.REVOCATION, b"envelope"),
            cargo_news.Notice(cargo_news.About.PROMOTION, b"envelope", b"", b"delegation"),
        )
    ),
)
REGISTRIES = (
    (messages.JOB, JOB_MESSAGES),
    (messages.ADS, ADS_MESSAGES),
    (stage_messages.STAGE, STAGE_MESSAGES),
    (hold.HOLD, HOLD_MESSAGES),
    (direct.SETTLE, SETTLE_MESSAGES),
    (direct.DESK, DESK_MESSAGES),
    (blobs.BLOB, BLOB_MESSAGES),
    (cargo_news.CARGOS, CARGOS_MESSAGES),
)
