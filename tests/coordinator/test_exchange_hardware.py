"""Hardware by its name: the tiers of the sources, names as drivers write them, and what nobody knows."""

from __future__ import annotations

import pytest

from coordinator.exchange.hardware import (
    MODELS,
    TIER_PPM,
    Tier,
    bandwidth_of_gpu,
    estimated_tokens_per_s,
    find_model,
    suggested_ask,
    tier_of,
    tier_of_gpu,
)
from protocol.ads import Gpu, Hardware
from protocol.prices import Ask

GIB = 2**30

NAMES: list[tuple[str, int, int, Tier]] = [
    # name as a driver or llama.cpp writes it, VRAM in GiB, GB/s of the data sheet, tier
    ("NVIDIA H100 80GB HBM3", 80, 3350, Tier.ENTERPRISE),
    ("NVIDIA H100 PCIe", 80, 2000, Tier.ENTERPRISE),
    ("NVIDIA A100-SXM4-80GB", 79, 2039, Tier.ENTERPRISE),
    ("NVIDIA A100-PCIE-40GB", 39, 1555, Tier.ENTERPRISE),
    ("NVIDIA GeForce RTX 4090", 24, 1008, Tier.ENTERPRISE),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", 16, 576, Tier.MID_RANGE),
    ("NVIDIA GeForce RTX 5090", 32, 1792, Tier.ENTERPRISE),
    ("NVIDIA L4", 22, 300, Tier.MID_RANGE),
    ("NVIDIA L40S", 45, 864, Tier.ENTERPRISE),
    ("Tesla T4", 15, 320, Tier.MID_RANGE),
    ("NVIDIA RTX A4000", 16, 448, Tier.MID_RANGE),
    ("NVIDIA RTX 6000 Ada Generation", 48, 960, Tier.ENTERPRISE),
    ("Quadro RTX 6000", 24, 672, Tier.MID_RANGE),
    ("NVIDIA GeForce RTX 4070", 12, 504, Tier.MID_RANGE),
    ("NVIDIA GeForce RTX 4070 Ti SUPER", 16, 672, Tier.HIGH_END),
    ("NVIDIA GeForce RTX 3090", 24, 936, Tier.HIGH_END),
    ("NVIDIA GeForce RTX 3080", 10, 760, Tier.MID_RANGE),
    ("NVIDIA GeForce RTX 3080", 12, 912, Tier.MID_RANGE),
    ("NVIDIA GeForce RTX 3060", 12, 360, Tier.ENTRY),
    ("NVIDIA GeForce RTX 3060", 8, 240, Tier.ENTRY),
    ("NVIDIA GeForce GTX 1080 Ti", 11, 484, Tier.ENTRY),
    ("AMD Radeon RX 7900 XTX (RADV NAVI31)", 24, 960, Tier.HIGH_END),
    ("AMD Radeon RX 7900 XT", 20, 800, Tier.HIGH_END),
    ("AMD Radeon PRO W7900", 48, 864, Tier.HIGH_END),
    ("Intel(R) Arc(TM) A770 Graphics", 16, 560, Tier.MID_RANGE),
    ("Apple M2", 10, 100, Tier.ENTRY),
    ("Apple M2 Max", 32, 400, Tier.MID_RANGE),
    ("Apple M4 Max", 48, 546, Tier.HIGH_END),
]


def gpu(name: str, vram_gib: int = 8) -> Gpu:
    return Gpu(name, "cuda", vram_gib * GIB)


def machine(*gpus: Gpu) -> Hardware:
    return Hardware(8, 16 * GIB, GIB, gpus)


@pytest.mark.parametrize(("name", "vram", "bandwidth", "tier"), NAMES, ids=[f"{row[0]} {row[1]}" for row in NAMES])
def test_names(name: str, vram: int, bandwidth: int, tier: Tier) -> None:
    assert bandwidth_of_gpu(gpu(name, vram)) == bandwidth
    assert tier_of_gpu(gpu(name, vram)) is tier


def test_the_table_can_be_read_in_one_way() -> None:
    keys = [(model.words, model.vram_gb_min) for model in MODELS]
    assert len(keys) > 130 and len(set(keys)) == len(keys)
    for model in MODELS:
        assert 50 < model.bandwidth_gb_per_s < 10_000
        assert find_model(gpu(" ".join(model.words), model.vram_gb_min + 1)) == model


@pytest.mark.parametrize(
    "name", ["", "llvmpipe (LLVM 15.0.7, 256 bits)", "RTX", "Radeon RX 79000", "NVIDIA A4090", "\u0661"]
)
def test_unknown_names(name: str) -> None:
    assert find_model(gpu(name)) is None
    assert tier_of_gpu(gpu(name, 8)) is Tier.ENTRY
    assert tier_of_gpu(gpu(name, 96)) is Tier.MID_RANGE, "shared memory is not a large card"


def test_an_island_is_its_best_gpu() -> None:
    assert tier_of(machine()) is Tier.CPU
    assert tier_of(machine(gpu("NVIDIA GeForce RTX 3060"), gpu("NVIDIA GeForce RTX 4090"))) is Tier.ENTERPRISE


def test_speed_by_the_formula() -> None:
    """bandwidth / 4.5 x 0.55 x {1, 0.5, 0.3}"""
    assert estimated_tokens_per_s(machine(gpu("NVIDIA GeForce RTX 4090", 24))) == pytest.approx(1008 / 4.5 * 0.55)
    assert estimated_tokens_per_s(machine(gpu("NVIDIA GeForce GTX 1650", 4))) == pytest.approx(128 / 4.5 * 0.55 * 0.5)
    assert estimated_tokens_per_s(machine()) == pytest.approx(51 / 4.5 * 0.55 * 0.3)
    assert estimated_tokens_per_s(machine(gpu("NVIDIA L4", 22)), 9 * 10**9) == pytest.approx(300 / 9 * 0.55)
    assert estimated_tokens_per_s(machine(gpu("NVIDIA L4", 22), gpu("NVIDIA L4", 22)), 30 * 10**9) == pytest.approx(5.5)
    assert estimated_tokens_per_s(machine(gpu("NVIDIA L4", 0)), 0) > 0


def test_suggested_asks() -> None:
    rate = Ask(1000, 333, 0)
    asks = {tier: suggested_ask(rate, tier) for tier in Tier}
    assert asks == {
        Tier.ENTERPRISE: Ask(2000, 666),
        Tier.HIGH_END: Ask(1500, 500),
        Tier.MID_RANGE: Ask(1200, 400),
        Tier.ENTRY: Ask(1000, 333),
        Tier.CPU: Ask(500, 167),
    }
    assert set(TIER_PPM) == set(Tier)
