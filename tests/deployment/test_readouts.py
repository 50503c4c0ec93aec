"""Every kind of readout is exported and saved as what it is: cosine classifiers, several proxies per class, nearest class means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

from der_fast.deployment.exporter import export
from der_fast.deployment.facts import Facts, Preprocessing
from der_fast.deployment.network import FoldedNetwork
from der_fast.deployment.onnx_graph import build_onnx
from der_fast.deployment.pt2_file import DeployedNetwork
from der_fast.deployment.safetensors_file import read_safetensors, write_safetensors
from der_fast.model.architecture import build_architecture
from der_fast.model.layout import MaskLayout
from der_fast.model.readout import Readout
from der_fast.training.learner import Learner

RULE = Preprocessing((16, 16), (16, 16), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
KINDS = [(False, 1), (True, 1), (False, 3), (True, 3)]


def with_readout(network: FoldedNetwork, normalise: bool, proxies: int, scale: float = 1.0) -> FoldedNetwork:
    noise = torch.Generator().manual_seed(proxies)
    weight = torch.randn(4 * proxies, network.readout.features, generator=noise) * scale
    bias = torch.randn(4 * proxies, generator=noise)
    return replace(network, readout=Readout(weight, bias, normalise, proxies, temperature=0.5))


def facts_for(network: FoldedNetwork) -> Facts:
    readout = network.readout
    names = ("ant", "bee", "cow", "dog")
    return Facts(names, RULE, readout.temperature, (), network.checksum, "test", readout.normalise, readout.proxies)


@pytest.mark.parametrize("share", [1.0, 0.0])
@pytest.mark.parametrize(("normalise", "proxies"), KINDS)
def test_every_format_computes_the_readout(
    normalise: bool, proxies: int, share: float, random_network: Callable[..., tuple[FoldedNetwork, object]], tmp_path: Path
) -> None:
    architecture = build_architecture("resnet20", width=2)
    network, _ = random_network(architecture, [torch.full((MaskLayout(architecture).channels,), share > 0)])
    network = with_readout(network, normalise, proxies)
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    wanted, probabilities = network(images)
    assert wanted.shape == (3, 4)
    facts = facts_for(network)
    session = onnxruntime.InferenceSession(build_onnx(network, facts).SerializeToString(), providers=["CPUExecutionProvider"])
    for images_now, logits_now in ((images, wanted), (images[:1], wanted[:1])):
        logits, shares = (torch.from_numpy(v) for v in session.run(["logits", "probabilities"], {"images": images_now.numpy()}))
        assert torch.allclose(logits, logits_now, atol=1e-5)
        assert torch.allclose(shares, probabilities[: len(shares)], atol=1e-5)
    assert torch.allclose(DeployedNetwork(network, RULE)(images)[0], wanted, atol=1e-6)
    write_safetensors(tmp_path / "model.safetensors", network, facts)
    read, run = read_safetensors(tmp_path / "model.safetensors", torch.device("cpu"))
    assert read == facts
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(run(pixels)[0], network(RULE.transform()(pixels))[0])


def test_a_file_says_by_its_format_that_its_classifier_is_not_linear(random_network: Callable[..., tuple[FoldedNetwork, object]]) -> None:
    architecture = build_architecture("resnet20", width=2)
    network, _ = random_network(architecture, [torch.ones(MaskLayout(architecture).channels, dtype=torch.bool)])
    formats = {kind: facts_for(with_readout(network, *kind)).to_texts()["der_fast_format"] for kind in KINDS}
    assert formats == {(False, 1): "1", (True, 1): "2", (False, 3): "2", (True, 3): "2"}


@pytest.mark.parametrize("name", ["model.onnx", "model.safetensors"])
def test_a_learner_is_saved_read_and_exported_with_its_readout(name: str, learner: Learner, digits: Tensor, tmp_path: Path) -> None:
    model = learner.model
    rows = torch.randn(30, model.network.bank.features, generator=torch.Generator().manual_seed(0))
    model.readout = Readout(rows, torch.full((30,), -2.0), normalise=True, proxies=3, temperature=0.25)
    wanted = learner.predict(digits, top=3)
    loaded = Learner.load(learner.save(tmp_path / "run"), device="cpu")
    assert loaded.predict(digits, top=3) == wanted
    assert torch.equal(loaded.model.network.head.weight, model.network.head.weight)
    done = export(tmp_path / "run", tmp_path / name)
    assert done.difference < 1e-5
