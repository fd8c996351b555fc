"""Installs the peers, each group into an environment of its own under a cache folder, pinned and hashed.

    python bench/peers/install.py [NAME...]      install (make bench-peers)
    python bench/peers/install.py --lock         resolve the locks anew (make bench-lock)

A Python peer is `NAME.in` (what is wanted) and `NAME.lock` (hashed, without addresses); a Node peer is the folder
`NAME` with `package.json` and `package-lock.json`. The folder is XDG_CACHE_HOME/k2-bench, or `.bench/` of the project.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
OWN = "k2"  # K2's own environment: peers that are among its dependencies run in it, too
_STAMP = ".installed"


def names() -> list[str]:
    """Return the names of all peer environments."""
    return sorted(
        [path.stem for path in HERE.glob("*.in")] + [path.parent.name for path in HERE.glob("*/package.json")]
    )


def cache() -> Path:
    """Return the folder the environments are in."""
    given = os.environ.get("XDG_CACHE_HOME")
    return Path(given) / "k2-bench" if given else HERE.parents[1] / ".bench" / "peers"


def interpreter(name: str) -> list[str] | None:
    """Return the command that runs a script in this environment; None where it is not installed as locked."""
    if name == OWN:
        return [sys.executable]
    home = cache() / name
    stamp = home / _STAMP
    if not stamp.is_file() or stamp.read_text() != _digest(name):
        return None
    if _is_node(name):
        return [str(home / "node_modules" / _node_package() / "bin" / "node")]
    return [str(home / "bin" / "python")]


def versions(name: str) -> dict[str, str]:
    """Return the pinned versions of what was asked for in this environment, by name."""
    if name == OWN:
        return {}
    if _is_node(name):
        wanted = json.loads((HERE / name / "package.json").read_text())
        return {**wanted["dependencies"], "node": wanted["optionalDependencies"][_node_package()]}
    asked = [line.strip() for line in (HERE / f"{name}.in").read_text().splitlines()]
    return dict(line.split("==") for line in asked if "==" in line and not line.startswith("#"))


def install(name: str) -> None:
    """Install one environment as its lock says; nothing is done where that was done already."""
    if interpreter(name) is not None:
        return
    home = cache() / name
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    if _is_node(name):
        _install_node(name, home)
    else:
        _install_python(name, home)
    (home / _STAMP).write_text(_digest(name))


def _install_python(name: str, home: Path) -> None:
    python = _python_of(name)
    lock = ["--require-hashes", "-r", str(HERE / f"{name}.lock")]  # some have no wheel: a compiler is needed
    _run([python, "-m", "venv", str(home)])
    if importlib.util.find_spec("uv"):
        _run([sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(home / "bin" / "python"), *lock])
    else:
        _run([str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *lock])


def _install_node(name: str, home: Path) -> None:
    """Install from the lock; it holds no addresses, so the registry of the surroundings is used."""
    for file in ("package.json", "package-lock.json", ".npmrc"):
        shutil.copy(HERE / name / file, home / file)
    _run(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"], cwd=home)


def _node_package() -> str:
    """Return the package that carries the Node binary for this machine; the one installed here may be too old."""
    machine = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    return f"node-{platform.system().lower()}-{machine}"


def _python_of(name: str) -> str:
    """Return a Python of the version the peer's `.in` file names in its first line (`# python 3.12`)."""
    wanted = (HERE / f"{name}.in").read_text().splitlines()[0].removeprefix("# python ").strip()
    candidates = [
        f"python{wanted}",
        *map(str, sorted((Path.home() / ".pyenv" / "versions").glob(f"{wanted}.*/bin/python"))),
    ]
    if f"{sys.version_info.major}.{sys.version_info.minor}" == wanted:
        candidates.insert(0, sys.executable)
    for candidate in candidates:
        tried = shutil.which(candidate)
        if tried and _says(tried, wanted):
            return tried
    raise SystemExit(f"peer {name} needs Python {wanted}, and there is none (install it, or put it on PATH)")


def _says(python: str, wanted: str) -> bool:
    """Whether this is a working Python of the version: a version manager's stand-in may not be."""
    done = subprocess.run([python, "--version"], capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.startswith(f"Python {wanted}.")


def _is_node(name: str) -> bool:
    return (HERE / name / "package.json").is_file()


def _digest(name: str) -> str:
    lock = HERE / name / "package-lock.json" if _is_node(name) else HERE / f"{name}.lock"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.is_file() else "no lock"


def lock(name: str) -> None:
    """Resolve a peer's lock anew."""
    if _is_node(name):
        _run(["npm", "install", "--package-lock-only", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=HERE / name)
        _without_addresses(HERE / name / "package-lock.json")
        return
    wanted = (HERE / f"{name}.in").read_text().splitlines()[0].removeprefix("# python ").strip()
    _run(
        [
            *(
                sys.executable,
                "-m",
                "uv",
                "pip",
                "compile",
                "--quiet",
                "--universal",
                "--generate-hashes",
                "--no-header",
            ),
            *("--no-annotate", "--python-version", wanted, "-o", f"{name}.lock", f"{name}.in"),
        ],
        cwd=HERE,
    )


def _without_addresses(path: Path) -> None:
    """Drop the addresses of sponsors, too."""
    told = json.loads(path.read_text())
    for package in told["packages"].values():
        package.pop("funding", None)
    path.write_text(json.dumps(told, indent=2) + "\n")


def _run(command: list[str], cwd: Path | None = None) -> None:
    if subprocess.run(command, cwd=cwd, check=False).returncode:
        raise SystemExit(f"failed: {' '.join(command)}")


def main() -> None:
    """Install the named peers, or all; one that fails does not keep the others out."""
    given = sys.argv[1:]
    failed = []
    for name in [one for one in given if not one.startswith("-")] or names():
        try:
            (lock if "--lock" in given else install)(name)
        except SystemExit as error:
            failed.append(f"{name}: {error}")
        else:
            print(", ".join(f"{package} {told}" for package, told in versions(name).items()), flush=True)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
