"""OpenAI's ``/v1/files``: what is sent is written away piece by piece as it comes, and read so; a file is never whole in memory."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import BadHttpMessage

from coordinator.books.file_rows import FileFault, FileRefused, FileRow
from coordinator.files import Files, FileWriter
from coordinator.http import params
from coordinator.http.answers import json_response
from coordinator.http.bridge import Bridge
from coordinator.http.errors import ApiError, bad_request
from protocol import checks, limits

Admit = Callable[[web.Request, str], Awaitable[str]]

PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "vision", "evals")
ANCHOR = "created_at"
_STATUS = {
    FileFault.UNKNOWN: 404,
    FileFault.TOO_MANY: 409,
    FileFault.NO_ROOM: 409,
    FileFault.TOO_LARGE: 413,
    FileFault.IN_USE: 409,
}
_PARTS_MAX = 16
_FIELD_BYTES_MAX = 1024
_AROUND_BYTES_MAX = 64 * 1024  # boundaries, headers and fields round the file
_CHUNK_BYTES = 64 * 1024
_FILENAME_CHARS_MAX = 255
_HEADERS = {"Content-Type": "application/octet-stream", "Content-Disposition": "attachment", "X-Content-Type-Options": "nosniff"}


class FileRoutes:
    """``draining()``: nothing new is taken."""

    def __init__(self, admit: Admit, bridge: Bridge, files: Files, draining: Callable[[], bool]) -> None:
        self._admit, self._bridge, self._files, self._draining = admit, bridge, files, draining

    def routes(self, prefix: str) -> list[web.AbstractRouteDef]:
        """Under /v1, and under /api/v1 too."""
        return [
            route
            for base in (prefix, prefix.removeprefix("/api"))
            for route in (
                web.post(f"{base}/files", self.upload),
                web.get(f"{base}/files", self.list),
                web.get(base + "/files/{id}", self.get),
                web.delete(base + "/files/{id}", self.delete),
                web.get(base + "/files/{id}/content", self.content),
            )
        ]

    async def upload(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "write")
        if self._draining():
            raise ApiError(503, "the Coordinator is shutting down", code="draining", kind="server_error", headers={"Retry-After": "2"})
        if request.content_type != "multipart/form-data":
            raise bad_request("send multipart/form-data with the fields file and purpose", None, "invalid_type")
        most = self._files.limits.file_bytes_max
        if (request.content_length or 0) > most + _AROUND_BYTES_MAX:
            raise told(FileRefused(FileFault.TOO_LARGE, f"the file is over {most} bytes; send it in several files"))
        upload = _Upload(self._bridge, self._files, account)
        try:
            row = await upload.receive(request)
        except FileRefused as refused:
            raise told(refused) from None
        except (ValueError, AssertionError, RuntimeError, BadHttpMessage):  # how aiohttp says that the parts are none
            raise bad_request("the body could not be read as multipart/form-data", None, "invalid_body") from None
        finally:
            upload.close()
        return json_response(file_json(row))

    async def list(self, request: web.Request) -> web.StreamResponse:
        account = await self._admit(request, "read")
        limit = params.whole_number(request, "limit", 1, limits.FILES_LISTED_MAX) or limits.FILES_LISTED_MAX
        newest_first = params.one_of(request, "order", ("asc", "desc"), "desc") == "desc"
        purpose, after = params.parsed(request, "purpose", _word) or "", params.parsed(request, "after", _word) or ""
        rows, has_more = await self._bridge.call(self._files.list, account, purpose, after, limit, newest_first)
        return json_response(page_json([file_json(row) for row in rows], has_more))

    async def get(self, request: web.Request) -> web.StreamResponse:
        return json_response(file_json(await self._find(request)))

    async def delete(self, request: web.Request) -> web.StreamResponse:
        account, file_id = await self._admit(request, "write"), _id(request)
        try:
            await self._bridge.call(self._files.delete, file_id, account)
        except FileRefused as refused:
            raise told(refused) from None
        return json_response({"id": file_id, "object": "file", "deleted": True})

    async def content(self, request: web.Request) -> web.StreamResponse:
        """The bytes as they were sent. They are a stranger's, so browsers are to run nothing of them."""
        row = await self._find(request)
        response = web.StreamResponse(headers={**_HEADERS, "Content-Length": str(row.bytes)})
        try:
            first = await self._bridge.call(self._files.piece, row, 0) if row.bytes else b""
            await response.prepare(request)
            await response.write(first)
            for number in range(1, row.pieces):
                await response.write(await self._bridge.call(self._files.piece, row, number))
        except FileRefused as refused:
            raise told(refused) from None
        await response.write_eof()
        return response

    async def _find(self, request: web.Request) -> FileRow:
        account = await self._admit(request, "read")
        try:
            return await self._bridge.call(self._files.find, _id(request), account)
        except FileRefused as refused:
            raise told(refused) from None


class _Upload:
    """One body under way: its fields, and the file that grows with it. Close it."""

    def __init__(self, bridge: Bridge, files: Files, account: str) -> None:
        self._bridge, self._files, self._account = bridge, files, account
        self._writer: FileWriter | None = None
        self._fields: dict[str, str] = {}
        self._filename = ""

    async def receive(self, request: web.Request) -> FileRow:
        """Raises ApiError, FileRefused, BooksUnavailable, and what aiohttp says of a body that is none."""
        reader, parts = await request.multipart(), 0
        while (part := await reader.next()) is not None:
            parts += 1
            if parts > _PARTS_MAX or not isinstance(part, BodyPartReader):
                raise bad_request(f"send at most {_PARTS_MAX} fields, of which file is one", None, "invalid_body")
            if part.name == "file":
                await self._take_file(part)
            else:
                self._fields[part.name or ""] = await _field(part)
        if self._writer is None:
            raise bad_request("you must provide file", "file", "missing_required_parameter")
        purpose = self._fields.get("purpose", "")
        if purpose not in PURPOSES:
            raise bad_request(f"purpose must be one of {', '.join(PURPOSES)}", "purpose", _code_of(purpose))
        row = await self._bridge.call(self._writer.finish, purpose, self._filename, self._expires_after_s())
        self._writer = None
        return row

    async def _take_file(self, part: BodyPartReader) -> None:
        if self._writer is not None:
            raise bad_request("send one file at a time", "file")
        self._filename = _filename(part.filename or "")
        writer = self._writer = await self._bridge.call(self._files.begin, self._account)
        waiting = bytearray()
        while not part.at_eof():
            waiting += await part.read_chunk(_CHUNK_BYTES)
            if len(waiting) >= limits.FILE_PIECE_BYTES:
                await self._bridge.call(writer.write, bytes(waiting))
                waiting.clear()
        await self._bridge.call(writer.write, bytes(waiting))

    def _expires_after_s(self) -> float:
        anchor, text = self._fields.get("expires_after[anchor]"), self._fields.get("expires_after[seconds]")
        retention_s = self._files.limits.retention_s
        if anchor is None and text is None:
            return retention_s
        return expiry_s(anchor, params.whole(text or ""), "expires_after", retention_s)

    def close(self) -> None:
        """What is not whole is erased, whether or not its client is still there."""
        writer, self._writer = self._writer, None
        if writer is not None:
            self._bridge.to_trio(lambda: self._bridge.start_task(writer.discard))


async def _field(part: BodyPartReader) -> str:
    data = bytearray()
    while not part.at_eof():
        data += await part.read_chunk(_CHUNK_BYTES)
        if len(data) > _FIELD_BYTES_MAX:
            raise bad_request(f"a field beside the file may have {_FIELD_BYTES_MAX} bytes", None)
    return data.decode("utf-8", "replace")


def expiry_s(anchor: object, seconds: object, name: str, retention_s: float) -> float:
    """OpenAI's ``{anchor: "created_at", seconds}``, of at most ``retention_s``. Raises ApiError 400."""
    if anchor != ANCHOR:
        raise bad_request(f"{name}.anchor must be {ANCHOR}", f"{name}.anchor", "invalid_value")
    low, high = int(limits.FILE_EXPIRY_MIN_S), int(retention_s)
    if type(seconds) is not int or not low <= seconds <= high:
        raise bad_request(f"{name}.seconds must be a whole number from {low} to {high}", f"{name}.seconds", "invalid_value")
    return float(seconds)


def _code_of(purpose: str) -> str:
    return "invalid_value" if purpose else "missing_required_parameter"


def _filename(text: str) -> str:
    """The last part of whatever path the client has, without what a terminal or a database may stumble over."""
    name = checks.made_printable(text.replace("\\", "/").rpartition("/")[2]).strip()
    return name[:_FILENAME_CHARS_MAX] or "file"


def _word(text: str) -> str:
    """Raises ValueError for what can be no id and no purpose."""
    if not (text.isascii() and text.isprintable() and len(text) <= limits.NAME_CHARS_MAX):
        raise ValueError(f"takes at most {limits.NAME_CHARS_MAX} printable ASCII characters")
    return text


def _id(request: web.Request) -> str:
    """Raises ApiError 404 for what is no id of a file."""
    text = request.match_info["id"]
    if not (text.isascii() and text.isprintable() and len(text) <= limits.NAME_CHARS_MAX):
        raise told(FileRefused(FileFault.UNKNOWN, "there is no such file"))
    return text


def told(refused: FileRefused) -> ApiError:
    """As the client hears it."""
    return ApiError(_STATUS[refused.fault], refused.message, code=refused.fault.value)


def page_json(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A page of OpenAI's lists."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}


def file_json(row: FileRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": row.created_at_ms // 1000,
        "expires_at": row.expires_at_ms // 1000,
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
        "status_details": None,
    }
