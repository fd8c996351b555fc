"""Faults are read strictly, strike as scheduled, and end."""

from __future__ import annotations

import json
import random

import pytest

from k2.errors import Rejected, UnknownName
from k2.simulator.faults import MAX_FAULTS, Fault, Faults, add_fields, break_text, parse_fault


def test_parse_fault_reads_options() -> None:
    """A fault is its kind and name=value options."""
    assert parse_fault("drop:every=50,count=3") == Fault("drop", every=50, count=3)
    assert parse_fault("silence:for=20,after=5,exchange=kraken,heartbeats=true") == Fault(
        "silence", exchange="kraken", after=5, for_seconds=20, heartbeats=True
    )
    assert parse_fault("disconnect every=30 abrupt=true") == Fault("disconnect", every=30, abrupt=True)
    assert parse_fault("429") == Fault("429")


@pytest.mark.parametrize(
    ("text", "error", "told"),
    [
        ("disconect", UnknownName, "did you mean 'disconnect'"),
        ("drop:evry=3", UnknownName, "did you mean 'every'"),
        ("drop:every=x", Rejected, "every"),
        ("drop:every=1.5", Rejected, "whole number"),
        ("silence:for=-1", Rejected, "not be negative"),
    ],
)
def test_parse_fault_refuses_with_a_hint(text: str, error: type[Exception], told: str) -> None:
    """What cannot be understood is refused, and the message says what would be right."""
    with pytest.raises(error, match=told):
        parse_fault(text)


def test_message_fault_strikes_every_nth_up_to_its_count() -> None:
    """Every tenth message, three times, the same ones for the same seed."""

    def struck(seed: int) -> list[int]:
        faults = Faults(seed)
        faults.add(parse_fault("drop:every=10,count=3"), now=0.0)
        return [i for i in range(200) if faults.strikes("kraken", 1.0)]

    hits = struck(1)
    assert len(hits) == 3
    assert hits[1] - hits[0] == hits[2] - hits[1] == 10
    assert struck(1) == hits


def test_message_fault_strikes_only_its_exchange_and_time() -> None:
    """Neither another exchange nor the time before and after is touched."""
    faults = Faults(1)
    faults.add(parse_fault("repeat:every=1,exchange=kraken,after=10,for=5"), now=0.0)

    assert [bool(faults.strikes("kraken", now)) for now in (9.0, 10.0, 14.9, 15.0)] == [False, True, True, False]
    assert not faults.strikes("binance", 12.0)


def test_timed_fault_comes_again_and_ends() -> None:
    """A repeated fault begins at its times, is in force in between, and is forgotten after its count."""
    faults = Faults(1)
    faults.add(parse_fault("429:after=5,for=2,every=10,count=2"), now=0.0)

    began, held = [], []
    for now in range(40):
        began += [now for _ in faults.advance(float(now))]
        held += [now] if faults.force("429", "kraken", float(now)) else []
    assert began == [5, 15]
    assert held == [5, 6, 15, 16]
    assert faults.describe() == []


def test_faults_are_limited_in_number() -> None:
    """No more than a fixed number are taken."""
    faults = Faults(1)
    for _ in range(MAX_FAULTS):
        faults.add(Fault("drop"), 0.0)

    with pytest.raises(Rejected, match="DELETE /faults"):
        faults.add(Fault("drop"), 0.0)


def test_broken_texts_are_broken_and_added_fields_are_not() -> None:
    """Broken copies cannot be read; a message with unknown fields still says what it said."""
    text = '{"channel":"trade","data":[{"price":1.50}]}'
    choice = random.Random(1)

    for _ in range(30):
        with pytest.raises(ValueError):
            json.loads(break_text(text, choice))
    more = json.loads(add_fields(text))
    assert more["channel"] == "trade"
    assert more["data"][0]["price"] == 1.5
    assert set(more) > {"channel", "data"}
