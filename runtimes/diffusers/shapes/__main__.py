"""Trains the pipeline of shapes and writes its folder: ``python -m runtimes.diffusers.shapes FOLDER [--steps N] [--threads N]``.

With a ``cargo.toml``, ready for ``archipelag-node cargo build``. It ends with how many captions the model answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from runtimes.diffusers.shapes import FOLDER
from runtimes.diffusers.shapes.check import answered
from runtimes.diffusers.shapes.draw import ALL_SCENES, HELD_OUT
from runtimes.diffusers.shapes.train import Plan, train
from runtimes.diffusers.shapes.write import file_list, write_cargo, write_folder


def main() -> None:
    args = _arguments()
    import torch

    torch.set_num_threads(args.threads)
    plan = Plan(seed=args.seed)
    if args.steps:
        plan = Plan(max(1, args.steps * plan.vae_steps // plan.unet_steps), args.steps, args.seed)
    with _Bars() as bars:
        trained = train(plan, bars.told)
    write_folder(trained.parts, args.folder)
    write_cargo(args.folder)
    if args.folder.resolve() == FOLDER.resolve():
        pins = {"torch": torch.__version__, "files": file_list(args.folder)}
        (FOLDER.parent / "hashes.json").write_text(json.dumps(pins, indent=1) + "\n", encoding="utf-8")
    found = answered(args.folder, ALL_SCENES, seed=0, threads=args.threads)
    unseen = sum(scene in found for scene in HELD_OUT)
    print(f"{args.folder} answers {len(found)} of {len(ALL_SCENES)} captions, and {unseen} of the {len(HELD_OUT)} that it was never shown")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="trains the small text-to-image pipeline of shapes")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="of the U-Net; the autoencoder's go with them")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    return parser.parse_args()


class _Bars:
    """One progress bar a stage, on stderr."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def told(self, stage: str, step: int, steps: int, loss: float) -> None:
        if step == 1:
            self.__exit__()
            self._bar = tqdm(total=steps, desc=stage, unit="step")
        assert self._bar is not None
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self._bar.update()


if __name__ == "__main__":
    main()
