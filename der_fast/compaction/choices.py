"""Which strategy is the fastest on this machine: measured once, remembered in a file, and pinned where a run must repeat itself.

Strategies differ by rounding. A run that shall go on bit for bit keeps `record()` and hands it to `pin` before it goes on.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from der_fast.errors import StorageError
from der_fast.files import write_json

VERSION = 1
# Each strategy runs twice, and again for these seconds unless it is far behind.
BUDGET = 0.1
_FAR_BEHIND = 2.0

_log = logging.getLogger(__name__)


def cache_file() -> Path | None:
    """Return where this user's choices are kept; None where the user has no home."""
    try:
        return _cache_folder() / "der_fast" / "strategies.json"
    except RuntimeError:
        return None


def _cache_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@functools.cache
def machine() -> str:
    """Return what a choice holds for: processor, its instruction sets as PyTorch uses them, and PyTorch's version."""
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}|{torch.backends.cpu.get_cpu_capability()}|torch {torch.__version__}"


class Choices:
    """Remembers the fastest strategy by key.

    Args:
        path: JSON file that is read at first use and added to after every measurement; None for memory only. A file that cannot be
            read, written or understood is as good as none.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._chosen: dict[str, str] = {}
        self._filed: dict[str, str] | None = None

    def record(self) -> dict[str, str]:
        """Return every choice that was made, looked up or pinned here, key → strategy."""
        return dict(self._chosen)

    def pin(self, record: Mapping[str, str]) -> None:
        """Let the choices of an earlier `record` stand before all others; on another machine they say nothing."""
        self._chosen.update(record)

    def fastest(self, key: str, runs: Mapping[str, Callable[[], object]]) -> str:
        """Return the name of the fastest run: a remembered one, or else measured now.

        Args:
            key: what the time depends on, beside the machine.
            runs: what each strategy does, by name; a remembered name that is not among them does not count.
        """
        known = self.known(key, runs)
        if known is None:
            milliseconds = measure(runs)
            known = min(milliseconds, key=milliseconds.__getitem__)
            key = f"{machine()}|{key}"
            self._chosen[key] = known
            self._write(key, milliseconds)
        return known

    def known(self, key: str, names: Collection[str]) -> str | None:
        """Return what is remembered for `key`, where it is one of `names`; else None. Nothing is measured."""
        key = f"{machine()}|{key}"
        if self._chosen.get(key) not in names:
            if self._filed is None:
                self._filed = _read(self.path)
            if self._filed.get(key) not in names:
                return None
            self._chosen[key] = self._filed[key]
        return self._chosen[key]

    def _write(self, key: str, milliseconds: Mapping[str, float]) -> None:
        chosen = self._chosen[key]
        times = ", ".join(f"{name} {value:.1f} ms" for name, value in milliseconds.items())
        _log.info("frozen extractors run %s (%s) for %s", chosen, times, key)
        if self.path is None:
            return
        try:
            write_json(self.path, {"version": VERSION, "choices": {**_read(self.path), key: chosen}})
        except StorageError as error:
            _log.debug("choices are not kept: %s", error)


def _read(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("version") != VERSION or not isinstance(content.get("choices"), dict):
        return {}
    return {key: value for key, value in content["choices"].items() if isinstance(value, str)}


def measure(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the milliseconds of every run, its best of several: noise only ever adds time."""
    best: dict[str, float] = {}
    for name, run in runs.items():
        # The first run also builds what the strategy keeps.
        times = [_milliseconds(run), _milliseconds(run)]
        until = time.perf_counter() + BUDGET
        while min(times) < _FAR_BEHIND * min(best.values(), default=min(times)) and time.perf_counter() < until:
            times.append(_milliseconds(run))
        best[name] = min(times)
    return best


def _milliseconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


@functools.cache
def shared() -> Choices:
    """Return the choices of this process, kept in the user's file."""
    return Choices(cache_file())
