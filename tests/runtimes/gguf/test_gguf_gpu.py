"""Devices of this build, and what would be done with those of other machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.gguf import budget, gpu, load
from runtimes.gguf.gpu import Device
from runtimes.gguf.messages import Load

GIB = 1024**3
CPU = Device("CPU", "a processor", "CPU", False, 32 * GIB, 16 * GIB)
BLAS = Device("BLAS", "OpenBLAS", "BLAS", False, 0, 0)  # an accelerator that holds no layers
CUDA0 = Device("CUDA0", "a card", "CUDA", True, 24 * GIB, 20 * GIB)
CUDA1 = Device("CUDA1", "another card", "CUDA", True, 8 * GIB, 7 * GIB)
SHARED = Device("Vulkan0", "in the processor", "Vulkan", True, 16 * GIB, 12 * GIB, shares_memory=True)


def pretend(monkeypatch: pytest.MonkeyPatch, *devices: Device, offload: bool = True) -> None:
    monkeypatch.setattr(gpu, "devices", lambda: list(devices))
    monkeypatch.setattr(gpu, "supports_offload", lambda: offload)


def test_this_build_lists_the_cpu() -> None:
    found = gpu.devices()
    (cpu,) = [device for device in found if device.backend == "CPU"]
    assert cpu.name == "CPU" and cpu.description and not cpu.is_gpu and not cpu.shares_memory
    assert cpu.memory_total_bytes >= cpu.memory_free_bytes > 0
    assert gpu.gpus() == [device for device in found if device.is_gpu]


def test_a_build_without_gpus_computes_on_the_cpu(smollm2_path: Path) -> None:
    if gpu.supports_offload():
        pytest.skip("this build has a GPU back end")
    assert gpu.gpus() == [] and gpu.vram_free_bytes() == 0
    assert gpu.backend_name() == "cpu"
    assert load._gpu_layers(order(smollm2_path, gpu_layers=99)) == 0


@pytest.mark.parametrize(
    ("devices", "offload", "backend", "vram_bytes"),
    [
        ((CPU,), True, "cpu", 0),
        ((BLAS, CPU), True, "cpu", 0),
        ((CUDA0, CUDA1, CPU), True, "cuda", 27 * GIB),
        ((SHARED, CPU), True, "vulkan", 12 * GIB),
        ((CUDA1, SHARED, CPU), True, "cuda", 7 * GIB),  # the shared memory is the CPU's already
        ((CUDA0, CPU), False, "cpu", 20 * GIB),
    ],
)
def test_back_end_and_memory_of_made_up_machines(
    devices: tuple[Device, ...], offload: bool, backend: str, vram_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, *devices, offload=offload)
    assert gpu.backend_name() == backend
    assert gpu.vram_free_bytes() == vram_bytes


def order(path: Path, gpu_layers: int = -1) -> Load:
    return Load("m", str(path), "5a" * 32, 0, 1, gpu_layers, 0, 64)


@pytest.mark.parametrize(
    ("vram_free_bytes", "asked", "expected"),
    [
        (20 * GIB, -1, 31),  # all layers and the output matrix
        (2 * GIB, -1, 31),
        (budget.VRAM_RESERVE_BYTES + 128 * 2**20 + 200 * 10**6, -1, 13),  # 15.3 MB a layer with its cells
        (budget.VRAM_RESERVE_BYTES, -1, 0),
        (0, -1, 0),
        (0, 7, 7),  # the user knows better
        (20 * GIB, 0, 0),
    ],
)
def test_as_many_layers_go_to_the_gpu_as_its_memory_holds(
    vram_free_bytes: int, asked: int, expected: int, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Device("CUDA0", "a card", "CUDA", True, 24 * GIB, vram_free_bytes)
    pretend(monkeypatch, card, CPU)
    assert load._gpu_layers(order(smollm2_path, asked)) == expected
    pretend(monkeypatch, card, CPU, offload=False)
    assert load._gpu_layers(order(smollm2_path, asked)) == 0


def test_layers_of_a_model_that_is_half_too_large(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are the file's: the glance at it that the shape is read from loads no tensors."""
    pretend(monkeypatch, CPU)
    assert load._gpu_layers(order(smollm2_path)) == 0
    needed = smollm2_path.stat().st_size + budget.CELLS_DEFAULT * 23_040
    beside = budget.VRAM_RESERVE_BYTES + load._compute_guess(49_152, 128, load.MICRO_BATCH_GPU)
    pretend(monkeypatch, Device("CUDA0", "a card", "CUDA", True, GIB, beside + needed // 2 + 1_000_000), CPU)
    assert load._gpu_layers(order(smollm2_path)) == 15
