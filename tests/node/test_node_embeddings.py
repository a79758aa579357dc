"""Vectors and pictures from real Cargos, from OpenAI's client to the worker and back, as processes on loopback."""

from __future__ import annotations

import base64
import io
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import openai
import pytest
from PIL import Image
from tokenizers import Tokenizer

from node.localnet import LocalNetwork
from runtimes.diffusers.shapes.draw import Scene, read_scene
from runtimes.store import ModelStore

Floats = npt.NDArray[np.float32]

TEXTS = ["a cat sits on the mat", "a kitten is on the rug", "the stock market fell"]
CARGOS = ("minilm-l6-v2", "smollm2-embed", "shapes", "uuid", "echo")


class Running:
    """A Coordinator, one Island with Cargos of four runtimes, and a client."""

    def __init__(self, network: LocalNetwork) -> None:
        network.start_coordinator()
        island = network.start_island("one", *[part for name in CARGOS for part in ("--cargo", name)], "--threads", "1")
        self.peer_id = island.wait_ready()["peer_id"]
        self.client = openai.OpenAI(base_url=network.url + "/v1", api_key=network.make_key(), max_retries=0)

    def vectors(self, model: str, texts: list[str], **more: Any) -> list[Any]:
        return [entry.embedding for entry in self.client.embeddings.create(model=model, input=texts, **more).data]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with LocalNetwork(tmp_path_factory.mktemp("embeddings")) as network:
        yield Running(network)


def bare(text: str) -> Floats:
    """MiniLM by onnxruntime alone, pooled as sentence-transformers does it."""
    store, settings = ModelStore(), onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    path = str(Path(store.fetch("minilm-l6-v2").path))
    session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(Path(store.fetch("minilm-l6-v2-tokenizer").path)))
    tokenizer.no_padding()
    ids = np.array([tokenizer.encode(text).ids], np.int64)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    (states,) = session.run(None, inputs)
    mean = states[0].mean(0)
    vector: Floats = (mean / np.linalg.norm(mean)).astype(np.float32)
    return vector


def test_vectors_are_those_of_the_bare_model_as_numbers_and_as_base64(running: Running) -> None:
    for text in TEXTS[:2]:
        expected = bare(text)
        (plain,) = running.vectors("minilm-l6-v2", [text])  # the client asks for base64 by itself, and reads it
        (floats,) = running.vectors("minilm-l6-v2", [text], encoding_format="float")
        (packed,) = running.vectors("minilm-l6-v2", [text], encoding_format="base64")
        assert np.abs(np.array(floats) - expected).max() < 1e-3
        assert np.array(floats, np.float32).tobytes() == base64.b64decode(packed) == np.array(plain, np.float32).tobytes()


@pytest.mark.parametrize("model", ["minilm-l6-v2", "smollm2-embed"])
def test_what_means_alike_lies_near(running: Running, model: str) -> None:
    cat, kitten, market = (np.array(vector) for vector in running.vectors(model, TEXTS))
    assert abs(np.linalg.norm(cat) - 1) < 1e-3
    assert cat @ kitten > cat @ market + (0.2 if model == "minilm-l6-v2" else 0.0)


def test_many_texts_in_their_order_and_what_is_said_of_them(running: Running) -> None:
    texts = [f"number {n}" for n in range(256)]
    raw = running.client.embeddings.with_raw_response.create(model="minilm-l6-v2", input=texts, encoding_format="float")
    answer = raw.parse()
    assert [entry.index for entry in answer.data] == list(range(256))
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 256
    assert raw.headers["x-archipelag-island"] == running.peer_id and raw.headers["x-archipelag-job"]


@pytest.mark.parametrize("model", ["uuid", "shapes", "echo"])
def test_a_cargo_that_makes_none_says_so(running: Running, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        running.vectors(model, TEXTS)
    assert isinstance(caught.value.body, dict) and set(caught.value.body) == {"message", "type", "param", "code"}


def test_other_dimensions_are_refused(running: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="384"):
        running.vectors("minilm-l6-v2", TEXTS, dimensions=100)


def test_a_picture_shows_what_its_prompt_says_in_the_answer_and_at_its_address(running: Running) -> None:
    scene = Scene("red", "circle", "white")
    files = []
    for response_format in ("b64_json", "url"):
        answer = running.client.images.generate(
            model="shapes",
            prompt=scene.caption,
            response_format=response_format,
            extra_body={"seed": 5},
        )
        (image,) = answer.data or []
        if image.url:
            with urllib.request.urlopen(image.url, timeout=30) as shown:
                assert shown.headers["content-type"] == "image/png"
                files.append(shown.read())
        else:
            files.append(base64.b64decode(image.b64_json or ""))
    assert files[0] == files[1], "the same seed gives the same picture"
    pixels = np.asarray(Image.open(io.BytesIO(files[0])).convert("RGB"))
    assert read_scene(pixels).shows(scene)


def test_a_stream_tells_the_steps(running: Running) -> None:
    events = list(running.client.images.generate(model="shapes", prompt="a red circle on a white ground", n=2, stream=True))
    names = [event.type for event in events]
    assert names.count("image_generation.completed") == 2 and "image_generation.progress" in names
    assert len(events[-1].to_dict()["metadata"]["seeds"]) == 2  # type: ignore[index]
