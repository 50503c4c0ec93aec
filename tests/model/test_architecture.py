"""Groups, sizes and parameter counts of the descriptions, against published numbers and counts by hand."""

from __future__ import annotations

import pytest

from der_fast.errors import ConfigError
from der_fast.model.architecture import BACKBONES, build_architecture
from der_fast.model.extractor import Extractor

# torchvision's networks less their classifier.
IMAGENET = {"resnet18": 11_176_512, "resnet34": 21_284_672, "resnet50": 23_508_032}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("backbone", "parameters"), IMAGENET.items())
def test_parameters_with_the_imagenet_stem(backbone, parameters):
    assert build_architecture(backbone, stem="imagenet").parameters() == parameters


def test_resnet18_for_small_images_has_11_2_million():
    # The stem shrinks from 7×7 to 3×3; with the 100 classes of CIFAR-100 it is the network of the paper.
    parameters = build_architecture("resnet18").parameters()
    assert parameters == IMAGENET["resnet18"] - 64 * 3 * (49 - 9)
    assert round((parameters + 512 * 100 + 100) / 1e6, 1) == 11.2


@pytest.mark.parametrize(("backbone", "parameters", "millions"), [("resnet20", 269_722, 0.27), ("resnet32", 464_154, 0.46)])
def test_cifar_resnets_with_ten_classes(backbone, parameters, millions):
    # Table 6 of He et al. 2016 has 0.27 and 0.46 million.
    found = build_architecture(backbone).parameters() + 64 * 10 + 10
    assert found == parameters
    assert round(found / 1e6, 2) == millions


def test_preact_resnet18_counted_by_hand():
    stem, wide = 3 * 64 * 9, [64, 128, 256, 512]
    convs = sum(w * 9 * (inputs + 3 * w) for w, inputs in zip(wide, [64, *wide[:3]], strict=True))
    shortcuts = sum(2 * w * w for w in wide[:3])
    # Each block normalises what it reads and what is inside; one more stands at the end.
    norms = 2 * sum(inputs + 3 * w for w, inputs in zip(wide, [64, *wide[:3]], strict=True)) + 2 * 512
    assert build_architecture("preact_resnet18").parameters() == stem + convs + shortcuts + norms


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("stem", ["small", "imagenet"])
@pytest.mark.parametrize("width", [1, 3, 8])
def test_description_and_module_count_alike(backbone, stem, width):
    architecture = build_architecture(backbone, width=width, stem=stem)
    assert architecture.parameters() == count(Extractor(architecture))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_width_scales_every_group(backbone):
    narrow, wide = (build_architecture(backbone, width=width).groups for width in (2, 6))
    assert {name: 3 * channels for name, channels in narrow.items()} == dict(wide)
    default = build_architecture(backbone)
    assert default.groups["stage1"] == {"resnet20": 16, "resnet32": 16, "resnet50": 256}.get(backbone, 64)


def test_resnet18_has_four_streams_and_eight_inner_groups():
    groups = build_architecture("resnet18").groups
    streams = {name: width for name, width in groups.items() if "." not in name}
    inner = {name: width for name, width in groups.items() if "." in name}
    assert streams == {"stage1": 64, "stage2": 128, "stage3": 256, "stage4": 512}
    assert inner == {f"stage{s}.{b}": 64 << (s - 1) for s in (1, 2, 3, 4) for b in (0, 1)}


@pytest.mark.parametrize(
    ("backbone", "streams", "inner"),
    [("resnet34", 4, 16), ("resnet50", 5, 32), ("preact_resnet18", 4, 8), ("resnet20", 3, 9), ("resnet32", 3, 15)],
)
def test_number_of_groups(backbone, streams, inner):
    names = list(build_architecture(backbone).groups)
    assert [sum("." not in name for name in names), sum("." in name for name in names)] == [streams, inner]


def test_cifar_streams_widen_by_appending():
    architecture = build_architecture("resnet20")
    assert [architecture.width(block.target) for block in architecture.blocks] == [16] * 3 + [32] * 3 + [64] * 3
    assert architecture.features == ("stage1", "stage2", "stage3")
    assert all(block.shortcut is None for block in architecture.blocks)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_block_starts_where_the_one_before_ended(backbone):
    architecture = build_architecture(backbone)
    source = architecture.stem.target
    for block in architecture.blocks:
        assert block.source == source
        assert [conv.source for conv in block.convs[1:]] == [conv.target for conv in block.convs[:-1]]
        if block.shortcut is not None:
            assert (block.shortcut.source, block.shortcut.target) == (block.source, block.target)
            assert block.shortcut.stride == block.stride
        elif block.source != block.target:
            assert block.target[: len(block.source)] == block.source
        source = block.target
    assert source == architecture.features
    written = {name for conv in architecture.convs() for name in conv.target}
    assert written == set(architecture.groups)


def test_parameters_at_other_widths():
    architecture = build_architecture("resnet18", width=4)
    widths = {name: channels - 1 for name, channels in architecture.groups.items()}
    assert architecture.parameters(widths) == count(Extractor(architecture, widths))
    assert architecture.parameters(dict.fromkeys(architecture.groups, 0)) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backbone": "resnet19"}, r"model\.backbone: .*'resnet19'.*resnet18, resnet34, resnet50, preact_resnet18, resnet20, resnet32"),
        ({"backbone": "ResNet18"}, r"model\.backbone: .*'ResNet18'"),
        ({"backbone": ""}, r"model\.backbone: .*''"),
        ({"backbone": "resnet18", "stem": "large"}, r"model\.stem: .*'large'.*'small' or 'imagenet'"),
        ({"backbone": "resnet18", "width": 0}, r"model\.width.*at least 1, not 0"),
        ({"backbone": "resnet32", "width": -4}, r"model\.width.*at least 1, not -4"),
    ],
)
def test_unusable_descriptions(arguments, words):
    with pytest.raises(ConfigError, match=words):
        build_architecture(**arguments)
