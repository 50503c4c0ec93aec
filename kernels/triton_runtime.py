"""Whether Triton can run here. This is decided when a kernel is chosen or launched, never when a module is imported.

Triton's interpreter (TRITON_INTERPRET=1 in the environment before Triton is first imported) runs kernels on CPU tensors, slowly and for
tests only. It gets tl.dot of bfloat16 wrong, so kernels take `DOT_DTYPE` from `dot_in_float32()`: exact for bfloat16 and float16 operands.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

from der_fast.errors import BackendError

# The first with tensor cores for bfloat16; kernels are not compiled for older ones.
OLDEST = (8, 0)


@functools.cache
def _triton() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("triton"), ""
    except ImportError as error:
        return None, str(error)


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter."""
    module, _ = _triton()
    return module is not None and bool(module.knobs.runtime.interpret)


def version() -> str:
    """Return Triton's version, or 'none'."""
    module, _ = _triton()
    return "none" if module is None else str(module.__version__)


def dot_in_float32() -> bool:
    """Return whether operands of tl.dot must first be converted to float32."""
    return interpreting()


def usable(device: torch.device) -> tuple[bool, str]:
    """Return whether Triton kernels run on tensors on `device`, and why or why not."""
    module, reason = _triton()
    if module is None:
        return False, f"Triton is not installed ({reason})"
    if interpreting():
        return True, f"Triton {module.__version__}, interpreted: for tests, very slow"
    if device.type != "cuda":
        return False, f"Triton kernels need a CUDA device, not {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        name = torch.cuda.get_device_name(device)
        return False, f"{name} has compute capability {capability[0]}.{capability[1]}; the kernels need {OLDEST[0]}.{OLDEST[1]} or newer"
    return True, f"Triton {module.__version__} on {torch.cuda.get_device_name(device)}"


def require(device: torch.device, what: str) -> None:
    """Raise BackendError where `usable` returns False."""
    works, reason = usable(device)
    if not works:
        raise BackendError(f"{what} cannot run here: {reason}. Use backend 'reference' or 'auto'.")


def forget() -> None:
    """Forget whether Triton is installed, so that it is looked up again."""
    _triton.cache_clear()


# Triton reads this variable when it is imported; here it is only a name.
INTERPRET = "TRITON_INTERPRET"
