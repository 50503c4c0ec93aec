"""The compact network computes what the binary-masked one does: every backbone, stem and kind of mask pattern."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast.compaction import plan
from der_fast.model.architecture import BACKBONES, build_architecture
from der_fast.model.classifier import new_classifier, slice_classifier
from der_fast.model.extractor import Convolution, Extractor, MaskedBatchNorm
from der_fast.model.layout import MaskLayout

compact = runpy.run_path(str(Path(__file__).with_name("compact_network.py")))["compact"]
TOLERANCE = 1e-5
CASES = [(backbone, stem) for backbone in BACKBONES for stem in ("small", "imagenet")]
cases = pytest.mark.parametrize(("backbone", "stem"), CASES)


def seeded(number):
    return torch.Generator().manual_seed(number)


def images(seed=3, count=3):
    return torch.randn(count, 3, 21, 18, generator=seeded(seed)) * 0.8 + 0.1


@functools.cache
@torch.no_grad()
def trained(backbone, stem, width=3):
    """A full network in evaluation mode whose batch-norm has the statistics of a real pass, with noise, and uneven γ (some negative), β."""
    network = Extractor(build_architecture(backbone, width=width, stem=stem)).initialise(seeded(0))
    norms, generator = [module for module in network.modules() if isinstance(module, MaskedBatchNorm)], seeded(1)
    for norm in norms:
        norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) * 1.5 - 0.25)
        norm.bias.copy_(torch.randn(norm.bias.shape, generator=generator) * 0.5)
        norm.momentum = 1.0
    network.train()(images(seed=2, count=6))
    for norm in norms:
        norm.running_mean.add_(torch.randn(norm.bias.shape, generator=generator) * 0.2)
        norm.running_var.mul_(torch.rand(norm.bias.shape, generator=generator) + 0.5).add_(0.05)
    return network.eval()


@torch.no_grad()
def check(backbone, stem, keep):
    """Compact, compare on a batch, count; return the plan."""
    dense = trained(backbone, stem)
    layout = MaskLayout(dense.architecture)
    decision = plan(layout, keep)
    small = compact(dense, decision)
    assert not small.training and small.features == int(decision.features.sum())
    whole, found = dense(images(), keep.float()), small(images())
    expected = whole[:, decision.features]
    assert found.shape == expected.shape and bool(torch.isfinite(expected).all())
    assert sum(p.numel() for p in small.parameters()) == decision.parameters == layout.kept_parameters(decision.keep)
    if decision.constant:
        assert small.features == 0
        # The image no longer matters, so the features can move into the classifier's bias.
        assert torch.equal(dense(images(seed=4), keep.float()), whole)
    else:
        assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())
        assert bool((whole[:, ~decision.features] == 0).all())
    head = new_classifier(dense.features, 5, seeded(6))
    sliced = slice_classifier(head, decision.features, whole[0] if decision.constant else None)
    logits = head(whole)
    assert float((sliced(found) - logits).abs().max()) <= TOLERANCE * float(logits.abs().max())
    return decision


def all_kept(backbone, stem):
    return torch.ones(trained(backbone, stem).maskable, dtype=torch.bool)


def parts_of(backbone, stem, keep):
    return MaskLayout(trained(backbone, stem).architecture).by_group(keep)


@cases
def test_everything_kept(backbone, stem):
    assert not check(backbone, stem, all_kept(backbone, stem)).constant


@cases
def test_nothing_kept(backbone, stem):
    assert check(backbone, stem, ~all_kept(backbone, stem)).constant


@cases
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_channel_per_group(backbone, stem, seed):
    keep, generator = ~all_kept(backbone, stem), seeded(seed)
    for part in parts_of(backbone, stem, keep).values():
        part[int(torch.randint(len(part), (), generator=generator))] = True
    decision = check(backbone, stem, keep)
    assert set(decision.widths.values()) == {1}


@cases
def test_all_but_one_channel_per_group(backbone, stem):
    keep, generator = all_kept(backbone, stem), seeded(5)
    for part in parts_of(backbone, stem, keep).values():
        part[int(torch.randint(len(part), (), generator=generator))] = False
    assert not check(backbone, stem, keep).constant


@cases
def test_each_group_emptied_in_turn(backbone, stem):
    layout = MaskLayout(trained(backbone, stem).architecture)
    appended = {"stage2", "stage3"} if backbone in ("resnet20", "resnet32") else set()
    for name in layout.names:
        keep = all_kept(backbone, stem)
        parts_of(backbone, stem, keep)[name][:] = False
        assert check(backbone, stem, keep).constant == ("." not in name and name not in appended), name


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_group_alone_cut_to_one_channel(backbone, stem="small"):
    for name in MaskLayout(trained(backbone, stem).architecture).names:
        keep = all_kept(backbone, stem)
        parts_of(backbone, stem, keep)[name][1:] = False
        assert not check(backbone, stem, keep).constant


@cases
def test_all_branches_deleted(backbone, stem):
    keep = all_kept(backbone, stem)
    for name, part in parts_of(backbone, stem, keep).items():
        part[:] = "." not in name
    assert not check(backbone, stem, keep).constant


@cases
def test_streams_of_one_channel_with_whole_branches(backbone, stem):
    keep = all_kept(backbone, stem)
    for name, part in parts_of(backbone, stem, keep).items():
        part[1:] = "." in name
    assert not check(backbone, stem, keep).constant


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(CASES),
    seed=st.integers(0, 10_000),
    densities=st.lists(st.sampled_from([0.1, 0.4, 0.7, 0.95]), min_size=1, max_size=5),
)
def test_random_patterns(case, seed, densities):
    """Groups take turns with the densities, so that thick and thin layers meet."""
    keep, generator = all_kept(*case), seeded(seed)
    for number, part in enumerate(parts_of(*case, keep).values()):
        part[:] = torch.rand(len(part), generator=generator) < densities[number % len(densities)]
    check(*case, keep)


def random_keep(layout, seed=0, density=0.6):
    """A random pattern in which no stream is empty."""
    keep = torch.rand(layout.channels, generator=seeded(seed)) < density
    for name in layout.stream_groups():
        layout.by_group(keep)[name][0] = True
    return keep


def modules(network):
    """Every convolution and batch-norm by the name it has in the description."""
    architecture = network.architecture
    yield "stem", architecture.stem.source, architecture.stem.target, network.stem
    yield "norm", None, architecture.features if architecture.preactivation else architecture.stem.target, network.norm
    for description, block in zip(architecture.blocks, network.blocks, strict=True):
        for number, conv in enumerate(description.convs):
            yield f"{description.name} {conv.name}", conv.source, conv.target, block.convs[number]
            normalised = conv.source if architecture.preactivation else conv.target
            yield f"{description.name} norm {number}", None, normalised, block.norms[number]
        if description.shortcut is not None:
            yield f"{description.name} shortcut", description.source, description.target, block.shortcut
        if block.shortcut_norm is not None:
            yield f"{description.name} shortcut norm", None, description.target, block.shortcut_norm


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_the_kept_rows_and_columns_bit_for_bit(backbone, stem, dtype):
    architecture = build_architecture(backbone, width=3, stem=stem)
    dense = Extractor(architecture).initialise(seeded(0)).to(dtype)
    with torch.no_grad():
        for tensor in dense.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=seeded(tensor.numel()), dtype=dtype))
    layout = MaskLayout(architecture)
    keep = random_keep(layout)
    small, parts, seen = compact(dense, plan(layout, keep)), layout.by_group(keep), 0
    for (name, source, target, before), (_, _, _, after) in zip(modules(dense), modules(small), strict=True):
        rows = torch.cat([parts[group] for group in target])
        if isinstance(before, Convolution):
            columns = torch.cat([parts[group] for group in source]) if source else torch.ones(3, dtype=torch.bool)
            assert torch.equal(after.weight, before.weight[rows][:, columns]), name
            seen += 1
        else:
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                assert torch.equal(getattr(after, tensor), getattr(before, tensor)[rows]), name
                seen += 1
    assert all(value.dtype == dtype for value in small.state_dict().values())
    assert seen == len(small.state_dict())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_full_network_stays_as_it_is_and_shares_nothing(backbone):
    dense = Extractor(build_architecture(backbone, width=3)).initialise(seeded(0)).train()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    layout = MaskLayout(dense.architecture)
    keep = torch.ones(layout.channels, dtype=torch.bool)
    small = compact(dense, plan(layout, keep))
    with torch.no_grad():
        for tensor in small.state_dict().values():
            tensor.fill_(7)
    assert dense.training
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_a_plan_for_another_network_is_refused():
    dense = trained("resnet18", "small")
    for other in (build_architecture("resnet18", width=3, stem="imagenet"), build_architecture("preact_resnet18", width=3)):
        layout = MaskLayout(other)
        with pytest.raises(ValueError, match=f"full {other.name}, not for this resnet18"):
            compact(dense, plan(layout, torch.ones(layout.channels, dtype=torch.bool)))


def test_a_compact_network_cannot_be_compacted_by_the_full_one_s_plan():
    dense = trained("resnet20", "small")
    layout = MaskLayout(dense.architecture)
    decision = plan(layout, random_keep(layout))
    with pytest.raises(ValueError, match="the plan is for the full resnet20"):
        compact(compact(dense, decision), decision)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bfloat16_autocast_with_deleted_branches(backbone):
    # A branch without channels yields zeros of its input's dtype, which must go together with the stream's.
    dense = trained(backbone, "small")
    layout = MaskLayout(dense.architecture)
    keep = torch.ones(layout.channels, dtype=torch.bool)
    for name, part in layout.by_group(keep).items():
        part[:] = "." not in name
    small = compact(dense, plan(layout, keep))
    with torch.no_grad():
        exact = small(images())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = small(images()).float()
    assert 0 < float((rounded - exact).abs().mean() / exact.abs().mean()) < 0.05
