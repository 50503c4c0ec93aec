"""The exported form of the networks of `bench growth`, run by ONNX Runtime."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import numpy as np
import torch

from der_fast.compaction import Arena
from der_fast.deployment.facts import Facts, Preprocessing
from der_fast.deployment.network import FoldedNetwork, extractor_of
from der_fast.deployment.onnx_file import CHANNEL_BLOCK
from der_fast.deployment.onnx_graph import INPUT, LOGITS, build_onnx
from der_fast.deployment.padding import padded_network
from der_fast.model.readout import linear_readout

# A file of twenty unpruned networks comes close to the size limit of an ONNX file.
MOST_STEPS = 10


def available() -> bool:
    """Return whether onnx and onnxruntime are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime"))


def onnx_run(arenas: Sequence[Arena], classes: int, images: torch.Tensor, threads: int) -> Callable[[], object]:
    """Return a function that classifies `images` (N, 3, H, W) with the exported network of `arenas` and a classifier of random weights."""
    import onnxruntime

    extractors = tuple(extractor_of(arena) for arena in arenas)
    head = torch.nn.Linear(sum(extractor.features for extractor in extractors), classes)
    whole = FoldedNetwork(arenas[0].architecture, extractors, linear_readout(head))
    network = padded_network(whole, CHANNEL_BLOCK)
    size = (images.shape[2], images.shape[3])
    plain = Preprocessing(size, size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    facts = Facts(tuple(map(str, range(classes))), plain, 1.0, (), "", "bench growth")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = build_onnx(network, facts).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    batch = np.ascontiguousarray(images.numpy())
    return lambda: session.run([LOGITS], {INPUT: batch})
