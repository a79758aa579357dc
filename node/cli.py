"""``archipelag-node``: parses the command line and hands over. Each command is a module of node.commands, loaded when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from node import VERSION
from protocol.errors import ArchipelagError, ConfigError

COMMANDS = (
    "start",
    "coordinator",
    "bridge",
    "demo",
    "keys",
    "accounts",
    "cargo",
    "cache",
    "batch",
    "workflow",
    "ab",
    "status",
    "peers",
    "doctor",
)
EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_PIPE = 2, 130, 141

_DESCRIPTION = "Archipelag: a peer-to-peer network that turns home GPUs into one inference service."
_EPILOG = """\
first steps:
  archipelag-node demo                                    a Coordinator, two Islands and an answer on this machine
  archipelag-node coordinator                             run a Coordinator; it prints its address
  archipelag-node keys create                             make an API key for it
  archipelag-node accounts show local                     credits, karma and Islands of an account
  archipelag-node start --coordinator URL --cargo smollm2-135m
                                                          run an Island that serves a model
  archipelag-node bridge --coordinator URL                the API on your own machine, with answers straight from Islands

Every option can also be set in the environment (--memory-limit is ARCHIPELAG_MEMORY_LIMIT) or in config.toml in the data
folder (memory_limit = "4G"); flags win over the environment, the environment over the file."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="archipelag-node",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"archipelag-node {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"node.commands.{name}")
        sub = commands.add_parser(
            name, help=module.HELP, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run, parser=sub)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 wrong usage or settings, 1 anything else that went wrong, 130 after Ctrl-C, 141 when stdout was closed."""
    parsed = build_parser().parse_args(arguments)
    try:
        status = int(parsed.run(parsed) or 0)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has what he wanted, as `grep -q` does; the interpreter must not try to flush the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except (ArchipelagError, BaseExceptionGroup) as error:
        cause = _first_cause(error)
        if not isinstance(cause, (ArchipelagError, KeyboardInterrupt)):
            raise
        if isinstance(cause, ArchipelagError):
            print(f"archipelag-node: {cause}", file=sys.stderr)
            return EXIT_CONFIG if isinstance(cause, ConfigError) else 1
        return EXIT_INTERRUPTED


def _first_cause(error: BaseException) -> BaseException:
    """The error inside the groups that nurseries wrap round it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
