"""A finished model at step t: all frozen extractors and the classifier. One image (latency) and a large batch (throughput).

eager_fp32, eager_bf16  as in public code: unpruned networks one after another, launched from Python
eager_compact           the compact networks one after another
compile                 the unpruned networks with torch.compile(mode='max-autotune') and its CUDA graphs
branches                the compact networks as parallel cuDNN branches of one CUDA graph
ours                    der_fast's frozen bank, with the strategy it measured as fastest, in one CUDA graph
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.cases.bank import HALF, timesteps
from bench.harness.compiled import compiled
from bench.harness.registry import Case, Run, Setting, Tensors, Variant, Work, drawn
from bench.subjects.branch import branch
from bench.subjects.networks import CLASSES, SharedNetworks
from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.bank.graphs import GraphedBranches

Features = Callable[[Tensor], Tensor]


def _case(setting: Setting, what: str, t: int, batch: int) -> Case:
    networks = SharedNetworks(setting)

    def inputs(generator: torch.Generator) -> Tensors:
        features = sum(int(networks.plan(number).features.sum()) for number in range(t))
        weight = drawn(generator, t * CLASSES, features, scale=features**-0.5)
        return {"images": networks.images(batch, generator), "weight": weight.to(setting.device)}

    def run_of(features: Features, weight: Tensor, images: Tensor, dtype: torch.dtype, graphs: bool = False) -> Run:
        head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=setting.device, dtype=dtype)
        head.weight.data.copy_(weight)
        model: Features = lambda x: head(features(x).to(dtype))  # noqa: E731
        if graphs:
            model = compiled(model, setting, graphs=True)
        x = images.to(dtype)

        def run() -> Tensors:
            with torch.no_grad():
                if graphs:
                    torch.compiler.cudagraph_mark_step_begin()
                return {"logits": model(x)}

        return run

    def full(tensors: Tensors, dtype: torch.dtype, graphs: bool = False) -> Run:
        nets = [networks.full(number).to(dtype).to(memory_format=torch.channels_last) for number in range(t)]  # type: ignore[call-overload]
        kept, width = networks.kept_features(t), networks.architecture.width(networks.architecture.features)
        # Columns of pruned features are zero, so no features have to be selected.
        weight = torch.zeros(t * CLASSES, t * width, device=setting.device).index_copy_(1, kept, tensors["weight"])
        return run_of(lambda x: torch.cat([net(x) for net in nets], 1), weight, tensors["images"], dtype, graphs)

    def members(dtype: torch.dtype) -> list[Features]:
        return [branch(networks.compact(number, dtype)) for number in range(t)]

    def in_turn(tensors: Tensors) -> Run:
        several = members(HALF)
        return run_of(lambda x: torch.cat([one(x) for one in several], 1), tensors["weight"], tensors["images"], HALF)

    def graphed(tensors: Tensors) -> Run:
        return run_of(GraphedBranches(members(HALF)), tensors["weight"], tensors["images"], HALF)

    def own(tensors: Tensors) -> Run:
        bank = FrozenBank([networks.compact(number, HALF) for number in range(t)])
        return run_of(bank, tensors["weight"], tensors["images"], HALF)

    variants = [
        Variant("eager_fp32", torch.float32, lambda i: full(i, torch.float32), True, graphed=False),
        Variant("eager_bf16", HALF, lambda i: full(i, HALF), True, graphed=False, note="unpruned networks one after another"),
        Variant("eager_compact", HALF, in_turn, graphed=False, note="compact networks one after another"),
        Variant("branches", HALF, graphed, graphed=False, needs_cuda=True, note="parallel cuDNN branches in one CUDA graph"),
        Variant("ours", HALF, own, graphed=False, note="frozen bank"),
    ]
    if setting.scale != "quick":
        variants.insert(3, Variant("compile", HALF, lambda i: full(i, HALF, True), graphed=False, note="max-autotune with CUDA graphs"))
    params = {"t": t, "batch": batch}
    expected: Callable[[Tensors], Tensors] = lambda tensors: full(tensors, torch.float64)()  # noqa: E731
    floors = {torch.float32: 5e-3 if setting.cuda else 1e-4, HALF: 2e-2}
    work = Work(images=batch)
    return Case(f"inference.{what}", params, inputs, expected, tuple(variants), lambda _: work, "launch", False, 10, sets=1, floors=floors)


def cases(setting: Setting) -> list[Case]:
    """Return the group."""
    sizes = {"latency": 1, "throughput": setting.pick((512,), (512,), (4,))[0]}
    return [_case(setting, what, t, batch) for what, batch in sizes.items() for t in timesteps(setting)]
