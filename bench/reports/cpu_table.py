"""The table of CPU measurements: one row per claim, each from its results file."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEAD = "| what | accuracy | parameters | how measured |\n|---|---|---|---|"
_VARIANTS = {
    "pruned": "",
    "unpruned": "the same, unpruned",
    "without auxiliary loss": "the same, unpruned, without the auxiliary loss",
    "without expansion": "the same, without expansion (one extractor, same memory)",
}
_READERS = {"ours": "DALI through der_fast", "dali_bare": "DALI alone", "resident_cache": "resident cache"}
_CIFAR10 = "CIFAR-10, 5 × 2 classes, 1000 images per class, 200 exemplars, ResNet-32, pruned"


def table(results: Path) -> str:
    """Return the table, from the files that exist."""
    rows: list[str] = []
    for name, make in (
        ("cifar10.jsonl", _cifar10),
        ("stated.json", _stated),
        ("step_overhead.json", _overhead),
        ("compaction.json", _compaction),
        ("growth.json", _growth),
        ("loading.json", _loading),
    ):
        path = results / name
        if path.exists():
            content = path.read_text(encoding="utf-8")
            parsed: Any = [json.loads(line) for line in content.splitlines()] if path.suffix == ".jsonl" else json.loads(content)
            rows += make(parsed)
    return "\n".join([HEAD, *rows])


def row(what: str, accuracy: str = "", parameters: str = "", how: str = "") -> str:
    """Return a row of the table."""
    return f"| {what} | {accuracy} | {parameters} | {how} |"


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation, or the only value."""
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _cifar10(found: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for variant, name in _VARIANTS.items():
        chosen = [entry for entry in found if entry["variant"] == variant]
        if not chosen:
            continue
        average, last = (spread([entry[key] for entry in chosen]) for key in ("average_top1", "last_top1"))
        how = "the same command"
        if not name:
            seeds = {1: "one seed", 2: "two seeds", 3: "three seeds"}.get(len(chosen), f"{len(chosen)} seeds")
            how = (
                f"`python -m bench cifar10 CIFAR10_FOLDER --threads 1 --precision bf16`, [{seeds}](bench/results/cifar10.jsonl), "
                "mean ± standard deviation"
            )
        rows.append(row(name or _CIFAR10, f"{average} % average, {last} % last", _share(variant, chosen), how))
    return rows


def _share(variant: str, chosen: Sequence[Mapping[str, Any]]) -> str:
    if variant == "without expansion":
        return "one extractor"
    share = statistics.mean(100 * sum(entry["params"]) / sum(entry["params_unpruned"]) for entry in chosen)
    if share < 99.95:
        return f"{share:.1f} % of the unpruned"
    return f"100 % ({statistics.mean(entry['final_params'] for entry in chosen) / 1e6:.1f} M after step {len(chosen[0]['params'])})"


def _stated(found: Sequence[Mapping[str, Any]]) -> list[str]:
    return [row(entry["what"], entry["accuracy"], entry["parameters"], entry["source"]) for entry in found]


def _overhead(found: Mapping[str, Any]) -> list[str]:
    over = {entry["variant"]: (entry["time_over_plain_channels_last"], entry["time_over_plain"]) for entry in found["rows"]}
    plain, masked = over["ours"], over["ours_masked"]
    times = (
        f"time × {plain[0]:.2f} of plain channels-last PyTorch, × {plain[1]:.2f} of contiguous; "
        f"with masks × {masked[0]:.2f} and × {masked[1]:.2f}"
    )
    how = "`python -m bench step-overhead --images 256 --rounds 9`, [medians](bench/results/step_overhead.json)"
    return [row(f"training step 1, {_named(found['backbone'])}, against a plain eager loop", how=f"{times}: {how}")]


def _compaction(found: Mapping[str, Any]) -> list[str]:
    small = [entry for entry in found["rows"] if entry["kept_share"] < 0.5]
    pack, load = (
        {entry["backbone"]: entry["median"] for entry in small if entry["what"] == what}
        for what in ("plan + pack float32, align 1", "load")
    )
    packed = ", ".join(f"{_named(name)} {time:.2g} ms" for name, time in pack.items())
    loaded = " and ".join(f"{time:.2g}" for time in load.values())
    how = f"`python -m bench compaction --rounds {found['rounds']} --threads {found['threads']}`, [medians](bench/results/compaction.json)"
    return [row("cutting and packing an extractor at 1/12 of its parameters, float32", how=f"{packed}; loading it {loaded} ms: {how}")]


def _growth(found: Mapping[str, Any]) -> list[str]:
    ratios, steps = found["ratios"], sorted({entry["steps"] for entry in found["rows"]})
    infer = "inference at t = 10: "
    what = (
        f"ten steps, {_named(found['backbone'])}, {found['image_size']} × {found['image_size']}, batch {found['batch']}, "
        "1/12 of the parameters per extractor: inference"
    )
    text = (
        f"{ratios[infer + 'ours over eager unpruned, images/s']:.0f} × the images/s of ten full networks run eagerly, "
        f"× {ratios[infer + 'ours over one dense network, time']:.2f} the time of *one* full network"
    )
    exported = infer + "ONNX Runtime, ours over unpruned, images/s"
    if exported in ratios:
        text += f"; in ONNX Runtime {ratios[exported]:.1f} × the unpruned export"
    blocks = f"{exported}, whole blocks"
    if blocks in ratios:
        text += f", and {ratios[blocks]:.1f} × with whole blocks of channels (`masks.multiple={found['multiple']}`)"
    command = f"python -m bench growth --steps {','.join(map(str, steps))} --rounds {found['rounds']} --threads {found['threads']}"
    rows = [row(what, how=f"{text}: `{command}`, [table](bench/results/growth.md)")]
    later = [step for step in steps if step > 1]

    def over(variant: str, key: str) -> list[float]:
        return [ratios[f"training at t = {step} over t = 1: {variant}, {key}"] for step in later]

    ours, eager = (
        " and ".join(f"× {value:.{digits}f}" for value in over(name, "time")) for name, digits in (("ours", 2), ("eager_unpruned", 1))
    )
    when = " and ".join(f"t = {step}" for step in later)
    rate = {entry["variant"]: entry["images_per_s"] for entry in found["rows"] if (entry["steps"], entry["mode"]) == (1, "train")}
    faster = rate["ours_settled"] / rate["ours"]
    settled = " and ".join(f"× {value:.2f}" for value in over("ours_settled", "time"))
    memory = f"{max(over('ours', 'peak memory')):.2f}"
    rows.append(
        row(
            f"the same: a training step at {when}",
            how=(
                f"{ours} the time at t = 1 (eager, unpruned: {eager}); peak memory at most × {memory}. Once the masks have settled, the "
                f"compact network trains {faster:.1f} times as fast at t = 1, and the frozen ones cost more in proportion: {settled}"
            ),
        )
    )
    whole = {name: value for name, value in ratios.items() if name.startswith("whole step at")}
    if whole:
        kept, fresh = ([f"× {value:.2f}" for name, value in whole.items() if f": {kind}," in name] for kind in ("views", "fresh"))
        counts = " and ".join(name.split(" over ")[0].removeprefix("whole step at ") for name in whole if ": views," in name)
        how = (
            f"{' and '.join(kept)} the time at t = 1 where features of 16 views are kept, {' and '.join(fresh)} with fresh crops: the same "
            "command with `--modes schedule`, on an AMD EPYC"
        )
        rows.append(row(f"the same: all 170 epochs of a step at {counts}, masks learned in 17", how=how))
    return rows


def _named(backbone: str) -> str:
    return backbone.replace("resnet", "ResNet-")


def _loading(found: Mapping[str, Any]) -> list[str]:
    speeds = {one["variant"]: one["images_per_s"] for one in found["rows"]}
    base = speeds["dataloader_pillow"]
    parts = [f"{name} {speeds[key]:.0f} images/s (× {speeds[key] / base:.2f})" for key, name in _READERS.items() if key in speeds]
    command = f"`python -m bench loading --photos PHOTOS --threads {found['threads']} --rounds {found['rounds']}`"
    how = f"{', '.join(parts)}; a DataLoader with Pillow {base:.0f}: {command}, [medians](bench/results/loading.json)"
    rows = [row("reading photos: random-resized crops of 224 pixels, float32", how=how)]
    if "training" in found:
        training = found["training"]
        share = f"{100 * training['share']:.2f} % of {training['training_seconds']:.0f} s waiting for images"
        how = f"{share}: the same command with `--train FOLDER --side {training['side']}`"
        rows.append(row(f"training ResNet-18 on photos at {training['side']} pixels", how=how))
    return rows
