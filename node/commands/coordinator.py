"""Run a Coordinator: match Consumers to Islands and speak OpenAI's API.

It prints the URL of the API and the address that Islands join through. Make keys with "archipelag-node keys create". Back up its data
folder: network.key in it names the network, and Islands trust nobody else.

Plain HTTP is served on loopback only; for other addresses give --tls-cert and --tls-key, or --insecure-http behind a proxy that
terminates TLS.
"""

from __future__ import annotations

import argparse

import trio

from node import VERSION, logs
from node.commands.common import add_data_dir, add_logging, add_network, checked, settled
from node.settings import defaults, parse_host_port

HELP = "run a Coordinator: the OpenAI-compatible API and the matching"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_dir(parser, "coordinator")
    parser.add_argument(
        "--http",
        type=checked(parse_host_port),
        metavar="HOST:PORT",
        help="where to serve the API (default: 127.0.0.1:8080); port 0 picks a free one",
    )
    parser.add_argument(
        "--database-url", metavar="URL", help="SQLAlchemy URL of the database (default: SQLite in the data folder)"
    )
    parser.add_argument("--tls-cert", metavar="F", help="certificate chain, PEM")
    parser.add_argument("--tls-key", metavar="F", help="its private key, PEM")
    parser.add_argument(
        "--insecure-http", action="store_true", default=None, help="serve plain HTTP on an address that is not loopback"
    )
    parser.add_argument(
        "--trusted-proxy",
        action="append",
        metavar="IP",
        help="believe X-Forwarded-For from this address; may be repeated",
    )
    add_network(parser, "/ip4/0.0.0.0/tcp/4001")
    add_logging(parser)


def run(arguments: argparse.Namespace) -> int:
    settings = defaults(
        settled(arguments, "coordinator"),
        http=("127.0.0.1", 8080),
        listen=["/ip4/0.0.0.0/tcp/4001"],
        bootstrap=[],
        no_mdns=False,
        trusted_proxy=[],
        insecure_http=False,
    )
    logs.setup(settings.log_json, settings.log_level)
    from coordinator.config import CoordinatorConfig
    from node.coordinator_role import CoordinatorRole, run_coordinator
    from node.database import database_url

    http = CoordinatorConfig(
        http_host=settings.http[0],
        http_port=settings.http[1],
        database_url=database_url(settings.data_dir, settings.database_url),
        tls_cert=settings.tls_cert or "",
        tls_key=settings.tls_key or "",
        insecure_http=settings.insecure_http,
        trusted_proxies=tuple(settings.trusted_proxy),
        version=VERSION,
    )
    role = CoordinatorRole(
        data_dir=settings.data_dir,
        http=http,
        listen=tuple(settings.listen),
        bootstrap=tuple(settings.bootstrap),
        mdns=not settings.no_mdns,
        ready_file=settings.ready_file,
    )
    trio.run(run_coordinator, role)
    return 0
