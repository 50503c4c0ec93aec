"""Whether a compact extractor computes what the binary-masked network does: checked on a real batch at every step of every run."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from der_fast.compaction import CompactionPlan, pack
from der_fast.compaction.bank import strategies
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.errors import DerFastError
from der_fast.kernels.choices import shared
from der_fast.model.extractor import Extractor
from der_fast.training.context import Context
from der_fast.training.state import StepState

# The compact network computes the same sums in another order; anything beyond rounding is a bug in der_fast.
COMPACTION_TOLERANCE = 1e-5
# Folding and another summation order may round worse than the masked network by this factor.
ROUNDING = 10


def checked_error(
    context: Context, state: StepState, keep: Tensor, finished: CompactExtractor, decision: CompactionPlan, images: Tensor
) -> float:
    """Return the largest relative error of the compact extractor on a batch, over all strategies that can run it here.

    If batch-norm divides by a variance near zero, layer after layer, rounding alone exceeds any bound. Double precision tells that
    apart from a bug: in it, the two networks agree even if they are ill-conditioned, and in single precision the compact one is not
    much further from the truth than the masked one.

    Args:
        context: settings and listeners.
        state: the step; it gets a note if the extractor is ill-conditioned.
        keep: boolean (C,), the binary masks.
        finished, decision: the compact extractor, float32, and its plan.
        images: (N, 3, H, W) a real batch.

    Raises:
        DerFastError: the compact extractor computes something else.
    """
    masks = keep.to(context.device)
    # TensorFloat-32, the default of convolutions on newer GPUs, rounds to 10 bits: its error would hide that of compaction.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ways = features_by_strategy(finished, images)
        masked = _masked_features(state.extractor, masks.float(), decision, images)
        errors = {name: relative_error(found, masked) for name, found in ways.items()}
        if max(errors.values()) <= COMPACTION_TOLERANCE:
            return max(errors.values())
        doubled = copy.deepcopy(state.extractor).double()
        truth = _masked_features(doubled, masks.double(), decision, images.double())
        finest = CompactExtractor(pack(doubled, decision, dtype=torch.float64))
        exact = relative_error(finest(images.double()), truth)
        allowed = max(COMPACTION_TOLERANCE, ROUNDING * relative_error(masked, truth))
        errors = {name: relative_error(found, truth) for name, found in ways.items()}
    if not exact <= COMPACTION_TOLERANCE:
        _refuse(state, f"in double precision by {exact:.1e} (allowed {COMPACTION_TOLERANCE:.0e})")
    for name, error in errors.items():
        if not error <= allowed:
            _refuse(state, f"when run as {name!r} by {error:.1e} (allowed {allowed:.0e})")
    note = (
        f"step {state.step}: the extractor is ill-conditioned: masked and compact network agree to {exact:.0e} in double precision, but "
        f"only to {max(errors.values()):.0e} in single precision. Some batch-norm variance is close to zero: train longer, or keep more "
        "channels."
    )
    if note not in state.notes:
        state.notes.append(note)
        context.observer.message(note)
    return max(errors.values())


def features_by_strategy(extractor: CompactExtractor, images: Tensor) -> dict[str, Tensor]:
    """Return the extractor's features, by the name of every strategy that can run it here."""
    runnable = extractor.runnable
    names = runnable.strategies()
    return {name: strategies.run([runnable], images, name, shared())[0] for name in names}


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Return max |found − truth| / max |truth|; infinite if either holds NaN, 0 if both are empty."""
    if truth.numel() == 0:
        return 0.0
    error = float((found.double() - truth.double()).abs().max() / truth.double().abs().max().clamp_min(1e-12))
    return math.inf if math.isnan(error) else error


def _masked_features(dense: Extractor, masks: Tensor, decision: CompactionPlan, images: Tensor) -> Tensor:
    training = dense.training
    features: Tensor = dense.eval()(images, masks)[:, decision.features.to(images.device)]
    dense.train(training)
    return features


def _refuse(state: StepState, how: str) -> None:
    raise DerFastError(
        f"step {state.step}: the compact extractor differs from the masked one {how} on a batch of training images. This is a bug in "
        "der_fast: please report it with the run's config.json and `der-fast doctor --json`."
    )
