"""Multipart uploads, streamed to the store as they come: nothing of a file is ever in memory whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from promptmill.api.http.errors import ApiError, bad, missing
from promptmill.api.openai.file_store import Draft

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

#: Most bytes of a field that is no file, of a part's headers, and most parts of an upload.
LARGEST_FIELD = 4096
LARGEST_HEADERS = 8192
MOST_PARTS = 16


@dataclass(slots=True)
class Upload:
    """The fields of a form, and the name of its file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


class _Form:
    """Takes what the parser finds: fields into memory, the part named ``file`` into the draft."""

    def __init__(self, draft: Draft, largest_field: int) -> None:
        self._largest_field = largest_field
        self.upload = Upload()
        self._draft = draft
        self._parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._header_bytes = 0
        self._name, self._value = bytearray(), bytearray()
        self._field = ""
        self._text = bytearray()
        self._is_file = False
        self.ended = False

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin, "on_header_field": self._header_name, "on_header_value": self._header_value,
            "on_header_end": self._header_end, "on_headers_finished": self._headers_end, "on_part_data": self._data,
            "on_part_end": self._part_end, "on_end": self._end,
        }  # fmt: skip

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise bad(f"The form has more than {MOST_PARTS} parts.")
        self._headers, self._header_bytes, self._text = {}, 0, bytearray()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._value += data[start:end]

    def _count(self, more: int) -> None:
        self._header_bytes += more
        if self._header_bytes > LARGEST_HEADERS:
            raise bad("A part of the form has headers that are too long.")

    def _header_end(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name, self._value = bytearray(), bytearray()

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._field = options.get(b"name", b"").decode(errors="replace")
        filename = options.get(b"filename")
        self._is_file = self._field == "file"
        if self._is_file:
            if self.upload.filename is not None:
                raise bad("More than one file was given.", "file")
            if filename is None:
                raise bad("Invalid value for 'file': expected a file with a name.", "file", "invalid_value")
            self.upload.filename = filename.decode(errors="replace")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._draft.write(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > self._largest_field:
            raise bad(f"The field '{self._field[:40]}' is too long.", self._field[:40])

    def _part_end(self) -> None:
        if not self._is_file:
            self.upload.fields[self._field] = self._text.decode(errors="replace")

    def _end(self) -> None:
        self.ended = True


async def receive(request: Request, draft: Draft, largest_field: int = LARGEST_FIELD) -> Upload:
    """Read the form; its file goes into the draft. Raises ApiError for what is no such form."""
    kind, options = parse_options_header(request.headers.get("content-type", "").encode("latin-1", "replace"))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise ApiError(415, "Expected a file as multipart/form-data.", param="file", code="unsupported_content_type")
    form = _Form(draft, largest_field)
    try:
        parser = MultipartParser(boundary, form.callbacks())
        async for block in request.stream():
            parser.write(block)
        parser.finalize()
    except FormParserError:
        raise bad("The body is no valid multipart/form-data.") from None
    except ClientDisconnect:
        raise bad("The upload was cut off.") from None
    if not form.ended:
        raise bad("The body is no complete multipart/form-data.")
    if form.upload.filename is None:
        raise missing("file")
    return form.upload
