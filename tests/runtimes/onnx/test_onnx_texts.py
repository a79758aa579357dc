"""Tasks of texts, on models of one table: each token's logits are known, so the right answer is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Strip
from tokenizers.pre_tokenizers import Punctuation

from protocol.cargo_io import encode_line
from protocol.errors import ConfigError
from runtimes.lines.engine import BadJob, BrokenJob, JobStopped
from runtimes.onnx.engine import OnnxEngine
from runtimes.onnx.spans import Tagged, join_tags
from runtimes.onnx.texts import plan_batches
from tests.runtimes.onnx.onnx_models import FLOAT, VOCABULARY, FakeJob, lookup, opened, run, summed, word

_LOGITS = [("logits", FLOAT, ["rows", 2])]


def _table(classes: int, **rows: Sequence[float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    table = np.zeros((len(VOCABULARY), classes), np.float32)
    for token, row in rows.items():
        table[word(token)] = row
    return table


def _sentiment(folder: Path, **options: Any) -> OnnxEngine:
    model = lookup(_table(2, good=[0, 2], bad=[2, 0]), _LOGITS, [summed()])
    return opened(folder, model, {"task": "text-classification", "labels": ["no", "yes"], **options})


def test_a_text_is_classified(tmp_path: Path) -> None:
    result = run(_sentiment(tmp_path), text="the good capital")
    assert result["label"] == "yes" and result["task"] == "text-classification"
    assert result["score"] == pytest.approx(np.exp(2) / (np.exp(2) + 1), rel=1e-6)
    assert list(result["scores"]) == ["yes", "no"] and sum(result["scores"].values()) == pytest.approx(1)


def test_a_list_is_answered_in_its_order_and_its_tokens_are_counted(tmp_path: Path) -> None:
    texts = ["bad", "the good good good capital of france", "good bad bad"]
    job = FakeJob({"input": texts})
    line = _sentiment(tmp_path).run(job)
    assert line.usage is not None and line.usage.prompt_tokens == (1 + 7 + 3) + 3 * 2
    labels = [run(_sentiment(tmp_path), input=text)["label"] for text in texts]
    assert labels == ["no", "yes", "no"] == [result["label"] for result in run(_sentiment(tmp_path), input=texts)["results"]]


@pytest.mark.parametrize(("activation", "score"), [("sigmoid", 1 / (1 + np.exp(-4))), ("none", 4.0)])
def test_other_activations(tmp_path: Path, activation: str, score: float) -> None:
    assert run(_sentiment(tmp_path, activation=activation), text="good good")["score"] == pytest.approx(score)


def test_long_texts_are_cut_or_refused_as_the_manifest_says(tmp_path: Path) -> None:
    text = "good " * 6 + "bad " * 50
    assert run(_sentiment(tmp_path, max_tokens=8), text=text)["label"] == "yes"
    with pytest.raises(BadJob, match="more than the 8 tokens"):
        run(_sentiment(tmp_path, max_tokens=8, too_long="refuse"), text=text)


def test_batches_have_little_padding_and_every_text_once() -> None:
    lengths = [3, 60, 4, 61, 5, 300, 2]
    batches = plan_batches(lengths, 128)
    assert batches == [[6, 0, 2, 4], [1, 3], [5]]
    assert plan_batches([], 128) == []


def test_a_job_is_looked_at_between_batches(tmp_path: Path) -> None:
    engine = _sentiment(tmp_path)
    job = FakeJob({"text": ["good " * 200] * 8}, stop_after=3)
    with pytest.raises(JobStopped):
        engine.run(job)
    assert job.checks == 4


def test_embeddings_are_the_mean_over_the_mask(tmp_path: Path) -> None:
    table = _table(3, red=[1, 0, 0], green=[0, 1, 0], blue=[0, 0, 1], **{"[PAD]": [5, 5, 5]})
    model = lookup(table, [("states", FLOAT, ["rows", "tokens", 3])])
    engine = opened(tmp_path, model, {"task": "feature-extraction", "normalize": False})
    result = run(engine, text=["red green", "blue blue blue blue"])
    assert result["embeddings"] == [pytest.approx([0.25, 0.25, 0]), pytest.approx([0, 0, 4 / 6])]
    assert result["dimensions"] == 3 and "embedding" not in result and result["task"] == "feature-extraction"
    unit = opened(tmp_path, model, {"task": "embeddings"})
    assert run(unit, input="red green")["embedding"] == pytest.approx([0.5**0.5, 0.5**0.5, 0], rel=1e-6)


@pytest.mark.parametrize(("pooling", "expected"), [("cls", [9.0, 9.0]), ("last", [7.0, 7.0])])
def test_other_poolings_skip_padding(tmp_path: Path, pooling: str, expected: list[float]) -> None:
    table = _table(2, **{"[CLS]": [9, 9], "[SEP]": [7, 7]})
    model = lookup(table, [("states", FLOAT, ["rows", "tokens", 2])])
    engine = opened(tmp_path, model, {"task": "embeddings", "normalize": False, "pooling": pooling})
    assert run(engine, input=["red", "red green blue"])["embeddings"] == [expected, expected]


def test_a_model_that_pools_itself(tmp_path: Path) -> None:
    engine = opened(tmp_path, lookup(_table(2, red=[3, 4]), _LOGITS, [summed()]), {"task": "embeddings"})
    assert run(engine, input="red")["embedding"] == pytest.approx([0.6, 0.8])


def test_2048_texts_go_in_one_job(tmp_path: Path) -> None:
    model = lookup(np.ones((len(VOCABULARY), 384), np.float32), [("states", FLOAT, ["rows", "tokens", 384])])
    engine = opened(tmp_path, model, {"task": "embeddings"})
    done = engine.run(FakeJob({"input": ["red"] * 2048, "encoding_format": "base64"}))
    assert done.usage is not None and done.usage.prompt_tokens == 2048 * 3
    assert len(encode_line(done)) < 5_000_000


def test_too_many_numbers_for_one_answer(tmp_path: Path) -> None:
    model = lookup(np.ones((len(VOCABULARY), 1024), np.float32), [("states", FLOAT, ["rows", "tokens", 1024])])
    engine = opened(tmp_path, model, {"task": "embeddings"})
    with pytest.raises(BadJob, match="base64"):
        run(engine, input=["red"] * 2000)
    with pytest.raises(BadJob, match="send fewer"):
        run(engine, input=["red"] * 2000, encoding_format="base64")


def test_infinite_vectors_are_the_cargos_fault(tmp_path: Path) -> None:
    model = lookup(_table(2, red=[np.inf, 0]), [("states", FLOAT, ["rows", "tokens", 2])])
    with pytest.raises(BrokenJob, match="not finite"):
        run(opened(tmp_path, model, {"task": "embeddings"}), input="red")


def test_zero_shot(tmp_path: Path) -> None:
    model = lookup(_table(2, blue=[1, 3], red=[3, 0]), _LOGITS, [summed()])
    options = {"task": "zero-shot-classification", "labels": ["contradiction", "entailment"], "hypothesis_template": "is {} ."}
    engine = opened(tmp_path, model, options)
    result = run(engine, text="the capital", labels=["red", "blue", "green"])
    expected = np.exp([3.0, 0.0, 0.0]) / np.exp([3.0, 0.0, 0.0]).sum()
    assert list(result["scores"]) == ["blue", "red", "green"] and result["score"] == pytest.approx(expected[0])
    alone = run(engine, text="the capital", candidate_labels=["red", "blue"], multi_label=True)["scores"]
    assert alone == {"blue": pytest.approx(1 / (1 + np.exp(-2))), "red": pytest.approx(1 / (1 + np.exp(3)))}
    for labels in ([], ["red", "red"], "red", [1], ["red"] * 101):
        with pytest.raises(BadJob, match="labels"):
            run(engine, text="the capital", labels=labels)


_TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def test_entities_have_offsets_of_characters(tmp_path: Path) -> None:
    table = np.tile(np.array([6, 0, 0, 0, 0], np.float32), (len(VOCABULARY), 1))
    table[word("anna")] = [0, 6, 0, 0, 0]
    table[word("paris")], table[word("france")] = [0, 0, 0, 6, 0], [0, 0, 0, 0, 6]
    model = lookup(table, [("states", FLOAT, ["rows", "tokens", 5])])
    engine = opened(tmp_path, model, {"task": "token-classification", "labels": _TAGS})
    text = "ätsch anna lives in paris france ."
    result = run(engine, text=text)
    score = float(np.exp(6) / (np.exp(6) + 4))
    assert [entity | {"score": 0} for entity in result["entities"]] == [
        {"label": "PER", "score": 0, "start": 6, "end": 10, "text": "anna"},
        {"label": "LOC", "score": 0, "start": 20, "end": 32, "text": "paris france"},
    ]
    assert result["entities"][1]["score"] == pytest.approx(score) and result["label"] in ("PER", "LOC") and not result["truncated"]
    assert run(engine, text="the capital") == {
        **{"entities": [], "count": 0, "label": None, "score": 0.0, "scores": {}, "truncated": False},
        "task": "token-classification",
    }


def test_tags_are_joined() -> None:
    def tags(*names: str) -> list[Tagged]:
        return [Tagged(name, 0.5, place * 10, place * 10 + 5) for place, name in enumerate(names)]

    def spans(*names: str) -> list[tuple[str, int, int]]:
        return [(entity.label, entity.start, entity.end) for entity in join_tags(tags(*names), "O")]

    assert spans("B-A", "I-A", "O", "I-A") == [("A", 0, 15), ("A", 30, 35)]
    assert spans("B-A", "B-A", "I-B", "A") == [("A", 0, 5), ("A", 10, 15), ("B", 20, 25), ("A", 30, 35)]
    assert spans("X", "X", "O") == [("X", 0, 15)]


def _answering(folder: Path, **options: Any) -> OnnxEngine:
    nodes = [
        helper.make_node("Split", ["states"], ["s", "e"], axis=2),
        helper.make_node("Squeeze", ["s", "axis2"], ["start_logits"]),
        helper.make_node("Squeeze", ["e", "axis2"], ["end_logits"]),
    ]
    table = _table(2, paris=[9, 1], france=[1, 9], blue=[0, 8], **{"[CLS]": [4, 4]})
    model = lookup(table, [("start_logits", FLOAT, ["rows", "tokens"]), ("end_logits", FLOAT, ["rows", "tokens"])], nodes)
    model.graph.initializer.append(helper.make_tensor("axis2", 7, [1], [2]))
    return opened(folder, model, {"task": "question-answering", **options})


def test_the_best_span_answers(tmp_path: Path) -> None:
    context = "the capital is paris of france . blue"
    result = run(_answering(tmp_path), question="paris france blue is", context=context)
    assert (result["answer"], result["start"], result["end"]) == ("paris of france", 15, 30)
    assert 0.5 < result["score"] <= 1


def test_a_span_has_at_most_so_many_tokens_and_lies_in_the_context(tmp_path: Path) -> None:
    context = "paris of france the blue"
    result = run(_answering(tmp_path, answer_tokens=2), question="paris of france", context=context)
    assert context[result["start"] : result["end"]] == result["answer"] and result["answer"] in ("paris", "france")


def test_an_answer_may_be_missing(tmp_path: Path) -> None:
    engine = _answering(tmp_path, no_answer=True)
    assert run(engine, question="paris", context="the red green of")["answer"] == ""
    assert run(engine, question="is", context="paris france")["answer"] == "paris france"
    assert run(engine, question="is", context="the of france")["answer"] == "france"  # it begins in the text, not at [CLS]


def test_a_long_context_is_read_in_windows(tmp_path: Path) -> None:
    engine = _answering(tmp_path, max_tokens=16, stride=4)
    context = "the " * 100 + "paris france " + "red " * 100
    result = run(engine, question="is", context=context)
    assert context[result["start"] : result["end"]] == "paris france" == result["answer"]
    with pytest.raises(BadJob, match="question"):
        run(engine, question="the " * 40, context="red")


def test_a_mask_is_filled(tmp_path: Path) -> None:
    table = np.zeros((len(VOCABULARY), len(VOCABULARY)), np.float32)
    table[word("[MASK]"), word("paris")], table[word("[MASK]"), word("france")] = 5, 4
    model = lookup(table, [("states", FLOAT, ["rows", "tokens", len(VOCABULARY)])])
    engine = opened(tmp_path, model, {"task": "fill-mask"})
    result = run(engine, text="the capital is [MASK] .", top_k=2)
    assert result["label"] == "paris" and list(result["scores"]) == ["paris", "france"]
    assert result["sequence"] == "the capital is paris ."
    for text in ("no mask", "[MASK] and [MASK]"):
        with pytest.raises(BadJob, match=r"\[MASK\] once"):
            run(engine, text=text)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"input": []},
        {"input": ""},
        {"input": " "},
        {"input": 5},
        {"input": ["red", 5]},
        {"input": ["red", ""]},
        {"input": ["red"] * 2049},
        {"input": "\ud800"},
        {"input": "red", "text": "red"},
        {"input": "red", "txt": 1},
        {"input": "red", "encoding_format": "hex"},
        {"input": "red", "dimensions": 5},
        {"input": {"a": 1}},
        {"input": [["red"]]},
    ],
)
def test_input_that_cannot_be_used(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = lookup(_table(2), [("states", FLOAT, ["rows", "tokens", 2])])
    engine = opened(tmp_path, model, {"task": "embeddings"})
    with pytest.raises(BadJob) as caught:
        run(engine, **fields)
    assert "red" not in str(caught.value)
    assert run(engine, input="red", model="m", user="u")["dimensions"] == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"task": "poetry"},
        {"task": "text-classification", "labels": ["one"]},
        {"task": "text-classification", "labels": ["one", "one"]},
        {"task": "text-classification", "labels": "no"},
        {"task": "text-classification", "labels": ["a", "b"], "labels_file": "labels.txt"},
        {"task": "text-classification", "labels_file": "missing.txt"},
        {"task": "text-classification", "labels_metadata": "missing"},
        {"task": "text-classification", "activation": "relu"},
        {"task": "text-classification", "tokenizer": "nowhere.json"},
        {"task": "text-classification", "max_tokens": 1},
        {"task": "text-classification", "max_tokens": 12.5},
        {"task": "text-classification", "too_long": 5},
        {"task": "text-classification", "pooling": "mean"},
        {"task": "zero-shot-classification", "labels": ["a", "b"]},
        {"task": "zero-shot-classification", "labels": ["entailment", "b"], "hypothesis_template": "x"},
        {"task": "question-answering"},
        {"task": "fill-mask", "mask_token": "<mask>"},
        {"task": "embeddings", "output": "x"},
        {"task": "embeddings", "pooling": "mean"},
        {"task": "embeddings", "normalize": 1},
        {"task": "image-classification"},
    ],
)
def test_options_that_make_no_sense_are_refused_at_load(tmp_path: Path, options: dict[str, Any]) -> None:
    model = lookup(_table(2), _LOGITS, [summed()])
    with pytest.raises(ConfigError):
        opened(tmp_path, model, options)


@pytest.mark.parametrize("content", [b'["no", "yes"]', b'{"id2label": {"0": "no", "1": "yes"}}', b"no\nyes\n"])
def test_labels_may_stand_in_a_file(tmp_path: Path, content: bytes) -> None:
    model = lookup(_table(2, good=[0, 1]), _LOGITS, [summed()])
    engine = opened(tmp_path, model, {"task": "text-classification", "labels_file": "labels"}, {"labels": content})
    assert run(engine, text="good")["label"] == "yes"


@pytest.mark.parametrize("content", [b"\xff", b'{"id2label": {"1": "yes"}}', b"[1, 2]", b"[" * 100_000, b'["no"'])
def test_files_of_labels_that_are_none(tmp_path: Path, content: bytes) -> None:
    model = lookup(_table(2), _LOGITS, [summed()])
    with pytest.raises(ConfigError):
        opened(tmp_path, model, {"task": "text-classification", "labels_file": "labels"}, {"labels": content})


def test_a_tokenizer_that_is_none(tmp_path: Path) -> None:
    model = lookup(_table(2), _LOGITS, [summed()])
    for content in (b"{}", b"\xff\xff", b"[]"):
        with pytest.raises(ConfigError, match="tokenizer"):
            opened(tmp_path, model, {"task": "text-classification"}, {"tokenizer.json": content})


def test_a_tokenizer_that_fails_on_a_text_is_the_cargos_fault(tmp_path: Path) -> None:
    model = lookup(_table(2), _LOGITS, [summed()])
    content = Tokenizer(WordLevel({"red": 0}, unk_token="[UNK]")).to_str().encode()
    engine = opened(tmp_path, model, {"task": "text-classification"}, {"tokenizer.json": content})
    assert run(engine, text="red")["label"] == "LABEL_0"
    with pytest.raises(BrokenJob, match="tokenizer"):
        run(engine, text="blue")


def test_a_text_without_any_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer(WordLevel({"red": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.normalizer = Strip()
    tokenizer.pre_tokenizer = Punctuation("removed")
    model = lookup(_table(2), [("states", FLOAT, ["rows", "tokens", 2])])
    engine = opened(tmp_path, model, {"task": "embeddings", "pooling": "last"}, {"tokenizer.json": tokenizer.to_str().encode()})
    with pytest.raises(BadJob, match="no token"):
        run(engine, input=["red", "!!"])


def test_a_vocabulary_larger_than_the_models_is_the_cargos_fault(tmp_path: Path) -> None:
    model = lookup(np.zeros((4, 2), np.float32), _LOGITS, [summed()])
    with pytest.raises(BrokenJob, match="node Gather") as caught:
        run(opened(tmp_path, model, {"task": "text-classification"}), text="paris")
    assert str(word("paris")) not in str(caught.value)


def test_labels_of_engines_differ_by_cargo(tmp_path: Path) -> None:
    engine = _sentiment(tmp_path)
    assert engine.label.startswith("onnxruntime-") and engine.label.endswith("/" + "ab" * 8) and " " not in engine.label
