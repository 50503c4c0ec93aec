"""Training steps: der_fast's through its representation stage, and the rivals' written out as in public code.

Both start from the same weights, mask logits and classifiers and see the same batches in the same order, so that the loss and the
update of every weight after `batches` steps can be compared. Augmentation is off: the rivals get ready batches on the device, which is in
their favour, while der_fast takes uint8 pixels, normalises them and meters loss and accuracy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.harness.compiled import compiled
from bench.harness.registry import Run, Setting, Tensors
from bench.subjects.branch import branch
from bench.subjects.networks import CLASSES, SharedNetworks
from bench.subjects.rivals import MaskedNet, Masks, sparsity, take
from der_fast.compaction.bank import FrozenBank
from der_fast.config.resolve import resolve_config
from der_fast.data import MemorySource, transforms_for
from der_fast.kernels.backend import resolve
from der_fast.model.classifier import auxiliary_targets, new_classifier
from der_fast.seeds import generator
from der_fast.training.context import Context
from der_fast.training.methods.der.method import begin_step
from der_fast.training.methods.der.representation import RepresentationStage
from der_fast.training.methods.der.state import DerState
from der_fast.training.model import Model, Network
from der_fast.training.progress import Observer
from der_fast.training.schedule import mask_scale

# At most 5, so that the paper's form of the gradient compensation, which the rivals use, does not saturate.
LARGEST_SCALE = 5.0
# Small, so that rounding does not make two correct variants diverge within an epoch; no time depends on it.
LR, MASK_LR, SPARSITY, CLAMP = 1e-3, 0.03, 1.0, 6.0


class Notes(Observer):
    """Shows the package's messages, such as why a step runs without a CUDA graph."""

    def message(self, text: str) -> None:
        print(f"note: {text}", flush=True)


@dataclass
class Task:
    """Describes one training stage at step t.

    Attributes:
        networks: frozen extractors.
        t: the step; t − 1 extractors are frozen.
        batch: images per batch.
        batches: per epoch.
        augment: crop, flip and jitter; then only der_fast's speed is meaningful.
        target: share of the parameters that λ_s is adapted to; None: a constant λ_s, as in the rivals.
    """

    networks: SharedNetworks
    t: int
    batch: int
    batches: int
    augment: bool = False
    target: float | None = None

    @property
    def setting(self) -> Setting:
        """The device that it runs on."""
        return self.networks.setting

    @property
    def known(self) -> int:
        """Classes of the earlier steps."""
        return (self.t - 1) * CLASSES

    def inputs(self, draw: torch.Generator) -> Tensors:
        """Return pixels (uint8, on the CPU) and labels; the images of a class share a pattern, so that there is something to learn."""
        count = self.batch * self.batches
        labels = torch.randint(self.t * CLASSES, (count,), generator=draw, device=draw.device)
        patterns = torch.randint(256, (self.t * CLASSES, self.networks.size, self.networks.size, 3), generator=draw, device=draw.device)
        noise = torch.randint(256, (count, self.networks.size, self.networks.size, 3), generator=draw, device=draw.device)
        return {"pixels": ((patterns[labels] + 3 * noise) // 4).to("cpu", torch.uint8), "labels": labels.cpu()}

    def config(self, precision: str, backend: str) -> Any:
        """Return der_fast's configuration."""
        keys: dict[str, Any] = {"model.backbone": "resnet18", "masks.enabled": True, "masks.settle": 0.0}
        # The frozen networks are part of what is measured.
        keys |= {"masks.target_params": self.target, "later.views": 0}
        keys |= {"masks.s_max": LARGEST_SCALE, "masks.lr": MASK_LR, "masks.sparsity": SPARSITY, "masks.clamp": CLAMP}
        keys |= {"runtime.precision": precision, "runtime.backend": backend, "runtime.device": str(self.setting.device)}
        if not self.augment:
            keys |= {"data.crop_padding": 0, "data.flip": False, "data.brightness": 0.0}
        for stage in ("first", "later"):
            keys |= {f"{stage}.batch_size": self.batch, f"{stage}.epochs": 10**6, f"{stage}.milestones": ()}
            keys |= {f"{stage}.lr": LR, f"{stage}.warmup_epochs": 0}
        return resolve_config("cifar10", "B0-5", preset="cifar10-5x2", changes=keys)

    def stage(self, tensors: Tensors, precision: str, backend: str, *, everywhere: bool = False) -> RepresentationStage:
        """Return der_fast's stage, at the start of its first epoch; `everywhere`: with its kernels wherever they can run."""
        config, networks = self.config(precision, backend), self.networks
        transforms = transforms_for(config.data, (networks.size, networks.size))
        chosen = resolve(backend, self.setting.device)
        chosen = replace(chosen, measured=chosen.measured and not everywhere)
        context = Context(config, self.setting.device, *transforms, observer=Notes(), backend=chosen)
        names = [tuple(str(step * CLASSES + number) for number in range(CLASSES)) for step in range(self.t)]
        members = [networks.compact(number, context.dtype) for number in range(self.t - 1)]
        model = Model(Network(networks.architecture, FrozenBank(members)), class_sets=names[:-1])
        if self.t > 1:
            model.network.head = new_classifier(model.network.bank.features, self.known, torch.Generator().manual_seed(0))
        state = begin_step(context, model, CLASSES)
        source = MemorySource(tensors["pixels"], tensors["labels"], [name for step in names for name in step])
        stage = RepresentationStage(context, state, model.network.bank, source, self.known, config.later if self.t > 1 else config.first)
        stage.settle_at = 10**6
        return stage

    def ready(self, stage: RepresentationStage) -> list[tuple[Tensor, Tensor]]:
        """Return the batches that the stage would draw in its first epoch, on the device."""
        names = (stage.context.seed, stage.name, stage.state.step, 0)
        drawn = stage.context.training_batches(stage.source, None, self.batch, generator(*names))
        return [(batch.images, batch.labels) for batch in drawn]


def weights_of(state: DerState) -> list[Tensor]:
    """Return every tensor that der_fast trains, on the CPU in float64: extractor, mask logits, classifier, auxiliary classifier."""
    return [
        parameter.detach().to("cpu", torch.float64, copy=True) for module in state.modules().values() for parameter in module.parameters()
    ]


def flat(tensors: list[Tensor]) -> Tensor:
    """Return all tensors in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def ours(task: Task, tensors: Tensors, precision: str, backend: str, *, everywhere: bool = False) -> Run:
    """Return an epoch of der_fast's stage; `everywhere`: with its kernels wherever they can run."""
    stage = task.stage(tensors, precision, backend, everywhere=everywhere)

    def epoch() -> Tensor:
        stage.epoch()
        return torch.tensor(stage.state.records[-1].loss, dtype=torch.float64)

    return noted(epoch, lambda: weights_of(stage.state))


def noted(epoch: Callable[[], Tensor], weights: Callable[[], list[Tensor]]) -> Run:
    """Return a run of an epoch that also returns the update of all weights the first time, when it is compared and not timed."""
    begin = weights()

    def run() -> Tensors:
        loss = epoch()
        if not begin:
            return {"loss": loss}
        update = flat([after - start for after, start in zip(weights(), begin, strict=True)])
        begin.clear()
        return {"loss": loss, "update": update}

    return run


class Rival:
    """A training step as in public code, from the same start as der_fast's.

    Args:
        task: the stage.
        tensors: the data.
        dtype: of autocast's computations; float32 and float64 run without autocast.
        frozen: 'full': unpruned networks one after another; 'compact': compact ones one after another.
        channels_last: memory format of activations and weights.
        compile: let torch.compile make one graph of the new network's forward pass and the loss; frozen networks stay outside.
    """

    def __init__(
        self, task: Task, tensors: Tensors, dtype: torch.dtype, frozen: str = "full", *, channels_last: bool = True, compile: bool = False
    ) -> None:
        self.task, self.dtype, self.device = task, dtype, task.setting.device
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        stage = task.stage(tensors, "fp32", "reference")
        state, net = stage.state, task.networks.architecture
        self.batches = [(images.to(wide), labels) for images, labels in task.ready(stage)]
        if not channels_last:
            self.batches = [(images.contiguous(), labels) for images, labels in self.batches]
        self.net = MaskedNet(net)
        take(self.net, state.extractor.state_dict())
        self.masks = Masks(net, torch.Generator().manual_seed(0))
        assert state.masks is not None
        for logits, start in zip(self.masks.values(), state.masks.layout.by_group(state.masks.logits.detach()).values(), strict=True):
            logits.data.copy_(start)
        self.head, self.kept = self._head(state, frozen)
        self.auxiliary = copy.deepcopy(state.auxiliary)
        parts = [part for part in (self.net, self.masks, self.head, self.auxiliary) if part is not None]
        for part in parts:
            part.to(self.device, wide)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net.train()
        self.frozen = self._frozen(frozen, channels_last)
        self.weights = [parameter for part in (self.net, self.head, self.auxiliary) if part is not None for parameter in part.parameters()]
        groups: list[dict[str, Any]] = [
            {"params": self.weights},
            {"params": list(self.masks.values()), "lr": MASK_LR, "momentum": 0.0, "weight_decay": 0.0},
        ]
        fused = compile and task.setting.cuda
        self.sgd = torch.optim.SGD(groups, LR, momentum=0.9, weight_decay=5e-4, fused=fused)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16 and task.setting.cuda)
        self.loss_of = compiled(self._loss, task.setting, graphs=True) if compile else self._loss

    def _head(self, state: DerState, frozen: str) -> tuple[nn.Linear, Tensor | None]:
        """Return a classifier for the frozen networks' features: columns of pruned features are zero and stay zero."""
        if frozen == "compact" or self.task.t == 1:
            return copy.deepcopy(state.head), None
        width = self.task.networks.architecture.width(self.task.networks.architecture.features)
        old = self.task.networks.kept_features(self.task.t - 1)
        kept = torch.cat([old, torch.arange(width, device=self.device) + (self.task.t - 1) * width])
        head = nn.Linear(self.task.t * width, state.head.out_features, device=self.device)
        with torch.no_grad():
            head.weight.zero_().index_copy_(1, kept, state.head.weight)
            head.bias.copy_(state.head.bias)
        return head, kept

    def _frozen(self, kind: str, channels_last: bool) -> list[Callable[[Tensor], Tensor]]:
        networks, count = self.task.networks, self.task.t - 1
        if kind == "compact":
            return [branch(networks.compact(number, self.dtype)) for number in range(count)]
        nets = [networks.full(number) for number in range(count)]
        format = torch.channels_last if channels_last else torch.contiguous_format
        # In the compute dtype, since autocast would cast their weights again in every step.
        return [net.to(self.device, self.dtype).to(memory_format=format) for net in nets]  # type: ignore[call-overload]

    @torch.no_grad()
    def _old_features(self, images: Tensor) -> list[Tensor]:
        converted = images.to(self.dtype)
        return [net(converted).to(images.dtype) for net in self.frozen]

    def _loss(self, images: Tensor, labels: Tensor, scale: Tensor | float, old: list[Tensor]) -> Tensor:
        masks = self.masks.soft(scale)
        enabled = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(self.device.type, self.dtype if enabled else torch.bfloat16, enabled=enabled):
            new = self.net(images, masks)
        features = torch.cat([*old, new.to(images.dtype)], 1)
        loss = F.cross_entropy(self.head(features), labels)
        if self.auxiliary is not None:
            loss = loss + F.cross_entropy(self.auxiliary(new.to(images.dtype)), auxiliary_targets(labels, self.task.known))
        return loss + SPARSITY * sparsity(self.task.networks.architecture, masks)

    def step(self, images: Tensor, labels: Tensor, scale: Tensor | float) -> Tensor:
        """Train one batch and return its loss."""
        if self.loss_of is not self._loss:
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.loss_of(images, labels, scale, self._old_features(images))
        self.sgd.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.sgd)
        self.masks.compensate(scale)
        self.scaler.step(self.sgd)
        self.scaler.update()
        self.masks.clamp(CLAMP)
        return loss.detach()

    def epoch(self) -> Tensor:
        """Train every batch; return the mean loss, in float64."""
        count = len(self.batches)
        scales: list[Tensor | float] = [mask_scale(number + 1, count, LARGEST_SCALE) for number in range(count)]
        if self.loss_of is not self._loss:
            # A Python number would be compiled in as a constant, with one program per value.
            scales = list(torch.tensor(scales, dtype=torch.float32, device=self.device))
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for (images, labels), scale in zip(self.batches, scales, strict=True):
            total += self.step(images, labels, scale)
        return (total / count).cpu()

    def trained(self) -> list[Tensor]:
        """Return the trained tensors, in the order of `weights_of`, without columns of pruned features."""
        head = self.head.weight if self.kept is None else self.head.weight.index_select(1, self.kept)
        found = [*self.net.parameters(), torch.cat(list(self.masks.values())), head, self.head.bias]
        found += [] if self.auxiliary is None else list(self.auxiliary.parameters())
        # On the CPU: a copy on the GPU would count as this variant's memory.
        return [tensor.detach().to("cpu", torch.float64, copy=True) for tensor in found]


def rival(task: Task, tensors: Tensors, dtype: torch.dtype, frozen: str = "full", **options: bool) -> Run:
    """Return an epoch of a rival."""
    made = Rival(task, tensors, dtype, frozen, **options)
    return noted(made.epoch, made.trained)
