"""What a result depends on besides the code: device, driver, versions, commit, clocks."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from der_fast.machine import processor_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("der_fast", "torch", "triton", "numpy", "pillow")
_QUERY = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "utilization.gpu",
)


def _output(command: Sequence[str]) -> str | None:
    """Return what a command prints; None if it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, cwd=ROOT)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()


def commit() -> str:
    """Return the commit, followed by '+' if files differ from it; 'unknown' outside a repository."""
    name = _output(["git", "rev-parse", "--short=12", "HEAD"])
    if name is None:
        return "unknown"
    # Results being written are not a change of the code.
    changed = _output(["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"])
    return name + ("+" if changed else "")


def clocks() -> dict[str, str]:
    """Return what nvidia-smi reports for the first GPU; {} without it."""
    line = _output(["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader", "--id=0"])
    if not line:
        return {}
    values = [part.strip() for part in line.splitlines()[0].split(",")]
    return dict(zip(_QUERY, values, strict=False))


def versions() -> dict[str, str]:
    """Return the versions of all measured software."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def facts_of(device: torch.device, commit_name: str | None = None) -> dict[str, object]:
    """Return everything to record with a result measured on `device`; `commit` may name the commit if there is no repository."""
    found: dict[str, object] = {
        "time": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": processor_name(),
        "kind": device.type,
        "commit": commit_name or commit(),
        "versions": versions(),
        "cpu": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": properties.total_memory / 2**30,
            "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "nvidia_smi": clocks(),
        }
    return found
