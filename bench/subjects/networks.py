"""Networks of a DER model at step t, made once and shared by every variant, so that all variants compute the same function.

Frozen extractors are pruned as in the paper: √(1/12) of every group's channels, about 1/12 of the parameters. der_fast runs the compact
networks. The eager loop runs full networks with the pruned channels' γ and β set to zero: they cost as much as unpruned ones and compute
the same as the compact ones, so that results can be compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bench.harness.registry import Setting
from bench.subjects.plain import PlainFeatures
from bench.subjects.rivals import take
from der_fast.compaction import pack, plan
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.compaction.plan import CompactionPlan
from der_fast.model.architecture import Architecture, build_architecture
from der_fast.model.extractor import Extractor, MaskedBatchNorm
from der_fast.model.layout import MaskLayout

SHARE = math.sqrt(1 / 12)
CLASSES = 10


@dataclass
class SharedNetworks:
    """Everything that the variants of one setting share.

    Attributes:
        setting: device and scale.
    """

    setting: Setting
    _dense: dict[int, Extractor] = field(default_factory=dict)

    @property
    def architecture(self) -> Architecture:
        """ResNet-18 with a small stem, narrow for smoke runs."""
        return build_architecture("resnet18", width=8 if self.setting.smoke else None)

    @property
    def size(self) -> int:
        """Side of the images."""
        return 16 if self.setting.smoke else 32

    def dense(self, number: int) -> Extractor:
        """A frozen extractor before compaction, on the CPU, with running statistics other than the initial ones."""
        if number not in self._dense:
            generator = torch.Generator().manual_seed(100 + number)
            extractor = Extractor(self.architecture).initialise(generator).train()
            norms = [module for module in extractor.modules() if isinstance(module, MaskedBatchNorm)]
            # Running statistics of real activations, as after training: without them features die out or explode.
            for norm in norms:
                norm.momentum = 1.0
            with torch.no_grad():
                extractor(self.pixels(16, generator).permute(0, 3, 1, 2).float().div(64).sub(2), self.plan(number).masks.float())
            extractor.eval()
            self._dense[number] = extractor
        return self._dense[number]

    def plan(self, number: int) -> CompactionPlan:
        """The channels that extractor `number` kept."""
        generator = torch.Generator().manual_seed(200 + number)
        layout = MaskLayout(self.architecture)
        keep = torch.zeros(layout.channels, dtype=torch.bool)
        for part in layout.by_group(keep).values():
            part[torch.randperm(len(part), generator=generator)[: max(1, round(len(part) * SHARE))]] = True
        return plan(layout, keep)

    def compact(self, number: int, dtype: torch.dtype) -> CompactExtractor:
        """A frozen extractor as a step leaves it: a float32 arena that computes in `dtype`, on the setting's device."""
        return CompactExtractor(pack(self.dense(number), self.plan(number)), dtype).to(self.setting.device)

    def full(self, number: int) -> PlainFeatures:
        """The same as a full network of torch.nn modules, whose pruned channels are zero."""
        net = PlainFeatures(self.architecture)
        take(net, self.dense(number).state_dict())
        keep, layout = self.plan(number).masks, MaskLayout(self.architecture)
        norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm, groups in zip(norms, self.architecture.norms(), strict=True):
            mask = keep[layout.slice_of(groups)]
            norm.weight.data.mul_(mask)
            norm.bias.data.mul_(mask)
        return net.eval().requires_grad_(False).to(self.setting.device)

    def kept_features(self, count: int) -> Tensor:
        """Positions of the kept features among the concatenated features of `count` full networks, int64 on the setting's device."""
        features = [self.plan(number).features for number in range(count)]
        return (torch.cat(features) if features else torch.zeros(0, dtype=torch.bool)).nonzero().flatten().to(self.setting.device)

    def pixels(self, count: int, generator: torch.Generator) -> Tensor:
        """Images, uint8 (N, H, W, 3), on the generator's device."""
        return torch.randint(256, (count, self.size, self.size, 3), dtype=torch.uint8, generator=generator, device=generator.device)

    def images(self, count: int, generator: torch.Generator) -> Tensor:
        """Normalised images (N, 3, H, W) that bfloat16 holds exactly, channels-last, on the setting's device."""
        values = self.pixels(count, generator).permute(0, 3, 1, 2).float().div(64).sub(2).bfloat16().float()
        return values.to(self.setting.device).contiguous(memory_format=torch.channels_last)
