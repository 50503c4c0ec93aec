"""The metadata of an exported file: class names, preprocessing, history, checksum of the weights.

Every format holds the same texts under the same keys, each value in JSON, so that programs without der_fast can read them too
(docs/deploy.md).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from der_fast.data.augment.transform import Transform, transforms_for
from der_fast.errors import ExportError, Spelling
from der_fast.training.figures import EXPORT, names_for
from der_fast.training.learner import Learner

LINEAR_FORMAT, FORMAT = 1, 2
RESIZE_RULE = (
    "turn upright by EXIF, take the upper 8 bits of 16-bit grey, lay transparency over white, convert to RGB, scale to just cover `resize` "
    "and cut off evenly (bilinear, antialiased)"
)
FLOAT_INPUT, UINT8_INPUT = "float32", "uint8"
_LAYOUTS = {FLOAT_INPUT: "NCHW", UINT8_INPUT: "NHWC"}


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to the network's input.

    Attributes:
        resize: (height, width) in pixels to which an image is resized, see `RESIZE_RULE`.
        crop: (height, width) of the centre crop that the network sees.
        mean, std: per channel (RGB), for pixels in [0, 1]: the network sees (pixel / 255 − mean) / std.
        input: 'float32': the file takes N × 3 × crop, normalised; 'uint8': it takes N × resize × 3 and does the rest itself.
    """

    resize: tuple[int, int]
    crop: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    input: str = FLOAT_INPUT

    @property
    def corner(self) -> tuple[int, int]:
        """(top, left) of the crop."""
        return (self.resize[0] - self.crop[0]) // 2, (self.resize[1] - self.crop[1]) // 2

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Shape of one image as the file takes it."""
        return (*self.resize, 3) if self.input == UINT8_INPUT else (3, *self.crop)

    def transform(self) -> Transform:
        """Return the function from uint8 images N × resize × 3 to the network's input N × 3 × crop."""
        return Transform(
            size=self.crop,
            crop_padding=0,
            flip=False,
            brightness=0.0,
            random_resized_crop=self.crop != self.resize,
            mean=self.mean,
            std=self.std,
            train=False,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the preprocessing as plain JSON values."""
        return {
            "resize": list(self.resize),
            "resize_rule": RESIZE_RULE,
            "crop": list(self.crop),
            "channels": "RGB",
            "value_range": [0, 1],
            "mean": list(self.mean),
            "std": list(self.std),
            "input": {"dtype": self.input, "layout": _LAYOUTS[self.input], "shape": ["batch", *self.input_shape]},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError if something is missing or invalid."""
        found = cls(_size(value["resize"]), _size(value["crop"]), _rgb(value["mean"]), _rgb(value["std"]), value["input"]["dtype"])
        if found.input not in _LAYOUTS or min(found.corner) < 0 or min(found.std) <= 0:
            raise ValueError("preprocessing with invalid values")
        return found


@dataclass(frozen=True)
class Facts:
    """The metadata of an exported file.

    Attributes:
        class_names: in the order of the logits.
        preprocessing: from an image file to the network's input.
        temperature: probabilities are softmax(logits / temperature).
        normalise, proxies: how the classifier reads features, see `der_fast.model.readout.Readout`.
        steps: one entry per learned step: its classes, accuracy (percent) and parameters.
        weights_sha256: `FoldedNetwork.checksum`.
        producer: the software that wrote the file.
    """

    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    temperature: float
    steps: tuple[Mapping[str, Any], ...]
    weights_sha256: str
    producer: str
    normalise: bool = False
    proxies: int = 1

    def to_texts(self) -> dict[str, str]:
        """Return the metadata as a file holds it: one JSON text per key."""
        values = {
            # Programs that know only format 1 support only linear classifiers.
            "der_fast_format": FORMAT if self.normalise or self.proxies > 1 else LINEAR_FORMAT,
            "producer": self.producer,
            "class_names": list(self.class_names),
            "preprocessing": self.preprocessing.to_json(),
            "temperature": self.temperature,
            "steps": [dict(step) for step in self.steps],
            "weights_sha256": self.weights_sha256,
        }
        if values["der_fast_format"] == FORMAT:
            values["readout"] = {"normalise": self.normalise, "proxies": self.proxies}
        return {key: json.dumps(value, ensure_ascii=False, allow_nan=False) for key, value in values.items()}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], where: str) -> Facts:
        """The inverse of `to_texts`.

        Args:
            texts: a file's metadata; other keys are ignored.
            where: the file, for messages.

        Raises:
            ExportError: der_fast did not export the file, it has another format version, or it is damaged.
        """
        if "der_fast_format" not in texts:
            raise ExportError(
                f"{where} was not exported by der_fast: it has no metadata about classes and preprocessing. Export the run again with ",
                Spelling("`der-fast export`", "export()"),
                ", or run the file with the program that it was made for",
            )
        if texts["der_fast_format"] not in (str(LINEAR_FORMAT), str(FORMAT)):
            raise ExportError(
                f"{where} has format {texts['der_fast_format']}; this version reads formats {LINEAR_FORMAT} and {FORMAT}. Export the run "
                "again, or install the version of der_fast that wrote the file"
            )
        try:
            value = {key: json.loads(texts[key]) for key in _KEYS}
            rule = json.loads(texts["readout"]) if texts["der_fast_format"] == str(FORMAT) else {"normalise": False, "proxies": 1}
            facts = cls(
                tuple(str(name) for name in value["class_names"]),
                Preprocessing.from_json(value["preprocessing"]),
                float(value["temperature"]),
                tuple(dict(step) for step in value["steps"]),
                str(value["weights_sha256"]),
                str(value["producer"]),
                bool(rule["normalise"]),
                int(rule["proxies"]),
            )
            if not (facts.class_names and facts.temperature > 0 and math.isfinite(facts.temperature)):
                raise ValueError("no classes, or an invalid temperature")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ExportError(f"{where} is damaged: its metadata cannot be read ({error!r}). Export the run again") from error
        return facts

    def taking(self, kind: str) -> Facts:
        """Return the same facts for a file whose input is of `kind`, 'float32' or 'uint8'."""
        return replace(self, preprocessing=replace(self.preprocessing, input=kind))


_KEYS = ("class_names", "preprocessing", "temperature", "steps", "weights_sha256", "producer")


def facts_of(learner: Learner, weights_sha256: str) -> Facts:
    """Return the metadata for a learner's exported file."""
    assert learner.image_size is not None
    _, transform = transforms_for(learner.config.data, learner.image_size)
    preprocessing = Preprocessing(learner.image_size, transform.size, transform.mean, transform.std)
    names = ("step", "class_names", *names_for(EXPORT))
    steps = tuple({name: getattr(result, name) for name in names} for result in learner.results)
    readout = learner.model.ready
    return Facts(
        learner.class_names,
        preprocessing,
        readout.temperature,
        steps,
        weights_sha256,
        _producer(),
        normalise=readout.normalise,
        proxies=readout.proxies,
    )


def _producer() -> str:
    try:
        return f"der_fast {metadata.version('der_fast')}"
    except metadata.PackageNotFoundError:
        return "der_fast"


def _size(value: Any) -> tuple[int, int]:
    height, width = value
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
        raise ValueError(f"an invalid size in pixels: {value!r}")
    return height, width


def _rgb(value: Any) -> tuple[float, float, float]:
    red, green, blue = (float(entry) for entry in value)
    if not all(map(math.isfinite, (red, green, blue))):
        raise ValueError(f"invalid channel values: {value!r}")
    return red, green, blue
