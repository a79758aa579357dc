"""Show the whole network on this machine: a Coordinator, two Islands with a real language model, and one answer, token by token.

The first run downloads the model (98 MB). Afterwards it prints the base URL, a key and a curl line and stays up until Ctrl-C;
--once ends after the answer.
"""

from __future__ import annotations

import argparse
import signal
import sys

from node.commands.common import checked
from node.settings import defaults, parse_host_port, settle

HELP = "a Coordinator, two Islands and an answer, on this machine"
_QUESTION = "What is the capital of France?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", default=None, help="end after the answer")
    parser.add_argument("--prompt", metavar="TEXT", help=f"what to ask (default: {_QUESTION})")
    parser.add_argument("--islands", type=int, metavar="N", help="how many Islands (default: 2)")
    parser.add_argument(
        "--http",
        type=checked(parse_host_port),
        metavar="HOST:PORT",
        help="where to serve the API (default: 127.0.0.1:8080, or a free port)",
    )


def run(arguments: argparse.Namespace) -> int:
    chosen = settle(arguments.parser, arguments).http is not None
    settings = defaults(arguments, once=False, prompt=_QUESTION, islands=2, http=("127.0.0.1", 8080))
    from node.demo import DemoConfig, check_islands, run_demo

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM stops the nodes as Ctrl-C does
    host, port = settings.http
    run_demo(
        DemoConfig(settings.prompt, check_islands(settings.islands), settings.once, f"{host}:{port}", chosen),
        sys.stdout,
    )
    return 0
