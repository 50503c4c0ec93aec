"""`der-fast doctor`: what works on this machine, what does not, and why."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from der_fast.cli import options as opt
from der_fast.cli.console import output, print_json
from der_fast.machine import processor_name

# Distributions whose versions affect numbers or what works.
_DISTRIBUTIONS = (
    "der_fast",
    "torch",
    "triton",
    "numpy",
    "pillow",
    "safetensors",
    "onnx",
    "onnxruntime",
    "scikit-learn",
    "matplotlib",
    "typer",
    "rich",
)


def doctor(as_json: opt.Json = False, debug: opt.Debug = False) -> None:
    """Show versions, devices, backends and optional parts: what works here, and what does not and why."""
    found = examine()
    if as_json:
        print_json(found)
        return
    console = output()
    for title, rows in found.items():
        table = Table(title=title, title_justify="left", show_header=False, min_width=60)
        for name, value in rows.items():
            table.add_row(name, value if isinstance(value, str) else f"{'yes' if value['works'] else 'no'}: {value['reason']}")
        console.print(table)


def examine() -> dict[str, dict[str, Any]]:
    """Return everything that `doctor` shows: sections of name → text, or name → {works, reason}."""
    return {
        "versions": _versions(),
        "processor": _processor(),
        "cuda": _cuda(),
        "backends": _backends(),
        "measured choices": _choices(),
        "optional parts": _optional_parts(),
        "files": _files(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, Any]:
    found = {name: _version(name) or "not installed" for name in _DISTRIBUTIONS}
    return {"python": f"{platform.python_version()} ({platform.platform()})", **found}


def _processor() -> dict[str, Any]:
    import torch

    from der_fast.training.runtime import keep_large_buffers

    kept = keep_large_buffers()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    reason = "glibc keeps large buffers between batches" if kept else "needs glibc's mallopt; large buffers are mapped again in every batch"
    return {
        "model": processor_name(),
        "cores": f"{os.cpu_count()}, of which this process may use {usable}",
        "threads": f"{torch.get_num_threads()} (runtime.threads)",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": _bfloat16(),
        "allocator tuning": {"works": kept, "reason": reason},
    }


def _bfloat16() -> dict[str, Any]:
    """Whether bfloat16 is worthwhile on this processor, measured on a small network."""
    from der_fast.model.architecture import build_architecture
    from der_fast.training.precision import measured_precision

    times = measured_precision(build_architecture("resnet20"), (32, 32), 32)
    return {"works": times.bf16 <= times.fp32, "reason": str(times)}


def _cuda() -> dict[str, Any]:
    import torch

    if torch.version.cuda is None:
        return {"devices": {"works": False, "reason": f"PyTorch {torch.__version__} is built without CUDA"}}
    if not torch.cuda.is_available():
        return {"devices": {"works": False, "reason": f"PyTorch is built for CUDA {torch.version.cuda}, but finds no driver or no device"}}
    found: dict[str, Any] = {"PyTorch's CUDA": torch.version.cuda}
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute capability {facts.major}.{facts.minor}"
    return found


def _backends() -> dict[str, Any]:
    from der_fast.kernels.backend import available

    return {name: {"works": works, "reason": reason} for name, (works, reason) in available().items()}


def _choices() -> dict[str, Any]:
    """What was measured to be fastest on this machine with these versions."""
    import torch

    from der_fast.kernels.choices import machine, shared

    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    here = {machine(device) for device in devices}
    shown: dict[str, Any] = {"file": str(shared().path or "nowhere: there is no home folder")}
    for key, choice in sorted(shared().filed().items()):
        where = next((name for name in here if key.startswith(f"{name}|")), None)
        if where is not None:
            times = ", ".join(f"{name} {value:.3g} ms" for name, value in choice.milliseconds.items())
            shown[key.removeprefix(f"{where}|")] = f"{choice.chosen} ({times})"
    return shown


def _optional_parts() -> dict[str, Any]:
    from der_fast.deployment.optional import availability

    version = _version("tensorboard")
    missing = "not installed; pip install 'der_fast[tensorboard]'"
    found = {"tensorboard": (version is not None, f"{version}; --tensorboard" if version else missing), **availability()}
    return {name: {"works": works, "reason": reason} for name, (works, reason) in found.items()}


def _files() -> dict[str, Any]:
    import der_fast
    from der_fast.data.load import archive_folder
    from der_fast.data.sets.cifar import ARCHIVES
    from der_fast.data.sets.named import forms_in
    from der_fast.home import cache_folder

    cache = cache_folder()
    sets = {}
    for name, archive in ARCHIVES.items():
        folder = archive_folder(None, archive.file)
        forms = [] if folder is None else forms_in(name, folder)
        where = "a cache folder" if folder is None else folder
        sets[name] = {"works": bool(forms), "reason": str(forms[0]) if forms else f"not in {where}; --download, or data.root"}
    return {"package": str(Path(der_fast.__file__).parent), "cache": _usable(cache), **sets}


def _usable(cache: Path | None) -> dict[str, Any]:
    """Whether files can be kept in the cache folder, which is made when first needed."""
    if cache is None:
        return {"works": False, "reason": "this user has no home folder; set HOME or XDG_CACHE_HOME to a writable folder"}
    above = next(folder for folder in (cache, *cache.parents) if folder.exists())
    works = above.is_dir() and os.access(above, os.W_OK)
    return {"works": works, "reason": str(cache) if works else f"{cache} cannot be written to; set XDG_CACHE_HOME to a folder that can"}
