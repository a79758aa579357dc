"""Settings of the Coordinator, checked when they are made."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from coordinator.cache.policy import CacheConfig
from protocol import limits
from protocol.activations import Activations
from protocol.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class FileLimits:
    """``file_bytes_max``: of one file; ``account_bytes_max``, ``account_files_max``: of all files of an account; ``retention_s``: how long
    a file is kept that says nothing else, and at most."""

    file_bytes_max: int = limits.FILE_BYTES_MAX
    account_bytes_max: int = limits.FILES_BYTES_MAX
    account_files_max: int = limits.FILES_MAX
    retention_s: float = limits.FILE_RETENTION_S

    def __post_init__(self) -> None:
        """Raises ConfigError; its text says what to do."""
        if not 0 < self.file_bytes_max <= self.account_bytes_max:
            raise ConfigError("--file-limit takes more than 0 bytes, and at most as many as --storage-limit")
        if self.retention_s < limits.FILE_EXPIRY_MIN_S:
            raise ConfigError(f"--file-retention takes at least {limits.FILE_EXPIRY_MIN_S:.0f} seconds")


@dataclass(frozen=True, slots=True)
class CoordinatorConfig:
    """``http_port`` 0 picks a free one. ``trusted_proxies``: addresses or networks whose X-Forwarded-For counts. ``activations``: how
    hidden states travel between the stages of a pipeline. ``retry_window_s``: how long a chat's answer is kept for a client that asks
    again, ``result_retention_s``: how long that of a submitted job is; 0 keeps none. ``run_retention_s``: how long batches and workflows
    are, with all that their jobs said. ``require_approval``: only Islands that the operator has approved get jobs. ``auto_approve_cargos``:
    a Cargo that is published needs no word of the operator's. ``cache``: of answers. ``files``: that accounts send.
    ``requests_per_minute_per_address``: 0 is no limit."""

    database_url: str
    http_host: str = "127.0.0.1"
    http_port: int = 0
    tls_cert: str = ""
    tls_key: str = ""
    insecure_http: bool = False
    trusted_proxies: tuple[str, ...] = ()
    body_bytes_max: int = limits.BODY_BYTES_MAX
    job_timeout_s: float = limits.JOB_TIMEOUT_S
    capacity_wait_s: float = limits.CAPACITY_WAIT_S
    island_wait_s: float = limits.ISLAND_WAIT_S
    keep_alive_comment_s: float = limits.KEEPALIVE_COMMENT_S
    login_tries_per_minute: int = limits.LOGIN_TRIES_PER_MINUTE
    requests_per_minute_per_address: int = 0
    activations: Activations = Activations.F32
    retry_window_s: float = limits.RETRY_WINDOW_S
    result_retention_s: float = limits.RESULT_RETENTION_S
    run_retention_s: float = limits.RUN_RETENTION_S
    require_approval: bool = False
    auto_approve_cargos: bool = True
    cache: CacheConfig = field(default_factory=CacheConfig)
    files: FileLimits = field(default_factory=FileLimits)
    version: str = "0"

    def __post_init__(self) -> None:
        """Raises ConfigError; its text says what to do."""
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("TLS needs both a certificate and a key: give --tls-cert and --tls-key together")
        if not (self.tls_cert or self.insecure_http or is_loopback(self.http_host)):
            raise ConfigError(
                f"plain HTTP on {self.http_host} would send keys and prompts readable over the network: give --tls-cert and "
                "--tls-key, listen on 127.0.0.1, or say --insecure-http (behind a proxy that does TLS)"
            )
        if self.run_retention_s <= 0:
            raise ConfigError("--run-retention takes seconds, at least 1: a batch or a workflow is what its jobs have said")
        if self.requests_per_minute_per_address < 0:
            raise ConfigError("--address-limit takes a number of requests a minute, or 0 for no limit")
        for proxy in self.trusted_proxies:
            try:
                ipaddress.ip_network(proxy, strict=False)
            except ValueError:
                raise ConfigError(f"--trusted-proxy {proxy!r} is no address and no network like 10.0.0.0/8") from None
