"""What is exported computes what the dense, masked network computes: every backbone and stem, lost branches, padding, nothing left."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from der_fast.deployment.facts import Facts, Preprocessing
from der_fast.deployment.network import FoldedNetwork
from der_fast.deployment.onnx_graph import build_onnx
from der_fast.deployment.pt2_file import DeployedNetwork
from der_fast.model.architecture import BACKBONES, Architecture, build_architecture
from der_fast.model.layout import MaskLayout

RULE = Preprocessing((20, 18), (17, 16), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
Build = Callable[..., tuple[FoldedNetwork, Callable[[Tensor], Tensor]]]


def facts_for(network: FoldedNetwork, rule: Preprocessing = RULE) -> Facts:
    return Facts(("ant", "bee", "cow", "dog"), rule, network.readout.temperature, (), network.checksum, "test")


def session_for(network: FoldedNetwork, facts: Facts) -> onnxruntime.InferenceSession:
    model = build_onnx(network, facts)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run(session: onnxruntime.InferenceSession, images: Tensor) -> list[Tensor]:
    return [torch.from_numpy(value) for value in session.run(["logits", "probabilities"], {"images": images.numpy()})]


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, *RULE.crop, generator=torch.Generator().manual_seed(count))


def relative(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max())


def random_keep(architecture: Architecture, seed: int, share: float = 0.6, lost: int | None = None) -> Tensor:
    """Draw a mask; one channel of every stream stays, and every third inner group, from `lost` on, is empty."""
    layout = MaskLayout(architecture)
    keep = torch.rand(layout.channels, generator=torch.Generator().manual_seed(seed)) < share
    parts = layout.by_group(keep)
    for name in layout.stream_groups():
        parts[name][0] = True
    inner = [name for name in layout.names if name not in layout.stream_groups()]
    for name in inner[lost::3] if lost is not None else ():
        parts[name][:] = False
    return keep


@pytest.mark.parametrize(("backbone", "stem", "lost"), [(name, ("small", "imagenet")[i % 2], i % 3) for i, name in enumerate(BACKBONES)])
def test_every_backbone(backbone: str, stem: str, lost: int, random_network: Build) -> None:
    architecture = build_architecture(backbone, width=4, stem=stem)
    keeps = [random_keep(architecture, 1), random_keep(architecture, 2, lost=lost)]
    network, masked = random_network(architecture, keeps)
    batch = images()
    wanted = masked(batch)
    logits, probabilities = run(session_for(network, facts_for(network)), batch)
    assert relative(logits, wanted) < 1e-5
    assert relative(probabilities, torch.softmax(wanted / 2, 1)) < 1e-5
    assert relative(DeployedNetwork(network, RULE)(batch)[0], wanted) < 1e-5


@pytest.mark.parametrize("backbone", ["resnet20", "preact_resnet18"])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
def test_both_stems(backbone: str, stem: str, random_network: Build) -> None:
    architecture = build_architecture(backbone, width=4, stem=stem)
    network, masked = random_network(architecture, [random_keep(architecture, 3)])
    assert relative(run(session_for(network, facts_for(network)), images())[0], masked(images())) < 1e-5


def test_batches_of_any_length(random_network: Build) -> None:
    architecture = build_architecture("resnet20", width=2)
    network, masked = random_network(architecture, [random_keep(architecture, 4)])
    session = session_for(network, facts_for(network))
    for count in (1, 2, 7):
        assert relative(run(session, images(count))[0], masked(images(count))) < 1e-5


def test_raw_pixels(random_network: Build) -> None:
    architecture = build_architecture("resnet20", width=2)
    network, masked = random_network(architecture, [random_keep(architecture, 4)])
    pixels = torch.randint(0, 256, (3, *RULE.resize, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    rule = replace(RULE, input="uint8")
    wanted = masked(RULE.transform()(pixels))
    session = session_for(network, facts_for(network, rule))
    assert session.get_inputs()[0].shape == ["batch", 20, 18, 3]
    assert relative(run(session, pixels)[0], wanted) < 1e-5
    assert relative(DeployedNetwork(network, rule)(pixels)[0], wanted) < 1e-5


def test_an_extractor_of_which_nothing_is_left(random_network: Build) -> None:
    architecture = build_architecture("resnet20", width=2)
    nothing = torch.zeros(MaskLayout(architecture).channels, dtype=torch.bool)
    for keeps in ([nothing, random_keep(architecture, 5)], [nothing, nothing]):
        network, masked = random_network(architecture, keeps)
        session = session_for(network, facts_for(network))
        for count in (1, 3):
            wanted = masked(images(count))
            assert relative(run(session, images(count))[0], wanted) < 1e-5
            assert relative(DeployedNetwork(network, RULE)(images(count))[0], wanted) < 1e-5


def test_padded_channels_are_not_seen(random_network: Build) -> None:
    """Stored widths are multiples of 4, the zeros lie between the true features, and the classifier still reads the true ones."""
    architecture = build_architecture("resnet20", width=6)
    keep = random_keep(architecture, 6)
    network, masked = random_network(architecture, [keep])
    padded, _ = random_network(architecture, [keep], align=4)
    assert padded.extractors[0].features == network.extractors[0].features < padded.extractors[0].ops[-1].outputs
    wanted = masked(images())
    assert relative(run(session_for(padded, facts_for(padded)), images())[0], wanted) < 1e-5
    assert relative(DeployedNetwork(padded, RULE)(images())[0], wanted) < 1e-5


def test_the_torch_module_can_be_traced_and_moved(random_network: Build) -> None:
    """Weights are buffers: whoever casts the module changes what it computes with."""
    architecture = build_architecture("resnet20", width=2)
    network, _ = random_network(architecture, [random_keep(architecture, 4)])
    module = DeployedNetwork(network, RULE)
    assert sum(buffer.numel() for buffer in module.buffers()) == sum(tensor.numel() for _, tensor in network.named_tensors())
    assert module.double()(images().double())[0].dtype == torch.float64
    torch.save(module.state_dict(), io.BytesIO())


def test_the_checksum_is_of_names_shapes_and_values(random_network: Build) -> None:
    architecture = build_architecture("resnet20", width=2)
    network, _ = random_network(architecture, [random_keep(architecture, 4)])
    again, _ = random_network(architecture, [random_keep(architecture, 4)])
    assert again.checksum == network.checksum
    changed = [
        replace(network, readout=replace(network.readout, bias=torch.nextafter(network.readout.bias, torch.tensor(9.0)))),
        replace(network, readout=replace(network.readout, weight=network.readout.weight.reshape(2, -1), bias=network.readout.bias[:2])),
        replace(network, extractors=(*network.extractors, *network.extractors)),
    ]
    assert len({network.checksum, *(other.checksum for other in changed)}) == 4


def test_metadata_and_versions(random_network: Build) -> None:
    architecture = build_architecture("resnet20", width=2)
    network, _ = random_network(architecture, [random_keep(architecture, 4)])
    facts = facts_for(network)
    model: Any = build_onnx(network, facts)
    assert {entry.key: entry.value for entry in model.metadata_props} == facts.to_texts()
    assert (model.ir_version, [entry.version for entry in model.opset_import]) == (8, [17])
    weights = {entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer}
    for name, tensor in network.named_tensors():
        np.testing.assert_array_equal(weights[name], tensor.numpy())
