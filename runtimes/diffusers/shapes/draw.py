"""Captioned shapes as numpy draws them, and what a caption promises, found again in a picture by its pixels.

A scene is one plain shape in one colour on one ground. Its place and size are drawn by chance; what its caption says is what
``read_scene`` finds in the picture: the colour by the nearest of the palette, the shape by how much of its bounding box it fills
(a circle π/4, a square 1, a triangle whose base is as long as its height 1/2) and how much of it is above the middle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SIDE_PX = 32

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 165, 70),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 50),
    "purple": (140, 50, 185),
    "orange": (245, 140, 30),
}
GROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}
SHAPES = ("circle", "square", "triangle")
# Share of its bounding box that a shape fills, at least and at most: 0.73 to 0.85 (π/4), 1, and 0.5 to 0.57 (1/2) as drawn in 32 x 32;
# a square that is a little askew has a larger box, and so has a triangle whose tips are round a smaller one.
_FILLS = {"circle": (0.65, 0.85), "square": (0.85, 1.0), "triangle": (0.4, 0.75)}
_UPPER_MAX = 0.38  # of a shape's area, in the upper half of its box: a quarter of a triangle, half of the others
_STRAY_MAX = 60.0  # of 441: so far from its colour may half of the pixels of a shape be

_HALF_PX = (8.0, 12.0)  # half of a shape's side, at least and at most
_MARGIN_PX = 2.0


@dataclass(frozen=True, slots=True)
class Scene:
    """What stands in a caption."""

    colour: str
    shape: str
    ground: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} on a {self.ground} ground"


ALL_SCENES = tuple(Scene(colour, shape, ground) for colour in COLOURS for shape in SHAPES for ground in GROUNDS)
# Never drawn in training: what the model makes of these it has put together itself, of words it knows from others.
HELD_OUT = (Scene("blue", "triangle", "black"), Scene("yellow", "circle", "grey"), Scene("green", "square", "white"))
TRAINED = tuple(scene for scene in ALL_SCENES if scene not in HELD_OUT)


def draw(scenes: list[Scene], chance: np.random.Generator) -> NDArray[np.float32]:
    """Pictures of ``scenes``: [len(scenes), SIDE_PX, SIDE_PX, 3], 0 to 1, edges smooth over one pixel."""
    count = len(scenes)
    half = chance.uniform(*_HALF_PX, count)[:, None, None]
    free = SIDE_PX / 2 - _MARGIN_PX - half
    middle_x, middle_y = (SIDE_PX / 2 + free * chance.uniform(-1, 1, (count, 1, 1)) for _ in range(2))
    places = np.arange(SIDE_PX) + 0.5
    x, y = places[None, None, :] - middle_x, places[None, :, None] - middle_y
    outside_px = {
        "circle": np.hypot(x, y) - half,
        "square": np.maximum(abs(x), abs(y)) - half,
        # Sides from the top's middle to the corners below: 2|x| = y + half, at right angles to (2, -1).
        "triangle": np.maximum((2 * abs(x) - y - half) / np.sqrt(5), abs(y) - half),
    }
    cover = np.stack([outside_px[scene.shape][index] for index, scene in enumerate(scenes)])
    cover = np.clip(0.5 - cover, 0, 1)[..., None]
    shape = np.array([COLOURS[scene.colour] for scene in scenes])[:, None, None, :] / 255
    ground = np.array([GROUNDS[scene.ground] for scene in scenes])[:, None, None, :] / 255
    return (cover * shape + (1 - cover) * ground).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a picture shows. ``fill``: share of its bounding box that the shape covers; ``aspect``: width by height of the box;
    ``cover``: share of all pixels. ``shape`` is empty where there is none that is known."""

    colour: str
    shape: str
    ground: str
    fill: float
    aspect: float
    cover: float

    def shows(self, scene: Scene) -> bool:
        return (self.colour, self.shape, self.ground) == (scene.colour, scene.shape, scene.ground)


def read_scene(pixels: NDArray[np.uint8]) -> Seen:
    """Of a picture [height, width, 3]. The ground is what most of the border shows; a pixel belongs to the shape as far as it is on the way
    from the ground's colour to the shape's."""
    picture = pixels.astype(np.float64)
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    ground = _nearest(np.median(border, axis=0), GROUNDS)
    away = picture - np.array(GROUNDS[ground])
    others = picture[np.linalg.norm(away, axis=-1) > _STRAY_MAX]
    if not len(others):
        return Seen("", "", ground, 0.0, 0.0, 0.0)
    colour = _nearest(np.median(others, axis=0), COLOURS)
    is_plain = np.median(np.linalg.norm(others - np.array(COLOURS[colour]), axis=-1)) <= _STRAY_MAX
    way = np.array(COLOURS[colour], dtype=np.float64) - np.array(GROUNDS[ground])
    share = np.clip(away @ way / (way @ way), 0, 1)
    mask = share >= 0.5
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return Seen(colour, "", ground, 0.0, 0.0, 0.0)
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    fill, upper = float(box.mean()), float(box[: len(box) // 2].sum() / box.sum())
    shape = "triangle" if upper < _UPPER_MAX else "circle" if fill < _FILLS["circle"][1] else "square"
    is_known = is_plain and _FILLS[shape][0] <= fill <= _FILLS[shape][1]
    return Seen(colour, shape if is_known else "", ground, fill, box.shape[1] / box.shape[0], float(mask.mean()))


def _nearest(pixel: NDArray[np.float64], palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(pixel - np.array(palette[name]))))
