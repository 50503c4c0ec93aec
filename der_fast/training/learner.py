"""The learner: classes go in, a classifier of all classes so far comes out."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from der_fast.config.check import check
from der_fast.config.key import Change
from der_fast.config.schema import Config, RuntimeConfig
from der_fast.config.tree import flatten, keys_with, replace_keys, to_dict
from der_fast.data.sets.dataset import as_source
from der_fast.data.source import ImageSource
from der_fast.data.storage import located
from der_fast.errors import ConfigError, DerFastError
from der_fast.files import held, write_json
from der_fast.home import expand
from der_fast.kernels.backend import resolve, resolve_device, resolve_precision
from der_fast.kernels.forked import fit_to_compute
from der_fast.model.architecture import Architecture, build_architecture
from der_fast.training import events, provenance
from der_fast.training.figures import SUMMARY, names_for
from der_fast.training.hooks import Hooks
from der_fast.training.known import KnownClasses
from der_fast.training.measuring import measure
from der_fast.training.memory import check_quota, scarcity_note
from der_fast.training.model import Model, Network
from der_fast.training.precision import precision_note
from der_fast.training.progress import EpochRecord, Observer
from der_fast.training.reference_model import train_reference
from der_fast.training.results import StepResult, device_name, metrics_of, times_of, unmeasured_note
from der_fast.training.runtime import apply_runtime, refuse_rerun
from der_fast.training.sources import check_test, check_train, counts_by_class, without_empty_classes
from der_fast.training.state import StepFile
from der_fast.training.step import learn_step
from der_fast.training.storage import saved
from der_fast.training.storage.history import write_history
from der_fast.training.watching import watched

# Up to this input side the stem is the small one (3×3, stride 1).
_SMALL_SIDE = 64

# Means that no observer was given: such a learner shows its progress if somebody is watching.
_NOBODY = Observer()


class Learner(KnownClasses):
    """Learns classes step by step.

    Args:
        config: the configuration; default: `Config()`.
        observer: receives progress.

    Raises:
        ConfigError, BackendError: something in the configuration cannot be used here.
    """

    def __init__(self, config: Config | None = None, *, observer: Observer | None = None) -> None:
        config = check(config or Config())
        self.observer = observer or _NOBODY
        self.device = resolve_device(config.runtime.device)
        self.config = self._with_precision(config)
        self.backend = resolve(self.config.runtime.backend, self.device)
        apply_runtime(self.config.runtime, self.device)
        self.results: list[StepResult] = []
        self.records: list[EpochRecord] = []
        # For every step, the images it was trained on and those held out.
        self.learned: list[provenance.Learned] = []
        self.notes: list[str] = []
        self.events: list[events.Event] = []
        self.lesson = ""
        self.image_size: tuple[int, int] | None = None
        self._model: Model | None = None
        self._stem = ""
        # For every step learned here, the files kept with it.
        self._step_files: dict[int, dict[str, StepFile]] = {}
        self._home: Path | None = None
        # A memory read from a run's folder: its files may have been moved since.
        self._memory_found = True
        self._precision_said = False

    def learn(self, train: Any, test: Any = None, *, progress: bool | None = None) -> StepResult:
        """Learn the classes of `train`; finished extractors do not change.

        Images of known classes join the rehearsal memory. If there are no others, no extractor is added: the rehearsal memory is
        chosen again, by herding over its own and the new images of these classes, and the classifier stage retrains the classifier.
        Such a refresh is measured in `events`, not in `results`.

        Args:
            train: an image source or a map-style dataset of (image, label) with the new classes' images (for the upper bound,
                the images of all classes seen so far), and further ones of known classes.
            test: images of any seen classes, to measure accuracy on; None skips that. Class names without images are ignored.
            progress: show progress on standard error or in the notebook; None: if somebody is watching and the learner has no observer
                (see `der_fast.train`).

        Raises:
            DataError: images of another size than before, an empty source, or nothing new.
            ConfigError: a memory without room for one exemplar of every class; known classes only, without a classifier stage;
                a script that runs again in a child process.
            DivergenceError: the loss is no longer finite.

        After any error the learner is as it was before the call.
        """
        refuse_rerun()
        before = self.observer
        with watched(None if before is _NOBODY else before, progress) as self.observer:
            try:
                if self.observer is not before:
                    self.observer.run_begins(len(self.results) + 1, self.config)
                return self._learn(train, test, Hooks())
            finally:
                self.observer = before

    def _learn(self, train: Any, test: Any, hooks: Hooks) -> StepResult:
        """Do what `learn` does, as a run needs it: with checkpoints and the origin of the images."""
        started = time.perf_counter()
        fit_to_compute(self.device)
        train, test = self._checked(train, test)
        lesson = train.fingerprint()
        self._find_memory(train)
        self._check_memory(train, hooks.announce)
        train = self._new_images(train)
        context = self._context(train, hooks.save)
        if self._is_refresh(train):
            result = self._refresh(context, train, test, hooks, started)
            return self._learned(result, lesson, train, test, hooks.origin, refreshed=True)
        model = self._model or Model(Network(self._architecture(context.test_transform.size)))
        self._say_precision(model.network.architecture, context.test_transform.size)
        method = self.method
        state = hooks.begun(lambda: method.begin(context, model, train))
        before = state.spent
        finished, packed, facts = learn_step(context, method, model, state, train)
        seconds = before + time.perf_counter() - started
        wanted = self.config.method.fwt and state.step > 1
        reference, records = train_reference(context, model, train, test) if wanted else (None, [])
        outcome = self._evaluate(context, finished, test) if test is not None else None
        spent, waited = times_of(state.records)
        result = measure(context, finished, packed, outcome, reference, seconds)
        result = replace(result, training_seconds=spent, data_seconds=waited, facts=facts)
        self._model, self.image_size = finished, train.image_size
        self._step_files[state.step] = state.files()
        self.results.append(result)
        self.records += [*state.records, *records]
        self.notes += state.notes
        return self._learned(result, lesson, train, test, hooks.origin, refreshed=False)

    def _learned(
        self,
        result: StepResult,
        lesson: str,
        train: ImageSource,
        test: ImageSource | None,
        origin: provenance.Origin | None,
        *,
        refreshed: bool,
    ) -> StepResult:
        """Record what was learned, from which images, and the notes about it."""
        origin = origin or provenance.Origin(None, provenance.own_test_images(train, test))
        self.lesson = lesson
        self.learned += provenance.try_learned(len(self.results), train, origin, self.observer.message)
        self.notes += [*_notes(train), *(_notes(test) if test is not None else []), *origin.notes]
        if (note := unmeasured_note(result, self.class_names)) is not None:
            self.notes.append(note)
            self.observer.message(note)
        self.observer.step_ends({**_summary(result), "refreshed": refreshed})
        return result

    def save(self, folder: str | Path) -> Path:
        """Write the learner, its metrics and its history; what the folder held before stays readable until that is done.

        Afterwards the folder holds this learner and no other.

        Raises:
            StorageError: no space left, no permission, or another process is writing to the folder.
        """
        run, model = expand(folder), self.model
        with held(run):
            self._save_step_files(run)
            facts = {
                **saved.results_to_json(self.results, self.records),
                "notes": self.notes,
                "events": events.to_json(self.events),
                "lesson": self.lesson,
                "image_size": list(self.image_size or ()),
                "learned": provenance.save_learned(run, self.learned),
            }
            saved.save_model(run, model, self.config, self._stem, facts)
            self.save_results(run)
        self._home = run
        return run

    def save_results(self, run: Path) -> None:
        """Write ``metrics.json`` and ``history.json``; raises StorageError."""
        write_json(run / "metrics.json", self.metrics())
        write_history(run, self.records)

    def _save_step_files(self, run: Path) -> None:
        for step in range(1, len(self.results) + 1):
            if step in self._step_files:
                saved.save_step_files(run, step, self._step_files[step])
            elif self._home is not None and self._home.absolute() != run.absolute():
                saved.copy_step_files(self._home, run, step)

    @classmethod
    def load(
        cls, folder: str | Path, *, device: str | None = None, backend: str | None = None, observer: Observer | None = None
    ) -> Learner:
        """Read a saved learner, ready to predict or to learn more classes.

        Args:
            folder: written by `save` or a run.
            device, backend: where and how it runs from now on; default: 'auto' for both.
            observer: receives progress, and notices of a damaged state that was skipped.

        Raises:
            CheckpointError: nothing there can be read.
        """
        fit_to_compute()
        watcher, home = observer or _NOBODY, expand(folder)
        model, config, manifest = saved.load_model(home, watcher.message)
        runtime: RuntimeConfig = replace(config.runtime, device=device or "auto", backend=backend or "auto")
        learner = cls(replace(config, runtime=runtime), observer=watcher)
        assert model.network.head is not None
        model.network.bank.to(learner.device)
        if runtime.channels_last:
            model.network.bank.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        model.network.head.to(learner.device)
        model.readout = model.ready.to(learner.device)
        learner._model, learner._stem = model, manifest["stem"]
        learner.image_size = (manifest["image_size"][0], manifest["image_size"][1])
        learner.results, learner.records = saved.results_from_json(manifest)
        learner.notes = list(manifest["notes"])
        # Runs saved before this was recorded have none.
        learner.learned = provenance.load_learned(home, manifest.get("learned", ()), watcher.message)
        learner.events = events.from_json(manifest.get("events", []))
        learner.lesson = manifest.get("lesson", "")
        learner._home = home
        learner._memory_found = False
        return learner

    def reconfigure(self, config: Config) -> None:
        """Continue with another configuration, on the same device.

        Raises:
            ConfigError: a value out of range, or a key that the learned model depends on.
        """
        config = self._with_precision(check(config))
        if self._model is not None:
            changed = [key for key in keys_with(Change.NEVER) if _value(config, key) != _value(self.config, key)]
            if changed:
                rows = ", ".join(f"{key} was {_value(self.config, key)!r}, now {_value(config, key)!r}" for key in changed)
                raise ConfigError(f"the learned model depends on these keys, so they can no longer be changed: {rows}")
        self.learned = provenance.moved(self.learned, self.config.data, config.data)
        self.config = config
        apply_runtime(config.runtime, self.device)

    def _with_precision(self, config: Config) -> Config:
        """Return the configuration with the precision that 'auto' stands for on this device, so that a run goes on in it anywhere."""
        return replace_keys(config, {"runtime.precision": resolve_precision(config.runtime.precision, self.device)})

    def metrics(self) -> dict[str, Any]:
        """Return what ``metrics.json`` holds (see the report's documentation); raises DerFastError before the first step."""
        if not self.results:
            raise DerFastError("nothing has been learned yet: call learn() first")
        facts = {
            "protocol": self.config.protocol.name,
            "dataset": self.config.data.name,
            "name": self.method.label(self.config),
            "backend": f"{self.backend.name} ({self.backend.reason})",
            "device": device_name(self.device),
            "notes": list(dict.fromkeys(self.notes)),
            "config": to_dict(self.config),
        }
        return metrics_of(self.results, {**facts, "events": events.rows_of(self.events)}, self.latest)

    def _architecture(self, size: tuple[int, int]) -> Any:
        stem = self.config.model.stem
        self._stem = stem if stem != "auto" else ("small" if max(size) <= _SMALL_SIDE else "imagenet")
        return build_architecture(self.config.model.backbone, width=self.config.model.width, stem=self._stem)

    def _checked(self, train: Any, test: Any) -> tuple[ImageSource, ImageSource | None]:
        """Turn the arguments into sources; before any work, refuse what cannot be learned or measured."""
        source = as_source(train, self.config.data, self.image_size)
        check_train(source, self.class_names, self.image_size, joint=self.method.joint)
        if test is None:
            return source, None
        measured = without_empty_classes(as_source(test, self.config.data, source.image_size))
        check_test(measured, (*self.class_names, *source.class_names), source.image_size)
        return source, measured

    def _say_precision(self, architecture: Architecture, size: tuple[int, int]) -> None:
        """Report once what bfloat16 costs here, if it is used."""
        if not self._precision_said:
            self._precision_said = True
            note = precision_note(self.config, self.device, architecture, size)
            if note is not None:
                self.observer.message(note)

    def _find_memory(self, train: ImageSource) -> None:
        """Find once the present place of the files of a memory read from a run's folder; raises DataError if they are missing."""
        if self._model is not None and self._model.memory is not None and not self._memory_found:
            self._model = replace(self._model, memory=located(self._model.memory, [*train.roots, self.config.data.name]))
        self._memory_found = True

    def _check_memory(self, train: ImageSource, announce: bool) -> None:
        """Refuse a memory that would stay empty; name new classes that cannot fill their quota."""
        if self.method.joint:
            return
        new = {name: count for name, count in counts_by_class(train).items() if name not in self.class_names}
        seen = len(self.class_names) + len(new)
        check_quota(self.config.memory, seen)
        note = scarcity_note(self.config, new, seen) if announce else None
        if note is not None:
            self.observer.message(note)


def _value(config: Config, key: str) -> Any:
    return flatten(to_dict(config))[key]


def _notes(source: ImageSource) -> list[str]:
    skipped = source.skipped
    count = [f"{len(skipped)} image file(s) could not be read and were left out"] if skipped else []
    return [*source.notes, *count, *(f"skipped {entry}" for entry in skipped)]


def _summary(result: StepResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in ("step", *names_for(SUMMARY))}
