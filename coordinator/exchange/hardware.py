"""What an Island's hardware is worth: its price tier, and how fast it should be before anybody has measured.

Bandwidths are those of the vendors' data sheets (width of the memory bus x data rate), desktop cards unless it says laptop. Tiers of the
cards that the sources list are theirs (H100, A100, RTX 4090 and 5090 enterprise, and so on); the others go with cards of their speed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from coordinator.exchange.amounts import scaled_ask
from protocol.ads import Gpu, Hardware
from protocol.prices import Ask

GB = 10**9
REFERENCE_WEIGHTS_BYTES = 9 * GB // 2  # mission.md: 4.5, a model of 7 billion weights in 4 bits
BANDWIDTH_SHARE = 0.55  # mission.md: of the bandwidth that decoding reaches
FIT_SPARE = 1.2  # weights, KV cache and buffers, as a multiple of the weights
FACTOR_FITS, FACTOR_SPILLS, FACTOR_CPU = 1.0, 0.5, 0.3  # mission.md: {1, 0.5, 0.3}
CPU_BANDWIDTH_GB_PER_S = 51  # two channels of DDR4-3200
_UNKNOWN_GB_PER_S = 128  # of a GPU that is in no table: a narrow bus of GDDR5
_UNKNOWN_MID_BYTES = 12 * GB


class Tier(StrEnum):
    ENTERPRISE = "enterprise"
    HIGH_END = "high_end"
    MID_RANGE = "mid_range"
    ENTRY = "entry"
    CPU = "cpu_only"


TIER_PPM: dict[Tier, int] = {
    # mission.md: hardware multipliers 2.0, 1.5, 1.2, 1.0, 0.5
    Tier.ENTERPRISE: 2_000_000,
    Tier.HIGH_END: 1_500_000,
    Tier.MID_RANGE: 1_200_000,
    Tier.ENTRY: 1_000_000,
    Tier.CPU: 500_000,
}


@dataclass(frozen=True, slots=True)
class GpuModel:
    """A row of the table: the words of its name, from how many gigabytes of VRAM on it counts, its memory's GB/s and its tier."""

    words: tuple[str, ...]
    vram_gb_min: int
    bandwidth_gb_per_s: int
    tier: Tier


# Name, "@ GB" where cards of one name differ by their memory, and GB/s.
_TABLE: dict[Tier, str] = {
    Tier.ENTERPRISE: """
        b200 8000, h200 4800, h100 3350, h100 pcie 2000, gh200 4000, a100 1555, a100 @60 2039, a800 2039, l40s 864, l40 864,
        mi300x 5300, mi250x 3277, mi210 1638, rtx pro 6000 blackwell 1792, rtx 6000 ada 960, rtx 5090 1792, rtx 4090 1008,
        rtx 4090 d 1008""",
    Tier.HIGH_END: """
        a40 696, a30 933, a10 600, a10g 600, v100 900, rtx a6000 768, rtx a5500 768, rtx a5000 768, rtx 5000 ada 576,
        rtx 5090 laptop 896, rtx 5080 960, rtx 5080 laptop 896, rtx 5070 ti 896, rtx 4080 716, rtx 4080 super 736, rtx 4070 ti super 672,
        rtx 3090 936, rtx 3090 ti 1008, rtx 3080 ti 912, titan rtx 672, rx 7900 xtx 960, rx 7900 xt 800, pro w7900 864, radeon vii 1024,
        apple m4 max 546, apple m3 ultra 819, apple m2 ultra 800, apple m1 ultra 800""",
    Tier.MID_RANGE: """
        l4 300, t4 320, p100 732, rtx a4500 640, rtx a4000 448, rtx 4500 ada 432, rtx 4000 ada 360, rtx 5070 672, rtx 5070 ti laptop 672,
        rtx 5060 ti 448, rtx 4090 laptop 576, rtx 4080 laptop 432, rtx 4070 504, rtx 4070 super 504, rtx 4070 ti 504,
        rtx 3080 760, rtx 3080 @11 912, rtx 3080 ti laptop 512, rtx 3080 laptop 448, rtx 3070 448, rtx 3070 ti 608, rtx 2080 ti 616,
        rtx 2080 super 496, rtx 2080 448, quadro rtx 8000 672, quadro rtx 6000 672, rx 9070 xt 640, rx 9070 640, rx 7900 gre 576,
        rx 7800 xt 624, rx 7700 xt 432, rx 6950 xt 576, rx 6900 xt 512, rx 6800 xt 512, rx 6800 512, pro w7800 576, arc a770 560,
        apple m4 pro 273, apple m3 max 400, apple m2 max 400, apple m1 max 400, gb10 273, radeon 8060s 256""",
    Tier.ENTRY: """
        p40 346, p4 192, a2 200, rtx a2000 288, rtx 2000 ada 224, rtx 5060 448, rtx 5050 320, rtx 5070 laptop 384, rtx 5060 laptop 384,
        rtx 5050 laptop 384, rtx 4060 ti 288, rtx 4060 272, rtx 4070 laptop 256, rtx 4060 laptop 256, rtx 4050 laptop 192,
        rtx 3060 ti 448, rtx 3060 240, rtx 3060 @11 360, rtx 3050 168, rtx 3050 @7 224, rtx 3070 ti laptop 448, rtx 3070 laptop 448,
        rtx 3060 laptop 336, rtx 3050 laptop 192, rtx 2070 super 448, rtx 2070 448, rtx 2060 super 448, rtx 2060 336, gtx 1660 ti 288,
        gtx 1660 super 336, gtx 1660 192, gtx 1650 128, gtx 1080 ti 484, gtx 1080 320, gtx 1070 ti 256, gtx 1070 256, gtx 1060 192,
        rx 9060 xt 320, rx 7600 xt 288, rx 7600 288, rx 6750 xt 432, rx 6700 xt 384, rx 6600 xt 256, rx 6600 224, rx 580 256,
        arc b580 456, arc b570 380, arc a750 512, arc a580 512, arc a380 186, apple m4 120, apple m3 pro 150, apple m3 100,
        apple m2 pro 200, apple m2 100, apple m1 pro 200, apple m1 68, orin 204""",
}
_ROW = re.compile(r"([a-z0-9 ]+?)(?: @([0-9]+))? ([0-9]+)\Z")
_WORD = re.compile(r"[a-z0-9]+")
_NO_WORD = re.compile(r"(tm|r|generation|[0-9]+gb)\Z")  # "Intel(R) Arc(TM)", "H100 80GB"


def _models() -> Iterator[GpuModel]:
    for tier, rows in _TABLE.items():
        for row in rows.split(","):
            match = _ROW.match(" ".join(row.split()))
            if match is None:
                raise ValueError(f"no row of the table of GPUs: {row!r}")
            yield GpuModel(tuple(match[1].split()), int(match[2] or 0), int(match[3]), tier)


MODELS: tuple[GpuModel, ...] = tuple(_models())


def find_model(gpu: Gpu) -> GpuModel | None:
    """The row whose words stand one after the other in the GPU's name; of several the one with most words, then with most memory."""
    words = [word for word in _WORD.findall(gpu.name.lower()) if not _NO_WORD.match(word)]
    fits = [m for m in MODELS if gpu.vram_bytes >= m.vram_gb_min * GB and _stands_in(m.words, words)]
    return max(fits, key=lambda model: (len(model.words), model.vram_gb_min), default=None)


def _stands_in(wanted: tuple[str, ...], words: list[str]) -> bool:
    size = len(wanted)
    return any(tuple(words[at : at + size]) == wanted for at in range(len(words) - size + 1))


def tier_of_gpu(gpu: Gpu) -> Tier:
    """A GPU that no table knows is never more than mid range: graphics that share the computer's memory claim a lot of it."""
    model = find_model(gpu)
    if model is not None:
        return model.tier
    return Tier.MID_RANGE if gpu.vram_bytes >= _UNKNOWN_MID_BYTES else Tier.ENTRY


def bandwidth_of_gpu(gpu: Gpu) -> int:
    """GB/s of its memory."""
    model = find_model(gpu)
    return model.bandwidth_gb_per_s if model is not None else _UNKNOWN_GB_PER_S


def tier_of(hardware: Hardware) -> Tier:
    """That of its best GPU."""
    return max((tier_of_gpu(gpu) for gpu in hardware.gpus), key=TIER_PPM.__getitem__, default=Tier.CPU)


def estimated_tokens_per_s(hardware: Hardware, weights_bytes: int = REFERENCE_WEIGHTS_BYTES) -> float:
    """Tokens per second of one stream, until they are measured: each token reads all weights once.

    ``weights_bytes``: of the model, by default the reference. They may be spread over all GPUs; the fastest counts.
    """
    if not hardware.gpus:
        bandwidth, factor = CPU_BANDWIDTH_GB_PER_S, FACTOR_CPU
    else:
        bandwidth = max(map(bandwidth_of_gpu, hardware.gpus))
        fits = sum(gpu.vram_bytes for gpu in hardware.gpus) >= FIT_SPARE * weights_bytes
        factor = FACTOR_FITS if fits else FACTOR_SPILLS
    return bandwidth * GB / max(1, weights_bytes) * BANDWIDTH_SHARE * factor


def suggested_ask(rate: Ask, tier: Tier) -> Ask:
    """What such hardware may ask where jobs clear at this rate."""
    return scaled_ask(rate, TIER_PPM[tier])
