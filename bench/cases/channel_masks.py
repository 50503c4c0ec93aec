"""All masks of ResNet-18 (12 groups, 20 convolutions): sigmoid, sparsity loss, and the compensated gradient of both.

  eager        as in public code: group by group, convolution by convolution, the quotient with cosh for the compensation
  eager_flat   one flat vector, matrix products for the group sums: `backend='reference'`
  compile      eager_flat compiled by torch.compile (captured by this benchmark where graphs are timed)
  ours         der_fast's Triton kernel, one launch each way
  ours_native  der_fast's CUDA C++ kernel, one launch each way, without PyTorch's headers

The masks are a few thousand numbers, so launches take the time, not bytes. 'launch' is what eager training pays; 'graph' is what remains
inside a CUDA graph. L2 is not flushed, as in training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.harness.compiled import compiled
from bench.harness.registry import Case, Run, Setting, Tensors, Variant, drawn, uniform
from bench.subjects.networks import SharedNetworks
from bench.subjects.rivals import Masks, sparsity
from der_fast.kernels.channel_masks import masks_and_sparsity
from der_fast.model.architecture import Architecture
from der_fast.model.layout import MaskLayout

SCALE = 5.0
Operation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def flat(operation: Operation, tensors: Tensors, what: str, dtype: torch.dtype) -> Run:
    """Return a run of an operation on the flat vector."""
    logits, scale = tensors["logits"].to(dtype, copy=True), tensors["scale"].to(dtype)
    gradients = [tensors["g"].to(dtype), torch.ones((), dtype=dtype, device=logits.device)]
    logits.requires_grad_(what == "both")

    def run() -> Tensors:
        masks, loss = operation(logits, scale)
        found = {"masks": masks.detach(), "loss": loss.detach()}
        if what == "both":
            found["gradient"] = torch.autograd.grad([masks, loss], logits, gradients)[0]
        return found

    return run


def per_layer(net: Architecture, tensors: Tensors, what: str) -> Run:
    """Return a run of the code that loops over groups."""
    masks = Masks(net, torch.Generator().manual_seed(0)).to(tensors["logits"].device)
    widths = list(net.groups.values())
    for logits, start in zip(masks.values(), tensors["logits"].split(widths), strict=True):
        logits.data.copy_(start)
    gradients = list(tensors["g"].split(widths))

    def run() -> Tensors:
        with torch.set_grad_enabled(what == "both"):
            soft = masks.soft(SCALE)
            loss = sparsity(net, soft)
        found = {f"masks{number}": mask.detach() for number, mask in enumerate(soft.values())} | {"loss": loss.detach()}
        if what == "both":
            for logits in masks.values():
                logits.grad = None
            torch.autograd.backward([*soft.values(), loss], [*gradients, None])
            masks.compensate(SCALE)
            found |= {f"gradient{number}": logits.grad for number, logits in enumerate(masks.values()) if logits.grad is not None}
        return found

    return run


def joined(outputs: Tensors) -> Tensors:
    """Concatenate the parts of a group-by-group run."""
    found = {"loss": outputs["loss"]}
    for name in ("masks", "gradient"):
        parts = [value for key, value in outputs.items() if key.removeprefix(name).isdigit() and key.startswith(name)]
        if parts:
            found[name] = torch.cat(parts)
    return found


def _case(setting: Setting, what: str, how: str) -> Case:
    net = SharedNetworks(setting).architecture
    structure = MaskLayout(net).structure(setting.device)

    def inputs(generator: torch.Generator) -> Tensors:
        count = structure.channels
        tensors = {"logits": 2 * uniform(generator, count), "g": drawn(generator, count)}
        return {name: tensor.to(setting.device) for name, tensor in (*tensors.items(), ("scale", torch.tensor(SCALE)))}

    def operation(backend: str) -> Operation:
        return lambda logits, scale: masks_and_sparsity(logits, scale, structure, backend=backend)

    single = torch.float32
    reference, native = operation("reference"), "native" if setting.backend == "fused" or not setting.cuda else "reference"
    once = compiled(reference, setting)
    variants = (
        Variant("eager", single, lambda i: per_layer(net, i, what), True, result=joined, note="group by group"),
        Variant("eager_flat", single, lambda i: flat(reference, i, what, single), note="one flat vector"),
        Variant("compile", single, lambda i: flat(once, i, what, single), note="max-autotune"),
        Variant("ours", single, lambda i: flat(operation(setting.backend), i, what, single), deterministic=True, note="Triton"),
        Variant("ours_native", single, lambda i: flat(operation(native), i, what, single), deterministic=True, note="C++, CUDA on a GPU"),
    )
    return Case(
        f"channel_masks.{what}",
        {"how": how},
        inputs,
        lambda tensors: flat(reference, tensors, what, torch.float64)(),
        variants,
        timing=how,
        cold=False,
        inner=20,
        sets=1,
        # The loss is a sum over millions of products, and the quotient of two cosh loses digits.
        floors={single: 2e-5},
    )


def cases(setting: Setting) -> list[Case]:
    """Return the group."""
    return [_case(setting, what, how) for what in ("forward", "both") for how in ("launch", "graph")]
