"""Long fuzzing of everything that reads what strangers wrote: `make fuzz ARGS="--seconds 600 --target parsers"`.

With atheris the choice of inputs follows the coverage of K2's own code; without it the same properties are tried on
random inputs. A finding is printed with its input, and the exit code is not 0.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

HAS_ATHERIS = __name__ == "__main__" and importlib.util.find_spec("atheris") is not None
if HAS_ATHERIS:
    import atheris

with atheris.instrument_imports(include=["k2"]) if HAS_ATHERIS else contextlib.nullcontext():
    import hostile
    import properties
    import runs

    from k2.errors import BadData, Misconfigured, UnknownName
    from k2.feeds import recordings, registry
    from k2.log import codec
    from k2.model import ANSWER, FRAME, Frame
    from k2.settings import load
    from k2.symbols import canonical, is_canonical

EXCHANGES = sorted(registry.OWN)
CASES = {name: hostile.known_frames(name) for name in EXCHANGES}
SLOWEST_SECONDS = 5.0
SCRATCH = Path(tempfile.gettempdir()) / "k2-fuzz"


class Choices:
    """Reads numbers and bytes off an input; at its end everything is 0."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, size: int = 2) -> int:
        """Return the next number of so many bytes."""
        taken = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken, "little")

    def edits(self) -> list[hostile.Edit]:
        """Return up to six edits."""
        return [(self.number(1), self.number(), self.number()) for _ in range(1 + self.number(1) % 6)]

    def rest(self) -> bytes:
        """Return what is left."""
        return self._data[self._at :]

    def frame(self, name: str) -> Frame:
        """Return a damaged frame of an exchange, or one of nothing but the bytes left."""
        cases = CASES[name]
        if self.number(1) % 4 == 0:
            origin = cases[self.number() % len(cases)].expected.origin
            return Frame(ANSWER if origin else FRAME, "live", "0", 0, 0, 1, self.rest(), origin)
        case, other = cases[self.number() % len(cases)], cases[self.number() % len(cases)]
        return case.frame(hostile.damage(case.data, self.edits(), other.data))


def parsers(choices: Choices) -> None:
    """Rows or BadFrame."""
    name = EXCHANGES[choices.number(1) % len(EXCHANGES)]
    properties.parse(registry.get(name), choices.frame(name))


def normalisers(choices: Choices) -> None:
    """Exact rows or dead letters, as columns the same as one by one."""
    name = EXCHANGES[choices.number(1) % len(EXCHANGES)]
    frames = [choices.frame(name) for _ in range(1 + choices.number(1) % 3)]
    properties.normalise(registry.get(name), frames)
    properties.normalise_as_a_run(registry.get(name), [frame for frame in frames if frame.kind == FRAME] or frames)


def alike(choices: Choices) -> None:
    """Runs of one message, one of them damaged in a byte or a value: read at once as each by itself."""
    name = EXCHANGES[choices.number(1) % len(EXCHANGES)]
    known = [case.data for case in CASES[name] if case.expected.kind == FRAME and not case.expected.bad]
    data = known[choices.number() % len(known)]
    turn = choices.number(1) % 4
    damaged = runs.damage(data, random.Random(choices.number(4)))
    runs.check_run(registry.get(name), [*[data] * turn, damaged, *[data] * (3 - turn)])


def files(choices: Choices) -> None:
    """Frames or BadData, from a recording."""
    name = EXCHANGES[choices.number(1) % len(EXCHANGES)]
    fmt = ("auto", *recordings.FORMATS)[choices.number(1) % 5]
    path = SCRATCH / f"aggTrades_BTCUSDT_{name}.gz"
    path.write_bytes(hostile.recording(choices.number(1), choices.edits(), choices.rest()))
    with contextlib.suppress(BadData, Misconfigured):
        for recorded in recordings.read(path, registry.get(name), fmt):
            assert recorded.frame is None or len(recorded.frame.data) <= 16 << 20


def batches(choices: Choices) -> None:
    """Frames or ValueError, from a blob of the log."""
    kind = choices.number(1) % 3
    _, blob = codec.encode([CASES["kraken"][0].frame(), choices.frame("kraken")])
    with contextlib.suppress(ValueError):
        codec.decode(kind, choices.rest() if choices.number(1) % 2 else hostile.damage(blob, choices.edits()))


def settings(choices: Choices) -> None:
    """Settings or Misconfigured, from a file."""
    path = SCRATCH / "k2.toml"
    path.write_bytes(hostile.damage(hostile.SETTINGS_FILE, choices.edits()) + choices.rest())
    with contextlib.suppress(Misconfigured):
        load(environment={}, file=path)


def symbols(choices: Choices) -> None:
    """A canonical symbol or UnknownName."""
    text = choices.rest().decode("utf-8", "surrogatepass" if choices.number(1) % 2 else "replace")
    for understand in (canonical, *(registry.get(name).to_canonical for name in EXCHANGES)):
        with contextlib.suppress(UnknownName):
            assert is_canonical(understand(text)), text


TARGETS: dict[str, Callable[[Choices], None]] = {
    target.__name__: target for target in (parsers, normalisers, alike, files, batches, settings, symbols)
}


def run(target: Callable[[Choices], None], data: bytes) -> None:
    """Try one input; what the target lets through, or a long while, is a finding."""
    began = time.thread_time()
    with contextlib.suppress(UnicodeDecodeError if target is symbols else ()):
        target(Choices(data))
    seconds = time.thread_time() - began
    assert seconds < SLOWEST_SECONDS, f"{seconds:.1f} s"


def at_random(target: Callable[[Choices], None], seconds: float, seed: int) -> int:
    """Try random inputs for so long; return how many."""
    choose = random.Random(seed)
    until = time.monotonic() + seconds
    tried = 0
    while time.monotonic() < until:
        data = choose.randbytes(choose.randrange(1, 80))
        try:
            run(target, data)
        except Exception:
            sys.stdout.write(f"{target.__name__}: input {data.hex()}\n")
            raise
        tried += 1
    return tried


def guided(target: Callable[[Choices], None], seconds: float, seed: int) -> None:
    """Let atheris choose the inputs; it ends the process, and tells how many it tried."""
    arguments = [sys.argv[0], f"-max_total_time={int(seconds)}", f"-seed={seed}", "-max_len=4096", "-timeout=20"]
    arguments += ["-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={SCRATCH}/"]
    atheris.Setup(arguments, lambda data: run(target, data))
    atheris.Fuzz()


def main() -> None:
    """Fuzz one target, or each in its turn at random."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    options.add_argument("--seconds", type=float, default=60.0, help="for each target")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--random", action="store_true", help="without coverage, even where atheris is there")
    options.add_argument("--replay", help="try this one input, in hexadecimal")
    chosen = options.parse_args()
    SCRATCH.mkdir(exist_ok=True)
    targets = list(TARGETS.values()) if chosen.target == "all" else [TARGETS[chosen.target]]
    for target in targets:
        if chosen.replay is not None:
            run(target, bytes.fromhex(chosen.replay))
        elif HAS_ATHERIS and not chosen.random and len(targets) == 1:
            guided(target, chosen.seconds, chosen.seed)
        else:
            tried = at_random(target, chosen.seconds, chosen.seed)
            sys.stdout.write(f"{target.__name__}: {tried:,} inputs in {chosen.seconds:g} s, no finding\n")


if __name__ == "__main__":
    main()
