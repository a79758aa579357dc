"""Real models that the tests of the ONNX runtime share; the store brings each once."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtimes.lines.engine import LoadOrder
from runtimes.onnx.engine import OnnxEngine, load
from runtimes.store import ModelStore


@pytest.fixture(scope="session")
def minilm_files() -> dict[str, str]:
    store = ModelStore()
    names = {"model.onnx": "minilm-l6-v2", "tokenizer.json": "minilm-l6-v2-tokenizer"}
    return {path: str(Path(store.fetch(name).path)) for path, name in names.items()}


@pytest.fixture(scope="session")
def minilm(minilm_files: dict[str, str]) -> OnnxEngine:
    options = {"task": "embeddings", "max_tokens": 128}
    return load(LoadOrder("minilm-l6-v2", "ab" * 32, "model.onnx", minilm_files, options, 1))


_RAPIDOCR = "pypi:rapidocr-onnxruntime==1.4.4/rapidocr_onnxruntime/models"


def _fetched(source: str, sha256: str) -> str:
    return str(ModelStore().fetch(f"{source}#sha256={sha256}").path)


@pytest.fixture(scope="session")
def ocr_reader_path() -> str:
    """PP-OCRv4, Chinese and English, Apache-2.0, 10.9 MB."""
    return _fetched(f"{_RAPIDOCR}/ch_PP-OCRv4_rec_infer.onnx", "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b")


@pytest.fixture(scope="session")
def ocr_finder_path() -> str:
    """PP-OCRv4's detector of lines, Apache-2.0, 4.7 MB."""
    return _fetched(f"{_RAPIDOCR}/ch_PP-OCRv4_det_infer.onnx", "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9")


@pytest.fixture(scope="session")
def ocr_turner_path() -> str:
    """PP-OCR's classifier of lines that stand on their head, Apache-2.0, 0.6 MB."""
    return _fetched(f"{_RAPIDOCR}/ch_ppocr_mobile_v2.0_cls_infer.onnx", "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c")


@pytest.fixture(scope="session")
def magika_path() -> str:
    """Magika's classifier of file types, Apache-2.0, 3.2 MB."""
    source = "pypi:magika==1.0.3/magika/models/standard_v3_3/model.onnx"
    return _fetched(source, "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c")
