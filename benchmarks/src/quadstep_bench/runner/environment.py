"""Environments: what a measurement depends on beside its configuration.

An environment is the revision of the repository, a hash of the library's sources, the versions of
what is installed, and the machine.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quadstep_bench.optimizers import PEERS

Environment = dict[str, Any]


def hash_sources(sources: Mapping[str, bytes]) -> str:
    """Identifies source files, by name, by the first digits of their SHA-256.

    Names come in alphabetical order; each is followed by the length and the contents of its file.
    """
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(f"{name}\0{len(sources[name])}\0".encode())
        digest.update(sources[name])
    return digest.hexdigest()[:12]


def _library() -> Path:
    """The folder of the library, wherever it is installed, found without importing it."""
    spec = find_spec("quadstep")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


# The modules of subpackages adapt the library to frameworks and decide no step.
SOURCES = hash_sources({path.name: path.read_bytes() for path in _library().glob("*.py")})
"""The hash of the library's modules as they were when this process began."""


def environment(*, threads: int, device: str, packages: Iterable[str] = ()) -> Environment:
    """Describes what a measurement depends on.

    Args:
        threads: How many threads torch computes in.
        device: Where it computes, in torch's words.
        packages: Further distributions whose versions matter, as that of a peer.
    """
    library, own = _library(), Path(__file__).parents[1]
    # Only a revision that tracks this very library says what ran: an installed copy may happen to
    # lie inside the checkout of some other project.
    tracked = _git(library, "ls-files", "__init__.py")
    return {
        "revision": _git(library, "rev-parse", "HEAD") if tracked else None,
        "dirty": bool(
            tracked and any(_git(folder, "status", "--porcelain", ".") for folder in (library, own))
        ),
        "sources": SOURCES,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("quadstep", "torch", "numpy", *packages)},
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": threads,
            "device": device,
        },
    }


def key(environment: Environment) -> str:
    """Identifies an environment by the first digits of the SHA-256 of its JSON."""
    text = json.dumps(environment, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def check_installed(optimizers: Iterable[str]) -> None:
    """Raises a `ValueError` that says what to install unless the packages of all peers are there.

    Args:
        optimizers: Names of settings; all but peers come with what is installed anyway.
    """
    needed = {name: PEERS[name] for name in optimizers if name in PEERS}
    missing = {name: package for name, package in needed.items() if version(package) is None}
    if missing:
        raise ValueError(
            f"{', '.join(sorted(set(missing.values())))} not installed: run pip install "
            f'"quadstep-bench[peers]", or leave out {", ".join(sorted(missing))}'
        )


def version(package: str) -> str | None:
    """The version of an installed distribution; `None` if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    # `platform.processor` names the model on most systems but not on Linux.
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
