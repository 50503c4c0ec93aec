"""The network as an ONNX model, built operation by operation from the programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from der_fast.compaction.program import AFFINE, BIAS, CONV, FEATURES, IMAGE, MEAN, POOL, WIDEN, Op
from der_fast.deployment.facts import UINT8_INPUT, Facts, Preprocessing
from der_fast.deployment.network import FEATURE_INDEX, HEAD_BIAS, HEAD_WEIGHT, FoldedExtractor, FoldedNetwork, tensor_name
from der_fast.deployment.optional import optional

# Opset and IR of ONNX 1.12: every runtime since 2022 supports them, and nothing newer is needed.
OPSET, IR_VERSION = 17, 8
INPUT, LOGITS, PROBABILITIES = "images", "logits", "probabilities"
BATCH = "batch"


def build_onnx(network: FoldedNetwork, facts: Facts) -> Any:
    """Return the ONNX model (`onnx.ModelProto`), with the facts as its metadata.

    Its input is ``images``, with a dynamic batch, as the preprocessing describes; its outputs are ``logits`` and ``probabilities``,
    both float32 (batch, C).

    Raises:
        ExportError: onnx is not installed.
    """
    onnx = optional("onnx", "writing .onnx files")
    graph = _Graph(onnx)
    images = graph.preprocess(facts.preprocessing)
    rows = [graph.extractor(number, extractor, images) for number, extractor in enumerate(network.extractors, 1) if extractor.features]
    graph.classifier(network, rows)
    helper, taken = onnx.helper, facts.preprocessing
    kind = onnx.TensorProto.UINT8 if taken.input == UINT8_INPUT else onnx.TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(INPUT, kind, [BATCH, *taken.input_shape])]
    shape = [BATCH, network.readout.classes]
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in (LOGITS, PROBABILITIES)]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "der_fast", inputs, outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="der_fast",
        doc_string="Class-incremental image classifier. images → logits, probabilities; see the metadata.",
    )
    helper.set_model_props(model, facts.to_texts())
    return model


class _Graph:
    """Nodes and initializers so far; every method adds some and returns the name of their result."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.constants: set[str] = set()

    def node(self, kind: str, inputs: Sequence[str], target: str, **attributes: Any) -> str:
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [target], name=target, **attributes))
        return target

    def constant(self, name: str, value: NDArray[Any] | Tensor) -> str:
        array = value.detach().cpu().contiguous().numpy() if isinstance(value, Tensor) else value
        if name not in self.constants:
            self.constants.add(name)
            self.initializers.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant("int64." + ".".join(map(str, values)), np.array(values, dtype=np.int64))

    def preprocess(self, rule: Preprocessing) -> str:
        """Crop, normalise and transpose raw pixels; normalised images pass unchanged."""
        if rule.input != UINT8_INPUT:
            return INPUT
        value = INPUT
        if rule.crop != rule.resize:
            (top, left), (height, width) = rule.corner, rule.crop
            ends = self.integers(top + height, left + width)
            value = self.node("Slice", [value, self.integers(top, left), ends, self.integers(1, 2)], "preprocessing.crop")
        value = self.node("Cast", [value], "preprocessing.float", to=self.onnx.TensorProto.FLOAT)
        # The same two constants as in training, for the same float32 values.
        mean, std = np.array(rule.mean, dtype=np.float64), np.array(rule.std, dtype=np.float64)
        scale = self.constant("preprocessing.scale", (1 / (255 * std)).astype(np.float32))
        shift = self.constant("preprocessing.shift", (-mean / std).astype(np.float32))
        value = self.node("Mul", [value, scale], "preprocessing.scaled")
        value = self.node("Add", [value, shift], "preprocessing.normalised")
        return self.node("Transpose", [value], "preprocessing.nchw", perm=[0, 3, 1, 2])

    def extractor(self, number: int, extractor: FoldedExtractor, images: str) -> str:
        """Add one extractor; the value is its true features (batch, F)."""
        values = {IMAGE: images}
        weights = {name: self.constant(tensor_name(number, name), tensor) for name, tensor in extractor.tensors.items()}
        for op in extractor.ops:
            values[op.target] = self.operation(op, values, weights, tensor_name(number, op.target))
        features = values[FEATURES]
        if extractor.feature_index is None:
            return features
        index = self.constant(tensor_name(number, FEATURE_INDEX), extractor.feature_index)
        return self.node("Gather", [features, index], tensor_name(number, "true_features"), axis=1)

    def operation(self, op: Op, values: Mapping[str, str], weights: Mapping[str, str], target: str) -> str:
        """Add one operation of a program."""
        steps = [name for name, there in (("add", op.residual), ("relu", op.relu)) if there]
        # The last node has the operation's name.
        names = [*(f"{target}.linear" for _ in steps[:1]), *(f"{target}.sum" for _ in steps[1:]), target]
        value = self._plain(op, values[op.source], weights, names[0])
        for step, name in zip(steps, names[1:], strict=True):
            value = self.node("Relu", [value], name) if step == "relu" else self.node("Add", [value, values[op.residual]], name)
        return value

    def _plain(self, op: Op, source: str, weights: Mapping[str, str], target: str) -> str:
        """Add an operation without its residual and ReLU."""
        own = [weights[name] for name in op.tensors()]
        if op.kind == CONV:
            window = {"kernel_shape": [op.kernel] * 2, "strides": [op.stride] * 2, "pads": [op.kernel // 2] * 4}
            return self.node("Conv", [source, *own], target, **window)
        if op.kind == BIAS:
            return self.node("Add", [source, self._per_channel(own[0])], target)
        if op.kind == AFFINE:
            scaled = self.node("Mul", [source, self._per_channel(own[0])], f"{target}.scaled")
            return self.node("Add", [scaled, self._per_channel(own[1])], target)
        if op.kind == POOL:
            return self.node("MaxPool", [source], target, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        if op.kind == WIDEN:
            return self._widen(op, source, target)
        if op.kind == MEAN:
            pooled = self.node("GlobalAveragePool", [source], f"{target}.pooled")
            return self.node("Flatten", [pooled], target, axis=1)
        raise ValueError(f"unknown operation {op.kind!r}")

    def _per_channel(self, vector: str) -> str:
        """Shape a vector (C,) so that it broadcasts over N × C × H × W."""
        target = f"{vector}.column"
        if target not in self.constants:
            self.constants.add(target)
            self.node("Unsqueeze", [vector, self.integers(1, 2)], target)
        return target

    def _widen(self, op: Op, source: str, target: str) -> str:
        grow = op.outputs - op.inputs
        if op.stride > 1:
            # A 1×1 max-pooling takes every stride-th pixel, in any layout of the runtime's images.
            name = f"{target}.strided" if grow else target
            source = self.node("MaxPool", [source], name, kernel_shape=[1, 1], strides=[op.stride] * 2)
        if grow:
            return self.node("Pad", [source, self.integers(0, 0, 0, 0, 0, grow, 0, 0)], target)
        return source if op.stride > 1 else self.node("Identity", [source], target)

    def _unit_length(self, features: str) -> str:
        """Divide feature vectors by their length; zero vectors stay zero."""
        length = self.node("ReduceL2", [features], "feature_length", axes=[1], keepdims=1)
        least = self.constant("least_length", np.array(1e-12, dtype=np.float32))
        return self.node("Div", [features, self.node("Max", [length, least], "feature_divisor")], "unit_features")

    def classifier(self, network: FoldedNetwork, rows: Sequence[str]) -> None:
        """Add the readout and the softmax."""
        readout = network.readout
        bias = self.constant(HEAD_BIAS, readout.bias)
        scores = LOGITS if readout.proxies == 1 else "proxy_scores"
        if rows:
            features = rows[0] if len(rows) == 1 else self.node("Concat", rows, "super_feature", axis=1)
            features = self._unit_length(features) if readout.normalise else features
            self.node("Gemm", [features, self.constant(HEAD_WEIGHT, readout.weight), bias], scores, transB=1)
        else:
            # No extractor depends on the image: the scores are the bias, once per image.
            batch = self.node("Shape", [INPUT], "batch_size", start=0, end=1)
            shape = self.node("Concat", [batch, self.integers(len(readout.bias))], "scores_shape", axis=0)
            self.node("Expand", [bias, shape], scores)
        if readout.proxies > 1:
            by_class = self.node("Reshape", [scores, self.integers(-1, readout.classes, readout.proxies)], "scores_by_class")
            shares = self.node("Softmax", [by_class], "proxy_shares", axis=2)
            self.node("ReduceSum", [self.node("Mul", [shares, by_class], "shared_scores"), self.integers(2)], LOGITS, keepdims=0)
        temperature = self.constant("temperature", np.array(readout.temperature, dtype=np.float32))
        scaled = self.node("Div", [LOGITS, temperature], "logits_over_temperature")
        self.node("Softmax", [scaled], PROBABILITIES, axis=1)
