"""The memory tail: what is on its way to hot stays visible until hot has it."""

from __future__ import annotations

import pyarrow as pa

from k2.hot.tail import Generation, RemoteTail, Row, Tail, encode_snapshot


def convert(_table: str, rows: list[Row]) -> pa.Table:
    return pa.table({"value": pa.array([row[0] for row in rows], pa.int64())})


def generation(start: dict[str, int]) -> Generation:
    return Generation(start, ["trades"], convert)


def values(tail: Tail) -> list[int]:
    return tail.snapshot("trades")[1].column("value").to_pylist()


def test_rows_stay_visible_while_they_are_flushed():
    """A flush in progress hides nothing; a finished one leaves only newer rows."""
    tail = Tail(generation({"a": 5}))
    tail.filling.add({"trades": [(1,), (2,)]}, "a", 5, 7)
    tail.turn(generation(tail.end))
    tail.filling.add({"trades": [(3,)]}, "a", 7, 8)

    assert values(tail) == [1, 2, 3]
    assert tail.snapshot("trades")[0] == {"a": 5}
    tail.flushed()
    assert values(tail) == [3]
    assert tail.snapshot("trades")[0] == {"a": 7}


def test_a_new_partition_has_a_start_from_its_first_row():
    """Without one, a reader could not tell its rows in hot from those in the tail."""
    tail = Tail(generation({}))
    tail.turn(generation({}))
    tail.filling.add({"trades": [(1,)]}, "b", 0, 1)

    assert tail.snapshot("trades")[0] == {"b": 0}


def test_a_remote_snapshot_equals_the_local_one():
    """Positions and rows travel together."""
    tail = Tail(generation({"a": 5}))
    tail.filling.add({"trades": [(1,), (2,)]}, "a", 5, 7)
    remote = RemoteTail(lambda table: encode_snapshot(tail, table), lambda table: convert(table, []))

    assert remote.snapshot("trades") == tail.snapshot("trades")


def test_no_tail_is_an_empty_one():
    """Where nothing is being ingested, hot has all there is."""
    remote = RemoteTail(lambda _: None, lambda table: convert(table, []))

    start, rows = remote.snapshot("trades")
    assert (start, rows.num_rows) == ({}, 0)
