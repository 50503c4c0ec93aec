"""The extractor against residual networks written the plain way, one class per kind of block, given the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from der_fast.model.architecture import BACKBONES, build_architecture
from der_fast.model.extractor import Extractor
from der_fast.model.layout import MaskLayout

DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "preact_resnet18": (2, 2, 2, 2),
    "resnet20": (3, 3, 3),
    "resnet32": (5, 5, 5),
}


def conv(inputs, outputs, kernel, stride=1):
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def times(x, mask):
    return x * mask.reshape(1, -1, 1, 1)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; the shortcut is the identity, a 1×1 projection, or every other pixel and appended zeros."""

    def __init__(self, inputs, outputs, stride, append=False):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs if append else 0
        if not append and (stride != 1 or inputs != outputs):
            self.down, self.down_bn = conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)

    def forward(self, x, inner, before, after):
        out = F.relu(times(self.bn1(self.conv1(x)), inner[""]))
        out = times(self.bn2(self.conv2(out)), after)
        if hasattr(self, "down"):
            return F.relu(out + times(self.down_bn(self.down(x)), after))
        if self.stride > 1:
            x = x[:, :, ::2, ::2]
        zeros = torch.zeros(x.shape[0], self.more, *x.shape[2:], dtype=x.dtype)
        return F.relu(out + torch.cat([x, zeros], 1))


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride), 1×1 with four times the channels."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        middle = outputs // 4
        self.conv1, self.bn1 = conv(inputs, middle, 1), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = conv(middle, middle, 3, stride), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = conv(middle, outputs, 1), nn.BatchNorm2d(outputs)
        if stride != 1 or inputs != outputs:
            self.down, self.down_bn = conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)

    def forward(self, x, inner, before, after):
        out = F.relu(times(self.bn1(self.conv1(x)), inner["a"]))
        out = F.relu(times(self.bn2(self.conv2(out)), inner["b"]))
        out = times(self.bn3(self.conv3(out)), after)
        return F.relu(out + (times(self.down_bn(self.down(x)), after) if hasattr(self, "down") else x))


class PreActBlock(nn.Module):
    """Batch-norm and ReLU before each convolution; the projection reads what the first of them made."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs, 3)
        if stride != 1 or inputs != outputs:
            self.down = conv(inputs, outputs, 1, stride)

    def forward(self, x, inner, before, after):
        active = F.relu(times(self.bn1(x), before))
        out = self.conv2(F.relu(times(self.bn2(self.conv1(active)), inner[""])))
        return out + (self.down(active) if hasattr(self, "down") else x)


class PlainResNet(nn.Module):
    """Stem, stages, mean over pixels; `masks` maps a group's name to its vector."""

    def __init__(self, backbone, width, stem):
        super().__init__()
        self.cifar, self.preact, self.bottleneck = backbone in ("resnet20", "resnet32"), "preact" in backbone, backbone == "resnet50"
        self.pool = stem == "imagenet"
        self.conv1 = conv(3, width, 7, 2) if self.pool else conv(3, width, 3)
        self.names, self.blocks, inputs = [], nn.ModuleList(), width
        for stage, depth in enumerate(DEPTHS[backbone], 1):
            outputs = width * 2 ** (stage - 1) * (4 if self.bottleneck else 1)
            for index in range(depth):
                stride = 2 if stage > 1 and index == 0 else 1
                if self.cifar:
                    block = BasicBlock(inputs, outputs, stride, append=True)
                else:
                    block = (Bottleneck if self.bottleneck else PreActBlock if self.preact else BasicBlock)(inputs, outputs, stride)
                self.names.append((stage, f"stage{stage}.{index}"))
                self.blocks.append(block)
                inputs = outputs
        self.bn1 = nn.BatchNorm2d(inputs if self.preact else width)

    def stream(self, masks, stage):
        if stage == 0:
            return masks["stem" if self.bottleneck else "stage1"]
        return torch.cat([masks[f"stage{s}"] for s in range(1, stage + 1)]) if self.cifar else masks[f"stage{stage}"]

    def forward(self, images, masks):
        x, before = self.conv1(images), self.stream(masks, 0)
        if not self.preact:
            x = F.relu(times(self.bn1(x), before))
        if self.pool:
            x = F.max_pool2d(x, 3, 2, 1)
        for (stage, name), block in zip(self.names, self.blocks, strict=True):
            inner = {key.removeprefix(name): mask for key, mask in masks.items() if key.startswith(name)}
            after = self.stream(masks, stage)
            x = block(x, inner, before, after)
            before = after
        if self.preact:
            x = F.relu(times(self.bn1(x), before))
        return x.mean((2, 3))


def pairs(plain, extractor):
    """Yield (plain module, ours) for every convolution and batch-norm."""
    yield plain.conv1, extractor.stem
    yield plain.bn1, extractor.norm
    for theirs, ours in zip(plain.blocks, extractor.blocks, strict=True):
        for number, (conv_module, norm) in enumerate(zip(ours.convs, ours.norms, strict=True), 1):
            yield getattr(theirs, f"conv{number}"), conv_module
            yield getattr(theirs, f"bn{number}"), norm
        assert hasattr(theirs, "down") == (ours.shortcut is not None)
        assert hasattr(theirs, "down_bn") == (ours.shortcut_norm is not None)
        if hasattr(theirs, "down"):
            yield theirs.down, ours.shortcut
        if hasattr(theirs, "down_bn"):
            yield theirs.down_bn, ours.shortcut_norm


@torch.no_grad()
def twins(backbone, stem, width=3):
    """A plain network with random weights and statistics, and the extractor that was given all of them, in double precision."""
    torch.manual_seed(7)
    plain, extractor = PlainResNet(backbone, width, stem), Extractor(build_architecture(backbone, width=width, stem=stem))
    for theirs, ours in pairs(plain, extractor):
        if isinstance(theirs, nn.BatchNorm2d):
            theirs.weight.uniform_(0.4, 1.4)
            theirs.bias.normal_(0, 0.4)
            theirs.running_mean.normal_(0, 0.3)
            theirs.running_var.uniform_(0.5, 2.0)
            for name in ("bias", "running_mean", "running_var"):
                getattr(ours, name).copy_(getattr(theirs, name))
        assert ours.weight.shape == theirs.weight.shape
        ours.weight.copy_(theirs.weight)
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in extractor.parameters())
    return plain.double(), extractor.double()


def soft_masks(extractor, seed=0):
    channels = MaskLayout(extractor.architecture).channels
    return torch.rand(channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1


def images(height=11, width=14, count=2):
    return torch.randn(count, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


cases = pytest.mark.parametrize(("backbone", "stem"), [(backbone, stem) for backbone in BACKBONES for stem in ("small", "imagenet")])


@cases
@pytest.mark.parametrize("size", [(11, 14), (32, 32)])
def test_same_features_without_masks(backbone, stem, size):
    plain, extractor = twins(backbone, stem)
    plain.eval()
    extractor.eval()
    ones = MaskLayout(extractor.architecture).by_group(torch.ones_like(soft_masks(extractor)))
    with torch.no_grad():
        torch.testing.assert_close(extractor(images(*size)), plain(images(*size), ones), rtol=1e-10, atol=1e-12)


@cases
def test_same_features_with_soft_masks(backbone, stem):
    # A mask that is applied twice, or not at all, to a writer of a stream shows here.
    plain, extractor = twins(backbone, stem)
    masks = soft_masks(extractor)
    with torch.no_grad():
        expected = plain.eval()(images(), MaskLayout(extractor.architecture).by_group(masks))
        torch.testing.assert_close(extractor.eval()(images(), masks), expected, rtol=1e-10, atol=1e-12)


@cases
def test_same_training_step(backbone, stem):
    plain, extractor = twins(backbone, stem)
    masks = soft_masks(extractor).requires_grad_()
    theirs = masks.detach().clone().requires_grad_()
    batch = images(19, 17, count=4)
    features = extractor.train()(batch, masks)
    expected = plain.train()(batch, MaskLayout(extractor.architecture).by_group(theirs))
    torch.testing.assert_close(features, expected, rtol=1e-8, atol=1e-10)
    upstream = torch.randn(features.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    features.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(masks.grad, theirs.grad, rtol=1e-7, atol=1e-8)
    for plain_module, module in pairs(plain, extractor):
        torch.testing.assert_close(module.weight.grad, plain_module.weight.grad, rtol=1e-7, atol=1e-8)
        if isinstance(plain_module, nn.BatchNorm2d):
            torch.testing.assert_close(module.bias.grad, plain_module.bias.grad, rtol=1e-7, atol=1e-8)
            torch.testing.assert_close(module.running_mean, plain_module.running_mean, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(module.running_var, plain_module.running_var, rtol=1e-9, atol=1e-11)
