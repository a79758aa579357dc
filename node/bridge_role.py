"""The role of a bridge: an OpenAI API on a Consumer's own machine, whose tokens come straight from Islands.

The HTTP face is the Coordinator's (coordinator/http); the work behind it is done by a DirectWorker, whose tickets come from a Coordinator.
It serves loopback only, and only clients that show the key which it holds itself: other users of the machine, and web pages that its user
opens, reach that address too.
"""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import trio
from aiohttp import web

from coordinator.affinity import Affinity
from coordinator.config import CoordinatorConfig
from coordinator.http.app import Api, Services
from coordinator.http.auth import Gate
from coordinator.http.bridge import Bridge
from coordinator.http.errors import ApiError
from coordinator.http.metrics import Metrics
from coordinator.http.thread import HttpThread
from coordinator.keys import ApiKey
from node import AGENT, VERSION
from node.announce import CoordinatorFinder
from node.control import serve_control
from node.datadir import DataDir
from node.desk_client import DeskAway, DeskClient
from node.direct_worker import DirectWorker, api_error
from node.holder import Links
from node.net.host import Host, PeerLost, open_host
from node.ready import remove_ready, write_ready
from node.signals import watch_signals
from node.trust import Pins
from privacy.keys import api_key_hash, same
from protocol import limits
from protocol.direct import DeskRefused, Models, ModelsWanted, RateStanding
from protocol.errors import ConfigError, RemoteProtocolError
from protocol.messages import PROTOCOL_VERSION, Hello, NodeRole

log = logging.getLogger(__name__)

_ACCOUNT = "bridge"
_DRAIN_POLL_S = 0.02
_STATUS_UNAVAILABLE = 503
_ELSEWHERE = ("account", "api-keys", "islands", "jobs", "market", "quotes")  # addresses under /api/v1 that a bridge does not have


@dataclass(frozen=True, slots=True)
class BridgeRole:
    """``coordinators``: multiaddrs or URLs. ``http_host`` is an address of this machine alone."""

    data_dir: str
    coordinators: tuple[str, ...]
    api_key: str = field(repr=False)
    http_host: str = "127.0.0.1"
    http_port: int = 0
    ca_file: str | None = None
    ready_file: str | None = None
    job_timeout_s: float = limits.JOB_TIMEOUT_S
    keep_alive_comment_s: float = limits.KEEPALIVE_COMMENT_S


class OneKey:
    """The one key that this bridge holds."""

    def __init__(self, api_key: str) -> None:
        self._hash = api_key_hash(api_key)
        self._key = ApiKey(1, _ACCOUNT, frozenset({"read", "write"}), 0)  # what it may do is for the Coordinator to say

    def find(self, key_hash: str) -> ApiKey | None:
        """Compares in constant time."""
        return self._key if same(key_hash, self._hash) else None

    def note_used(self, used_at_ms: Mapping[int, int]) -> None:
        """The Coordinator notes it."""


class BridgeGate(Gate):
    """Lets in whoever shows the key; the headers say how the key stands with the Coordinator."""

    def __init__(self, api_key: str, config: CoordinatorConfig, standing: Callable[[], RateStanding]) -> None:
        super().__init__(OneKey(api_key), config, time.monotonic)
        self._standing = standing

    async def admit(self, request: web.Request, scope: str) -> tuple[ApiKey, dict[str, str]]:
        key, _ = await super().admit(request, scope)
        said = self._standing()
        if not said.limit:
            return key, {}
        return key, {
            "X-RateLimit-Limit": str(said.limit),
            "X-RateLimit-Remaining": str(said.remaining),
            "X-RateLimit-Reset": str(said.reset_s),
        }


class Offered:
    """What the Coordinator says that is offered; asked anew for each client that wants to know."""

    def __init__(self, desk: DeskClient, api_key: str) -> None:
        self._desk, self._api_key = desk, api_key
        self._islands = 0

    def islands(self) -> int:
        """When the Coordinator was asked last."""
        return self._islands

    async def cargos(self) -> dict[str, int]:
        """Name -> Unix time in seconds since when. Raises ApiError."""
        try:
            answer = await self._desk.ask(lambda number: ModelsWanted(number, self._api_key))
        except DeskAway as error:
            headers = {"Retry-After": str(int(limits.NO_CAPACITY_REST_MAX_S))}
            raise ApiError(_STATUS_UNAVAILABLE, str(error), code="no_coordinator", kind="server_error", headers=headers) from error
        if isinstance(answer, DeskRefused):
            raise api_error(answer)
        if not isinstance(answer, Models):
            raise RemoteProtocolError(f"{type(answer).__name__} is no list of models")
        self._islands = answer.islands
        return {model.name: model.since_s for model in answer.models}


class BridgeApi(Api):
    """The Coordinator's API, with the models that it offers. What it does not have itself it says where to ask for."""

    def __init__(self, services: Services, coordinators: Sequence[str]) -> None:
        super().__init__(services)
        self._coordinators = coordinators

    def application(self) -> web.Application:
        app = super().application()
        for name in _ELSEWHERE:
            for path in (f"/api/v1/{name}", f"/api/v1/{name}/{{rest:.*}}"):
                app.router.add_route("*", path, self.elsewhere)
        return app

    async def elsewhere(self, request: web.Request) -> web.StreamResponse:
        """Accounts, jobs and the market are the Coordinator's."""
        await self.admit(request, "read")
        urls = " or ".join(f"{url.rstrip('/')}{request.path}" for url in self._coordinators if not url.startswith("/"))
        where = f"ask the Coordinator: {urls}" if urls else "ask the Coordinator at its own URL"
        raise ApiError(404, f"a bridge only runs chats and completions; {where}", code="ask_the_coordinator")


async def run_bridge(role: BridgeRole) -> None:
    """Runs until a signal, then drains. Raises ConfigError when it cannot start."""
    data = DataDir.open(role.data_dir)
    with data.locked():
        async with trio.open_nursery() as nursery:
            stop = trio.Event()
            await nursery.start(watch_signals, stop)
            async with open_host(data.key("identity").seed, ()) as host:  # nobody dials it, so it listens to no peer
                await serve_bridge(role, data, host, stop)
            nursery.cancel_scope.cancel()


async def serve_bridge(
    role: BridgeRole,
    data: DataDir,
    host: Host,
    stop: trio.Event,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Until ``stop``. Started means that it serves, at this URL. Raises ConfigError."""
    failure: ConfigError | None = None
    async with trio.open_nursery() as nursery:
        bridge = _Bridge(role, data, host, stop, nursery, task_status)
        nursery.start_soon(bridge.watch_stop)
        try:
            await bridge.run()
        except ConfigError as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class _Bridge:
    """One run of the role, in the order of its methods."""

    def __init__(
        self,
        role: BridgeRole,
        data: DataDir,
        host: Host,
        stop: trio.Event,
        nursery: trio.Nursery,
        task_status: trio.TaskStatus[str],
    ) -> None:
        self._started = task_status.started
        self._role, self._data, self._host, self._stop, self._nursery = role, data, host, stop, nursery
        self._key, self._pins = data.key("identity"), Pins(data)
        rng = random.Random(secrets.randbits(64))  # jitter must differ between nodes, nothing else depends on it
        finder = CoordinatorFinder(host, self._pins, role.coordinators, self._hello, role.ca_file)
        self._desk = DeskClient(host, finder, self._pins, self._hello, rng)
        self._links = Links(host, nursery, self._hello, self._key)
        affinity = Affinity(secrets.token_bytes(32))
        self._worker = DirectWorker(host, self._links, self._desk, nursery, role.api_key, affinity, role.job_timeout_s)
        self._offered = Offered(self._desk, role.api_key)
        self._serving = False

    def _hello(self) -> Hello:
        return Hello(PROTOCOL_VERSION, NodeRole.CONSUMER, self._pins.network, AGENT)

    async def watch_stop(self) -> None:
        """Before it serves there is nothing to drain: a signal just ends the start."""
        await self._stop.wait()
        if not self._serving:
            self._nursery.cancel_scope.cancel()

    async def run(self) -> None:
        """Raises ConfigError."""
        self._nursery.start_soon(self._desk.run)
        self._nursery.start_soon(self._watch_peers)
        await self._nursery.start(serve_control, self._data, {"status": self.status, "peers": self.peers})
        await self._check_key()
        config = CoordinatorConfig(database_url="", http_host=self._role.http_host, http_port=self._role.http_port)
        bridge = Bridge(self._nursery)
        with closing(BridgeGate(self._role.api_key, config, self._desk.standing)) as gate:
            services = self._services(bridge, gate, config)
            http = HttpThread(
                BridgeApi(services, self._role.coordinators).application, self._role.http_host, self._role.http_port, None
            )
            self._nursery.start_soon(http.run)
            try:
                await http.wait_ended_or_started()
                if http.error is not None:
                    raise http.error
                await self._serve(http, bridge, services)
            finally:
                http.stop()

    async def _check_key(self) -> None:
        """Waits for a Coordinator. Raises ConfigError when it does not know the key."""
        while True:
            try:
                await self._offered.cargos()
                return
            except ApiError as error:
                if error.status < _STATUS_UNAVAILABLE and error.code != "rate_limit_exceeded":
                    raise ConfigError(f"the Coordinator refuses the API key: {error.message}") from error
                await trio.sleep(limits.RECONNECT_MIN_S)

    def _services(self, bridge: Bridge, gate: Gate, config: CoordinatorConfig) -> Services:
        def gauges() -> dict[str, float]:
            return {"islands": self._offered.islands(), "jobs_running": self._worker.running, "reports": self._worker.reports}

        return Services(
            bridge=bridge,
            worker=self._worker,
            islands=self._offered.islands,
            cargos=self._offered.cargos,
            gate=gate,
            metrics=Metrics(self._worker.statistics, gauges),
            well_known=lambda: {"role": "bridge", "peer_id": self._key.peer_id, "network": self._pins.network},
            salt_secret=secrets.token_bytes(32),
            version=VERSION,
            body_bytes_max=config.body_bytes_max,
            keep_alive_comment_s=self._role.keep_alive_comment_s,
        )

    async def _serve(self, http: HttpThread, bridge: Bridge, services: Services) -> None:
        self._serving = True
        log.info("ready: %s, tickets from Coordinator %s", http.url, self._desk.coordinator)
        write_ready(
            self._role.ready_file, peer_id=self._key.peer_id, http=http.url, coordinator=self._desk.coordinator
        )
        self._started(http.url)
        await self._stop.wait()
        remove_ready(self._role.ready_file)
        services.draining.set()
        await http.stop_listening()
        with trio.move_on_after(limits.DRAIN_S):
            while bridge.tasks or self._worker.reports:
                await trio.sleep(_DRAIN_POLL_S)

    async def _watch_peers(self) -> None:
        """An Island whose connection has ended fails its jobs now, not at the next write."""
        async for event in self._host.peer_events():
            if isinstance(event, PeerLost):
                self._links.drop(event.peer_id, "its connection ended")

    def status(self) -> Mapping[str, Any]:
        counts = self._worker.statistics
        return {
            "role": "bridge",
            "peer_id": self._key.peer_id,
            "addresses": [],
            "network": self._pins.network,
            "coordinator": self._desk.coordinator,
            "jobs": {
                "running": self._worker.running,
                "done": counts.jobs_done,
                "failed": sum(counts.jobs_failed.values()),
                "cancelled": counts.jobs_cancelled,
            },
            "reports": self._worker.reports,
            "links": repr(self._links),
            "host": asdict(self._host.statistics()),
        }

    def peers(self) -> Mapping[str, Any]:
        round_trips = self._host.round_trips_s()
        return {
            "peers": [
                {
                    "peer_id": peer,
                    "connected": True,
                    "round_trip_ms": round(round_trips[peer] * 1000, 2) if peer in round_trips else None,
                    "island": None,
                }
                for peer in sorted(self._host.connected_peers())
            ]
        }

