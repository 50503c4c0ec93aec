"""One incremental step, from new images to a model that knows their classes (docs/method.md)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from der_fast.data.source import ImageSource
from der_fast.errors import DerFastError
from der_fast.training.context import Context
from der_fast.training.method import Method, State
from der_fast.training.model import Model
from der_fast.training.packing import Packed
from der_fast.training.rehearsal import new_names, refill, rehearsal


def learn_step(
    context: Context, method: Method[State], model: Model, state: State, train: ImageSource
) -> tuple[Model, Packed, dict[str, Any]]:
    """Complete a step from the point that `state` has reached.

    Args:
        context: settings and listeners.
        method: does the work.
        model: the model before this step; left unchanged.
        state: the current step; changed in place.
        train: the new classes' training images; for a joint method, those of all seen classes.

    Returns:
        The new model, its packed network, and the method's own figures.

    Raises:
        DivergenceError: the loss is no longer finite.
        DerFastError: the compact network does not compute what the trained one does, or the method's figures differ from those it declares.
    """
    new = new_names(model, train)
    chosen, held = method.split(context, model, train)
    source = rehearsal(model, chosen)
    state.unreadable = source.recall(state.unreadable)
    context.observer.step_begins(state.step, state.step, new, len(source))
    method.train(context, model, state, source)
    packed = method.pack(context, model, state, source)
    finished = replace(model, network=packed.network, class_sets=[*model.class_sets, new])
    finished.memory = None if method.joint else refill(context, finished, model.memory, chosen)
    method.finish(context, finished, state, source, held)
    finished.readout = method.readout(context, finished, state)
    facts = method.facts(context, state, packed)
    if facts.keys() != method.figures.keys():
        raise DerFastError(f"a method's facts must be the figures that it declares, {sorted(method.figures)}, not {sorted(facts)}")
    return finished, packed, facts
