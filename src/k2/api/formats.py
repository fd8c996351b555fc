"""Chooses the format of an answer and encodes it: JSON, NDJSON, CSV or an Arrow stream."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pyarrow as pa
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from k2.errors import Rejected, nearest
from k2.query.engine import Answer
from k2.query.output import ARROW_ROWS, arrow_stream, csv_lines, json_lines, json_rows
from k2.schema import Table

ARROW = "application/vnd.apache.arrow.stream"
MEDIA = {
    "json": "application/json",
    "ndjson": "application/x-ndjson",
    "csv": "text/csv; charset=utf-8",
    "arrow": ARROW,
}
_ACCEPTED = {
    "application/json": "json",
    "application/*": "json",
    "*/*": "json",
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "text/csv": "csv",
    "text/*": "csv",
    ARROW: "arrow",
}


def choose(request: Request, given: str | None) -> str:
    """Return the format asked for: by `?format=`, else by the Accept header, else JSON.

    Raises Rejected for a format nobody offers.
    """
    if given is not None:
        if given not in MEDIA:
            raise Rejected(f"format {given!r} is unknown{nearest(given, MEDIA)}")
        return given
    accept = request.headers.get("accept", "*/*")
    ranked = sorted(enumerate(accept.split(",")), key=lambda item: (-_quality(item[1]), item[0]))
    for _, part in ranked:
        media = part.split(";")[0].strip().lower()
        if media in _ACCEPTED and _quality(part) > 0:
            return _ACCEPTED[media]
    raise Rejected(f"Accept: {accept}: none of these can be given (offered: {', '.join(MEDIA.values())})")


def _quality(part: str) -> float:
    for parameter in part.split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                return float(value)
            except ValueError:
                return 0.0
    return 1.0


def encode_answer(answer: Answer, fmt: str, next_path: str | None) -> Response:
    """Encode an answer; all but the Arrow stream is encoded here and now, so call it on a worker."""
    headers = {
        "K2-Tiers": ",".join(answer.tiers),
        "K2-Watermark": msgspec.json.encode(dict(answer.watermark)).decode("ascii", "backslashreplace"),
        "K2-Rows": str(answer.rows.num_rows),
    }
    if answer.snapshot_id is not None:
        headers["K2-Snapshot"] = str(answer.snapshot_id)
    if answer.note:
        headers["K2-Note"] = answer.note
    if next_path is not None:
        headers["Link"] = f'<{next_path}>; rel="next"'
        headers["K2-Cursor"] = str(answer.next_cursor)
    if fmt != "json":
        return encode_rows(answer.rows, fmt, answer.table, headers)
    envelope = {
        "next": next_path,
        "tiers": answer.tiers,
        "watermark": dict(answer.watermark),
        "snapshot_id": answer.snapshot_id,
        "note": answer.note,
    }
    tail = msgspec.json.encode(envelope)[1:]
    body = b"".join([b'{"data":[', *json_rows(answer.rows, answer.table), b"],", tail])
    return Response(body, headers=headers, media_type=MEDIA["json"])


def encode_rows(rows: pa.Table, fmt: str, table: Table | None, headers: dict[str, str] | None = None) -> Response:
    """Encode rows alone; a large Arrow stream is made batch by batch while it is sent."""
    if fmt == "arrow" and rows.num_rows <= ARROW_ROWS:  # each batch of a stream costs two changes of threads
        return Response(b"".join(arrow_stream(rows)), headers=headers, media_type=MEDIA[fmt])
    if fmt == "arrow":
        return StreamingResponse(arrow_stream(rows), headers=headers, media_type=MEDIA[fmt])
    return Response(b"".join(_text(rows, fmt, table)), headers=headers, media_type=MEDIA[fmt])


def _text(rows: pa.Table, fmt: str, table: Table | None) -> Iterator[bytes]:
    if fmt == "csv":
        return csv_lines(rows, table)
    if fmt == "ndjson":
        return json_lines(rows, table)
    return iter([b'{"data":[', *json_rows(rows, table), b"]}"])
