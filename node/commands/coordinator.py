"""Run a Coordinator: match Consumers to Islands and speak OpenAI's API.

It prints the URL of the API and the address that Islands join through. Make keys with "archipelag-node keys create". Back up its data
folder: network.key in it names the network, and Islands trust nobody else.

Plain HTTP is served on loopback only; for other addresses give --tls-cert and --tls-key, or --insecure-http behind a proxy that
terminates TLS.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import trio

from coordinator.cache.policy import CacheConfig
from node import VERSION, logs
from node.commands.common import add_data_dir, add_logging, add_network, checked, parse_count, settled
from node.ready import check_ready_file
from node.settings import CACHE_MODEL_DEFAULT, defaults, parse_bytes, parse_host_port, parse_similarity, parse_switch
from protocol import limits
from protocol.activations import Activations
from protocol.errors import ConfigError
from protocol.shards import ShardManifest, manifest_from_json

HELP = "run a Coordinator: the OpenAI-compatible API and the matching"
_CACHE = CacheConfig()


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
    parser.add_argument(
        "--network-of",
        metavar="D",
        help="serve the network of the Coordinator whose data folder D is, or a copy of its network.key and salt.key; "
        "needs the same --database-url",
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
    parser.add_argument(
        "--address-limit",
        type=checked(parse_count),
        metavar="N",
        help="requests a minute of one address, right keys and wrong ones (default: no limit)",
    )
    parser.add_argument(
        "--body-limit",
        type=checked(parse_bytes),
        metavar="BYTES",
        help=f"largest request body (default: {limits.BODY_BYTES_MAX}; at most {limits.JOB_INPUT_BYTES_MAX})",
    )
    _add_work_arguments(parser)
    _add_file_arguments(parser)
    _add_cache_arguments(parser)
    add_network(parser, "/ip4/0.0.0.0/tcp/4001")
    add_logging(parser)


def _add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """Jobs, answers, and who may do what."""
    parser.add_argument(
        "--job-timeout",
        type=float,
        metavar="SECONDS",
        help=f"longest time that a job may take (default: {limits.JOB_TIMEOUT_S:.0f})",
    )
    parser.add_argument(
        "--retry-window",
        type=checked(parse_count),
        metavar="SECONDS",
        help="how long a chat's answer is kept, sealed, for a client that asks again after it was cut off "
        f"(default: {limits.RETRY_WINDOW_S:.0f}; 0 keeps none)",
    )
    parser.add_argument(
        "--result-retention",
        type=checked(parse_count),
        metavar="SECONDS",
        help=f"how long the output of a submitted job is kept, sealed (default: {limits.RESULT_RETENTION_S:.0f})",
    )
    parser.add_argument(
        "--run-retention",
        type=checked(parse_count),
        metavar="SECONDS",
        help=f"how long batches and workflows are kept, sealed, after their end (default: {limits.RUN_RETENTION_S:.0f})",
    )
    parser.add_argument(
        "--require-approval",
        action="store_true",
        default=None,
        help="give jobs only to Islands that 'archipelag-node accounts approve' has named",
    )
    parser.add_argument(
        "--review-cargos",
        action="store_true",
        default=None,
        help="published Cargos wait until 'archipelag-node cargo review' approves them",
    )
    parser.add_argument(
        "--manifest",
        action="append",
        metavar="F",
        help="shard manifest (cargo shard writes it) of a model that may run on several Islands; those of the catalogue are known",
    )
    parser.add_argument(
        "--activations",
        choices=tuple(Activations),
        help="how hidden states travel between the stages of a pipeline: f32 is exact (default), f16 and int8 are smaller",
    )


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Files that accounts send, and those that batches write."""
    parser.add_argument(
        "--file-limit", type=checked(parse_bytes), metavar="BYTES", help=f"largest file (default: {limits.FILE_BYTES_MAX})"
    )
    parser.add_argument(
        "--storage-limit",
        type=checked(parse_bytes),
        metavar="BYTES",
        help=f"all files of an account together (default: {limits.FILES_BYTES_MAX})",
    )
    parser.add_argument(
        "--file-retention",
        type=checked(parse_count),
        metavar="SECONDS",
        help=f"how long files are kept, sealed, unless they say less (default: {limits.FILE_RETENTION_S:.0f})",
    )


def _add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the cache of answers; what a Cargo's manifest says, or ``archipelag-node cache policy``, comes before."""
    parser.add_argument(
        "--cache", type=checked(parse_switch), metavar="on|off", help="answer from the cache what was answered before (default: on)"
    )
    parser.add_argument(
        "--cache-ttl",
        type=checked(parse_count),
        metavar="SECONDS",
        help=f"how long answers of Cargos without a manifest are kept (default: {_CACHE.ttl_s})",
    )
    parser.add_argument(
        "--cache-entries", type=checked(parse_count), metavar="N", help=f"answers in the cache at most (default: {_CACHE.entries_max:,})"
    )
    parser.add_argument(
        "--cache-similarity",
        type=checked(parse_similarity),
        metavar="S",
        help="how alike two questions to a Cargo without a manifest have to be for one to get the other's answer "
        f"(default: {_CACHE.similarity_milli / 1000:g}; 1: only equal ones)",
    )
    parser.add_argument(
        "--cache-model",
        metavar="NAME|off",
        help=f"Cargo whose vectors say which questions are alike (default: {CACHE_MODEL_DEFAULT}); off: only equal ones are",
    )


def _cache(settings: argparse.Namespace) -> CacheConfig:
    """Raises ConfigError that names the flag."""
    if not 1 <= settings.cache_ttl <= limits.CARGO_CACHE_TTL_S_MAX:
        raise ConfigError(f"--cache-ttl takes 1 to {limits.CARGO_CACHE_TTL_S_MAX} seconds; --cache off keeps no answers")
    if settings.cache_entries < 1:
        raise ConfigError("--cache-entries takes at least 1; --cache off keeps no answers")
    return CacheConfig(
        enabled=settings.cache,
        ttl_s=settings.cache_ttl,
        entries_max=settings.cache_entries,
        similarity_milli=settings.cache_similarity,
    )


def _cache_model(settings: argparse.Namespace) -> str:
    """Empty where no vectors are wanted. Raises ConfigError."""
    if settings.cache_model == "off" or not settings.cache:
        return ""
    from node.answer_embedder import check_model

    check_model(settings.cache_model)
    return str(settings.cache_model)


def _manifests(files: list[str]) -> dict[str, ShardManifest]:
    """Of the catalogue and of these files, by the model's name. Raises ConfigError."""
    from runtimes.manifests import catalogue_manifests

    found = dict(catalogue_manifests())
    given: dict[str, str] = {}
    for file in files:
        try:
            manifest = manifest_from_json(Path(file).expanduser().read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--manifest {file} cannot be read: {error}") from error
        if manifest.name in given:
            raise ConfigError(f"--manifest {file} names {manifest.name}, and so does {given[manifest.name]}; leave one of them out")
        given[manifest.name] = file
        found[manifest.name] = manifest
    return found


def run(arguments: argparse.Namespace) -> int:
    settings = defaults(
        settled(arguments, "coordinator"),
        http=("127.0.0.1", 8080),
        listen=["/ip4/0.0.0.0/tcp/4001"],
        bootstrap=[],
        no_mdns=False,
        trusted_proxy=[],
        insecure_http=False,
        manifest=[],
        activations=Activations.F32.value,
        address_limit=0,
        body_limit=limits.BODY_BYTES_MAX,
        job_timeout=limits.JOB_TIMEOUT_S,
        retry_window=limits.RETRY_WINDOW_S,
        result_retention=limits.RESULT_RETENTION_S,
        run_retention=limits.RUN_RETENTION_S,
        file_limit=limits.FILE_BYTES_MAX,
        storage_limit=limits.FILES_BYTES_MAX,
        file_retention=limits.FILE_RETENTION_S,
        require_approval=False,
        review_cargos=False,
        cache=_CACHE.enabled,
        cache_ttl=_CACHE.ttl_s,
        cache_entries=_CACHE.entries_max,
        cache_similarity=_CACHE.similarity_milli,
        cache_model=CACHE_MODEL_DEFAULT,
    )
    if not 0 < settings.body_limit <= limits.JOB_INPUT_BYTES_MAX:
        raise ConfigError(f"--body-limit takes 1 to {limits.JOB_INPUT_BYTES_MAX} bytes")
    if not 0 < settings.job_timeout <= limits.TICKET_LIFETIME_S:
        raise ConfigError(f"--job-timeout takes more than 0 and at most {limits.TICKET_LIFETIME_S:.0f} seconds")
    if settings.network_of and not settings.database_url:
        raise ConfigError("--network-of needs --database-url: the Coordinators of a network keep their books in one PostgreSQL")
    check_ready_file(settings.ready_file)
    logs.setup(settings.log_json, settings.log_level)
    from coordinator.config import CoordinatorConfig, FileLimits
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
        requests_per_minute_per_address=settings.address_limit,
        body_bytes_max=settings.body_limit,
        job_timeout_s=settings.job_timeout,
        activations=Activations(settings.activations),
        retry_window_s=settings.retry_window,
        result_retention_s=settings.result_retention,
        run_retention_s=settings.run_retention,
        require_approval=settings.require_approval,
        auto_approve_cargos=not settings.review_cargos,
        cache=_cache(settings),
        files=FileLimits(settings.file_limit, settings.storage_limit, retention_s=settings.file_retention),
        version=VERSION,
    )
    role = CoordinatorRole(
        data_dir=settings.data_dir,
        http=http,
        listen=tuple(settings.listen),
        bootstrap=tuple(settings.bootstrap),
        mdns=not settings.no_mdns,
        ready_file=settings.ready_file,
        manifests=_manifests(settings.manifest),
        network_of=settings.network_of,
        cache_model=_cache_model(settings),
    )
    trio.run(run_coordinator, role)
    return 0
