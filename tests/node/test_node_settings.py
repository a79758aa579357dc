"""Flags over environment over file; bad values name their source."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from node.cli import build_parser
from node.commands.common import checked
from node.settings import defaults, parse_bytes, parse_host_port, settle
from protocol.errors import ConfigError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir")
    parser.add_argument("--memory-limit", type=checked(parse_bytes))
    parser.add_argument("--cargo", action="append")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"))
    parser.add_argument("--log-json", action="store_true", default=None)
    return parser


def _settle(tmp_path: Path, flags: list[str], environment: dict[str, str], toml: str) -> argparse.Namespace:
    (tmp_path / "config.toml").write_text(toml)
    parser = _parser()
    return settle(parser, parser.parse_args(["--data-dir", str(tmp_path), *flags]), environment)


@pytest.mark.parametrize(
    ("flags", "environment", "toml", "expected"),
    [
        (["--memory-limit", "1K"], {"ARCHIPELAG_MEMORY_LIMIT": "2K"}, 'memory_limit = "3K"', 1024),
        ([], {"ARCHIPELAG_MEMORY_LIMIT": "2K"}, 'memory_limit = "3K"', 2048),
        ([], {}, 'memory-limit = "3K"', 3072),
        ([], {}, "memory_limit = 77", 77),
        ([], {}, "", None),
    ],
)
def test_precedence(
    tmp_path: Path, flags: list[str], environment: dict[str, str], toml: str, expected: int | None
) -> None:
    assert _settle(tmp_path, flags, environment, toml).memory_limit == expected


def test_lists_and_switches(tmp_path: Path) -> None:
    settings = _settle(tmp_path, [], {"ARCHIPELAG_CARGO": "a,b"}, 'cargo = ["c"]\nlog_json = true')
    assert settings.cargo == ["a", "b"] and settings.log_json is True
    assert _settle(tmp_path, [], {}, 'cargo = ["c", "d"]').cargo == ["c", "d"]
    assert _settle(tmp_path, [], {"ARCHIPELAG_LOG_JSON": "no"}, "log_json = true").log_json is False


@pytest.mark.parametrize(
    ("environment", "toml", "words"),
    [
        ({"ARCHIPELAG_MEMORY_LIMIT": "lots"}, "", "ARCHIPELAG_MEMORY_LIMIT"),
        ({}, 'memory_limit = "lots"', "config.toml: memory_limit"),
        ({}, "memmory_limit = 1", "unknown settings: memmory_limit"),
        ({}, "= broken", "config.toml"),
        ({"ARCHIPELAG_LOG_JSON": "perhaps"}, "", "neither true nor false"),
        ({"ARCHIPELAG_LOG_LEVEL": "foo"}, "", "none of debug, info, warning, error"),
    ],
)
def test_bad_values_name_their_source(tmp_path: Path, environment: dict[str, str], toml: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _settle(tmp_path, [], environment, toml)


@pytest.mark.parametrize(
    ("text", "size"), [("7", 7), ("1K", 1024), ("1.5 GiB", 3 * 2**29), ("2m", 2**21), ("3TB", 3 * 2**40)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1e9", "G", "0x10", "1Q"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_bytes(text)


def test_host_and_port() -> None:
    assert parse_host_port("0.0.0.0:80") == ("0.0.0.0", 80)
    assert parse_host_port("[::1]:8080") == ("::1", 8080)
    for bad in ("8080", "host:", "host:99999", "host:x"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            parse_host_port(bad)


def test_defaults_keep_what_was_set() -> None:
    assert defaults(argparse.Namespace(a=0, b=None), a=1, b=2) == argparse.Namespace(a=0, b=2)


def test_every_command_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("start", "coordinator", "demo", "keys", "cache", "status", "peers", "doctor"):
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([command, "--help"])
        assert stop.value.code == 0
        assert len(capsys.readouterr().out) > 300
