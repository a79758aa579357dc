"""What an owner asks for from afar: allowed by him where the Island runs, passed on by a Coordinator, shown in the next ad."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.books.accounts import PairIsland
from coordinator.books.stored import apply_together
from node.database import open_books
from node.demo_client import DemoFailed, ask_json
from node.localnet import LocalNetwork
from tests.node.coordinators_net import wait_for


def test_an_owner_sets_what_his_island_asks(tmp_path: Path) -> None:
    with LocalNetwork(tmp_path) as network:
        network.start_coordinator()
        assert network.coordinator is not None
        nodes = [network.start_island("open", "--cargo", "echo", "--remote-asks"), network.start_island("shut", "--cargo", "echo")]
        open_peer, shut_peer = (str(node.wait_ready()["peer_id"]) for node in nodes)
        ann, ben = network.make_key(account="ann"), network.make_key(account="ben")
        with open_books(str(network.coordinator.data_dir), None) as books, books.writing() as connection:
            apply_together(connection, [PairIsland(peer, "ann") for peer in (open_peer, shut_peer)], 1)

        def wish(key: str, peer: str, price: str = "0.5+2+0", cargo: str = "echo") -> dict[str, object]:
            body: dict[str, object] = {"workload_slug": cargo, "host_id": peer, "asking_price": price}
            return ask_json(network.url, key, "/api/v1/market/asking-prices", body)

        assert wish(ann, open_peer)["asking_price"] == "0.5+2+0"

        def highest() -> object:
            return ask_json(network.url, ann, "/api/v1/market/orderbook/echo")["max_ask_price"]

        wait_for("its ad says so", lambda: highest() == "2.5")  # 0.5 a job and 2 for 1,000 tokens
        for key, peer, cargo, status in (
            (ben, open_peer, "echo", "404"),  # not his
            (ann, shut_peer, "echo", "400"),  # not allowed where it runs
            (ann, open_peer, "other", "404"),  # not there
        ):
            with pytest.raises(DemoFailed, match=f"answers {status}"):
                wish(key, peer, cargo=cargo)
        with pytest.raises(DemoFailed, match="answers 400"):
            wish(ann, open_peer, "-1")
