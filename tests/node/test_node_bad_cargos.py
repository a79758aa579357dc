"""Bad Cargos and bad input from end to end: real processes on loopback, and a Consumer who is told what was wrong, pays nothing, and finds
the Island as it was.

What the issue lists and is decided lower down has its tests there: manifests (tests/protocol/test_protocol_cargos.py), releases that go
back and revoked keys (test_protocol_cargo_shelf.py), names in archives and bombs (test_container_archive.py, test_store_wheel.py),
redirects (test_store_public.py), pickles and external data (test_onnx_model_file.py, test_pipeline_folder.py), sizes of pictures
(test_image_request.py). Here it goes through an Island.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import wasmtime
from onnx import TensorProto, helper

from node.cli import EXIT_CONFIG, main
from node.datadir import DataDir
from node.local_cargos import bring_files, find_local
from node.localnet import LocalNetwork, LocalNode, NodeFailed
from privacy.keys import NodeKey
from protocol.cargos import CargoFile, Runtime, SignedCargo, canonical_manifest, sign_cargo
from protocol.envelope import Label, seal
from protocol.errors import ConfigError
from runtimes.store import ModelStore
from runtimes.wasm import modules
from tests.node.coordinators_net import wait_for
from tests.protocol.cargo_samples import PUBLISHER, cargo
from tests.runtimes.onnx.onnx_models import FLOAT, build
from tests.runtimes.wasm import hostile

PATIENCE_S = 60.0
SECRET = "very-secret-word"
_LETTER_AT = len('{"mode":"')

# What the one hostile module does for each first letter of its input's "mode"
_SAYS: dict[str, bytes] = {
    "n": b"hello " + SECRET.encode() + b"\n",
    "u": b'{"type":"token","content":"\xff"}\n',
    "t": b'{"type":"done"}\n{"type":"done"}\n',
    "w": b'{"type":"image","data":"aGVsbG8=","format":"png","width":100000,"height":1}\n',
    "g": b'{"type":"token","content":"' + b"x" * 4000 + b'"}\n',
    "d": b'{"type":"done"}\n',
}
_DOES = {
    "l": "(loop $again (br $again))",
    "b": "(loop $again (br_if $again (i32.ne (memory.grow (i32.const 64)) (i32.const -1)))) unreachable",
    "g": "(loop $again (call $say (i32.const %d) (i32.const %d)) (br $again))",
    "p": "(drop (i32.load (i32.const -64)))",
}


def _hostile_module() -> bytes:
    places, data = {}, b""
    for letter, text in _SAYS.items():
        places[letter] = (1024 + len(data), len(text))
        data += text
    cases = []
    for letter in {**_SAYS, **_DOES}:
        body = _DOES.get(letter, "(call $say (i32.const %d) (i32.const %d))")
        body = body % places[letter] if "%d" in body else body
        cases.append(f"(if (i32.eq (local.get $letter) (i32.const {ord(letter)})) (then {body}))")
    read = f"""(local $letter i32)
      (i32.store (i32.const 16) (i32.const 16384)) (i32.store (i32.const 20) (i32.const 1024))
      (drop (call $fd_read (i32.const 0) (i32.const 16) (i32.const 1) (i32.const 24)))
      (local.set $letter (i32.load8_u (i32.const {16384 + _LETTER_AT})))"""
    return hostile.program(read + " ".join(cases), data=data)


def folder_of(place: Path, name: str, runtime: str, files: dict[str, bytes], entry: str = "") -> Path:
    """As a publisher has it."""
    place.mkdir(parents=True)
    for path, data in files.items():
        (place / path).write_bytes(data)
    listed = "\n".join(f'[files."{path}"]' for path in files)
    (place / "cargo.toml").write_text(
        f'name = "{name}"\nrelease = "1.0.0"\nruntime = "{runtime}"\nentry = "{entry or next(iter(files))}"\nlicence = "MIT"\n'
        f'ask = "0.5+0+0"\n{listed}\n[needs]\nmemory_mb = 64\ntime_s = 1\noutput_mb = 1\n[options]\n'
        + ('task = "tensors"\n' if runtime == "onnx" else "")
    )
    return place


def external_model(location: str) -> bytes:
    """A model that keeps a tensor in another file."""
    model = build([helper.make_node("Add", ["x", "w"], ["y"])], [("x", FLOAT, [4])], [("y", FLOAT, [4])])
    tensor = TensorProto(name="w", dims=[4], data_type=FLOAT, data_location=TensorProto.EXTERNAL)
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    model.graph.initializer.append(tensor)
    return bytes(model.SerializeToString())


def _cache_with(folder: Path, data: bytes) -> Path:
    """Where a node finds this file, as if peers had given it."""
    file, digest = folder / "file", hashlib.sha256(data).hexdigest()
    file.write_bytes(data)
    ModelStore(folder / "cache").adopt(file, digest, ".onnx", "late: model.onnx", "")
    return folder / "cache"


NO_MODEL = b"\x80\x04" + bytes(100)


class Running:
    """A Coordinator, an Island with a hostile Cargo beside healthy ones, and a Consumer."""

    def __init__(self, network: LocalNetwork) -> None:
        self.network = network
        network.start_coordinator()
        bad = folder_of(network.folder / "bad", "hostile", "wasm", {"module.wasm": _hostile_module()})
        names = ("text-stats", "image-resize", str(bad), "lost", "late")
        wanted = [part for name in names for part in ("--cargo", name)]
        self.island = network.start_island("one", *wanted, "--threads", "1", "--cache-dir", str(_cache_with(network.folder, NO_MODEL)))
        self.url = network.url
        self.client = httpx.Client(base_url=network.url, headers={"Authorization": f"Bearer {network.make_key()}"}, timeout=PATIENCE_S)
        wait_for("the Island offers them", self._is_offered, PATIENCE_S)
        self.pid = self.island.process.pid
        self.workers = self.processes()

    def _is_offered(self) -> bool:
        assert self.island.running, self.island.log()
        return self.job("text-stats", {"text": "a"}).status_code == 200

    def job(self, name: str, given: Any) -> httpx.Response:
        return self.client.post("/api/v1/jobs", content=json.dumps({"cargo": name, "input": given, "stream": True}))

    def credits(self) -> tuple[str, str]:
        shown = self.client.get("/api/v1/account").json()
        return shown["credits"], shown["credits_held"]

    def processes(self) -> set[int]:
        """All that the Island has started."""
        return {process.pid for process in psutil.Process(self.island.process.pid).children(recursive=True)}

    def is_well(self) -> bool:
        """It is the same process with the same workers, and a healthy Cargo says what it always says."""
        module = modules.load("text_stats")
        answer = self.job("text-stats", module.example_input)
        result = {name: value for name, value in module.example_output[-1].items() if name != "type"}
        told = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
        return self.island.running and {"type": "output", "result": result} in told


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with LocalNetwork(tmp_path_factory.mktemp("bad")) as network:
        yield Running(network)


def error_of(answer: httpx.Response) -> tuple[int, dict[str, Any]]:
    """With status 200 it came after lines that had been told already."""
    if answer.status_code != 200:
        return answer.status_code, answer.json()["error"]
    told = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line.startswith("data: ")]
    return 200, told[-1]["error"]


BAD_JOBS: dict[str, tuple[str, str]] = {
    "infinite loop": ("l", "it ran for more than 1 s"),
    "memory bomb": ("b", "it aborted"),
    "ten gigabytes of output": ("g", "more than 1048576 bytes"),
    "out of its memory": ("p", "out of its memory"),
    "no JSON lines": ("n", "line 1 of the Cargo's output is not JSON"),
    "invalid UTF-8": ("u", "line 1 of the Cargo's output is not UTF-8 at byte 27"),
    "two ends": ("t", "line 2 of the Cargo's output comes after done or error"),
    "a picture too wide": ("w", "width must be between"),
    "nothing": ("x", "without done or error"),
}


@pytest.mark.parametrize("name", BAD_JOBS)
def test_a_hostile_job_is_told_and_not_charged(running: Running, name: str) -> None:
    mode, words = BAD_JOBS[name]
    before = running.credits()
    status, error = error_of(running.job("hostile", {"mode": mode}))
    assert status in (200, 422) and error["code"] == "cargo_failed" and words in error["message"]
    assert SECRET not in str(error)
    assert running.credits() == before, "nothing is charged, nothing held"
    assert running.is_well()
    assert "event: complete" in running.job("hostile", {"mode": "d"}).text, "the same Cargo serves on"
    assert running.processes() == running.workers and running.island.process.pid == running.pid
    assert SECRET not in running.island.log()


BAD_PICTURES: dict[str, tuple[dict[str, Any], str]] = {
    "no size": ({"to_width": 0}, "width"),
    "too wide": ({"to_width": 100_000_000}, "width"),
    "less than nothing": ({"to_width": -1}, "width"),
    "no number": ({"to_width": "wide"}, "width"),
    "no picture": ({"data": "AAAA", "to_width": 2}, ""),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_sizes_of_pictures_that_cannot_be(running: Running, name: str) -> None:
    changes, words = BAD_PICTURES[name]
    before = running.credits()
    status, error = error_of(running.job("image-resize", {**modules.load("image_resize").example_input, **changes}))
    assert status in (200, 400, 422) and words in error["message"], error
    assert running.credits() == before and running.is_well()


def test_a_source_in_the_islands_own_network_is_not_published(running: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish(running, tmp_path, "near", "https://localhost/module.wasm") == EXIT_CONFIG
    assert "private_source" in capsys.readouterr().err
    assert running.client.get("/api/v1/cargos?name=near").json()["data"] == []


def test_a_published_cargo_that_cannot_be_had_harms_no_other(running: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The Island's owner asked for it; there is nobody at its source."""
    assert publish(running, tmp_path, "lost", "https://nobody.invalid/module.wasm") == 0, capsys.readouterr().err
    wait_for("the Island has tried", lambda: "nobody.invalid cannot be found" in running.island.log(), PATIENCE_S)
    check_not_offered(running, "lost")


def test_a_published_cargo_that_is_no_model_harms_no_other(running: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file can be had, and is as it was signed; but it is a pickle."""
    file = CargoFile("model.onnx", hashlib.sha256(NO_MODEL).hexdigest(), len(NO_MODEL))
    changes: dict[str, Any] = {"files": (file,), "entry": "model.onnx", "runtime": Runtime.ONNX, "options": '{"task":"tensors"}'}
    assert publish(running, tmp_path, "late", **changes) == 0, capsys.readouterr().err
    wait_for("the Island has tried", lambda: "Cargo late 1.0.0 is not served" in running.island.log(), PATIENCE_S)
    assert "is a pickle" in running.island.log()
    check_not_offered(running, "late")


def check_not_offered(running: Running, name: str) -> None:
    assert running.is_well(), running.island.log()[-2000:]
    before = running.credits()
    status, error = error_of(running.job(name, {}))
    assert status in (404, 503) and name in error["message"] and running.credits() == before


def publish(running: Running, folder: Path, name: str, source: str = "", **changes: Any) -> int:
    """With a key of its own. The command's status."""
    key = DataDir.open(folder).key("publisher")
    files = (CargoFile("module.wasm", "ab" * 32, 1000, (source,) if source else ()),)
    one = cargo(name, "1.0.0", key, **({"files": files} | changes))
    (folder / f"{name}.cargo").write_bytes(sign_cargo(one.manifest, key))
    api_key = running.network.make_key("read", "write", account="ann")
    return main(["cargo", "publish", str(folder / f"{name}.cargo"), "--coordinator", running.url, "--api-key", api_key])


def _started(network: LocalNetwork, name: str, folder: Path) -> LocalNode:
    return network.start_island(name, "--cargo", str(folder))


def test_cargos_that_are_none_are_refused_at_the_start(running: Running, tmp_path: Path) -> None:
    """The owner is told what is wrong and the Island does not begin to offer it; all at once, since each takes a start."""
    plain, climbs = external_model("weights.bin"), external_model("../../etc/passwd")
    empty = wasmtime.wat2wasm('(module (memory (export "memory") 1))')
    cases = {
        "no-entry": (folder_of(tmp_path / "a", "no-entry", "wasm", {"module.wasm": bytes(empty)}), "no entry point _start"),
        "pickled": (folder_of(tmp_path / "b", "pickled", "onnx", {"model.pkl": b"\x80\x04"}), "only safetensors, GGUF and ONNX"),
        "disguised": (folder_of(tmp_path / "c", "disguised", "onnx", {"model.onnx": NO_MODEL}), "a pickle"),
        "external": (folder_of(tmp_path / "d", "external", "onnx", {"model.onnx": climbs}), "outside the Cargo"),
        "unlisted": (folder_of(tmp_path / "e", "unlisted", "onnx", {"model.onnx": plain}), "which the manifest does not list"),
    }
    (tmp_path / "f").mkdir()
    climbing = folder_of(tmp_path / "f" / "g", "climbing", "wasm", {"module.wasm": hostile.ECHO})
    toml = (climbing / "cargo.toml").read_text()
    (climbing / "cargo.toml").write_text(toml.replace('"module.wasm"', '"../../key"'))
    cases["climbing"] = (climbing, "relative path of plain names")
    nodes = {name: _started(running.network, f"bad-{name}", folder) for name, (folder, _) in cases.items()}
    for name, node in nodes.items():
        with pytest.raises(NodeFailed) as caught:
            node.wait_ready(PATIENCE_S)
        assert cases[name][1] in str(caught.value), name
        assert node.process.returncode == EXIT_CONFIG and "Traceback" not in node.log()
        assert error_of(running.job(name, {}))[0] in (404, 503)
    assert running.is_well()


def _of_another(one: SignedCargo, key: NodeKey) -> bytes:
    return seal(Label.CARGO, canonical_manifest(one.manifest), key)


SPOILT: dict[str, tuple[Callable[[SignedCargo], bytes], str]] = {
    "tampered": (lambda one: one.envelope[:90] + bytes([one.envelope[90] ^ 1]) + one.envelope[91:], "local.cargo: "),
    "signed by another": (lambda one: _of_another(one, NodeKey(b"o" * 32)), "was signed by"),
    "cut off": (lambda one: one.envelope[:-1], "local.cargo: "),
    "expired": (lambda one: cargo(publisher=PUBLISHER, published_at_ms=1, expires_at_ms=2).envelope, "expired"),
    "another file": (lambda one: one.envelope, "not 1000 and abab"),
}


@pytest.mark.parametrize("name", SPOILT)
async def test_a_spoilt_cargo_on_this_disk_is_not_opened(name: str, tmp_path: Path) -> None:
    """As ``start --cargo FILE`` and ``cargo run`` bring it."""
    spoil, words = SPOILT[name]
    (tmp_path / "local.cargo").write_bytes(spoil(cargo(publisher=PUBLISHER)))
    (tmp_path / "module.wasm").write_bytes(hostile.ECHO)
    with pytest.raises(ConfigError) as caught, ExitStack() as stack:
        local = find_local(str(tmp_path / "local.cargo"), PUBLISHER.peer_id)
        assert local is not None
        await bring_files(local, ModelStore(tmp_path / "cache"), stack)
    assert words in str(caught.value)


def test_nothing_is_left_when_the_island_stops(running: Running) -> None:
    """The last test of this module."""
    before = running.processes()
    assert len(before) >= 3 and running.island.stop() == 0
    assert not [pid for pid in before if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
