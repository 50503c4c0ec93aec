"""Exported models take images in every form in which a learner takes them, and so does the comparison before a file is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import der_fast
from der_fast.data import as_image_batch
from der_fast.data.decode import parts
from der_fast.data.decode import pixels as decode
from der_fast.deployment import exporter
from der_fast.deployment.deployed import DeployedModel
from der_fast.errors import ConfigError, DataError
from der_fast.training.learner import Learner
from der_fast.training.prediction import Prediction

Same = Callable[[list[Prediction], list[Prediction]], bool]


@pytest.fixture(scope="module", params=["onnx", "safetensors", "run"])
def model(request: pytest.FixtureRequest, run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DeployedModel:
    if request.param == "run":
        return der_fast.load(run_folder, device="cpu")
    return der_fast.load(der_fast.export(run_folder, tmp_path_factory.mktemp("forms") / f"model.{request.param}").path)


def forms_of(pixels: np.ndarray) -> dict[str, Any]:
    """One grey digit, uint8 H × W × 3, as people hold it."""
    grey, chw = pixels[..., 0].copy(), pixels.transpose(2, 0, 1).copy()
    clear = np.dstack([pixels, np.full_like(grey, 255)])
    return {
        "Pillow": Image.fromarray(pixels), "H × W": grey, "H × W × 1": grey[..., None], "H × W × 3": pixels, "H × W × 4": clear,
        "C × H × W": torch.from_numpy(chw), "1 × H × W": torch.from_numpy(grey)[None], "array C × H × W": chw,
        "floating tensor": torch.from_numpy(chw) / 255, "floating array": pixels / 255,
        "4 × H × W": torch.from_numpy(clear).permute(2, 0, 1), "backwards": pixels[::-1].copy()[::-1],
        "many": torch.from_numpy(chw)[None], "in a list": [torch.from_numpy(chw)],
    }  # fmt: skip


def test_one_image_in_any_form_is_one_answer(model: DeployedModel, learner: Learner, digits: Tensor, same: Same) -> None:
    wanted = learner.predict(digits[:1], top=10)
    for name, form in forms_of(digits[0].numpy()).items():
        for answers in (model.predict(form, top=10), learner.predict(form, top=10)):
            assert len(answers) == 1, name
            assert same(answers, wanted), name


@pytest.mark.parametrize("shape", [(3, 8, 3), (70, 8, 8), (5, 6, 7)])
def test_a_form_that_is_not_certain_is_refused(model: DeployedModel, learner: Learner, shape: tuple[int, ...]) -> None:
    for one in (model, learner):
        with pytest.raises(DataError, match=str(shape[0])):
            one.predict(np.zeros(shape, np.uint8))


def test_the_comparison_before_a_file_is_written_takes_them_too(run_folder: Path, digits: Tensor, tmp_path: Path) -> None:
    for form in forms_of(digits[0].numpy()).values():
        assert der_fast.export(run_folder, tmp_path / "model.safetensors", images=form).images == 1
    with pytest.raises(DataError, match=r"\(70, 8, 8\)"):
        der_fast.export(run_folder, tmp_path / "other.safetensors", images=digits[..., 0])
    assert not (tmp_path / "other.safetensors").exists()


def test_only_the_images_that_are_compared_are_decoded(
    learner: Learner, digits: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(digits[0].numpy()).save(tmp_path / "one.png")
    opened: list[Path] = []
    real = decode.decode
    monkeypatch.setattr(decode, "decode", lambda path, size: (opened.append(path), real(path, size))[1])
    assert len(exporter._check_images(learner, [tmp_path / "one.png"] * 500)) == len(opened) == exporter.CHECK_IMAGES


def test_files_are_decoded_and_answered_part_by_part(
    model: DeployedModel, learner: Learner, digits: Tensor, same: Same, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / f"{index:02}.png" for index in range(10)]
    for path, pixels in zip(paths, digits, strict=False):
        Image.fromarray(pixels.numpy()).save(path)
    wanted = learner.predict(digits[:10], top=10)
    monkeypatch.setattr(parts, "PART_BYTES", 4 * 8 * 8 * 3)
    happened: list[str] = []
    real = parts.decode_files
    monkeypatch.setattr(parts, "decode_files", lambda files, size: (happened.append(f"{len(files)} decoded"), real(files, size))[1])
    for one, place in ((model, "der_fast.deployment.deployed"), (learner, "der_fast.training.trained")):
        happened.clear()
        with monkeypatch.context() as patch:
            patch.setattr(f"{place}.predictions_of", noting(happened, one))
            answers = one.predict(paths, top=10)
        assert happened == ["4 decoded", "4 answered", "4 decoded", "4 answered", "2 decoded", "2 answered"]
        assert same(answers, wanted) and len(answers) == 10


def noting(happened: list[str], one: Any) -> Callable[..., list[Prediction]]:
    from der_fast.training.prediction import predictions_of

    def noted(probabilities: Tensor, *rest: Any) -> list[Prediction]:
        happened.append(f"{len(probabilities)} answered")
        return predictions_of(probabilities, *rest)

    return noted


@pytest.mark.parametrize("top", [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_integers_of_every_type_are_integers(model: DeployedModel, learner: Learner, digits: Tensor, top: Any) -> None:
    assert len(model.predict(digits[:2], top=top)[1].top) == len(learner.predict(digits[:2], top=top)[1].top) == 3


@pytest.mark.parametrize("top", [2.0, "2", None, np.float32(2), np.array([2, 3]), 0, -1, np.int8(-1)])
def test_another_top_is_refused(model: DeployedModel, learner: Learner, digits: Tensor, top: Any) -> None:
    for one in (model, learner):
        with pytest.raises(ConfigError, match="top takes a whole number of at least 1"):
            one.predict(digits[:2], top=top)


def test_outputs_takes_pixels_only(model: DeployedModel, digits: Tensor) -> None:
    assert model.outputs(as_image_batch(list(digits[:3]), model.image_size))[0].shape == (3, 10)
    for pixels in (digits[:2].permute(0, 3, 1, 2), digits[:2] / 255, digits[0], digits[:0]):
        with pytest.raises(DataError, match=r"outputs\(\) needs uint8 pixels of shape \(N, 8, 8, 3\)"):
            model.outputs(pixels)
