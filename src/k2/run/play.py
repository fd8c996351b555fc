"""What the simulator plays: recordings others made, or K2's own log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from k2.errors import Misconfigured, Rejected
from k2.feeds import recordings, registry
from k2.log import open_log
from k2.model import FRAME, Frame
from k2.run.upgrade import upgrade
from k2.settings import Settings
from k2.simulator.recording import frames_of_log


def frames_of_recordings(exchanges: Sequence[str], files: Sequence[str]) -> dict[str, Iterable[Frame]]:
    """Return the frames of recordings of one exchange, file after file; empty without files."""
    if not files:
        return {}
    if len(exchanges) != 1:
        raise Rejected("simulate: a --recording needs exactly one --exchange, whose messages it holds")
    for file in files:
        if not Path(file).is_file():
            raise Misconfigured(f"simulate: there is no recording {file}: check the path")
    exchange = registry.get(exchanges[0])
    return {exchange.name: _of_files([str(file) for file in files], exchange.name)}


def _of_files(files: Sequence[str], exchange: str) -> Iterator[Frame]:
    for file in files:
        for _line, frame in recordings.read(Path(file), registry.get(exchange), recordings.AUTO):
            if frame is not None and frame.kind == FRAME:
                yield frame


def frames_of_installation(settings: Settings, exchanges: Sequence[str]) -> dict[str, Iterable[Frame]]:
    """Return the frames of K2's own log, per exchange; raises Misconfigured where it holds none."""
    upgrade(settings)
    log = open_log(settings)
    names = [registry.get(name).name for name in exchanges] or log.partitions()
    missing = sorted(set(names) - set(log.partitions()))
    if missing or not names:
        raise Misconfigured(
            f"simulate: the log in {settings.data_path} holds nothing of {', '.join(missing) or 'anything'}"
        )
    return {name: frames_of_log(log, name, log.start_offset(name)) for name in names}
