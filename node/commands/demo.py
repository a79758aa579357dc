"""Show the whole network on this machine: a Coordinator, two Islands with a real language model, and one answer, token by token;
then the same question from the cache of answers, vectors of sentences and, where torch is installed, a picture.

The first run downloads the models (120 MB). Afterwards it prints the base URL, a key and a curl line and stays up until Ctrl-C;
--once ends after the answer.

--pipeline shows instead how a model runs that no single Island can hold: it is cut in two, three Islands offer too little memory for the
whole, one of them is killed in the middle of an answer, and the answer is finished all the same.

--ab shows an A/B test: two releases of a Cargo that differ, requests of many users, a promotion by itself, and an Island that follows.
It downloads nothing and takes half a minute.
"""

from __future__ import annotations

import argparse
import signal
import sys

from node.commands.common import checked
from node.settings import defaults, parse_host_port, settle
from protocol.errors import ConfigError

HELP = "a Coordinator, two Islands and an answer, on this machine"
_QUESTION = "What is the capital of France?"
_STORY = "Write a short story about an island."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", default=None, help="end after the answer")
    parser.add_argument("--pipeline", action="store_true", default=None, help="one model over several Islands, one of which dies")
    parser.add_argument("--ab", action="store_true", default=None, help="an A/B test of two releases, until the better one is promoted")
    parser.add_argument("--kill-stage", type=int, metavar="N", help="with --pipeline: which stage dies, 0 (default) or 1")
    parser.add_argument("--prompt", metavar="TEXT", help=f"what to ask (default: {_QUESTION} or, with --pipeline, {_STORY})")
    parser.add_argument("--islands", type=int, metavar="N", help="how many Islands (default: 2)")
    parser.add_argument(
        "--http",
        type=checked(parse_host_port),
        metavar="HOST:PORT",
        help="where to serve the API (default: 127.0.0.1:8080, or a free port)",
    )


def run(arguments: argparse.Namespace) -> int:
    chosen = settle(arguments.parser, arguments).http is not None
    question = _STORY if arguments.pipeline else _QUESTION
    settings = defaults(
        arguments, once=False, prompt=question, islands=2, http=("127.0.0.1", 8080), pipeline=False, ab=False, kill_stage=0
    )
    from node.demo import DemoConfig, check_islands, run_demo
    from node.demo_ab import run_ab_demo
    from node.demo_pipeline import PipelineDemo, run_pipeline_demo

    if settings.kill_stage not in (0, 1):
        raise ConfigError("--kill-stage takes 0 or 1: the demo's pipeline has two stages")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM stops the nodes as Ctrl-C does
    if settings.ab:
        run_ab_demo(sys.stdout)
        return 0
    if settings.pipeline:
        run_pipeline_demo(PipelineDemo(settings.prompt, settings.kill_stage), sys.stdout)
        return 0
    host, port = settings.http
    run_demo(
        DemoConfig(settings.prompt, check_islands(settings.islands), settings.once, f"{host}:{port}", chosen),
        sys.stdout,
    )
    return 0
