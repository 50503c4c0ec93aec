"""One description of a residual network, from which everything else follows.

The description says which *channel groups* every convolution reads and writes. Modules, mask layout, sparsity loss, parameter
counts and compaction are all derived from it, so they cannot disagree.

A channel group is a set of channels that are pruned together because several tensors share them: all convolutions that write to
one residual stream write the same group(s). A tensor's channels are one or more groups side by side: CIFAR ResNets widen their
stream by appending zero channels (He et al. 2016, option A), so the tensors of their stage 2 consist of stage 1's group followed
by a new one. Old channels therefore precede appended ones, before and after compaction, and no index map is needed at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from der_fast.errors import ConfigError

IMAGE_CHANNELS = 3

Groups = tuple[str, ...]


@dataclass(frozen=True)
class Conv:
    """A square convolution without bias: reads `source` groups (empty: the image), writes `target` groups."""

    name: str
    source: Groups
    target: Groups
    kernel: int
    stride: int = 1


@dataclass(frozen=True)
class Block:
    """A residual block: `convs` in order; `shortcut` is a projection, or None for identity (or appended zero channels)."""

    name: str
    convs: tuple[Conv, ...]
    shortcut: Conv | None = None

    @property
    def source(self) -> Groups:
        """The stream that the block reads."""
        return self.convs[0].source

    @property
    def target(self) -> Groups:
        """The stream that the block writes."""
        return self.convs[-1].target

    @property
    def stride(self) -> int:
        """The factor by which the block shrinks height and width."""
        stride = 1
        for conv in self.convs:
            stride *= conv.stride
        return stride


@dataclass(frozen=True)
class Architecture:
    """A backbone.

    Attributes:
        name: e.g. 'resnet18'.
        groups: channel groups with their full widths, in the order of the mask vector.
        stem: the first convolution.
        pool: 3×3 stride-2 max-pooling after the stem.
        blocks: the residual blocks in order.
        preactivation: batch-norm and ReLU before each convolution (PreAct-ResNet) instead of after it.
    """

    name: str
    groups: Mapping[str, int]
    stem: Conv
    pool: bool
    blocks: tuple[Block, ...]
    preactivation: bool = False

    @property
    def features(self) -> Groups:
        """The groups of the final feature map."""
        return self.blocks[-1].target

    def convs(self) -> list[Conv]:
        """Every convolution: stem, then block by block, shortcuts last in their block."""
        rows = [self.stem]
        for block in self.blocks:
            rows += [*block.convs, *([block.shortcut] if block.shortcut else [])]
        return rows

    def width(self, groups: Groups, widths: Mapping[str, int] | None = None) -> int:
        """Channels of a tensor that consists of `groups`; the image's channels where `groups` is empty."""
        table = self.groups if widths is None else widths
        return sum(table[name] for name in groups) if groups else IMAGE_CHANNELS

    def norms(self) -> list[Groups]:
        """The groups that each batch-norm normalises, one entry per batch-norm."""
        if not self.preactivation:
            return [conv.target for conv in self.convs()]
        return [*(conv.source for block in self.blocks for conv in block.convs), self.features]

    def parameters(self, widths: Mapping[str, int] | None = None) -> int:
        """Number of parameters (convolutions and batch-norm) at the given group widths; the full ones by default."""
        weights = sum(self.width(c.source, widths) * self.width(c.target, widths) * c.kernel**2 for c in self.convs())
        return weights + 2 * sum(self.width(groups, widths) for groups in self.norms())


def _basic(name: str, source: Groups, stream: Groups, inner: str, stride: int, project: bool) -> Block:
    convs = (Conv("conv1", source, (inner,), 3, stride), Conv("conv2", (inner,), stream, 3))
    return Block(name, convs, Conv("shortcut", source, stream, 1, stride) if project else None)


def _bottleneck(name: str, source: Groups, stream: Groups, inner: str, stride: int, project: bool) -> Block:
    convs = (
        Conv("conv1", source, (f"{inner}a",), 1),
        Conv("conv2", (f"{inner}a",), (f"{inner}b",), 3, stride),
        Conv("conv3", (f"{inner}b",), stream, 1),
    )
    return Block(name, convs, Conv("shortcut", source, stream, 1, stride) if project else None)


def _imagenet_family(name: str, depths: tuple[int, ...], width: int, stem: str, bottleneck: bool, preactivation: bool) -> Architecture:
    groups: dict[str, int] = {}
    if bottleneck:
        groups["stem"] = width
    blocks: list[Block] = []
    source: Groups = ("stem",) if bottleneck else ("stage1",)
    for stage, depth in enumerate(depths, 1):
        inner_width = width << (stage - 1)
        stream: Groups = (f"stage{stage}",)
        groups[stream[0]] = inner_width * (4 if bottleneck else 1)
        for index in range(depth):
            inner = f"stage{stage}.{index}"
            for suffix in ("a", "b") if bottleneck else ("",):
                groups[inner + suffix] = inner_width
            stride = 2 if stage > 1 and index == 0 else 1
            make = _bottleneck if bottleneck else _basic
            blocks.append(make(inner, source, stream, inner, stride, source != stream))
            source = stream
    large = stem == "imagenet"
    first = Conv("stem", (), ("stem",) if bottleneck else ("stage1",), 7 if large else 3, 2 if large else 1)
    return Architecture(name, groups, first, large, tuple(blocks), preactivation)


def _cifar_family(name: str, depth: int, width: int, stem: str) -> Architecture:
    # The three parts of the single stream come first and side by side, so that a stage's mask is one slice of the mask vector.
    groups = {"stage1": width, "stage2": width, "stage3": 2 * width}
    blocks: list[Block] = []
    source: Groups = ("stage1",)
    for stage in (1, 2, 3):
        stream: Groups = ("stage1", "stage2", "stage3")[:stage]
        for index in range(depth):
            inner = f"stage{stage}.{index}"
            groups[inner] = width << (stage - 1)
            stride = 2 if stage > 1 and index == 0 else 1
            blocks.append(_basic(inner, source, stream, inner, stride, project=False))
            source = stream
    large = stem == "imagenet"
    first = Conv("stem", (), ("stage1",), 7 if large else 3, 2 if large else 1)
    return Architecture(name, groups, first, large, tuple(blocks))


_FAMILIES: dict[str, tuple[int, tuple[int, ...], bool, bool]] = {
    # name: default width, blocks per stage, bottleneck, preactivation
    "resnet18": (64, (2, 2, 2, 2), False, False),
    "resnet34": (64, (3, 4, 6, 3), False, False),
    "resnet50": (64, (3, 4, 6, 3), True, False),
    "preact_resnet18": (64, (2, 2, 2, 2), False, True),
}
_CIFAR_DEPTHS = {"resnet20": 3, "resnet32": 5}
BACKBONES = (*_FAMILIES, *_CIFAR_DEPTHS)


def build_architecture(backbone: str, *, width: int | None = None, stem: str = "small") -> Architecture:
    """Describe a backbone.

    Args:
        backbone: one of `BACKBONES`.
        width: channels of the first stage; default 64, or 16 for resnet20 and resnet32.
        stem: 'imagenet' (7×7 stride 2, then max-pooling) or 'small' (3×3 stride 1, no pooling).

    Raises:
        ConfigError: an unknown backbone or stem, or a width below 1.
    """
    if backbone not in BACKBONES:
        raise ConfigError(f"model.backbone: unknown backbone {backbone!r}; choose from {', '.join(BACKBONES)}")
    if stem not in ("small", "imagenet"):
        raise ConfigError(f"model.stem: unknown stem {stem!r}; choose 'small' or 'imagenet'")
    if width is not None and width < 1:
        raise ConfigError(f"model.width must be at least 1, not {width}")
    if backbone in _CIFAR_DEPTHS:
        return _cifar_family(backbone, _CIFAR_DEPTHS[backbone], width or 16, stem)
    default, depths, bottleneck, preactivation = _FAMILIES[backbone]
    return _imagenet_family(backbone, depths, width or default, stem, bottleneck, preactivation)
