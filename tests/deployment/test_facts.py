"""What a file says about itself comes back as it was, and nothing else is taken for it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from der_fast.deployment.facts import Facts, Preprocessing, facts_of
from der_fast.errors import ExportError
from der_fast.training.learner import Learner

RULE = Preprocessing((36, 40), (32, 36), (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
FACTS = Facts(("cat", "Käfer"), RULE, 3.5, ({"step": 1, "top1": 91.5},), "ab" * 32, "der_fast 1")


def test_facts_come_back() -> None:
    for facts in (FACTS, FACTS.taking("uint8")):
        texts = facts.to_texts()
        assert all(isinstance(text, str) for text in texts.values())
        assert Facts.from_texts({**texts, "added by others": "x"}, "file") == facts


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"der_fast_format": None}, "not exported by der_fast"),
        ({"der_fast_format": "3"}, "format 3; this version reads formats 1 and 2"),
        ({"class_names": None}, "damaged"),
        ({"class_names": "[]"}, "damaged"),
        ({"class_names": '["cat"'}, "damaged"),
        ({"temperature": "0"}, "damaged"),
        ({"temperature": "NaN"}, "damaged"),
        ({"steps": "[1]"}, "damaged"),
        ({"preprocessing": "[]"}, "damaged"),
        *(
            ({"preprocessing": json.dumps({**RULE.to_json(), **wrong})}, "damaged")
            for wrong in (
                {"resize": [36]}, {"resize": [0, 40]}, {"crop": [37, 36]}, {"std": [0.2, 0, 0.3]}, {"mean": [0.1, 0.2]},
                {"mean": ["a", 0, 0]}, {"input": {"dtype": "float16"}}, {"input": {}},
            )
        ),
    ],
)  # fmt: skip
def test_facts_that_cannot_be_read(change: dict[str, str | None], words: str) -> None:
    texts = {key: text for key, text in {**FACTS.to_texts(), **change}.items() if text is not None}
    with pytest.raises(ExportError, match=words) as error:
        Facts.from_texts(texts, "model.onnx")
    assert "model.onnx" in str(error.value)


def test_the_rule_does_what_the_learner_does(learner: Learner) -> None:
    facts = facts_of(learner, "0")
    assert facts.class_names == learner.class_names
    assert facts.temperature == learner.model.readout.temperature == 3.0
    assert [step["class_names"] for step in facts.steps] == [result.class_names for result in learner.results]
    assert facts.preprocessing.resize == facts.preprocessing.crop == learner.image_size == (8, 8)


def test_central_crop_and_normalisation() -> None:
    pixels = torch.arange(36 * 40 * 3).reshape(1, 36, 40, 3).remainder(256).to(torch.uint8)
    mean, std = torch.tensor(RULE.mean).double(), torch.tensor(RULE.std).double()
    wanted = ((pixels[:, 2:34, 2:38].double() / 255 - mean) / std).permute(0, 3, 1, 2)
    assert (RULE.transform()(pixels).double() - wanted).abs().max() < 1e-6
    assert (RULE.corner, RULE.input_shape, replace(RULE, input="uint8").input_shape) == ((2, 2), (3, 32, 36), (36, 40, 3))
