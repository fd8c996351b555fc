"""The example of docs/add-an-exchange.md is code that works."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import cast

from k2.feeds.base import Exchange
from k2.feeds.conformance import check

PAGE = Path(__file__).parents[2] / "docs" / "add-an-exchange.md"

TRADE = (
    '{"type":"trade","id":7,"market":"BTC/USD","price":"61837.630","size":"0.00005100","side":"buy",'
    '"time":"2026-01-01T00:00:00.5Z"}'
)
QUOTE = (
    '{"type":"bbo","market":"BTC/USD","bid":"1","bid_size":"2","ask":"3","ask_size":"4","time":"2026-01-01T00:00:00Z"}'
)
ROW = (
    '{"symbol":"BTC-USD","bid_price":"1","bid_amount":"2","ask_price":"3","ask_amount":"4",'
    '"exchange_ns":1767225600000000000}'
)


def test_example_of_the_page_conforms(tmp_path: Path) -> None:
    """The module and the case printed on the page pass the suite the page tells to run."""
    page = PAGE.read_text("utf-8")
    module = types.ModuleType("example")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    exec(compile(code, str(PAGE), "exec", dont_inherit=True), module.__dict__)
    files = {
        "trade": (TRADE, re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0]),
        "quote": (QUOTE, f'{{"source":"page","quotes":[{ROW}]}}'),
        "subscribed": (
            '{"type":"subscribed","keys":["trade:BTC/USD"]}',
            '{"source":"page","control":"acknowledged","acknowledged":["trade:BTC/USD"]}',
        ),
        "refused": (
            '{"type":"error","reason":"no such market"}',
            '{"source":"page","control":"refused","reason":"no such market"}',
        ),
        "unknown": ('{"type":"surprise"}', '{"source":"page","bad":true}'),
    }
    for name, (frame, expected) in files.items():
        (tmp_path / f"{name}.json").write_text(frame)
        (tmp_path / f"{name}.expected.json").write_text(expected)

    assert check(cast(Exchange, module.EXAMPLE), tmp_path) == []
