"""`make setup` on machines that lack something: each thing is named with the command that brings it."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.postgres import DEBIAN_HOME

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / ".ci" / "environment.py"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, on a machine whose only programs are those in PATH."""
    spec = importlib.util.spec_from_file_location("archipelag_environment", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CI", "CC", "CXX", "SKIP_CHECKS"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """PATH holds only these, and each does nothing and succeeds."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def add(*names: str) -> Path:
        for name in names:
            (folder / name).write_text("#!/bin/sh\nexit 0\n")
            (folder / name).chmod(0o755)
        return folder

    return add


def compiler_says(*arguments: str, text: str = "") -> str:
    """What g++ prints; nothing where there is none."""
    compiler = shutil.which("g++")
    if compiler is None:
        return ""
    return subprocess.run([compiler, *arguments], input=text, capture_output=True, text=True, check=False).stdout


def run_make(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    make = shutil.which("make")
    assert make is not None
    left_out = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "CI", "GPU", "PYTHON"}
    variables = {name: value for name, value in os.environ.items() if name not in left_out}
    if path is not None:
        variables["PATH"] = path
    return subprocess.run([make, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def test_the_script_can_be_read_by_pythons_that_it_refuses() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 7))


def test_an_old_python_is_told_which_one_to_take(environment: Any) -> None:
    with pytest.raises(
        environment.SetupError, match=r"Python 3\.11 or newer is needed, /x is 3\.10.*PYTHON=python3\.11"
    ):
        environment.check_python((3, 10), "/x")
    environment.check_python((3, 11), "/x")
    environment.check_python((3, 14), "/x")


def test_no_python_at_all() -> None:
    done = run_make("setup", "PYTHON=python-that-is-not-there")
    assert done.returncode != 0
    assert "python-that-is-not-there is missing. Debian: apt-get install python3 python3-venv" in done.stderr


def test_no_compiler(programs: Callable[..., Path], tmp_path: Path) -> None:
    """The whole way, in a process of its own."""
    programs("apt-get")
    command = [sys.executable, str(SCRIPT), "core", "--venv", str(tmp_path / "venv")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"compiler is missing .*Run: (sudo )?apt-get install -y build-essential", done.stderr)
    assert not (tmp_path / "venv").exists(), "nothing is begun that cannot be finished"


@pytest.mark.parametrize(
    ("manager", "command"),
    [("apt-get", "apt-get install -y libgmp-dev"), ("dnf", "dnf install -y gmp-devel"), ("brew", "brew install gmp")],
)
def test_missing_headers_are_named_for_each_package_manager(
    environment: Any, programs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, manager: str, command: str
) -> None:
    programs("cc", "c++", manager)
    monkeypatch.setattr(environment, "compiles", lambda compiler, source: "gmp.h" not in source)
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: "/nowhere")
    python, gmp = environment.missing_tools()
    assert "Python's headers are missing (/nowhere/Python.h)" in python
    assert gmp.endswith(command)


def test_a_machine_without_a_known_package_manager(environment: Any, programs: Callable[..., Path]) -> None:
    assert environment.advice("gmp") == "Install what Debian calls libgmp-dev."


def test_the_users_compiler_counts(
    environment: Any, programs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = programs("mycc")
    monkeypatch.setenv("CC", "mycc -O2")
    assert environment.find_compiler("CC", "cc") == str(folder / "mycc")
    monkeypatch.setenv("CC", "absent")
    assert environment.find_compiler("CC", "mycc") is None


def test_the_header_probe_tells_there_from_not_there(environment: Any) -> None:
    compiler = environment.find_compiler("CC", "cc", "gcc", "clang")
    assert compiler is not None, "tests run where Archipelag was set up"
    assert environment.compiles(compiler, "#include <stdio.h>")
    assert not environment.compiles(compiler, "#include <no_such_header.h>")


def test_venv_missing(environment: Any, programs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    programs("cc", "c++", "apt-get")
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: None)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert environment.missing_tools()[0].endswith(f"apt-get install -y python{version}-venv")


@pytest.mark.parametrize(
    ("gpu", "says"),
    [
        ("cuda", "needs nvcc.*CUDA toolkit"),
        ("vulkan", "needs glslc"),
        ("metal", "needs xcrun"),
        ("tpu", "not known.*cuda"),
    ],
)
def test_a_gpu_build_names_its_toolkit(environment: Any, programs: Callable[..., Path], gpu: str, says: str) -> None:
    (problem,) = environment.missing_for_gpu(gpu)
    assert re.search(says, problem)
    programs("nvcc", "glslc", "xcrun")
    assert bool(environment.missing_for_gpu(gpu)) == (gpu == "tpu")


# What an earlier run brought


class Installs:
    """Counts instead of installing."""

    def __init__(self, environment: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[list[str], dict[str, str]]] = []
        monkeypatch.setattr(
            environment, "pip_install", lambda venv, arguments, extra: self.calls.append((arguments, extra))
        )
        monkeypatch.setattr(environment, "missing_tools", list)
        monkeypatch.setattr(environment, "missing_for_gpu", lambda gpu: [])
        monkeypatch.setattr(environment, "make_venv", self.make_venv)
        monkeypatch.setattr(environment, "TEST_PROGRAMS", {})

    def make_venv(self, venv: Path) -> None:
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / "bin" / "python").touch()


@pytest.fixture
def installs(environment: Any, monkeypatch: pytest.MonkeyPatch) -> Installs:
    return Installs(environment, monkeypatch)


def test_a_second_run_does_nothing(environment: Any, installs: Installs, tmp_path: Path) -> None:
    environment.make_main("core", "", tmp_path)
    assert [arguments for arguments, _ in installs.calls] == [["--editable", f"{ROOT}[gguf,wasm,onnx]"]]
    environment.make_main("core", "", tmp_path)
    assert len(installs.calls) == 1


def test_setup_after_setup_test_keeps_the_extras(environment: Any, installs: Installs, tmp_path: Path) -> None:
    environment.make_main("core", "", tmp_path)
    environment.make_main("test", "", tmp_path)
    environment.make_main("core", "", tmp_path)
    assert [arguments[1] for arguments, _ in installs.calls] == [f"{ROOT}[gguf,wasm,onnx]", f"{ROOT}[gguf,wasm,onnx,diffusers,test]"]


def test_changed_dependencies_are_installed(
    environment: Any, installs: Installs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment.make_main("core", "", tmp_path)
    monkeypatch.setattr(environment, "requirements", lambda section, key: ["something-new"])
    environment.make_main("core", "", tmp_path)
    assert len(installs.calls) == 2


def test_a_gpu_build_is_forced_kept_and_can_be_undone(
    environment: Any, installs: Installs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMAKE_ARGS", "-DCMAKE_CXX_FLAGS=-O2")
    environment.make_main("core", "", tmp_path)
    installs.calls.clear()
    environment.make_main("core", "cuda", tmp_path)
    arguments, extra = installs.calls[0]
    assert {"--force-reinstall", "--no-cache-dir", "--no-deps", "--no-binary=llama-cpp-python"} < set(arguments)
    assert arguments[-1].startswith("llama-cpp-python>=")
    assert extra == {"CMAKE_ARGS": "-DCMAKE_CXX_FLAGS=-O2 -DGGML_CUDA=on"}
    installs.calls.clear()
    environment.make_main("core", "", tmp_path)
    assert installs.calls == [], "a plain setup keeps the GPU build"
    environment.make_main("core", "cpu", tmp_path)
    assert installs.calls[0][1] == {"CMAKE_ARGS": "-DCMAKE_CXX_FLAGS=-O2"}


def test_the_repair_for_amx_comes_with_every_build(
    environment: Any, installs: Installs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("CMAKE_ARGS", "-DX=1")
    environment.make_main("core", "", tmp_path)
    header = tmp_path / "amx_tile_config.h"
    assert installs.calls[0][1] == {"CMAKE_ARGS": f"-DX=1 -DCMAKE_CXX_FLAGS=-include{header}"}
    assert header.read_bytes() == environment.AMX_REPAIR.read_bytes()
    monkeypatch.setattr(environment.platform, "machine", lambda: "arm64")
    assert environment.cmake_args(tmp_path) == "-DX=1"


_TILES = """
#include <immintrin.h>
struct Tiles { unsigned char palette, start, rest[14]; unsigned short columns[16]; unsigned char rows[16]; };
void load(int rows) {
  struct Tiles tiles = {1};
  for (int i = 0; i < 8; i++) { tiles.columns[i] = 64; tiles.rows[i] = rows; }
  _tile_loadconfig(&tiles);
}
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64" or "Free Software" not in compiler_says("--version"), reason="a fault of GCC on x86-64"
)
def test_gcc_keeps_the_tile_configuration_only_with_the_repair(environment: Any) -> None:
    """With a GCC where both give the same count, the fault is mended and the header can go once no older one is supported."""

    def stores(*flags: str) -> int:
        return compiler_says("-O2", "-mamx-tile", *flags, "-S", "-o", "-", "-xc++", "-", text=_TILES).count("mov")

    assert stores() < stores("-include", str(environment.AMX_REPAIR))


def test_a_failed_install_leaves_no_stamp(
    environment: Any, installs: Installs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(venv: Path, arguments: list[str], extra: dict[str, str]) -> None:
        raise environment.SetupError("no network")

    monkeypatch.setattr(environment, "pip_install", fails)
    with pytest.raises(environment.SetupError):
        environment.make_main("core", "", tmp_path)
    assert not (tmp_path / "archipelag-setup.json").exists()


@pytest.mark.parametrize("stamp", ["", "[]", json.dumps({"level": "core", "digest": "old"})])
def test_a_stamp_that_makes_no_sense_is_no_stamp(
    environment: Any, installs: Installs, tmp_path: Path, stamp: str
) -> None:
    (tmp_path / "archipelag-setup.json").write_text(stamp)
    environment.make_main("core", "", tmp_path)
    assert len(installs.calls) == 1


def test_old_stubs_of_trio_are_dropped(environment: Any, tmp_path: Path) -> None:
    """Once trio-typing brings them no longer, drop_old_stubs can go."""
    files = importlib.metadata.files("trio-typing") or ()
    assert any(file.parts[0] == "trio-stubs" for file in files)
    stubs = tmp_path / "lib" / "python3.11" / "site-packages" / "trio-stubs"
    stubs.mkdir(parents=True)
    environment.drop_old_stubs(tmp_path)
    assert not stubs.exists()


# Programs for tests


def test_a_missing_test_program_is_named_and_fatal_in_ci(
    environment: Any, programs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        environment, "TEST_PROGRAMS", {"absent-a": "package-a", "absent-b": "package-b", "here": "package-c"}
    )
    programs("here")
    environment.check_test_programs()
    assert "tests need absent-a, absent-b. Debian: apt-get install package-a package-b" in capsys.readouterr().err
    monkeypatch.setenv("CI", "true")
    with pytest.raises(environment.SetupError, match="package-a package-b"):
        environment.check_test_programs()


@pytest.fixture
def apt(environment: Any, programs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Root in CI lacks one package; the commands are noted instead of run."""
    programs("apt-get")
    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(environment, "TEST_PROGRAMS", {"absent": "package"})
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    commands: list[list[str]] = []
    monkeypatch.setattr(environment, "run_ticking", lambda command, log, extra: commands.append(command))
    return commands


APT_INSTALL = ["apt-get", "install", "-y", "--no-install-recommends", "package"]


def test_in_ci_root_installs_them(environment: Any, apt: list[list[str]]) -> None:
    environment.check_test_programs()
    assert apt == [APT_INSTALL]


def test_lists_of_packages_are_fetched_when_the_install_fails(
    environment: Any, apt: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_without_lists(command: list[str], log: Path, extra: dict[str, str]) -> None:
        assert extra == {"DEBIAN_FRONTEND": "noninteractive"}
        apt.append(command)
        if ["apt-get", "update"] not in apt:
            raise environment.SetupError("Unable to locate package")

    monkeypatch.setattr(environment, "run_ticking", fails_without_lists)
    environment.check_test_programs()
    assert apt == [APT_INSTALL, ["apt-get", "update"], APT_INSTALL]


def test_an_install_that_fails_twice_is_fatal(
    environment: Any, apt: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(command: list[str], log: Path, extra: dict[str, str]) -> None:
        if command == APT_INSTALL:
            raise environment.SetupError("Unable to locate package")

    monkeypatch.setattr(environment, "run_ticking", fails)
    with pytest.raises(environment.SetupError, match="Unable to locate"):
        environment.check_test_programs()


def test_what_is_no_program_is_found_by_its_path(
    environment: Any, programs: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    header = tmp_path / "stdio.h"
    monkeypatch.setattr(environment, "TEST_PROGRAMS", {str(header): "some-libc"})
    programs()
    environment.check_test_programs()
    assert "apt-get install some-libc" in capsys.readouterr().err
    header.touch()
    environment.check_test_programs()
    assert capsys.readouterr().err == ""


def test_postgresql_is_found_where_debian_keeps_it(
    environment: Any,
    programs: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(environment, "POSTGRES_HOME", tmp_path / "postgresql")
    monkeypatch.setattr(environment, "TEST_PROGRAMS", {"git": "git", "postgres": "postgresql"})
    programs("git")
    environment.check_test_programs()
    assert "tests need postgres. Debian: apt-get install postgresql\n" in capsys.readouterr().err
    server = tmp_path / "postgresql" / "15" / "bin" / "postgres"
    server.parent.mkdir(parents=True)
    server.touch(mode=0o755)
    environment.check_test_programs()
    assert capsys.readouterr().err == ""
    assert environment.find_program("postgres") == str(server)
    found_on_path = programs("postgres") / "postgres"
    assert environment.find_program("postgres") == str(found_on_path)


def test_setup_and_the_tests_look_for_postgresql_in_the_same_place(environment: Any) -> None:
    assert environment.POSTGRES_HOME == DEBIAN_HOME


# Long steps


def test_a_long_step_says_that_it_lives(
    environment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([False, False])

    def ended_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
        process.wait()
        return next(answers, True)

    monkeypatch.setattr(environment, "ended_within", ended_within)
    program = "import os; print('WARNING: noise'); print('Building ' + os.environ['WHAT'])"
    environment.run_ticking([sys.executable, "-c", program], tmp_path / "log", {"WHAT": "llama"})
    assert capsys.readouterr().out == "   0:00  Building llama\n" * 2


def test_a_step_that_fails_shows_its_end(environment: Any, tmp_path: Path) -> None:
    program = "print('the reason'); raise SystemExit(3)"
    with pytest.raises(environment.SetupError, match=r"failed\. The end of .*log:\nthe reason"):
        environment.run_ticking([sys.executable, "-c", program], tmp_path / "log", {})


# The Makefile itself


def test_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    help_text = run_make().stdout
    for target in set(phony.split()) - {"python"}:
        assert f"make {target} " in help_text
    assert {"setup", "setup-test", "demo", "test", "soak", "bench", "lint"} <= set(phony.split())


def test_what_ci_runs() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert {"set -euo pipefail", "make lint </dev/null", "make test </dev/null"} <= set(lines)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_fixed_commands_stand_in_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["options.entry_points"]["console_scripts"].split() == ["archipelag-node", "=", "node.cli:main"]
    assert "libp2p==0.8.1" in config["options"]["install_requires"].split()
    packages = {line.partition(".")[0] for line in config["options.packages.find"]["include"].split()}
    assert packages == {"protocol", "privacy", "coordinator", "runtimes", "node"}


def test_the_driver_of_postgresql_is_the_same_for_tests_and_for_users(environment: Any) -> None:
    (driver,) = environment.requirements("options.extras_require", "postgres")
    assert driver.startswith("psycopg[binary]>=")
    assert driver in environment.requirements("options.extras_require", "test")
