"""Makes the virtual environments for `make setup`, `make setup-test` and `make bench`.

Runs on the system's Python with its standard library only. Everything that is missing is named with the command that brings it; a
long step shows that it lives; a second run finds the stamp and does nothing.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON_MIN = (3, 11)
TICK_S = 10.0
AMX_REPAIR = ROOT / ".ci" / "amx_tile_config.h"
EXTRAS = "options.extras_require"
LEVELS = {
    # each has all that the ones before it have
    "core": ["gguf", "wasm", "onnx"],
    "images": ["gguf", "wasm", "onnx", "diffusers"],
    "test": ["gguf", "wasm", "onnx", "diffusers", "test"],
}
GPU_BUILDS = {
    # kind: (flags for llama.cpp, a program that its toolkit brings, how to get it)
    "cuda": ("-DGGML_CUDA=on", "nvcc", "the CUDA toolkit: https://developer.nvidia.com/cuda-downloads"),
    "vulkan": ("-DGGML_VULKAN=on", "glslc", "the Vulkan SDK (Debian: apt-get install libvulkan-dev glslc)"),
    "metal": ("-DGGML_METAL=on", "xcrun", "Apple's command line tools: xcode-select --install"),
}
# Programs that tests call, and the Debian packages that bring them.
TEST_PROGRAMS = {
    "git": "git",
    "curl": "curl",
    "postgres": "postgresql",
    "setpriv": "util-linux",
    "bwrap": "bubblewrap",
    "clang": "clang",
    "wasm-ld": "lld",
    "/usr/include/wasm32-wasi/stdio.h": "wasi-libc",  # no program: what shows that it is there
    "podman": "podman",
    "runc": "runc",
    "/usr/lib/llvm-14/lib/clang/14.0.6/lib/wasi/libclang_rt.builtins-wasm32.a": "libclang-rt-14-dev-wasm32",
}
POSTGRES_HOME = Path("/usr/lib/postgresql")  # Debian keeps a server's programs here, not on PATH: VERSION/bin/postgres
INSTALLERS = {
    # what is missing: the packages that bring it, by package manager
    "compiler": {
        "apt-get": "build-essential",
        "dnf": "gcc gcc-c++",
        "pacman": "gcc",
        "apk": "build-base",
        "brew": "gcc",
    },
    "headers": {
        "apt-get": "python{v}-dev",
        "dnf": "python{v}-devel",
        "pacman": "python",
        "apk": "python3-dev",
        "brew": "python@{v}",
    },
    "venv": {
        "apt-get": "python{v}-venv",
        "dnf": "python{v}",
        "pacman": "python",
        "apk": "python3",
        "brew": "python@{v}",
    },
    "gmp": {"apt-get": "libgmp-dev", "dnf": "gmp-devel", "pacman": "gmp", "apk": "gmp-dev", "brew": "gmp"},
}
COMPILE_NOTE = " llama.cpp is compiled for this machine, once: about 5 minutes on 2 cores."
INSTALL_VERB = {"apt-get": "install -y", "dnf": "install -y", "pacman": "-S", "apk": "add", "brew": "install"}


class SetupError(Exception):
    """Something is missing; the text says what brings it."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Make Archipelag's virtual environments.")
    parser.add_argument("level", choices=[*LEVELS, "bench"])
    parser.add_argument("--gpu", default="", help="cuda, vulkan or metal; cpu to go back; empty: as it was")
    parser.add_argument("--venv", type=Path, default=None)
    options = parser.parse_args(arguments)
    try:
        check_python(sys.version_info[:2], sys.executable)
        if options.level == "bench":
            make_bench(options.venv or ROOT / ".venv-bench")
        else:
            make_main(options.level, options.gpu, options.venv or ROOT / ".venv")
    except SetupError as error:
        print(f"\nsetup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run it again to go on.", file=sys.stderr)
        return 130
    return 0


# Checks: each returns a list of sentences, one for each thing that is missing


def check_python(version: tuple[int, int], executable: str) -> None:
    if version < PYTHON_MIN:
        found, needed = ".".join(map(str, version)), ".".join(map(str, PYTHON_MIN))
        raise SetupError(
            f"Python {needed} or newer is needed, {executable} is {found}. Install one, then say which: make setup PYTHON=python{needed}"
        )


def missing_tools() -> list[str]:
    """What the first install cannot do without: to make an environment, and to compile the packages that come as source."""
    missing = []
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        missing.append("Python's venv module is missing. " + advice("venv"))
    c_compiler = find_compiler("CC", "cc", "gcc", "clang")
    if c_compiler is None or find_compiler("CXX", "c++", "g++", "clang++") is None:
        missing.append("A C and C++ compiler is missing (llama.cpp is compiled here). " + advice("compiler"))
        return missing
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        missing.append(f"Python's headers are missing ({include}/Python.h). " + advice("headers"))
    if not compiles(c_compiler, "#include <gmp.h>"):
        missing.append("The headers of GMP are missing (gmp.h; libp2p's fastecdsa needs them). " + advice("gmp"))
    return missing


def missing_for_gpu(gpu: str) -> list[str]:
    if gpu not in GPU_BUILDS:
        return [f"GPU={gpu} is not known. Possible are: {', '.join(GPU_BUILDS)}, cpu."]
    _, program, bringer = GPU_BUILDS[gpu]
    return [] if shutil.which(program) else [f"GPU={gpu} needs {program}, which is missing. Install {bringer}."]


def find_compiler(variable: str, *names: str) -> str | None:
    """The user's choice in CC or CXX counts; it may carry arguments."""
    chosen = os.environ.get(variable)
    candidates = [shlex.split(chosen)[0]] if chosen else list(names)
    return next((path for path in map(shutil.which, candidates) if path), None)


def compiles(compiler: str, source: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probe.c"
        file.write_text(source + "\n")
        flags = shlex.split(os.environ.get("CFLAGS", "")) + shlex.split(os.environ.get("CPPFLAGS", ""))
        return subprocess.run([compiler, *flags, "-E", str(file)], capture_output=True, check=False).returncode == 0


def advice(what: str) -> str:
    """The command that brings it, for this machine's package manager."""
    version = ".".join(map(str, sys.version_info[:2]))
    for manager, packages in INSTALLERS[what].items():
        if shutil.which(manager):
            sudo = "" if manager == "brew" or os.geteuid() == 0 else "sudo "
            return f"Run: {sudo}{manager} {INSTALL_VERB[manager]} {packages.format(v=version)}"
    return f"Install what Debian calls {INSTALLERS[what]['apt-get'].format(v=version)}."


# Environments


def make_main(level: str, gpu: str, venv: Path) -> None:
    """`.venv` with this project in it, editable, and its extras. What an earlier run brought (extras, GPU build) stays."""
    stamp_path = venv / "archipelag-setup.json"
    stamp = read_stamp(stamp_path)
    level = max(level, stamp.get("level", level), key=list(LEVELS).index)
    gpu = gpu or stamp.get("gpu", "cpu")
    wanted = {"level": level, "gpu": gpu, "digest": digest(LEVELS[level])}
    if stamp != wanted or not python_of(venv).exists():
        problems = (
            [] if os.environ.get("SKIP_CHECKS") else missing_tools() + (missing_for_gpu(gpu) if gpu != "cpu" else [])
        )
        if problems:
            raise SetupError("\n       ".join(["something is missing:", *problems]))
        make_venv(venv)
        if gpu != stamp.get("gpu", "cpu"):
            build_llama(venv, gpu)  # before the rest, which then finds it there and does not compile it for the CPU first
        print("Installing Archipelag and what it needs." + ("" if has_llama(venv) else COMPILE_NOTE), flush=True)
        target = f"{ROOT}[{','.join(LEVELS[level])}]"
        pip_install(venv, ["--editable", target], {"CMAKE_ARGS": cmake_args(venv)})
        drop_old_stubs(venv)
        stamp_path.write_text(json.dumps(wanted))
        print(f"Ready: {venv.name}/bin/archipelag-node", flush=True)
    if level == "test":
        check_test_programs()


def drop_old_stubs(venv: Path) -> None:
    """trio-typing 0.10, which libp2p 0.8.1 imports, also brings stubs of trio 0.22, which type checkers prefer to trio's own types."""
    for folder in venv.glob("lib/python*/site-packages/trio-stubs"):
        shutil.rmtree(folder)


def has_llama(venv: Path) -> bool:
    return any(venv.glob("lib/python*/site-packages/llama_cpp/__init__.py"))


def build_llama(venv: Path, gpu: str) -> None:
    """Compile llama.cpp for a GPU (or back for the CPU). pip's cache is left out: it does not tell builds apart."""
    requirement = next(line for line in requirements(EXTRAS, "gguf") if line.startswith("llama-cpp-python"))
    flags = GPU_BUILDS[gpu][0] if gpu in GPU_BUILDS else ""
    arguments = ["--force-reinstall", "--no-deps", "--no-cache-dir", "--no-binary=llama-cpp-python", requirement]
    print(f"Compiling llama.cpp for GPU={gpu}. With a GPU this takes 10 minutes and more.", flush=True)
    pip_install(venv, arguments, {"CMAKE_ARGS": cmake_args(venv, flags)})


def cmake_args(venv: Path, flags: str = "") -> str:
    """What llama.cpp is built with: the user's CMAKE_ARGS, our repair for AMX unless they set C++ flags, and ``flags``."""
    chosen = os.environ.get("CMAKE_ARGS", "")
    repair = ""
    if platform.machine() == "x86_64" and "CMAKE_CXX_FLAGS" not in chosen and " " not in str(venv):
        header = venv / AMX_REPAIR.name
        shutil.copyfile(AMX_REPAIR, header)
        repair = f"-DCMAKE_CXX_FLAGS=-include{header}"
    return " ".join(filter(None, (chosen, repair, flags)))


def make_bench(venv: Path) -> None:
    """`.venv-bench`: the servers that the benchmark compares with. They would pull other versions into `.venv`."""
    stamp_path = venv / "archipelag-setup.json"
    wanted = {"level": "bench", "digest": digest(["bench"])}
    if read_stamp(stamp_path) == wanted and python_of(venv).exists():
        return
    make_venv(venv)
    print("Installing the servers to compare with (LiteLLM's proxy, llama_cpp.server).", flush=True)
    pip_install(venv, requirements(EXTRAS, "bench"), {"CMAKE_ARGS": cmake_args(venv)})
    stamp_path.write_text(json.dumps(wanted))


def check_test_programs() -> None:
    missing = {program: package for program, package in TEST_PROGRAMS.items() if find_program(program) is None}
    if not missing:
        return
    continuous = os.environ.get("CI") == "true"
    if continuous and shutil.which("apt-get") and os.geteuid() == 0:
        install_packages(list(missing.values()), ROOT / ".venv" / "apt.log")
        return
    text = f"tests need {', '.join(missing)}. Debian: apt-get install {' '.join(missing.values())}"
    if continuous:
        raise SetupError(text)
    print(f"setup: {text}\n       Tests that need them will be skipped.", file=sys.stderr)


def find_program(name: str) -> str | None:
    """Where it is; a path stands for what is no program, such as a library."""
    if name.startswith("/"):
        return name if Path(name).exists() else None
    folders = [os.environ.get("PATH", os.defpath), *map(str, POSTGRES_HOME.glob("*/bin"))]
    return shutil.which(name, path=os.pathsep.join(folders))


def install_packages(packages: list[str], log: Path) -> None:
    """A fresh image has no lists of packages and an old one has outdated ones; only then they are fetched."""
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        run_ticking(command, log, quiet)
    except SetupError:
        run_ticking(["apt-get", "update"], log, quiet)
        run_ticking(command, log, quiet)


def make_venv(venv: Path) -> None:
    if works(python_of(venv)):
        return
    print(f"Making {venv.name} with Python {'.'.join(map(str, sys.version_info[:3]))}.", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], stdin=subprocess.DEVNULL, check=False)
    if made.returncode != 0:
        raise SetupError("the virtual environment could not be made; what Python said stands above. " + advice("venv"))


def works(python: Path) -> bool:
    if not python.exists():
        return False
    probe = f"import sys, pip; sys.exit(sys.version_info < {PYTHON_MIN})"
    return subprocess.run([str(python), "-c", probe], capture_output=True, check=False).returncode == 0


def pip_install(venv: Path, arguments: list[str], environment: dict[str, str]) -> None:
    command = [str(python_of(venv)), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *arguments]
    run_ticking(command, venv / "setup.log", environment)


def run_ticking(command: list[str], log: Path, environment: dict[str, str]) -> None:
    """Run a long step with its output in ``log``; say every few seconds that it lives and what it is at."""
    began = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            cwd=ROOT,
        )
        try:
            while not ended_within(process, TICK_S):
                print(f"  {clock(time.monotonic() - began)}  {last_line(log)}", flush=True)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise SetupError(f"`{shlex.join(command)}` failed. The end of {log}:\n{tail}")


def ended_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def last_line(log: Path) -> str:
    text = log.read_text(errors="replace").splitlines()
    lines = [line.strip() for line in text if line.strip() and not line.startswith("WARNING")]
    return lines[-1][:90] if lines else "starting"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60:2d}:{int(seconds) % 60:02d}"


def python_of(venv: Path) -> Path:
    return venv / "bin" / "python"


def requirements(section: str, key: str) -> list[str]:
    """The lines of a list in setup.cfg."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config[section][key].splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def digest(extras: list[str]) -> str:
    """Changes when the dependencies, the Python or the place do."""
    lists = [requirements("options", "install_requires"), *(requirements(EXTRAS, extra) for extra in extras)]
    commands = requirements("options.entry_points", "console_scripts")
    facts = [lists, commands, list(sys.version_info[:3]), str(ROOT)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_stamp(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
