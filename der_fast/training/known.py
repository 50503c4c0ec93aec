"""What a learner can do with known classes: refresh them with more images, rename one, forget some."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from der_fast.data.source import ImageSource
from der_fast.errors import DataError
from der_fast.training import provenance
from der_fast.training.context import Context
from der_fast.training.events import FORGOTTEN, REFRESHED, RENAMED, Event, latest, names_now, with_names
from der_fast.training.events import present as present_names
from der_fast.training.forget import forgotten_model
from der_fast.training.hooks import Hooks
from der_fast.training.progress import EpochRecord
from der_fast.training.refresh import begin_refresh, check_refresh, only_new_images, refresh
from der_fast.training.rename import renamed_model
from der_fast.training.results import StepResult, times_of
from der_fast.training.trained import TrainedModel

_MOST_NAMED = 5


class KnownClasses(TrainedModel):
    """The part of a learner that changes known classes; `Learner` has the rest.

    Attributes:
        results: the measurements after every step.
        events: what happened to classes between the steps.
        lesson: checksum of the images learned last; empty if unknown.
        learned: for every step, the images it was trained on and those held out.
    """

    results: list[StepResult]
    records: list[EpochRecord]
    notes: list[str]
    events: list[Event]
    lesson: str
    learned: list[provenance.Learned]

    @property
    def latest(self) -> StepResult:
        """The last measurement, after a step or a later event; raises IndexError before the first step."""
        return latest(self.results, self.events)

    def rename(self, old: str, new: str) -> None:
        """Rename the class `old` to `new`, in results too; no weight changes.

        Raises:
            DataError: there is no class `old`, or the new name is empty or taken.
            DerFastError: nothing has been learned yet.
        """
        self._model = renamed_model(self.model, old, new)
        self._call({old: new})
        self.learned = provenance.renamed(self.learned, old, new)
        self.events.append(Event(RENAMED, len(self.results), (old, new)))

    def forget(self, *class_names: str, test: Any = None) -> StepResult:
        """Remove classes from classifier, rehearsal memory and results; weights and logits of the other classes do not change.

        The extractors were trained on images of these classes and are not changed. A forgotten class can be learned again as a new one.

        Args:
            class_names: known classes, not all of them.
            test: images of the remaining classes, to measure accuracy on; None skips that.

        Raises:
            DataError: no name, an unknown one, all known classes, or test images that do not fit.
            DerFastError: nothing has been learned yet.
        """
        started = time.perf_counter()
        names = tuple(dict.fromkeys(class_names))
        model = forgotten_model(self.model, names)
        result = self._measured(None, model, test, time.perf_counter() - started)
        self._model = model
        self._call(dict.fromkeys(names))
        self.learned = provenance.forgotten(self.learned, names)
        # Notes may name files of the class.
        self.notes = [note for note in self.notes if not any(f"/{name}/" in note.replace("\\", "/") for name in names)]
        self.events.append(Event(FORGOTTEN, len(self.results), names, result=result))
        return result

    def _call(self, names: Mapping[str, str | None]) -> None:
        """Apply other class names to results and events; None = forgotten."""
        self.results = [replace(result, class_names=present_names(result.class_names, names)) for result in self.results]
        self.events = with_names(self.events, names)

    def _new_images(self, train: ImageSource) -> ImageSource:
        """Return the new images among images of new and known classes, and say what happens to the known ones.

        Raises:
            ConfigError, DataError: images of known classes only that cannot be learned; see `check_refresh`.
        """
        known = () if self._model is None else self._model.class_names
        again = [name for name in train.class_names if name in known]
        self._say_freed_names([name for name in train.class_names if name not in known])
        if self._model is None or not again or self.method.joint:
            return train
        named = ", ".join(map(repr, again[:_MOST_NAMED])) + (f" and {len(again) - _MOST_NAMED} more" if len(again) > _MOST_NAMED else "")
        if len(again) == len(train.class_names) and train.fingerprint() == self.lesson:
            raise DataError(
                f"class {again[0]!r} is already known, and these are exactly the images that were learned last; give further images of "
                "known classes, new classes, or rename the folder if it is another class"
            )
        fresh, held = only_new_images(train, self._model.memory, known)
        if len(again) == len(train.class_names):
            check_refresh(self.config, self._model, fresh)
            what = "they refresh rehearsal memory and classifier; extractors do not change"
        else:
            what = "their images join the rehearsal memory; the other classes are learned as a step"
        left_out = f" ({held} image(s) were already in the memory)" if held else ""
        self.observer.message(f"already known: {named}; {what}{left_out}")
        return fresh

    def _say_freed_names(self, new: Sequence[str]) -> None:
        """Point out new classes that have a known class's former name: they are learned as different classes."""
        now = names_now(self.events)
        freed = [f"{name!r} ({now[name]!r} now)" for name in new if now.get(name) is not None]
        if freed:
            self.observer.message(
                f"learned as new classes, although known ones had these names before they were renamed: {', '.join(freed)}; if you mean "
                "the same classes, stop and give their images under their current names"
            )

    def _is_refresh(self, train: ImageSource) -> bool:
        """Whether there are no new classes among these (checked) images."""
        return self._model is not None and not self.method.joint and set(train.class_names) <= set(self._model.class_names)

    def _refresh(self, context: Context, train: ImageSource, test: ImageSource | None, hooks: Hooks, started: float) -> StepResult:
        """Do what `learn` does if all classes are known."""
        model = self.model
        state = hooks.begun(lambda: begin_refresh(context, model))
        before = state.spent
        refreshed = refresh(context, model, state, train)
        result = self._measured(context, refreshed, test, before + time.perf_counter() - started)
        spent, waited = times_of(state.records)
        result = replace(result, training_seconds=spent, data_seconds=waited)
        self._model = refreshed
        self.events.append(Event(REFRESHED, state.step, train.class_names, len(train), result))
        self.records += state.records
        return result
