"""Rows as users get them: Arrow, Polars, pandas, or one by one."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator
from functools import lru_cache
from io import StringIO
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from k2 import meters
from k2.errors import NotInstalled
from k2.model import Positions
from k2.query.output import TABLE_METADATA, show, with_times
from k2.query.rows import shaped
from k2.schema import Table, Type

if TYPE_CHECKING:
    import pandas
    import polars

_SHOWN_ROWS = 10
CACHED_ROW_TYPES = 64
_CHUNK_ROWS = 10_000
_SMALL_CODES = 127


class Result:
    """Rows of one question, in time order, and what they are made from.

    `tiers` are the tiers that answered, `watermark` is the log offset per partition up to which cold
    did, `snapshot_id` the snapshot that was read (pass it as `as_of` to get the same rows again),
    `note` what is missing, if something is.
    """

    def __init__(
        self,
        rows: pa.Table,
        table: Table | None,
        *,
        tiers: tuple[str, ...] = (),
        watermark: Positions | None = None,
        snapshot_id: int | None = None,
        note: str = "",
    ) -> None:
        self._rows = rows
        self._table = table
        self.tiers = tiers
        self.watermark = dict(watermark or {})
        self.snapshot_id = snapshot_id
        self.note = note

    def arrow(self) -> pa.Table:
        """Return the rows as Arrow: decimal128 prices, int64 nanoseconds, microsecond timestamps beside them."""
        if self._table is None:
            return self._rows
        rows = with_times(shaped(self._rows, self._table), self._table)
        return rows.replace_schema_metadata({TABLE_METADATA: self._table.name})

    def _coded(self) -> pa.Table:
        """Return the rows as `arrow` does, but with names as dictionaries: as text they are half of the work."""
        if self._table is None:
            return self._rows
        rows = with_times(self._rows, self._table)
        for place, column in enumerate(self._table.columns):
            if column.type is Type.NAME:
                rows = rows.set_column(place, column.name, _coded_column(rows[column.name]))
        return rows

    def polars(self) -> polars.DataFrame:
        """Return the rows as a Polars frame: decimals stay exact, names are Categorical."""
        import polars

        frame = polars.from_arrow(self._coded())
        assert isinstance(frame, polars.DataFrame)
        return frame

    def pandas(self) -> pandas.DataFrame:
        """Return the rows as a pandas frame of Arrow-backed columns: decimals stay exact, names are categories.

        Raises NotInstalled when pandas is missing.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise NotInstalled("pandas is not installed: pip install 'k2-market-data[pandas]'") from None
        frame: pandas.DataFrame = self._coded().to_pandas(
            types_mapper=lambda kind: None if pa.types.is_dictionary(kind) else pandas.ArrowDtype(kind)
        )
        return frame

    def __len__(self) -> int:
        return int(self._rows.num_rows)

    def __iter__(self) -> Iterator[Any]:
        """Yield rows as named tuples: `row.price` is a Decimal, `row.exchange_ns` an int."""
        make = _row_type(self._table.name if self._table else "row", tuple(self._rows.column_names))
        for batch in self._rows.to_batches(max_chunksize=_CHUNK_ROWS):
            yield from map(make._make, zip(*(column.to_pylist() for column in batch.columns), strict=True))

    def __repr__(self) -> str:
        from rich.console import Console

        text = StringIO()
        show(self._rows.slice(0, _SHOWN_ROWS), Console(file=text, width=200), self._table)
        name = self._table.name if self._table else "rows"
        head = f"{len(self):,} {name} from {', '.join(self.tiers) or 'SQL'}"
        more = f"\n... {len(self) - _SHOWN_ROWS:,} more" if len(self) > _SHOWN_ROWS else ""
        note = f"\nnote: {self.note}" if self.note else ""
        return f"{head}\n{text.getvalue().rstrip()}{more}{note}"


def _coded_column(names: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return names as one dictionary, its codes no wider than they must be: mostly all rows have the same name."""
    coded = names if pa.types.is_dictionary(names.type) else names.dictionary_encode()
    coded = coded.unify_dictionaries()
    if not coded.num_chunks or len(coded.chunk(0).dictionary) > _SMALL_CODES:
        return coded
    known = coded.chunk(0).dictionary
    codes = [
        np.zeros(len(chunk), np.int8) if len(known) == 1 else chunk.indices.cast(pa.int8()) for chunk in coded.chunks
    ]
    return pa.chunked_array([pa.DictionaryArray.from_arrays(pa.array(each, pa.int8()), known) for each in codes])


@lru_cache(maxsize=CACHED_ROW_TYPES)
def _row_type(name: str, columns: tuple[str, ...]) -> Any:
    return namedtuple(name.title().replace("_", ""), columns, rename=True)


meters.watch_cache("query.row_types", _row_type)
