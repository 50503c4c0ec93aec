"""Writing .onnx files, and running them with onnxruntime.

The last entry of the metadata is a SHA-256 of all bytes before it: ONNX files are protocol buffers, to which a field may be appended,
so the bytes can be checked without knowing the format.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from der_fast.deployment.facts import UINT8_INPUT, Facts
from der_fast.deployment.network import FoldedNetwork, Run
from der_fast.deployment.onnx_graph import INPUT, LOGITS, PROBABILITIES, build_onnx
from der_fast.deployment.optional import optional
from der_fast.deployment.padding import padded_network
from der_fast.errors import BackendError, ExportError, Spelling

FILE_CHECKSUM = "file_sha256"
# Protocol buffers are limited to 2 GiB; everything except the weights takes far less than the rest.
LARGEST = 2**31 - 2**24
# ONNX Runtime's fast, blocked convolutions need multiples of four channels; they pad to their own blocks (8 on AVX2, 16 on AVX-512)
# themselves.
CHANNEL_BLOCK = 4


def write_onnx(path: Path, network: FoldedNetwork, facts: Facts) -> None:
    """Write the network to `path`, its channels padded with zeros to multiples of `CHANNEL_BLOCK`.

    Raises:
        ExportError: onnx is not installed, or the network is larger than an ONNX file can be.
        OSError: the file cannot be written.
    """
    padded = padded_network(network, CHANNEL_BLOCK)
    if padded.nbytes > LARGEST:
        raise ExportError(
            f"the weights take {padded.nbytes / 2**30:.1f} GiB, but an .onnx file holds at most 2 GiB; export to .safetensors or .pt2"
        )
    model = build_onnx(padded, facts)
    optional("onnx", "writing .onnx files").checker.check_model(model, full_check=True)
    content: bytes = model.SerializeToString()
    path.write_bytes(content + _seal(content))


def _seal(content: bytes) -> bytes:
    """The metadata entry that ends a file, in the protocol buffer's encoding: field 14, of key (1) and value (2)."""
    key, value = FILE_CHECKSUM.encode(), f'"{hashlib.sha256(content).hexdigest()}"'.encode()
    entry = bytes([0x0A, len(key)]) + key + bytes([0x12, len(value)]) + value
    return bytes([0x72, len(entry)]) + entry


def read_onnx(path: Path, device: str | None = None) -> tuple[Facts, Run]:
    """Open an exported file with onnxruntime.

    Args:
        path: the file.
        device: 'cpu', 'cuda', 'cuda:N' or 'auto'; default: the CPU.

    Returns:
        The facts, and what runs the network.

    Raises:
        ExportError: onnxruntime is not installed, der_fast did not export the file, or it is damaged.
        BackendError: a device that onnxruntime cannot use.
    """
    runtime = optional("onnxruntime", "running .onnx files")
    providers = _providers(runtime, device)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror or error}") from error
    options = runtime.SessionOptions()
    # Important messages reach the user through der_fast's own errors.
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(content, options, providers=providers)
        texts = dict(session.get_modelmeta().custom_metadata_map)
    except Exception as error:  # onnxruntime's errors have no common class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ExportError(f"{path} is not an ONNX file that onnxruntime can run: {reason}. Export the run again") from error
    facts = Facts.from_texts(texts, str(path))
    _check_seal(content, texts, path)
    _check_interface(session, facts, path)
    return facts, _runner(session, facts)


def _providers(runtime: Any, device: str | None) -> list[Any]:
    kind, _, index = (device or "cpu").partition(":")
    there = "CUDAExecutionProvider" in runtime.get_available_providers()
    if kind == "cpu" or (kind == "auto" and not there):
        return ["CPUExecutionProvider"]
    if kind not in ("cuda", "auto") or (index and not index.isdigit()):
        raise BackendError(f"unknown device {device!r}: use cpu, cuda, cuda:N or auto")
    if not there:
        on_cpu = Spelling("--device cpu", 'device="cpu"')
        raise BackendError(f"device {device!r}: this onnxruntime has no CUDA; install onnxruntime-gpu, or use ", on_cpu)
    return [("CUDAExecutionProvider", {"device_id": int(index or 0)}), "CPUExecutionProvider"]


def _check_seal(content: bytes, texts: dict[str, str], path: Path) -> None:
    """Refuse a file whose bytes have changed; a file without a checksum passes."""
    if FILE_CHECKSUM in texts:
        size = len(_seal(b""))
        if content[-size:] != _seal(content[:-size]):
            raise ExportError(
                f"{path} is damaged or was changed after the export: its checksum does not match. Export the run again; or, if you changed "
                f"it on purpose, take {FILE_CHECKSUM!r} out of its metadata"
            )


def _check_interface(session: Any, facts: Facts, path: Path) -> None:
    inputs = {value.name: value.shape[1:] for value in session.get_inputs()}
    outputs = {value.name: value.shape[1:] for value in session.get_outputs()}
    classes = [len(facts.class_names)]
    if inputs != {INPUT: [*facts.preprocessing.input_shape]} or outputs != {LOGITS: classes, PROBABILITIES: classes}:
        raise ExportError(f"{path} does not have the inputs and outputs that its metadata describes. Export the run again")


def _runner(session: Any, facts: Facts) -> Run:
    transform = None if facts.preprocessing.input == UINT8_INPUT else facts.preprocessing.transform()

    def run(pixels: Tensor) -> tuple[Tensor, Tensor]:
        images = pixels if transform is None else transform(pixels, channels_last=False)
        logits, probabilities = session.run([LOGITS, PROBABILITIES], {INPUT: images.contiguous().numpy()})
        return torch.from_numpy(logits), torch.from_numpy(probabilities)

    return run
