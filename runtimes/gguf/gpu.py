"""Which GPUs llama.cpp's build can use, and how much of their memory is free: ggml's device list, no vendor tool.

A build without a GPU back end lists the CPU alone; ``make setup GPU=…`` builds one that knows more.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from runtimes.gguf.llama import ggml, library

_TYPE_CPU, _TYPE_GPU, _TYPE_IGPU, _TYPE_ACCEL = 0, 1, 2, 3  # enum ggml_backend_dev_type


@dataclass(frozen=True, slots=True)
class Device:
    """A device as ggml names it, such as CUDA0, Vulkan0, Metal, CPU. Memory in bytes; 0 where the driver does not say."""

    name: str
    description: str
    backend: str
    is_gpu: bool
    memory_total_bytes: int
    memory_free_bytes: int
    shares_memory: bool = False  # an integrated GPU, whose memory is the machine's


def devices() -> list[Device]:
    """All devices of this build on this machine, the CPU included."""
    library()  # registers the back ends
    lib = _typed(ggml(), _registry())
    return [_device(lib, index) for index in range(lib.count())]


def gpus() -> list[Device]:
    return [device for device in devices() if device.is_gpu]


def supports_offload() -> bool:
    """Whether this build can put layers on a GPU at all."""
    return bool(library().llama_supports_gpu_offload())


def backend_name() -> str:
    """The back end that computes: that of the first GPU, else "cpu"."""
    found = gpus() if supports_offload() else []
    return found[0].backend.lower() if found else "cpu"


def vram_free_bytes() -> int:
    """Free memory of the GPUs that do not share the machine's RAM; of the shared one where there is no other."""
    found = gpus()
    own = [device for device in found if not device.shares_memory]
    return sum(device.memory_free_bytes for device in own or found)  # llama.cpp chooses in the same way


def _registry() -> Any:
    """The library that knows the devices: libggml, loaded already by llama.cpp."""
    from pathlib import Path

    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    for name in ("libggml.so", "libggml.dylib", "ggml.dll"):
        if (folder / name).exists():
            return ctypes.CDLL(str(folder / name))
    return ggml()


class _Calls:
    """The few functions that are needed, with their types."""

    def __init__(self, base: Any, registry: Any) -> None:
        self.count = registry.ggml_backend_dev_count
        self.count.restype, self.count.argtypes = ctypes.c_size_t, []
        self.get = registry.ggml_backend_dev_get
        self.get.restype, self.get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        self.name, self.description = base.ggml_backend_dev_name, base.ggml_backend_dev_description
        for text in (self.name, self.description):
            text.restype, text.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self.kind = base.ggml_backend_dev_type
        self.kind.restype, self.kind.argtypes = ctypes.c_int, [ctypes.c_void_p]
        self.memory = base.ggml_backend_dev_memory
        self.memory.restype = None
        self.memory.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t), ctypes.POINTER(ctypes.c_size_t)]
        self.registry_of, self.registry_name = base.ggml_backend_dev_backend_reg, base.ggml_backend_reg_name
        self.registry_of.restype, self.registry_of.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        self.registry_name.restype, self.registry_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]


def _typed(base: Any, registry: Any) -> _Calls:
    return _Calls(base, registry)


def _device(lib: _Calls, index: int) -> Device:
    device = lib.get(index)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    lib.memory(device, ctypes.byref(free), ctypes.byref(total))
    kind = lib.kind(device)
    return Device(
        name=_text(lib.name(device)),
        description=_text(lib.description(device)),
        backend=_text(lib.registry_name(lib.registry_of(device))),
        is_gpu=kind in (_TYPE_GPU, _TYPE_IGPU),
        memory_total_bytes=int(total.value),
        memory_free_bytes=int(free.value),
        shares_memory=kind == _TYPE_IGPU,
    )


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace")
