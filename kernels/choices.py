"""Which implementation is the fastest here: measured once, remembered in a file, and pinned where a run must repeat itself.

Implementations differ by rounding. A run that must resume bit for bit on the same kind of processor saves `record()` and passes it to
`pin` before it resumes.

Before a choice is used for the first time in a process, remembered or not, its results are compared with those of a trusted
implementation (`agreement`): a driver, a library or a GPU may have changed what it computes. Nothing is timed for that.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from der_fast.errors import StorageError
from der_fast.files import write_json
from der_fast.home import cache_folder
from der_fast.kernels.agreement import Run, Tensors, agreeing, failure
from der_fast.kernels.fingerprint import fingerprint
from der_fast.kernels.timing import measure
from der_fast.kernels.triton_runtime import version as triton_version
from der_fast.machine import processor_name

VERSION = 3
# How much faster than the usual implementation another must be to replace it: about the scatter of measured times.
HYSTERESIS = 0.03
# Seconds per process for measuring what has a good default (`optional`), compiling included: a step has dozens of such kernels.
OPTIONAL_SECONDS = 60.0
# The environment variable that sets another number, for a machine that is lent for minutes.
SECONDS_FROM = "DER_FAST_TILE_SECONDS"
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
    """Return what a choice is valid for: the device, the versions of everything that computes on it, and a hash of the kernels."""
    return f"{_hardware(device)}|kernels {fingerprint()}"


def _hardware(device: torch.device) -> str:
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


def _no_tensors(result: object) -> Sequence[Tensor | None]:
    return ()


def _optional_seconds() -> float:
    """Return how long this process may measure what has a good default; a value that is not a number is ignored with a line."""
    given = os.environ.get(SECONDS_FROM, "")
    try:
        return float(given) if given else OPTIONAL_SECONDS
    except ValueError:
        _log.warning("%s takes a number of seconds, not %r; %g are used", SECONDS_FROM, given, OPTIONAL_SECONDS)
        return OPTIONAL_SECONDS


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
        # Keys whose choice has been compared with a trusted result in this process, what was said, and what `OPTIONAL_SECONDS` has left.
        self._checked: set[str] = set()
        self._told: set[str] = set()
        self._seconds = _optional_seconds()

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
        trusted: Sequence[str] = (),
        tensors: Tensors = _no_tensors,
        last_resort: str | None = None,
        optional: bool = False,
    ) -> str:
        """Return the name of the fastest run, remembered or else measured now.

        A run that fails, or computes something else than the trusted one, is left out, and the log says so once.

        Args:
            key: what the time depends on besides the machine.
            runs: the implementations, by name; a remembered name that is not among them is ignored.
            device: where they run.
            usual: the name that wins unless another is faster by more than `HYSTERESIS`; None for no favourite.
            what: what is computed, for the log.
            trusted: names of the runs that the others must agree with before they are used, the best first (see `agreeing`); empty for
                no check.
            tensors: returns the parts of their results that must agree; by default none, so that a run only must not fail.
            last_resort: the name of a run that is not timed, and is taken only where no other works. That is not kept in the file, so
                that the next run tries again.
            optional: whether `usual` is good enough, so that all such choices together are measured for `OPTIONAL_SECONDS` at most. From
                then on `usual` is taken and remembered.

        Raises:
            Exception: a trusted run's, if all of them raise; without trusted runs the first one's, if all raise.
        """
        full = f"{machine(device)}|{key}"
        known = self.known(key, runs, device)
        if known is not None:
            if full in self._checked or self._confirmed(known, runs, trusted, tensors, what):
                self._checked.add(full)
                return known
            runs = {name: run for name, run in runs.items() if name != known}
            trusted = [name for name in trusted if name != known]
        self._say_if_stale(device)
        started = time.perf_counter()
        if optional and usual is not None and usual in runs and self._seconds <= 0:
            choice: Choice | None = Choice(usual)
        else:
            until = started + self._seconds if optional else math.inf
            choice = self._measured(runs, device, usual, what, trusted, tensors, last_resort, until)
        if optional:
            self._seconds -= time.perf_counter() - started
        self._checked.add(full)
        if choice is None:
            assert last_resort is not None
            self._chosen[full] = last_resort
            return last_resort
        self._chosen[full] = choice.chosen
        self._write(full, choice, what)
        return choice.chosen

    def _measured(
        self,
        runs: Mapping[str, Run],
        device: torch.device,
        usual: str | None,
        what: str,
        trusted: Sequence[str],
        tensors: Tensors,
        last_resort: str | None,
        until: float,
    ) -> Choice | None:
        """Return the choice among the runs that work, None for the last resort; arguments as in `fastest` and `agreeing`."""
        agreed, problems = agreeing(runs, trusted, tensors, until=until) if trusted else (runs, {})
        timed = {name: run for name, run in agreed.items() if name != last_resort}
        if not timed and last_resort is not None:
            if usual is not None and usual in runs and usual not in problems:
                # The time was over before anything but the trusted run was tried.
                return Choice(usual)
            said = next((f"{name!r} {problem}" for name, problem in problems.items() if name != last_resort), "there is no other")
            self._say(f"{what} {last_resort!r}, because nothing else works here:", said)
            return None
        for name, problem in problems.items():
            if name != last_resort:
                self._say(f"{what} {name!r} is not used, because it", problem)
        if trusted and len(timed) == 1:
            return Choice(next(iter(timed)))
        try:
            milliseconds = measure(timed, device)
        except torch.OutOfMemoryError:
            # A measurement takes more memory than a run.
            if not trusted or usual is None or usual not in timed:
                raise
            return Choice(usual)
        return Choice(_winner(milliseconds, usual), milliseconds)

    def _confirmed(self, known: str, runs: Mapping[str, Run], trusted: Sequence[str], tensors: Tensors, what: str) -> bool:
        """Whether a remembered run computes what a trusted one does. If no trusted one can say so, it is used as it was before."""
        if known in trusted[:1] or not trusted:
            return True
        try:
            _, problems = agreeing({name: runs[name] for name in dict.fromkeys((*trusted, known))}, trusted, tensors)
        except Exception as error:
            self._say(f"{what} {known!r}, unchecked, because what it is compared with", failure(error))
            return True
        if known in problems:
            self._say(f"{what} {known!r} is not used any more, because it", problems[known])
        return known not in problems

    def _say_if_stale(self, device: torch.device) -> None:
        """Warn once if this machine's choices were made for other kernels."""
        hardware, filed = f"{_hardware(device)}|", self.filed()
        if any(key.startswith(hardware) for key in filed) and not any(key.startswith(f"{machine(device)}|") for key in filed):
            self._say(f"the choices in {self.path} are ignored and measured again,", "because they were measured with other kernels")

    def _say(self, what: str, problem: str) -> None:
        """Warn, once for each thing that is wrong, though every shape has it."""
        known = what + problem.partition("(")[0]
        _log.log(logging.DEBUG if known in self._told else logging.WARNING, "%s %s", what, problem)
        self._told.add(known)

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
