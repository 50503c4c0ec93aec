"""Five small runs give, bit for bit, what they gave when they were recorded."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

NAMES = runpy.run_path(str(Path(__file__).with_name("recorded.py")))


def test_weights_memory_and_metrics_are_what_was_recorded(tmp_path):
    recorded = json.loads(NAMES["RECORD"].read_text(encoding="utf-8"))
    found = NAMES["record"](tmp_path)
    if found["kind"] in recorded:
        assert found["facts"] == recorded[found["kind"]]
    elif found["facts"] not in recorded.values():
        pytest.skip(
            f"nothing was recorded on a processor and PyTorch of this kind ({found['kind']}), whose rounding differs from those recorded; "
            f"on a commit that is known to be right, run: python {Path(__file__).parent.name}/recorded.py --write FOLDER"
        )


def test_the_recorder_notices_a_change_of_one_bit(tmp_path):
    # What is compared hangs on every byte.
    digest, tensor_bytes = NAMES["digest"], NAMES["tensor_bytes"]
    import torch

    value = torch.arange(4.0)
    changed = value.clone()
    changed.view(torch.int32)[2] ^= 1
    assert digest(*tensor_bytes({"w": value})) != digest(*tensor_bytes({"w": changed}))
    assert digest(*tensor_bytes({"w": value})) != digest(*tensor_bytes({"v": value}))
    assert digest(*tensor_bytes({"w": value})) == digest(*tensor_bytes({"w": value.clone()}))
