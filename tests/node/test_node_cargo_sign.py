"""`archipelag-node cargo new | build | sign | verify | show`: the way from a folder to a signed manifest, and what is refused on it."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from node.cargo_folder import CARGO_FILE, read_folder
from node.cli import EXIT_CONFIG, main
from node.datadir import DataDir
from protocol.blobs import tree_of
from protocol.cargos import CachePolicy, CargoManifest, Runtime, read_cargo, read_manifest, sign_cargo
from protocol.errors import ConfigError
from protocol.prices import Ask
from runtimes.catalogue import CATALOGUE
from tests.protocol.samples import ISLAND, OTHER

Run = Callable[..., int]
CONTENT = b"\0asm-like bytes"
MIB = 1024 * 1024


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """In a folder of its own, with a key of its own where the action has one."""
    monkeypatch.chdir(tmp_path)

    def call(action: str, *arguments: str) -> int:
        more = ("--data-dir", str(tmp_path / "pub")) if action in ("build", "sign") else ()
        return main(["cargo", action, *arguments, *more])

    return call


@pytest.fixture
def signed(run: Run) -> Path:
    """A whole way."""
    assert run("new", "text-stats") == 0
    Path("text-stats/module.wasm").write_bytes(CONTENT)
    assert run("build", "text-stats") == 0 and run("sign", "text-stats") == 0
    return Path("text-stats/text-stats-0.1.0.cargo")


def edit(before: str, after: str, folder: str = "text-stats") -> None:
    file = Path(folder) / CARGO_FILE
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err


def test_from_a_folder_to_a_signed_cargo(
    run: Run, signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cargo = read_cargo(signed.read_bytes())
    manifest, key = cargo.manifest, DataDir.open(tmp_path / "pub").key("publisher")
    assert (manifest.name, manifest.release, manifest.publisher) == ("text-stats", "0.1.0", key.peer_id)
    (file,) = manifest.files
    assert (file.path, file.size_bytes, file.sha256) == (
        "module.wasm",
        len(CONTENT),
        hashlib.sha256(CONTENT).hexdigest(),
    )
    assert (manifest.runtime, manifest.ask, manifest.needs.memory_bytes) == (Runtime.WASM, Ask(1000, 0, 0), 2**28)
    assert abs(manifest.published_at_ms - time.time() * 1000) < 60_000
    assert (tmp_path / "pub" / "publisher.key").stat().st_mode & 0o777 == 0o600
    capsys.readouterr()
    assert run("verify", str(signed)) == 0 and run("verify", str(signed), "--folder", "text-stats") == 0
    assert cargo.address in capsys.readouterr().out
    assert run("show", str(signed)) == 0
    told = capsys.readouterr().out
    assert file.root == tree_of([CONTENT]).root()
    assert all(text in told for text in ("text-stats 0.1.0", key.peer_id, "0.001+0+0", file.sha256, f"root {file.root}", "never"))
    assert run("show", "text-stats/text-stats-0.1.0.manifest") == 0 and capsys.readouterr().out == told


def test_what_a_folder_says_of_the_cache(run: Run, signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Answers are kept unless it is said, and never for others unless it is said."""
    assert read_cargo(signed.read_bytes()).manifest.cache == CachePolicy() == CachePolicy(True, 3600, 850, False)
    assert run("show", str(signed)) == 0
    assert "for 3600 s, for questions alike from 0.85 on, for the account that asked only" in capsys.readouterr().out
    manifest, toml = Path("text-stats/text-stats-0.1.0.manifest"), Path("text-stats/cargo.toml")
    whole = toml.read_text()
    tables = {
        "[cache]\nttl_s = 60\npublic = true": (CachePolicy(ttl_s=60, public=True), "for everybody"),
        "[cache]\nenabled = false": (CachePolicy(enabled=False), "no answers are kept"),
        "[cache]\nsimilarity_milli = 1000": (CachePolicy(similarity_milli=1000), "equal questions only"),
        "": (CachePolicy(), "0.85"),
    }
    for table, (policy, words) in tables.items():
        manifest.unlink()
        toml.write_text(whole.partition("[cache]")[0] + table)
        assert run("build", "text-stats") == 0 and read_manifest(manifest.read_bytes()).cache == policy
        assert run("show", str(manifest)) == 0 and words in capsys.readouterr().out


def test_every_runtime_has_a_template(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for runtime in Runtime:
        assert run("new", f"my-{runtime}", "--runtime", runtime) == 0
        folder = Path(f"my-{runtime}")
        if runtime is not Runtime.CONTAINER:
            entry = next(line for line in (folder / CARGO_FILE).read_text().splitlines() if line.startswith("entry"))
            (folder / entry.split('"')[1]).write_bytes(b"x")
        assert read_folder(folder, ISLAND.peer_id, 1).runtime is runtime
    assert run("new", "my-wasm") == EXIT_CONFIG and "there already" in error_of(capsys)
    assert run("new", "My Cargo") == EXIT_CONFIG and "lower-case" in error_of(capsys)
    assert run("new", "../escape") == EXIT_CONFIG and not Path("../escape").exists()
    assert run("new", "a", "--runtime", "jar") == EXIT_CONFIG and "diffusers" in error_of(capsys)


TAMPERED: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("a bit", lambda data: data[:80] + bytes([data[80] ^ 1]) + data[81:]),
    ("cut off", lambda data: data[:-1]),
    ("more behind", lambda data: data + b"\0"),
    ("empty", lambda data: b""),
    ("large", lambda data: data * 1000),
    ("another signer", lambda data: sign_cargo(read_manifest_as(data, OTHER.peer_id), OTHER)[:-1]),
]


def read_manifest_as(data: bytes, publisher: str) -> CargoManifest:
    return replace(read_cargo(data).manifest, publisher=publisher)


@pytest.mark.parametrize(("how", "change"), TAMPERED, ids=[how for how, _ in TAMPERED])
def test_a_tampered_cargo_is_found_out(
    run: Run, signed: Path, capsys: pytest.CaptureFixture[str], how: str, change: Callable[[bytes], bytes]
) -> None:
    signed.write_bytes(change(signed.read_bytes()))
    assert run("verify", str(signed)) == 1 and str(signed) in error_of(capsys)
    assert run("show", str(signed)) == EXIT_CONFIG and str(signed) in error_of(capsys)


def test_files_that_are_not_those(run: Run, signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = Path("text-stats/module.wasm")
    module.write_bytes(CONTENT + b"!")
    assert run("verify", str(signed), "--folder", "text-stats") == 1 and "module.wasm has 16 bytes" in error_of(capsys)
    module.unlink()
    assert run("verify", str(signed), "--folder", "text-stats") == 1 and "cannot read module.wasm" in error_of(capsys)
    module.symlink_to("/etc/passwd")
    assert run("verify", str(signed), "--folder", "text-stats") == 1 and "symbolic link" in error_of(capsys)
    module.unlink()
    os.mkfifo(module)
    assert run("verify", str(signed), "--folder", "text-stats") == 1 and "no plain file" in error_of(capsys)


def test_an_expired_cargo_is_no_good(
    run: Run, signed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit("trust_level = 0", "expires_days = 1\ntrust_level = 0")
    assert run("build", "text-stats") == 0 and run("sign", "text-stats") == 0 and run("verify", str(signed)) == 0
    now_ns = time.time_ns()
    monkeypatch.setattr("time.time_ns", lambda: now_ns + 2 * 86_400 * 10**9)
    assert run("verify", str(signed)) == 1 and "expired" in error_of(capsys)


def test_another_key_does_not_sign(run: Run, signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signed.unlink()
    assert main(["cargo", "sign", "text-stats", "--data-dir", str(tmp_path / "thief")]) == EXIT_CONFIG
    assert "was built for" in error_of(capsys) and not signed.exists()
    edit('release = "0.1.0"', 'release = "0.2.0"')
    assert run("sign", "text-stats") == EXIT_CONFIG and "cargo build text-stats first" in error_of(capsys)
    Path("text-stats/text-stats-0.2.0.manifest").write_bytes(b"\x90")
    assert run("sign", "text-stats") == EXIT_CONFIG and "build it again" in error_of(capsys)


def test_what_lies_elsewhere_needs_its_hash(run: Run, signed: Path) -> None:
    edit(
        '[files."module.wasm"]',
        f'[files."model.bin"]\nsha256 = "{"ab" * 32}"\nsize_bytes = 5\nsources = ["hf:a/b:c"]\n\n[files."module.wasm"]',
    )
    assert run("build", "text-stats") == 0
    manifest = read_manifest(Path("text-stats/text-stats-0.1.0.manifest").read_bytes())
    assert [(file.path, file.size_bytes, file.sources) for file in manifest.files] == [
        ("model.bin", 5, ("hf:a/b:c",)),
        ("module.wasm", 15, ()),
    ]


def test_what_lies_elsewhere_and_is_large_needs_its_root(run: Run, signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of models of the catalogue it is known."""
    entry = CATALOGUE["smollm2-135m"]
    for digest, root, known in (("ab" * 32, "", ""), ("ab" * 32, "cd" * 32, "cd" * 32), (entry.sha256, "", entry.root)):
        more = f'root = "{root}"\n' if root else ""
        file = f'[files."model.bin"]\nsha256 = "{digest}"\nsize_bytes = 2000000\n{more}\n'
        edit('[files."module.wasm"]', file + '[files."module.wasm"]')
        assert run("build", "text-stats") == (0 if known else EXIT_CONFIG)
        if known:
            manifest = read_manifest(Path("text-stats/text-stats-0.1.0.manifest").read_bytes())
            assert manifest.files[0].root == known
        else:
            assert "needs its root" in error_of(capsys)
        edit(file, "")


def test_a_root_of_another_file_is_found_out(run: Run, signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cargo = read_cargo(signed.read_bytes())
    (file,) = cargo.manifest.files
    key = DataDir.open(Path("pub")).key("publisher")
    signed.write_bytes(sign_cargo(replace(cargo.manifest, files=(replace(file, root="ab" * 32),)), key))
    assert run("verify", str(signed)) == 0
    assert run("verify", str(signed), "--folder", "text-stats") == 1 and "module.wasm has the root" in error_of(capsys)


def test_the_root_is_that_of_the_chunks(run: Run, signed: Path) -> None:
    data = bytes(range(256)) * 4096 * 2 + b"more"
    Path("text-stats/module.wasm").write_bytes(data)
    assert run("build", "text-stats") == 0
    (file,) = read_manifest(Path("text-stats/text-stats-0.1.0.manifest").read_bytes()).files
    assert file.root == tree_of([data[:MIB], data[MIB : 2 * MIB], data[2 * MIB :]]).root()


BAD: list[tuple[str, str, str]] = [
    ('name = "text-stats"', 'name = "Text Stats"', "name"),
    ('name = "text-stats"', "", "name is missing"),
    ('name = "text-stats"', "name = 5", "name is a text"),
    ('release = "0.1.0"', 'release = "1"', "release"),
    ('runtime = "wasm"', 'runtime = "jar"', "runtime"),
    ('entry = "module.wasm"', 'entry = "other.wasm"', "entry"),
    ('ask = "0.001+0+0"', 'ask = "-1"', "ask"),
    ('ask = "0.001+0+0"', 'ask = "1e3"', "ask"),
    ('ask = "0.001+0+0"', 'ask = "0.0000001"', "ask"),
    ("trust_level = 0", "trust_level = 4", "trust_level"),
    ("trust_level = 0", "trust_level = true", "trust_level"),
    ("trust_level = 0", "trust_level = 0\nnonsense = 1", "nonsense"),
    ("memory_mb = 256", "memory_mb = -1", "memory_mb"),
    ("memory_mb = 256", "memory_gb = 1", "memory_gb"),
    ("time_s = 60", "time_s = 601", "time_s"),
    ("enabled = true", 'enabled = "no"', "cache"),
    ("public = false", 'public = "no"', "cache"),
    ("public = false", "shared = true", "cache"),
    ("similarity_milli = 850", "similarity_milli = 1001", "similarity_milli"),
    ("similarity_milli = 850", "similarity_milli = 0.85", "similarity_milli"),
    ("ttl_s = 3600", "ttl_s = 0", "ttl_s"),
    ("[options]", "[options]\nx = inf", "JSON"),
    ("[options]", "[options]\nx = 2020-01-01", "JSON"),
    ("sources = []", 'sources = ["file:/etc/passwd"]', "source"),
    ("sources = []", 'sources = ["http://example.org"]', "source"),
    ("sources = []", "sources = 5", "sources"),
    ("sources = []", f'sha256 = "{"ab" * 32}"', "another hash"),
    ("sources = []", f'root = "{"ab" * 32}"', "another root"),
    ('[files."module.wasm"]', '[files."../module.wasm"]', "path"),
    ('[files."module.wasm"]', '[files."/etc/passwd"]', "path"),
    ('[files."module.wasm"]', '[files."missing.wasm"]', "cannot read missing.wasm"),
    ('[files."module.wasm"]', '[files."module.pkl"]\n[files."module.wasm"]', "cannot read module.pkl"),
    ("[options]", "[options", "no valid TOML"),
]


@pytest.mark.parametrize(("before", "after", "said"), BAD, ids=lambda text: text[:40])
def test_a_folder_that_is_no_cargo(
    run: Run, signed: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, said: str
) -> None:
    Path("text-stats/text-stats-0.1.0.manifest").unlink()
    edit(before, after)
    assert run("build", "text-stats") == EXIT_CONFIG
    assert said in error_of(capsys) and not list(Path("text-stats").glob("*.manifest"))


def test_a_pickle_is_no_model(run: Run, signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text-stats/model.pkl").write_bytes(b"x")
    edit('[files."module.wasm"]', '[files."model.pkl"]\n[files."module.wasm"]')
    assert run("build", "text-stats") == EXIT_CONFIG and "safetensors, GGUF and ONNX" in error_of(capsys)


def test_where_there_is_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("build", "nowhere") == EXIT_CONFIG and "cargo new NAME" in error_of(capsys)
    assert run("sign", "nowhere") == EXIT_CONFIG and "cargo new NAME" in error_of(capsys)
    assert run("verify", "nothing.cargo") == EXIT_CONFIG and "cannot read" in error_of(capsys)
    assert run("show", "nothing.manifest") == EXIT_CONFIG and "cannot read" in error_of(capsys)


def test_a_large_toml_is_not_read(tmp_path: Path) -> None:
    (tmp_path / CARGO_FILE).write_text("#" * 300_000)
    with pytest.raises(ConfigError, match="at most"):
        read_folder(tmp_path, ISLAND.peer_id, 1)
