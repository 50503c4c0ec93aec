"""Which implementation is the fastest here: measured once, remembered in a file, and pinned where a run must repeat itself.

Implementations differ by rounding. A run that must resume bit for bit on the same kind of processor saves `record()` and passes it to
`pin` before it resumes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from der_fast.errors import StorageError
from der_fast.files import write_json
from der_fast.home import cache_folder
from der_fast.kernels.agreement import Run, Tensors, agreeing
from der_fast.kernels.timing import measure
from der_fast.kernels.triton_runtime import version as triton_version
from der_fast.machine import processor_name

VERSION = 2
# How much faster than the usual implementation another must be to replace it: about the scatter of measured times.
HYSTERESIS = 0.03
# Seconds to wait while another process adds to the file, which takes milliseconds.
_PATIENCE = 5.0

CPU = torch.device("cpu")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """One remembered choice: the chosen implementation's name, and the milliseconds of every one that was measured."""

    chosen: str
    milliseconds: dict[str, float] = field(default_factory=dict)


def cache_file() -> Path | None:
    """Return where this user's choices are kept; None where the user has no home."""
    folder = cache_folder()
    return None if folder is None else folder / "choices.json"


def machine(device: torch.device = CPU) -> str:
    """Return what a choice is valid for: the device and the versions of everything that computes on it."""
    if device.type == "cuda":
        return _gpu(torch.cuda.current_device() if device.index is None else device.index)
    return _processor()


@functools.cache
def _processor() -> str:
    return f"{processor_name()}|{torch.backends.cpu.get_cpu_capability()}|torch {torch.__version__}"


@functools.cache
def _gpu(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    cudnn = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    libraries = f"torch {torch.__version__}|triton {triton_version()}|cuda {torch.version.cuda}|cudnn {cudnn}"
    return f"{torch.cuda.get_device_name(index)}|sm_{major}{minor}|{libraries}"


class Choices:
    """Remembers the fastest implementation for each key.

    Args:
        path: JSON file that is read on first use and extended after every measurement; None for memory only. A file that cannot be
            read, written or understood is ignored, and the log says so.
        homeless: `path` is None only because there is nowhere to put a file; the log says so too.

    Attributes:
        pinned: whether choices of an earlier run were pinned.
    """

    def __init__(self, path: Path | None = None, *, homeless: bool = False) -> None:
        self.path, self.homeless = path, homeless
        self.pinned = False
        self._chosen: dict[str, str] = {}
        self._filed: dict[str, Choice] | None = None
        self._said = False

    def record(self) -> dict[str, str]:
        """Return every choice that was made, looked up or pinned here, key → name."""
        return dict(self._chosen)

    def pin(self, record: Mapping[str, str]) -> None:
        """Give the choices of an earlier `record` priority over all others; on another machine they have no effect."""
        self._chosen.update(record)
        self.pinned = self.pinned or bool(record)

    def filed(self) -> dict[str, Choice]:
        """Return everything in the file, for this machine and others."""
        if self._filed is None:
            self._filed = _read(self.path, _log.warning)
        return dict(self._filed)

    def fastest(
        self,
        key: str,
        runs: Mapping[str, Run],
        *,
        device: torch.device = CPU,
        usual: str | None = None,
        what: str = "",
        trusted: str | None = None,
        tensors: Tensors | None = None,
    ) -> str:
        """Return the name of the fastest run, remembered or else measured now.

        Args:
            key: what the time depends on besides the machine.
            runs: the implementations, by name; a remembered name that is not among them is ignored.
            device: where they run.
            usual: the name that wins unless another is faster by more than `HYSTERESIS`; None for no favourite.
            what: what is computed, for the log.
            trusted: the name of the run that the others must agree with before they are measured (see `agreeing`); None for no check.
            tensors: returns the parts of their results that must agree.
        """
        known = self.known(key, runs, device)
        if known is not None:
            return known
        if trusted is not None and tensors is not None:
            runs = agreeing(runs, trusted, tensors, what)
        milliseconds = measure(runs, device)
        choice = Choice(_winner(milliseconds, usual), milliseconds)
        key = f"{machine(device)}|{key}"
        self._chosen[key] = choice.chosen
        self._write(key, choice, what)
        return choice.chosen

    def known(self, key: str, names: Collection[str], device: torch.device = CPU) -> str | None:
        """Return what is remembered for `key` if it is one of `names`, else None. Nothing is measured."""
        key = f"{machine(device)}|{key}"
        if self._chosen.get(key) not in names:
            filed = self.filed().get(key)
            if filed is None or filed.chosen not in names:
                return None
            self._chosen[key] = filed.chosen
        return self._chosen[key]

    def _write(self, key: str, choice: Choice, what: str) -> None:
        times = ", ".join(f"{name} {value:.3g} ms" for name, value in choice.milliseconds.items())
        _log.info("%s: %s (%s) for %s", what or "fastest", choice.chosen, times, key)
        if self.path is None:
            if self.homeless:
                self._say_not_kept("this user has no home folder; set HOME or XDG_CACHE_HOME to a folder that can be written to")
            return
        try:
            with _alone(self.path):
                # Another process may have added to the file since it was read.
                entries = {**_read(self.path, _log.debug), key: choice}
                write_json(self.path, {"version": VERSION, "choices": {name: asdict(entry) for name, entry in entries.items()}})
        except StorageError as error:
            reason = getattr(error.__cause__, "strerror", None) or error
            self._say_not_kept(f"cannot write {self.path}: {reason}")

    def _say_not_kept(self, reason: str) -> None:
        """Warn once, and say what it means for the next run."""
        if not self._said:
            self._said = True
            _log.warning("the choice of the fastest implementation is not kept, so the next run measures again: %s", reason)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from adding to the file. Where locking fails, an entry may be lost and measured again."""
    lock = FileLock(path.with_suffix(".lock"))
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.acquire(timeout=_PATIENCE, poll_interval=0.01))
        except (OSError, NotImplementedError) as error:
            # A drive without locks, a read-only folder, or a process that holds the lock and hangs (Timeout).
            _log.debug("%s is written without a lock: %s", path, error)
        yield


def _winner(milliseconds: Mapping[str, float], usual: str | None) -> str:
    best = min(milliseconds, key=milliseconds.__getitem__)
    if usual is not None and usual in milliseconds and milliseconds[best] >= (1 - HYSTERESIS) * milliseconds[usual]:
        return usual
    return best


def _read(path: Path | None, say: Callable[..., None]) -> dict[str, Choice]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        say("%s is ignored, because it cannot be read: %s", path, error)
        return {}
    if not isinstance(content, dict) or content.get("version") != VERSION or not isinstance(content.get("choices"), dict):
        say("%s is ignored, because it is damaged or has another version", path)
        return {}
    entries = {key: _choice(value) for key, value in content["choices"].items()}
    return {key: entry for key, entry in entries.items() if entry is not None}


def _choice(value: Any) -> Choice | None:
    if not isinstance(value, dict) or not isinstance(value.get("chosen"), str) or not isinstance(value.get("milliseconds"), dict):
        return None
    times = {str(name): float(time) for name, time in value["milliseconds"].items() if isinstance(time, (int, float))}
    return Choice(value["chosen"], times)


@functools.cache
def shared() -> Choices:
    """Return this process's choices, which are kept in the user's file."""
    path = cache_file()
    return Choices(path, homeless=path is None)
