"""The one pipeline of DALI: what it asks of the decoder, on a CPU and on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from der_fast.data.read.walk import ReadSettings

pytest.importorskip("nvidia.dali", reason="needs nvidia-dali (the extra 'dali'), which has no package for this system or Python")

from der_fast.data.read.dali import pipeline

SETTINGS = ReadSettings("dali", 3, prefetch=4, hardware_load=0.9, width_hint=640, height_hint=480)


class Asked(Exception):
    """The decoder was asked for."""


def asked(monkeypatch, device_id):
    """Return what a pipeline for a device is made with, and what its decoder is told."""
    made = {}
    whole = pipeline.Pipeline

    def make(**keywords):
        made.update(keywords)
        # Whatever is told a GPU's pipeline is told before anything looks for the GPU.
        return whole(**{**keywords, "device_id": None})

    def decode(encoded, **keywords):
        made["decoder"] = keywords
        raise Asked

    monkeypatch.setattr(pipeline, "Pipeline", make)
    monkeypatch.setattr(pipeline.fn, "decoders", SimpleNamespace(image_slice=decode))
    form = pipeline.Form(8, (55, 55), (48, 48), (0.5,) * 3, (0.2,) * 3, False, torch.float32, device_id)
    with pytest.raises(Asked):
        pipeline.build(form, SETTINGS, lambda: None)
    return made


def test_a_gpu_decodes_windows_with_its_own_decoder_and_buffers_made_in_advance(monkeypatch):
    found = asked(monkeypatch, 1)
    assert (found["device_id"], found["num_threads"], found["prefetch_queue_depth"], found["batch_size"]) == (1, 3, 4, 8)
    decoder = found["decoder"]
    assert {"start", "shape"} <= decoder.keys() and decoder["axis_names"] == "HW" and decoder["device"] == "mixed"
    assert (decoder["hw_decoder_load"], decoder["preallocate_width_hint"], decoder["preallocate_height_hint"]) == (0.9, 640, 480)


def test_a_cpu_decodes_windows_too(monkeypatch):
    found = asked(monkeypatch, None)
    assert (found["device_id"], found["decoder"]["device"]) == (None, "cpu")
    assert {"start", "shape"} <= found["decoder"].keys() and not [name for name in found["decoder"] if "hint" in name or "hw" in name]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_a_gpu_decodes_what_a_cpu_decodes(photos, open_photos, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    for jitter in (0.0, 0.4):
        train, _, transform, _ = open_photos(photos, "dali", cache_gib=0.0, brightness=jitter)
        passes = []
        for device in ("cpu", "cuda"):
            chance = torch.Generator().manual_seed(3)
            batches = train.batches(None, 4, transform=transform, generator=chance, shuffle=True, device=device, dtype=dtype)
            passes.append([(batch.indices, batch.images) for batch in batches])
        grey = 1.0 if dtype == torch.uint8 else 1 / 255 / 0.25
        for (one, wanted), (other, found) in zip(*passes, strict=True):
            assert torch.equal(one, other) and found.device.type == "cuda" and found.dtype == dtype
            assert (found.cpu().float() - wanted.float()).abs().mean() < 2 * grey
