"""Decoding with NVIDIA DALI, on the CPU or with the GPU's decoders. DALI is imported only when a reader is made."""

from __future__ import annotations

from importlib.util import find_spec

from der_fast.data.read.walk import Reader, ReadSettings
from der_fast.errors import DataError


def is_installed() -> bool:
    """Whether nvidia-dali is installed."""
    try:
        return find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def dali_reader(settings: ReadSettings) -> Reader:
    """Return a reader on DALI.

    Raises:
        DataError: nvidia-dali is not installed, or does not load.
    """
    if not is_installed():
        raise DataError("data.reader='dali' needs nvidia-dali, which is not installed: pip install 'der_fast[dali]', or use 'auto'")
    try:
        from der_fast.data.read.dali.reader import DaliReader
    except ImportError as error:
        raise DataError(f"nvidia-dali is installed but does not load: {error}; fix it, or use data.reader='pillow'") from error
    return DaliReader(settings)
