"""Writes GGUF models of a few layers with random weights: every architecture that is cut, without a download. Same seed, same bytes."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

WIDTH, HEADS, KV_HEADS, HEAD, FEED, VOCABULARY, CONTEXT = 64, 4, 2, 16, 96, 288, 512
EXPERTS, EXPERTS_USED, EXPERT_FEED = 4, 2, 32
_F32 = 0
Meta = int | float | str | bool | list[int] | list[float] | list[str] | list[bool]


@dataclass(frozen=True)
class Tiny:
    """``architecture`` as in the file; the flags say what its layers have."""

    architecture: str
    layers: int = 4
    tied: bool = False
    biases: bool = False
    head_norms: bool = False
    post_norms: bool = False
    experts: bool = False
    rope_freqs: bool = False
    kv_heads: tuple[int, ...] = ()  # one for each layer
    vocabulary: int = VOCABULARY
    more: tuple[tuple[str, Meta], ...] = ()
    context: int = CONTEXT
    template: str = "{{ messages[0]['content'] }}"
    controls: tuple[str, ...] = ()  # control tokens, the last of the vocabulary


TINY = {
    "llama": Tiny("llama", rope_freqs=True),
    "llama-tied": Tiny("llama", tied=True),
    "deci": Tiny("deci", kv_heads=(2, 4, 1, 2), vocabulary=289),
    "qwen2": Tiny("qwen2", biases=True),
    "qwen3": Tiny("qwen3", tied=True, head_norms=True),
    "mistral3": Tiny("mistral3"),
    "gemma3": Tiny("gemma3", layers=8, tied=True, head_norms=True, post_norms=True, more=(("gemma3.attention.sliding_window", 16),)),
    "qwen3moe": Tiny("qwen3moe", head_norms=True, experts=True),
}


def write_tiny(path: Path, tiny: Tiny, seed: int = 7) -> Path:
    """The file at ``path``."""
    write_gguf(path, metadata(tiny), tensors(tiny, seed))
    return path


def metadata(tiny: Tiny) -> dict[str, Meta]:
    arch = tiny.architecture
    found: dict[str, Meta] = {
        "general.architecture": arch,
        f"{arch}.block_count": tiny.layers,
        f"{arch}.context_length": tiny.context,
        f"{arch}.embedding_length": WIDTH,
        f"{arch}.feed_forward_length": FEED,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": list(tiny.kv_heads) or KV_HEADS,
        f"{arch}.attention.key_length": HEAD,
        f"{arch}.attention.value_length": HEAD,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.dimension_count": HEAD,
        f"{arch}.rope.freq_base": 10_000.0,
    }
    if tiny.experts:
        counts = {"expert_count": EXPERTS, "expert_used_count": EXPERTS_USED, "expert_feed_forward_length": EXPERT_FEED}
        found |= {f"{arch}.{name}": count for name, count in counts.items()}
    return found | dict(tiny.more) | _vocabulary(tiny.vocabulary, tiny.controls) | {"tokenizer.chat_template": tiny.template}


@dataclass(frozen=True)
class TinyEncoder:
    """BERT in small. ``pooling``: of the file; -1: it says nothing of it."""

    pooling: int = 1
    layers: int = 2
    context: int = 256


def write_tiny_encoder(path: Path, tiny: TinyEncoder | None = None, seed: int = 7) -> Path:
    tiny = tiny or TinyEncoder()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"▁{letter}" for letter in letters), *letters]
    found: dict[str, Meta] = {
        "general.architecture": "bert",
        "bert.block_count": tiny.layers,
        "bert.context_length": tiny.context,
        "bert.embedding_length": WIDTH,
        "bert.feed_forward_length": FEED,
        "bert.attention.head_count": HEADS,
        "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.attention.causal": False,
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 2, 3, 3, *[1] * (len(tokens) - 4)],
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }
    if tiny.pooling >= 0:
        found["bert.pooling_type"] = tiny.pooling
    write_gguf(path, found, _encoder_tensors(tiny, len(tokens), seed))
    return path


def _encoder_tensors(tiny: TinyEncoder, vocabulary: int, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    chance = np.random.default_rng(seed)

    def random(*shape: int) -> npt.NDArray[np.float32]:
        return np.asarray(chance.standard_normal(shape) / np.sqrt(shape[-1]), np.float32)

    found = {
        "token_embd.weight": random(vocabulary, WIDTH),
        "token_types.weight": random(2, WIDTH),
        "position_embd.weight": random(tiny.context, WIDTH),
        "token_embd_norm.weight": 1 + random(WIDTH),
        "token_embd_norm.bias": random(WIDTH),
    }
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (WIDTH, WIDTH), "attn_v": (WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}
    shapes |= {"ffn_up": (FEED, WIDTH), "ffn_down": (WIDTH, FEED)}
    for number in range(tiny.layers):
        for name, shape in shapes.items():
            found |= {f"blk.{number}.{name}.weight": random(*shape), f"blk.{number}.{name}.bias": random(shape[0])}
        for name in ("attn_output_norm", "layer_output_norm"):
            found |= {f"blk.{number}.{name}.weight": 1 + random(WIDTH), f"blk.{number}.{name}.bias": random(WIDTH)}
    return found


def _vocabulary(size: int, controls: tuple[str, ...]) -> dict[str, Meta]:
    """The smallest that llama.cpp takes: a SentencePiece vocabulary of control tokens, all bytes, and letters."""
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    words = size - 3 - 256 - len(controls)
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *(f"▁w{n}" for n in range(words)), *controls]
    kinds = [2, 3, 3, *[6] * 256, *[1] * words, *[3] * len(controls)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * size,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def tensors(tiny: Tiny, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """In numpy's order of dimensions, which is the reverse of GGUF's."""
    chance = np.random.default_rng(seed)

    def random(*shape: int) -> npt.NDArray[np.float32]:
        return np.asarray(chance.standard_normal(shape) / np.sqrt(shape[-1]), np.float32)

    def norm(size: int) -> npt.NDArray[np.float32]:
        return (1 + 0.1 * chance.standard_normal(size)).astype(np.float32)

    found = {"token_embd.weight": random(tiny.vocabulary, WIDTH), "output_norm.weight": norm(WIDTH)}
    if not tiny.tied:
        found["output.weight"] = random(tiny.vocabulary, WIDTH)
    if tiny.rope_freqs:
        found["rope_freqs.weight"] = (1 + chance.random(HEAD // 2)).astype(np.float32)
    for number in range(tiny.layers):
        kv = HEAD * (tiny.kv_heads[number] if tiny.kv_heads else KV_HEADS)
        layer = {
            "attn_norm.weight": norm(WIDTH),
            "attn_q.weight": random(HEADS * HEAD, WIDTH),
            "attn_k.weight": random(kv, WIDTH),
            "attn_v.weight": random(kv, WIDTH),
            "attn_output.weight": random(WIDTH, HEADS * HEAD),
            "ffn_norm.weight": norm(WIDTH),
        }
        if tiny.biases:
            layer |= {"attn_q.bias": random(HEADS * HEAD), "attn_k.bias": random(kv), "attn_v.bias": random(kv)}
        if tiny.head_norms:
            layer |= {"attn_q_norm.weight": norm(HEAD), "attn_k_norm.weight": norm(HEAD)}
        if tiny.post_norms:
            layer |= {"post_attention_norm.weight": norm(WIDTH), "post_ffw_norm.weight": norm(WIDTH)}
        if tiny.experts:
            layer["ffn_gate_inp.weight"] = random(EXPERTS, WIDTH)
            layer |= {f"ffn_{kind}_exps.weight": random(EXPERTS, EXPERT_FEED, WIDTH) for kind in ("gate", "up")}
            layer["ffn_down_exps.weight"] = random(EXPERTS, WIDTH, EXPERT_FEED)
        else:
            layer |= {f"ffn_{kind}.weight": random(FEED, WIDTH) for kind in ("gate", "up")}
            layer["ffn_down.weight"] = random(WIDTH, FEED)
        found |= {f"blk.{number}.{name}": tensor for name, tensor in layer.items()}
    return found


def write_gguf(path: Path, meta: dict[str, Meta], arrays: dict[str, npt.NDArray[np.float32]], version: int = 3) -> None:
    front = b"GGUF" + struct.pack("<IQQ", version, len(arrays), len(meta))
    front += b"".join(_text(key) + _typed(value) for key, value in meta.items())
    offset = 0
    for name, array in arrays.items():
        front += _text(name) + struct.pack(f"<I{array.ndim}QIQ", array.ndim, *array.shape[::-1], _F32, offset)
        offset += array.nbytes + -array.nbytes % 32
    data = b"".join(array.tobytes() + b"\0" * (-array.nbytes % 32) for array in arrays.values())
    path.write_bytes(front + b"\0" * (-len(front) % 32) + data)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _typed(value: Meta) -> bytes:
    kind = _kind(value)
    return struct.pack("<I", kind) + _bare(value, kind)


def _kind(value: Meta) -> int:
    return 9 if isinstance(value, list) else {bool: 7, int: 4, float: 6, str: 8}[type(value)]


def _bare(value: Meta, kind: int) -> bytes:
    if isinstance(value, list):
        inner = 5 if _kind(value[0]) == 4 else _kind(value[0])  # lists of numbers are signed
        return struct.pack("<IQ", inner, len(value)) + b"".join(_bare(item, inner) for item in value)
    return _text(value) if isinstance(value, str) else struct.pack({7: "<?", 4: "<I", 5: "<i", 6: "<f"}[kind], value)
