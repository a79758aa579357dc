"""Do these shards compute what the model computes? Tried in a throw-away process: ``python -m runtimes.gguf.shard_check MODEL SHARD…``.

Whether an architecture can be cut is not looked up in a list but found out: the model and the chain of its shards compute the same
batches, and every logit must be the same bit for bit. Layers that look at their own number, scale their input or keep something else
than keys and values fail here. Native code may crash on a file that it does not like, hence the process. One file is loaded at a time.

Answers with JSON on stdout: weights, KV and compute buffers of each file as llama.cpp has them; or, with exit code 3, the reason why not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from protocol.errors import ConfigError
from protocol.shards import LayerRange, ShardManifest
from runtimes.gguf.layers import Rows, Stage
from runtimes.gguf.llama import Floats, Ints, LlamaError, Model, NoSuchTensor
from runtimes.gguf.load import stage_size
from runtimes.gguf.shard_header import read_shard_layers

CELLS = 1024
_SIZE = stage_size(CELLS, threads=1)  # as an Island's stages have them: the buffers are measured so
_CHUNKS = (30, 28, 12)  # of each of two sequences, side by side in one batch
_STEPS = 6
_STRIDE = 7919  # a prime: the tokens of the prompts are spread over the vocabulary
_REFUSED = 3
_KV_ROUNDING_BYTES = 16 * 1024  # llama.cpp's log rounds each buffer to 0.01 MiB
_TIMEOUT_LEAST_S, _BYTES_PER_S_LEAST = 600.0, 4e6


@dataclass(frozen=True, slots=True)
class Measured:
    """What llama.cpp allocates for one file, in bytes; ``kv_bytes`` for CELLS tokens."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int


def check_chain(model: Path, shards: Sequence[Path], manifest: ShardManifest, spare: Path | None = None) -> tuple[int, int, int]:
    """Runs the model and its shards, which follow one another and are all of it, in a child process, and compares.

    Returns the measured ``compute_bytes`` of a first, a middle and a last stage; ``spare``: a middle shard that is only measured, for
    chains without one (else their middle is 0). Raises ConfigError where a logit differs, a size is not the manifest's, or the engine
    fails: then the model cannot be cut so.
    """
    ranges = [_layers(path) for path in shards]
    ends = [0, *(layers.high for layers in ranges)]
    if [layers.low for layers in ranges] != ends[:-1] or ends[-1] != manifest.total_layers:
        raise ConfigError(f"the shards {', '.join(map(str, ranges))} are not all of {manifest.name} in order; name one for each range")
    files = [*shards, *([spare] if spare is not None else [])]
    found = _in_child(model, files, len(shards), manifest)
    for layers, measured in zip([*ranges, *([_layers(spare)] if spare is not None else [])], found, strict=True):
        _compare(manifest, layers, measured)
    middles = [measured.compute_bytes for measured in found[1 : len(shards) - 1]] + [m.compute_bytes for m in found[len(shards) :]]
    return found[0].compute_bytes, max(middles, default=0), found[len(shards) - 1].compute_bytes


def _layers(path: Path) -> LayerRange:
    facts = read_shard_layers(path)
    if facts is None:
        raise ConfigError(f"{path} is a whole model, not a shard; cut it with `archipelag-node cargo shard`")
    return facts.layers


def _compare(manifest: ShardManifest, layers: LayerRange, measured: Measured) -> None:
    """Raises ConfigError: planners would count on figures that are not so."""
    expected, kv_expected = manifest.weights_bytes(layers), manifest.kv_bytes_per_token(layers) * CELLS
    if measured.weights_bytes != expected or abs(measured.kv_bytes - kv_expected) > _KV_ROUNDING_BYTES:
        raise ConfigError(
            f"{manifest.name} cannot be cut: llama.cpp holds {measured.weights_bytes} bytes of weights and {measured.kv_bytes} of KV cells "
            f"for the layers {layers}, not {expected} and {kv_expected}; serve the model whole"
        )


def _in_child(model: Path, files: Sequence[Path], stages: int, manifest: ShardManifest) -> list[Measured]:
    from runtimes.gguf.cargo import worker_environment  # loads trio, which the child has no use for

    command = [sys.executable, "-P", "-m", "runtimes.gguf.shard_check", str(stages), str(model.absolute())]
    command += [str(path.absolute()) for path in files]
    timeout_s = _TIMEOUT_LEAST_S + 3 * manifest.model_bytes / _BYTES_PER_S_LEAST
    what = f"{manifest.name} (architecture {manifest.architecture}) cannot be cut"
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, env=worker_environment(), cwd="/", check=False
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{what}: the check did not end within {timeout_s:.0f} s; try again on an idle machine") from None
    try:
        answer = json.loads(done.stdout)
        if done.returncode == _REFUSED:
            raise ConfigError(f"{what}: {answer['refused']}; serve the model whole")
        if done.returncode == 0:
            return [Measured(**entry) for entry in answer["measured"]]
    except (ValueError, KeyError, TypeError):
        pass  # it died before it could say anything
    raise ConfigError(f"{what}: the engine failed on its shards (exit status {done.returncode}); serve the model whole")


class _Unfit(Exception):
    """These shards do not do what the model does; the text says how that showed."""


def check_files(model: Path, shards: Sequence[Path], spare: Sequence[Path] = ()) -> list[Measured]:
    """The child's work, in this process. Raises LlamaError, and ``_Unfit`` where a logit differs."""
    with _opened(model, is_last=True) as stage:
        batches = _batches(stage.context.model.n_vocab)
        expected = [stage.forward(rows).copy() for rows in batches]
    if not all(np.isfinite(logits).all() for logits in expected):
        raise _Unfit("what the whole model computes are no numbers")
    measured, passed = [], batches
    for index, path in enumerate(shards):
        is_last = index == len(shards) - 1
        with _opened(path, is_last) as stage:
            outputs = [_forward(stage, rows) for rows in passed]
            measured.append(_measured(stage))
        if not is_last:
            passed = [rows.with_hidden(hidden) for rows, hidden in zip(passed, outputs, strict=True)]
    for logits, whole in zip(outputs, expected, strict=True):
        if not np.array_equal(logits, whole):
            raise _Unfit(f"its shards give other logits than the whole model, by up to {np.abs(logits - whole).max():.3g}")
    for path in spare:
        with _opened(path, is_last=False) as stage:
            measured.append(_measured(stage))
    return measured


@contextmanager
def _opened(path: Path, is_last: bool) -> Iterator[Stage]:
    model = Model(str(path), plain=True)  # kernels that need repacked weights are not the same on all CPUs
    try:
        stage = Stage(model, _SIZE, is_last)
        try:
            yield stage
        finally:
            stage.close()
    finally:
        model.close()


def _measured(stage: Stage) -> Measured:
    return Measured(stage.context.model.facts().weights_bytes, stage.context.kv_bytes, stage.context.compute_bytes)


def _forward(stage: Stage, rows: Rows) -> Floats:
    """One batch; a copy. Hidden states come from the tensor ``l_out-N``, which not every architecture has."""
    try:
        outputs = stage.forward(rows).copy()
    except NoSuchTensor as error:
        raise _Unfit(f"its hidden states cannot be read between the layers ({error})") from None
    count = int(rows.wanted.sum()) if stage.is_last else len(rows)
    if len(outputs) != count:
        raise _Unfit(f"{len(rows)} positions gave {len(outputs)} hidden states")
    return outputs


def _batches(vocabulary: int) -> list[Rows]:
    """Prompts of two sequences in two chunks, side by side; then single tokens. Some are read at their end only, some everywhere."""
    batches, start = [], 0
    for number, count in enumerate((*_CHUNKS, *[1] * _STEPS)):
        positions = np.tile(np.arange(start, start + count, dtype=np.int32), 2)
        sequences = np.repeat(np.arange(2, dtype=np.int32), count)
        tokens = _tokens(positions, sequences, vocabulary)
        wanted = np.ones(2 * count, np.int8)
        if number == 0:
            wanted[:] = positions == count - 1
        batches.append(Rows(tokens, positions, sequences, wanted))
        start += count
    return batches


def _tokens(positions: Ints, sequences: Ints, vocabulary: int) -> Ints:
    spread = (positions.astype(np.int64) + 1) * _STRIDE + sequences * 31
    tokens: Ints = (spread % vocabulary).astype(np.int32)
    return tokens


def main(arguments: Sequence[str]) -> int:
    """``STAGES MODEL SHARD…``: the first STAGES shards are a chain, what follows is only measured."""
    stages, model, files = int(arguments[0]), Path(arguments[1]), [Path(argument) for argument in arguments[2:]]
    try:
        measured = check_files(model, files[:stages], files[stages:])
    except (LlamaError, _Unfit) as error:
        print(json.dumps({"refused": str(error)}))
        return _REFUSED
    print(json.dumps({"measured": [asdict(entry) for entry in measured]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
