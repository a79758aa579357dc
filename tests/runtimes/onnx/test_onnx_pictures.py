"""Tasks of pictures on models whose right answers are known, and pictures that are none."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import helper
from PIL import Image, ImageDraw

from protocol import limits
from protocol.cargo_io import ImageLine
from protocol.errors import ConfigError
from runtimes.lines.engine import BadJob, BrokenJob
from runtimes.onnx.detection import Candidates, best_of, overlaps
from runtimes.onnx.images import Placement, Preparation, read_image
from runtimes.onnx.recognition import decode_columns
from runtimes.onnx.vision import unplaced
from tests.runtimes.onnx.onnx_models import FLOAT, FakeJob, build, opened, result_of, run

_PICTURE = [("pixels", FLOAT, [1, 3, 8, 8])]


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def plain(color: tuple[int, int, int], size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new("RGB", size, color)


def _means(layout: str = "nchw") -> Any:
    """Logits: the mean of each channel."""
    axes, shape = ([2, 3], [1, 3, 8, 8]) if layout == "nchw" else ([1, 2], [1, 8, 8, 3])
    node = helper.make_node("ReduceMean", ["pixels"], ["logits"], axes=axes, keepdims=0)
    return build([node], [("pixels", FLOAT, shape)], [("logits", FLOAT, [1, 3])])


_COLORS = {"task": "image-classification", "labels": ["red", "green", "blue"]}


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_picture_is_classified(tmp_path: Path, layout: str) -> None:
    engine = opened(tmp_path, _means(layout), _COLORS | {"activation": "none"})
    result = run(engine, image=encoded(plain((0, 255, 51))))
    assert result["label"] == "green" and result["score"] == pytest.approx(1.0)
    assert result["scores"] == {"green": pytest.approx(1.0), "blue": pytest.approx(0.2), "red": 0.0}
    assert list(run(engine, image=encoded(plain((9, 1, 2))), top_k=1)["scores"]) == ["red"]


def test_values_are_scaled_and_channels_turned_as_the_manifest_says(tmp_path: Path) -> None:
    options = _COLORS | {"activation": "none", "channels": "bgr", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 1]}
    scores = run(opened(tmp_path, _means(), options), image=encoded(plain((255, 0, 0))))["scores"]
    assert scores == {"red": pytest.approx(-1), "green": pytest.approx(-2), "blue": pytest.approx(0.5)}


@pytest.mark.parametrize(
    ("resize", "green"), [("stretch", 0.5), ("crop", 0.97), ("letterbox", 0.25 + 0.5 * 114 / 255)]
)
def test_a_wide_picture_is_stretched_cropped_or_fitted(tmp_path: Path, resize: str, green: float) -> None:
    image = Image.new("RGB", (32, 16), (0, 0, 0))
    ImageDraw.Draw(image).rectangle((8, 0, 23, 15), (0, 255, 0))
    engine = opened(tmp_path, _means(), _COLORS | {"activation": "none", "resize": resize})
    assert run(engine, image=encoded(image))["scores"]["green"] == pytest.approx(green, abs=0.03)


def test_pictures_of_all_modes_are_read() -> None:
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert read_image({"image": encoded(half)}).getpixel((0, 0)) == (255, 255, 255)
    assert read_image({"image": encoded(plain((10, 20, 30)).convert("P"))}).mode == "RGB"
    assert read_image({"image": encoded(Image.new("L", (4, 4), 7))}).getpixel((0, 0)) == (7, 7, 7)
    assert read_image({"image": encoded(Image.new("1", (4, 4), 1))}).getpixel((0, 0)) == (255, 255, 255)
    assert read_image({"image": encoded(Image.new("CMYK", (4, 4)), "JPEG")}).mode == "RGB"
    assert read_image({"image": "data:image/png;base64," + encoded(half)}).size == (4, 4)


def test_pictures_of_16_bits_are_scaled() -> None:
    deep = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert read_image({"image": encoded(deep)}).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("resize", ["stretch", "crop", "letterbox", "multiple"])
def test_pictures_of_any_shape_are_sized(resize: str) -> None:
    ones = (1.0, 1.0, 1.0)
    preparation = Preparation(64, 48, resize, ones, ones, 1.0, False, False, "float32")
    random = np.random.default_rng(7)
    sizes = [(1, 1), (1, 700), (700, 1), (64, 48), (48, 64), *random.integers(1, 300, (60, 2)).tolist()]
    for width, height in sizes:
        array, placed = preparation.array(plain((9, 9, 9), (width, height)))
        assert array.shape[:2] == (1, 3) and array.flags.c_contiguous and min(placed.scale_x, placed.scale_y) > 0
        assert resize == "multiple" or array.shape[2:] == (64, 48)
        assert resize == "letterbox" or (array == 8).all()


def test_a_photo_is_turned_as_its_camera_says() -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    plain((1, 2, 3), (16, 8)).save(buffer, "JPEG", exif=exif)
    assert read_image({"image": base64.b64encode(buffer.getvalue()).decode()}).size == (8, 16)


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


_GIF = io.BytesIO()
plain((1, 2, 3)).save(_GIF, "GIF")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "PNG or JPEG"),
        (5, "PNG or JPEG"),
        ("", "PNG or JPEG"),
        ("no base64!", "not base64"),
        ("aGVsbG8=", "no whole PNG"),
        (_as_base64(_GIF.getvalue()), "no whole PNG"),
        (_as_base64(_png(100_000, 100_000)), "at most"),
        (_as_base64(_png(9000, 1)), "at most"),
        (_as_base64(_png(5000, 4000)), "5000 x 4000 pixels; at most 16777216"),
        (_as_base64(_png(4, 4)), "no whole PNG"),
        (_as_base64(_png(0, 4)), "no whole PNG"),
        (_as_base64(_png(4, 4, zlib.compress(bytes(10)))), "no whole PNG"),
        (_as_base64(_png(4, 4)[:40]), "no whole PNG"),
        ("A" * 6_000_000, "smaller"),
        ("é" * 8, "not base64"),
    ],
)
def test_pictures_that_are_none(value: object, says: str) -> None:
    with pytest.raises(BadJob, match=says):
        read_image({"image": value})


def test_a_jpeg_cut_off_or_damaged() -> None:
    data = bytearray(base64.b64decode(encoded(plain((9, 9, 9), (64, 64)), "JPEG")))
    random = np.random.default_rng(5)
    for end in range(0, len(data), 16):
        with pytest.raises(BadJob):
            read_image({"image": _as_base64(bytes(data[:end])) or "="})
    for _ in range(200):
        damaged = bytearray(data)
        damaged[random.integers(2, len(data))] ^= int(random.integers(1, 256))
        try:
            read_image({"image": _as_base64(bytes(damaged))})
        except BadJob:
            pass


def _fixed(outputs: dict[str, npt.NDArray[Any]], **metadata: str) -> Any:
    """Gives the same whatever it sees: the outputs plus 0 times a pixel."""
    nodes = [helper.make_node("ReduceSum", ["pixels"], ["sum"], keepdims=0), helper.make_node("Mul", ["sum", "zero"], ["nothing"])]
    nodes += [helper.make_node("Add", [f"{name}_", "nothing"], [name]) for name in outputs]
    constants = {f"{name}_": array.astype(np.float32) for name, array in outputs.items()} | {"zero": np.zeros((), np.float32)}
    return build(nodes, _PICTURE, [(name, FLOAT, array.shape) for name, array in outputs.items()], constants, metadata)


def _yolo8() -> npt.NDArray[np.float32]:
    """Three boxes as cx, cy, w, h in the input's 8 x 8 pixels, two of which overlap; two classes."""
    rows = [[4, 4, 4, 2, 0.9, 0.1], [4.2, 4, 4, 2, 0.8, 0.1], [2, 3, 2, 2, 0.0, 0.6], [1, 1, 1, 1, 0.2, 0.1]]
    return np.array(rows, np.float32).T[None]


def test_yolo_boxes_come_back_in_the_pictures_pixels(tmp_path: Path) -> None:
    engine = opened(tmp_path, _fixed({"out": _yolo8()}), {"task": "object-detection", "labels": ["cat", "dog"]})
    result = run(engine, image=encoded(plain((0, 0, 0), (32, 16))))  # fits as 8 x 4, two rows of padding above: scale 4
    assert result["count"] == 2 and result["task"] == "object-detection"
    cat, dog = result["detections"]
    assert cat == {"label": "cat", "score": pytest.approx(0.9), "box": {"xmin": 8, "ymin": 4, "xmax": 24, "ymax": 12}}
    assert dog["label"] == "dog" and dog["box"] == {"xmin": 4, "ymin": 0, "xmax": 12, "ymax": 8}
    assert run(engine, image=encoded(plain((0, 0, 0))), threshold=0.95)["detections"] == []
    assert run(engine, image=encoded(plain((0, 0, 0))), iou=1.0, threshold=0.1)["count"] == 4


def test_yolov5_multiplies_by_how_sure_it_is_of_anything(tmp_path: Path) -> None:
    rows = np.array([[[4, 4, 4, 4, 0.5, 0.9, 0.2], [1, 1, 1, 1, 1.0, 0.1, 0.7]]], np.float32)
    engine = opened(tmp_path, _fixed({"out": rows}), {"task": "object-detection", "style": "yolov5", "threshold": 0.4})
    found = run(engine, image=encoded(plain((0, 0, 0), (8, 8))))["detections"]
    assert [(each["label"], round(each["score"], 3)) for each in found] == [("LABEL_1", 0.7), ("LABEL_0", 0.45)]


def test_boxes_scores_and_classes_apart(tmp_path: Path) -> None:
    outputs = {
        "boxes": np.array([[[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 2.0, 1.0]]]),
        "scores": np.array([[0.6, 0.7]]),
        "labels": np.array([[1, 0]]),
    }
    form = {"style": "boxes", "classes": "labels", "box_scale": "unit", "resize": "stretch"}
    options = {"task": "object-detection", "labels": ["a", "b"], **form}
    found = run(opened(tmp_path, _fixed(outputs), options), image=encoded(plain((0, 0, 0), (40, 20))))["detections"]
    assert [each["label"] for each in found] == ["a", "b"]
    assert found[0]["box"] == {"xmin": 20, "ymin": 10, "xmax": 40, "ymax": 20}  # cut at the picture's edge


def test_boxes_of_another_form_are_the_cargos_fault(tmp_path: Path) -> None:
    for shape in ((1, 4, 9), (2, 6, 9), (6, 9)):
        engine = opened(tmp_path, _fixed({"out": np.zeros(shape)}), {"task": "object-detection"})
        with pytest.raises(BrokenJob):
            run(engine, image=encoded(plain((0, 0, 0))))
    with pytest.raises(ConfigError, match="no boxes"):
        opened(tmp_path, _fixed({"out": _yolo8()}), {"task": "object-detection", "style": "boxes"})


def test_overlapping_boxes_leave_the_best_of_each_class() -> None:
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30]], np.float32)
    assert overlaps(boxes[0], boxes) == pytest.approx([1, 0.9, 1, 0])
    found = Candidates(boxes, np.array([0.8, 0.9, 0.7, 0.5], np.float32), np.array([0, 0, 1, 0]))
    assert best_of(found, 0.1, 0.5).scores.tolist() == pytest.approx([0.9, 0.7, 0.5])
    assert len(best_of(found, 0.95, 0.5).scores) == 0


def test_best_of_many_boxes_is_what_the_plain_algorithm_keeps() -> None:
    random = np.random.default_rng(3)
    low = random.random((400, 2), np.float32) * 90
    boxes = np.concatenate((low, low + random.random((400, 2), np.float32) * 20), axis=1)
    scores, classes = random.random(400, np.float32), random.integers(0, 3, 400)
    kept: list[int] = []
    for place in np.argsort(-scores, kind="stable"):
        if scores[place] > 0.3 and all(classes[k] != classes[place] or overlaps(boxes[k], boxes[place][None])[0] <= 0.4 for k in kept):
            kept.append(int(place))
    assert best_of(Candidates(boxes, scores, classes), 0.3, 0.4).boxes.tolist() == boxes[kept].tolist()


def test_a_mask_has_the_pictures_size(tmp_path: Path) -> None:
    node = helper.make_node("Identity", ["pixels"], ["maps"])
    model = build([node], _PICTURE, [("maps", FLOAT, [1, 3, 8, 8])])
    engine = opened(tmp_path, model, {"task": "image-segmentation", "labels": ["red", "green", "blue"]})
    image = plain((255, 0, 0), (40, 20))
    ImageDraw.Draw(image).rectangle((0, 0, 19, 19), (0, 0, 255))
    job = FakeJob({"image": encoded(image)})
    result = result_of(engine.run(job))
    assert result == {
        **{"output_shape": [1, 3, 8, 8], "num_classes": 3, "original_size": [40, 20], "task": "image-segmentation"},
        "shares": {"red": 0.5, "blue": 0.5},
    }
    (line,) = job.said
    assert isinstance(line, ImageLine) and (line.width, line.height) == (40, 20)
    mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(line.data))))
    assert (mask[:, :20] == 2).all() and (mask[:, 20:] == 0).all()


def test_a_mask_of_one_class_has_a_threshold(tmp_path: Path) -> None:
    node = helper.make_node("ReduceMean", ["pixels"], ["maps"], axes=[1], keepdims=1)
    model = build([node], _PICTURE, [("maps", FLOAT, [1, 1, 8, 8])])
    engine = opened(tmp_path, model, {"task": "image-segmentation", "activation": "none", "threshold": 0.7})
    picture = encoded(plain((153, 153, 153)))
    assert run(engine, image=picture)["shares"] == {"foreground": 0.0}
    assert run(engine, image=picture, threshold=0.5)["shares"] == {"foreground": 1.0}


def test_a_mask_that_no_answer_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CARGO_LINE_BYTES_MAX", 1100)
    node = helper.make_node("Identity", ["pixels"], ["maps"])
    engine = opened(tmp_path, build([node], _PICTURE, [("maps", FLOAT, [1, 3, 8, 8])]), {"task": "image-segmentation"})
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8))
    with pytest.raises(BadJob, match="smaller picture"):
        run(engine, image=encoded(noise))


def test_masks_of_fitted_pictures_leave_the_padding_out() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6] = 1  # the picture of 32 x 16 lies in rows 2 to 5
    assert (unplaced(mask, Placement(0.25, 0.25, 0, 2), (32, 16), (8, 8)) == 1).all()
    assert (unplaced(mask[::2, ::2], Placement(0.25, 0.25, 0, 2), (32, 16), (8, 8)) == 1).all()


def test_columns_are_read_by_ctc() -> None:
    characters = ("", "a", "b")
    scores = np.eye(3, dtype=np.float32)[[0, 1, 1, 0, 1, 2, 2, 0]]
    scores[4] = [0.1, 0.5, 0.4]
    text, score = decode_columns(scores, characters, 0)
    assert text == "aab" and score == pytest.approx((1 + 0.5 + 1) / 3)
    assert decode_columns(np.eye(3, dtype=np.float32)[[0, 0]], characters, 0) == ("", 0.0)
    assert decode_columns(np.eye(3, dtype=np.float32)[[2, 1, 0]], ("a", "b", ""), 2)[0] == "ba"


def _reader(characters: str) -> Any:
    """Reads black and white stripes: the class of a column is its mean times 2, rounded."""
    nodes = [
        helper.make_node("ReduceMean", ["pixels"], ["columns"], axes=[1, 2], keepdims=0),
        helper.make_node("Mul", ["columns", "two"], ["doubled"]),
        helper.make_node("Round", ["doubled"], ["numbers"]),
        helper.make_node("Cast", ["numbers"], ["classes"], to=7),
        helper.make_node("OneHot", ["classes", "depth", "values"], ["scores"], axis=-1),
    ]
    floats = {"two": np.array(2, np.float32), "values": np.array([0, 1], np.float32)}
    constants: dict[str, npt.NDArray[Any]] = {"depth": np.array([3]), **floats}
    takes, gives = [("pixels", FLOAT, [1, 3, 8, "width"])], [("scores", FLOAT, [1, "columns", 3])]
    return build(nodes, takes, gives, constants, {"character": characters})


def test_text_is_read_with_the_characters_of_the_models_metadata(tmp_path: Path) -> None:
    engine = opened(tmp_path, _reader("x\ny"), {"task": "text-recognition", "space": False, "width_min": 1})
    image = Image.new("RGB", (80, 16), (0, 0, 0))
    for left, value in ((0, 128), (20, 255), (40, 0), (60, 255)):
        ImageDraw.Draw(image).rectangle((left, 0, left + 19, 15), (value,) * 3)
    result = run(engine, image=encoded(image))
    assert result["text"].replace("x", "") == "yy" and result["text"].startswith("x") and result["score"] == 1.0
    lines = run(engine, images=[encoded(plain((255, 255, 255))), encoded(plain((128, 128, 128)))])
    assert lines["text"] == "y\nx" and lines["count"] == 2
    wrong: list[dict[str, Any]] = [{"images": []}, {"images": [1]}, {"images": ["a"] * 65}, {"image": "a", "images": ["a"]}]
    for fields in wrong:
        with pytest.raises(BadJob):
            run(engine, **fields)


@pytest.mark.parametrize(
    "options", [{"space": True}, {"blank": 3}, {"labels": ["a"]}, {"height": 9}, {"width": 8}]
)
def test_characters_have_to_be_as_many_as_the_models_classes(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        opened(tmp_path, _reader("x\ny"), {"task": "text-recognition", "space": False, **options})


@pytest.mark.parametrize(
    "options",
    [
        *({"height": 9}, {"mean": [0, 0]}, {"std": [1, 0, 1]}, {"resize": "tile"}),
        *({"layout": "nhwc"}, {"channels": "cmy"}, {"scale": 0}, {"pad": 256}),
    ],
)
def test_preparations_that_make_no_sense(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        opened(tmp_path, _means(), _COLORS | options)
