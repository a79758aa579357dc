"""Files over HTTP: sent, listed, read, deleted, forgotten; sealed at rest; each limit and each bad input."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sql
import trio

from coordinator.books.file_rows import FileRefused
from coordinator.books.schema import file_pieces, files
from coordinator.config import FileLimits
from coordinator.keys import create_key
from protocol import limits
from protocol.errors import ConfigError
from tests.coordinator.clients import http
from tests.coordinator.desks import error_of, opened, until, url_of
from tests.coordinator.fakes import Running, Script, island
from tests.coordinator.file_desk import FILES, batch_of, chat_line, content, file_of, send, shown

SECRET = b"the quick brown fox jumps over the lazy dog, privately. "


async def stored(running: Running) -> tuple[int, int]:
    """Rows of files, and of their pieces."""

    def count(connection: sql.Connection) -> tuple[int, int]:
        rows, pieces = (connection.execute(sql.select(sql.func.count()).select_from(table)).scalar_one() for table in (files, file_pieces))
        return rows, pieces

    return await running.server.books.ask(count)


async def test_a_file_of_several_pieces_comes_back_as_it_was(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FILE_PIECE_BYTES", 1000)
    data = random.Random(1).randbytes(2 * 1000 + 17)
    async with opened(database_url) as running:
        for size in (0, 1, 999, 1000, 1001, 2000, len(data)):
            file_id = await file_of(running, data[:size])
            assert await content(running, file_id) == data[:size]
        assert await stored(running) == (7, 0 + 1 + 1 + 1 + 2 + 2 + 3)
        async with http(running) as client:
            one = (await client.get(f"{FILES}/{file_id}")).json()
            created = one.pop("created_at")
            assert one.pop("expires_at") == created + int(limits.FILE_RETENTION_S)
            assert one == {
                "id": file_id,
                "object": "file",
                "bytes": len(data),
                "filename": "input.jsonl",
                "purpose": "batch",
                "status": "processed",
                "status_details": None,
            }
            response = await client.get(f"{FILES}/{file_id}/content")
            assert response.headers["content-length"] == str(len(data)) and response.headers["x-content-type-options"] == "nosniff"
            assert (await client.delete(f"{FILES}/{file_id}")).json() == {"id": file_id, "object": "file", "deleted": True}
            error_of(await client.delete(f"{FILES}/{file_id}"), 404, "file_not_found")
            error_of(await client.get(f"{FILES}/{file_id}/content"), 404, "file_not_found")
        assert await stored(running) == (6, 7)


async def test_lists_go_on_where_the_last_one_ended(database_url: str) -> None:
    async with opened(database_url) as running:
        ids = [await file_of(running, b"x", purpose=purpose) for purpose in ("batch", "user_data", "batch", "batch")]
        async with http(running) as client:

            async def listed(**query: Any) -> tuple[list[str], bool]:
                answer = (await client.get(FILES, params=query)).json()
                found = [each["id"] for each in answer["data"]]
                assert answer["object"] == "list"
                assert (answer["first_id"], answer["last_id"]) == ((found[0], found[-1]) if found else (None, None))
                return found, answer["has_more"]

            newest, _ = await listed()
            assert sorted(newest) == sorted(ids)
            assert (await listed(order="asc"))[0] == newest[::-1]
            assert await listed(limit=3) == (newest[:3], True)
            assert await listed(limit=3, after=newest[2]) == (newest[3:], False)
            assert await listed(limit=3, order="asc", after=newest[2]) == ([newest[1], newest[0]], False)
            assert await listed(purpose="user_data") == ([ids[1]], False)
            assert await listed(after="file-none") == ([], False)
            for query in ({"limit": 0}, {"limit": 10_001}, {"limit": "x"}, {"order": "up"}, {"after": "\0"}, {"purpose": "ä"}):
                error_of(await client.get(FILES, params=query), 400, "invalid_value", next(iter(query)))


async def test_what_is_anothers_does_not_exist(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path)) as running:
        file_id = await file_of(running, SECRET)
        other = create_key(running.database_url, "other")
        async with http(running, other) as client:
            for path in (f"{FILES}/{file_id}", f"{FILES}/{file_id}/content", f"{FILES}/file-none", f"{FILES}/%00", f"{FILES}/{'x' * 500}"):
                error_of(await client.get(path), 404, "file_not_found")
            error_of(await client.delete(f"{FILES}/{file_id}"), 404, "file_not_found")
            assert (await client.get(FILES)).json()["data"] == []
            assert (await client.get(FILES, params={"after": file_id})).json()["data"] == []
        reader = create_key(running.database_url, scopes=("read",))
        error_of(await send(running, b"x", reader), 403, "insufficient_scope")
        error_of(await send(running, b"x", "ak_wrong"), 401, "invalid_api_key")
        assert await content(running, file_id) == SECRET


async def test_nothing_of_a_file_stands_in_the_database_as_it_is(tmp_path: Path) -> None:
    data = SECRET * 100
    async with opened(url_of(tmp_path)) as running:
        file_id = await file_of(running, data)
        await batch_of(running, [chat_line("fox", SECRET.decode())])
        assert await content(running, file_id) == data
    for file in tmp_path.glob("coordinator.db*"):
        for part in (SECRET, SECRET[4:19], b"lazy dog"):
            assert part not in file.read_bytes()


async def test_a_piece_opens_in_its_own_place_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FILE_PIECE_BYTES", 1000)
    async with opened(url_of(tmp_path)) as running:
        file_id = await file_of(running, random.Random(2).randbytes(2000))

        def swap(connection: sql.Connection) -> None:
            for number, place in ((0, 7), (1, 0), (7, 1)):
                connection.execute(sql.update(file_pieces).where(file_pieces.c.number == number).values(number=place))

        await running.server.books.change(swap)
        async with http(running) as client:
            error_of(await client.get(f"{FILES}/{file_id}/content"), 500, "internal_error")


@pytest.mark.parametrize(
    ("form", "status", "code", "param"),
    [
        ({"purpose": ""}, 400, "missing_required_parameter", "purpose"),
        ({"purpose": "batch_output"}, 400, "invalid_value", "purpose"),
        ({"purpose": "x" * 2000}, 400, "invalid_value", None),
        ({"expires_after[anchor]": "last_active_at", "expires_after[seconds]": "3600"}, 400, "invalid_value", "expires_after.anchor"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"}, 400, "invalid_value", "expires_after.seconds"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592001"}, 400, "invalid_value", "expires_after.seconds"),
        ({"expires_after[anchor]": "created_at"}, 400, "invalid_value", "expires_after.seconds"),
        ({f"field-{index}": "x" for index in range(20)}, 400, "invalid_body", None),
    ],
)
async def test_fields_that_are_wrong(tmp_path: Path, form: dict[str, str], status: int, code: str, param: str | None) -> None:
    async with opened(url_of(tmp_path)) as running:
        error_of(await send(running, b"x", **form), status, code, param)
        await nothing_left(running)


async def nothing_left(running: Running) -> None:
    async def empty() -> bool:
        return await stored(running) == (0, 0)

    await until(empty)


BOUNDARY = {"Content-Type": "multipart/form-data; boundary=b"}
PURPOSE = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch'
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'


@pytest.mark.parametrize(
    ("headers", "body", "code", "param"),
    [
        ({"Content-Type": "application/json"}, b"{}", "invalid_type", None),
        ({"Content-Type": "multipart/form-data"}, b"x", "invalid_body", None),
        (BOUNDARY, b"", "invalid_body", None),
        (BOUNDARY, b"no boundary at all", "invalid_body", None),
        (BOUNDARY, PART + b"cut off", "invalid_body", None),
        (BOUNDARY, PART + b"two\r\n" + PART + b"files\r\n--b--\r\n", "invalid_value", "file"),
        (BOUNDARY, PURPOSE + b"\r\n--b--\r\n", "missing_required_parameter", "file"),
        (BOUNDARY, b"--b\r\nContent-Type: multipart/mixed; boundary=c\r\n\r\n--c\r\n\r\nx\r\n--c--\r\n--b--\r\n", "invalid_body", None),
    ],
)
async def test_bodies_that_are_no_files(tmp_path: Path, headers: dict[str, str], body: bytes, code: str, param: str | None) -> None:
    async with opened(url_of(tmp_path)) as running, http(running) as client:
        error_of(await client.post(FILES, content=body, headers=headers), 400, code, param)
        await nothing_left(running)


async def test_names_of_files_are_made_harmless(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path)) as running, http(running) as client:
        for given, kept in (("../../etc/passwd", "passwd"), ("C:\\x\\y.jsonl", "y.jsonl"), ("n" * 400, "n" * 255), ("", "file")):
            parts = {"file": (given or "/", b"x"), "purpose": (None, b"user_data")}
            assert (await client.post(FILES, files=parts)).json()["filename"] == kept


async def test_limits_of_a_file_and_of_an_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FILE_PIECE_BYTES", 1000)
    low = FileLimits(file_bytes_max=5000, account_bytes_max=12_000, account_files_max=4, retention_s=7200)
    async with opened(url_of(tmp_path), files=low) as running:
        error_of(await send(running, bytes(5001)), 413, "file_too_large")
        await nothing_left(running)
        for _ in range(2):
            await file_of(running, bytes(5000))
        error_of(await send(running, bytes(2001)), 409, "files_full")
        await until_stored(running, (2, 10))
        await file_of(running, bytes(1000))
        last = await file_of(running, bytes(1000))
        error_of(await send(running, b""), 409, "too_many_files")
        async with http(running) as client:
            await client.delete(f"{FILES}/{last}")
        await file_of(running, bytes(1000))
        other = create_key(running.database_url, "other")
        sent = (await send(running, bytes(5000), other)).json()
        assert sent["expires_at"] == sent["created_at"] + 7200
        more = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "7201"}
        error_of(await send(running, b"x", other, **more), 400, "invalid_value", "expires_after.seconds")


def test_limits_that_make_no_sense() -> None:
    for wrong in ({"file_bytes_max": 0}, {"account_bytes_max": 5}, {"retention_s": 60.0}):
        with pytest.raises(ConfigError, match="--"):
            FileLimits(**wrong)


async def until_stored(running: Running, wanted: tuple[int, int]) -> None:
    async def look() -> bool:
        return await stored(running) == wanted

    await until(look)


async def test_a_length_that_is_too_large_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path)) as running, http(running) as client:
        request = client.build_request("POST", FILES, content=b"", headers={**BOUNDARY, "Content-Length": str(10**9)})
        parts = urlsplit(running.url)
        with await trio.to_thread.run_sync(socket.create_connection, (parts.hostname, parts.port)) as raw:
            head = b"".join(b"%b: %b\r\n" % pair for pair in request.headers.raw)
            await trio.to_thread.run_sync(raw.sendall, b"POST " + request.url.raw_path + b" HTTP/1.1\r\n" + head + b"\r\n")
            answer = await trio.to_thread.run_sync(raw.recv, 12)
        assert answer == b"HTTP/1.1 413"


async def test_a_client_that_goes_away_leaves_nothing_behind(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FILE_PIECE_BYTES", 1000)
    async with opened(database_url) as running, http(running) as client:
        parts = urlsplit(running.url)
        request = client.build_request("POST", FILES, headers={**BOUNDARY, "Content-Length": "10000000"})
        raw = await trio.open_tcp_stream(str(parts.hostname), int(parts.port or 0))
        head = b"".join(b"%b: %b\r\n" % pair for pair in request.headers.raw)
        await raw.send_all(b"POST " + request.url.raw_path + b" HTTP/1.1\r\n" + head + b"\r\n" + PART)

        async def has_begun() -> bool:
            await raw.send_all(bytes(500))
            return (await stored(running))[1] > 2

        await until(has_begun)
        assert (await client.get(FILES)).json()["data"] == [], "it is nobody's to see yet"
        await raw.aclose()
        await nothing_left(running)


async def test_what_its_time_is_over_or_never_became_whole_is_erased(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FILE_PIECE_BYTES", 100)
    async with opened(database_url) as running:
        keeps = running.server._parts.files
        short = await file_of(running, bytes(2000), **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
        long = await file_of(running, bytes(100))
        writer = await keeps.begin("local")
        await writer.write(bytes(1000))
        now_ms = await running.server.books.now_ms()
        await keeps.forget(now_ms)
        assert await stored(running) == (3, 20 + 1 + 10)

        async def later() -> int:
            return now_ms + 3_700_000

        monkeypatch.setattr(running.server.books, "now_ms", later)
        await running.server._parts.upkeep._sweep({})
        assert await stored(running) == (1, 1)
        async with http(running) as client:
            assert (await client.get(f"{FILES}/{short}")).status_code == 404
            assert (await client.get(f"{FILES}/{long}")).status_code == 200
        with pytest.raises(FileRefused, match="given up"):  # an upload that goes on finds that out
            await writer.write(bytes(100))


async def test_a_file_that_a_batch_reads_stays(tmp_path: Path) -> None:
    async with opened(url_of(tmp_path), island(1, Script(hang_after=0))) as running, http(running) as client:
        batch_id = await batch_of(running, [chat_line("a", "one")])
        file_id = (await shown(running, batch_id))["input_file_id"]
        error_of(await client.delete(f"{FILES}/{file_id}"), 409, "file_in_use")
        await running.server._parts.files.forget(2**50)
        assert (await client.get(f"{FILES}/{file_id}")).status_code == 200
        cancelled = await client.post(f"/v1/batches/{batch_id}/cancel")
        assert cancelled.json()["status"] == "cancelled", cancelled.text
        assert (await client.delete(f"{FILES}/{file_id}")).status_code == 200
