"""Run folders as training writes them, with made-up but consistent numbers, and readers of what a report says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from der_fast.model.architecture import build_architecture


@pytest.fixture(scope="session")
def make_run():
    """Return `write_run`."""
    return write_run


def write_run(
    folder: Path,
    class_sets: Sequence[Sequence[str]],
    *,
    backbone: str | None = None,
    epochs: int = 10,
    settle_from: int | None = 6,
    classifier_epochs: int = 4,
    seed: int = 0,
    unpruned_each: int = 464_154,
    images_per_class: int = 20,
    **changes: Any,
) -> dict[str, Any]:
    """Write metrics.json, config.json, history.json and mask logits; return the metrics.

    Args:
        class_sets: class names of every step.
        backbone: whose channel groups are masked; None = masks off.
        changes: keys of metrics.json to replace; a value of None removes the key.
    """
    rng = np.random.default_rng(seed)
    groups = dict(build_architecture(backbone).groups) if backbone else {}
    kept, kept_share = [], []
    for step in range(1, len(class_sets) + 1):
        logits = _write_masks(folder, step, groups, epochs, rng) if groups else None
        kept.append(_kept(groups, logits))
        kept_share.append(sum(pair[0] for pair in kept[-1].values()) / sum(groups.values()) if groups else 1.0)
    metrics = _metrics(class_sets, kept, kept_share, unpruned_each, images_per_class, rng)
    metrics["config"]["masks"]["enabled"] = bool(groups)
    metrics.update(changes)
    metrics = {key: value for key, value in metrics.items() if key not in changes or changes[key] is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.json").write_text(json.dumps({**metrics.get("config", {}), "config_sha256": "0" * 64}))
    rows = _history(len(class_sets), epochs, settle_from if groups else None, classifier_epochs, kept_share if groups else None, rng)
    (folder / "history.json").write_text(json.dumps({"epochs": rows}))
    return metrics


def _write_masks(folder: Path, step: int, groups: dict[str, int], epochs: int, rng: np.random.Generator) -> np.ndarray:
    sizes = list(groups.values())
    drift = np.concatenate([np.full(size, -0.16 if "." in name else -0.28) for name, size in groups.items()])
    steps = rng.normal(drift, 0.12, size=(epochs, sum(sizes))) + rng.normal(0, 0.3, size=sum(sizes))
    logits = np.clip(np.cumsum(np.concatenate([rng.uniform(0, 2, size=(1, sum(sizes))), steps * 8 / epochs]), axis=0), -6, 6)
    file = folder / "steps" / f"{step:02d}" / "mask_logits.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    count = len(sizes)
    tensors = {"prices": np.linspace(0.2, 1, count), "thresholds": np.zeros(count)}
    tensors |= {"logits": logits.astype(np.float32), "times": np.arange(epochs + 1, dtype=np.float64), "offsets": offsets}
    save_file(tensors, file, metadata={"groups": json.dumps(list(groups))})
    return logits


def _kept(groups: dict[str, int], logits: np.ndarray | None) -> dict[str, list[int]]:
    kept, start = {}, 0
    for name, size in groups.items():
        assert logits is not None
        kept[name] = [int((logits[-1, start : start + size] > 0).sum()), size]
        start += size
    return kept


def _metrics(
    class_sets: Sequence[Sequence[str]], kept: list[Any], kept_share: list[float], each: int, images: int, rng: np.random.Generator
) -> dict[str, Any]:
    steps, classes = len(class_sets), sum(map(len, class_sets))
    sets = [
        [float(round(max(92 - 3.1 * (step - k) - rng.uniform(0, 6), 4.0), 3)) for k in range(1, step + 1)] for step in range(1, steps + 1)
    ]
    top1 = [float(round(np.mean(row), 3)) for row in sets]
    top5 = [min(100.0, value + 9) for value in top1]
    added = [int(each * share**2) for share in kept_share]
    params, full = np.cumsum(added).tolist(), [each * step for step in range(1, steps + 1)]
    latency = [1.5 + 0.8 * step for step in range(1, steps + 1)]
    return {
        "protocol": f"B0-{steps}", "dataset": "synthetic", "name": "pruned",
        "class_names": [name for names in class_sets for name in names], "steps": [list(names) for names in class_sets],
        "top1": top1, "top5": top5, "average_top1": float(np.mean(top1)), "last_top1": top1[-1], "average_top5": float(np.mean(top5)),
        "bwt": -1.25 if steps > 1 else None, "fwt": None,
        "params": params, "params_unpruned": full, "params_added": added,
        "average_params": float(np.mean(params)), "final_params": params[-1],
        "bytes": [4 * count for count in params], "bytes_unpruned": [4 * count for count in full],
        "saved_seconds": [None, *[12.0 * step - 20 for step in range(1, steps)]],
        "training_seconds": [30.0] * steps, "data_seconds": [0.6 * step for step in range(1, steps + 1)],
        "latency_ms": latency, "latency_added_ms": [latency[0], *[0.8] * (steps - 1)],
        "latency_unpruned_ms": [3.0 * step for step in range(1, steps + 1)],
        "seconds": [31.4 + 4 * step for step in range(steps)],
        "class_set_top1": sets, "kept_share": kept_share, "compaction_error": [3.1e-7] * steps,
        "confusion": _confusion(classes, images, rng), "kept": kept,
        "memory_per_class": [200 // sum(map(len, class_sets[: step + 1])) for step in range(steps)],
        "backend": "reference", "device": "cpu", "notes": [],
        "config": {"data": {"name": "synthetic", "flip": False}, "masks": {"enabled": True, "sparsity": 3.0}, "later": {"lr": 0.1}},
        "versions": {"der_fast": "0.1.0", "torch": "2.13.0", "python": "3.12.1"},
    }  # fmt: skip


def _confusion(classes: int, images: int, rng: np.random.Generator) -> list[list[int]]:
    weights = rng.dirichlet(np.full(classes, 0.15), size=classes) * 0.3 + 0.7 * np.eye(classes)
    return [rng.multinomial(images, row / row.sum()).tolist() for row in weights]


def _history(
    steps: int, epochs: int, settle_from: int | None, classifier_epochs: int, kept_share: list[float] | None, rng: np.random.Generator
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        stages = [("representation", epochs)] + ([("classifier", classifier_epochs)] if step > 1 else [])
        for stage, length in stages:
            for epoch in range(1, length + 1):
                share = None
                if kept_share is not None and stage == "representation":
                    share = 1 - (1 - kept_share[step - 1]) * min(1.0, 1.5 * epoch / length)
                rows.append(
                    {
                        "step": step, "stage": stage, "epoch": epoch, "epochs": length, "loss": 2.3 / epoch + float(rng.uniform(0, 0.1)),
                        "accuracy": 97 - 60 / epoch, "lr": 0.1 * 0.1 ** (epoch > length / 2), "kept_share": share,
                        "sparsity_weight": None if kept_share is None else 1.0, "images_per_s": 900.0,
                        "settled": stage == "representation" and settle_from is not None and epoch >= settle_from,
                    }
                )  # fmt: skip
    return rows


class Page(HTMLParser):
    """What a browser would make of a page: tables as texts, attributes that point somewhere, tags, visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._cell: list[str] | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "data", "action")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append("".join(self._cell))
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell is not None:
            self._cell.append(data)

    def table(self, *headings: str) -> list[list[str]]:
        """Return the rows of the table whose first headings are these."""
        return next(rows[1:] for rows in self.tables if rows[0][: len(headings)] == list(headings))


@pytest.fixture(scope="session")
def read_page():
    """Return a function that parses an HTML file."""
    return lambda path: Page(Path(path).read_text(encoding="utf-8"))
