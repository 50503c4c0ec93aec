"""Where the command line writes: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from der_fast.config.recipe import recipe_text
from der_fast.config.schema import Config

# Piped output has no width; tables must not be squeezed to 80 columns there.
_PIPED_WIDTH = 160


def output() -> Console:
    """Return a console on the current standard output (tests replace it, so the console is never kept)."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH)


def errors() -> Console:
    """Return a console on standard error."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Write `value` as JSON to standard output, with nothing else around it."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def print_recipe(config: Config) -> None:
    """Write a configuration to standard output as a file that --preset takes."""
    sys.stdout.write(f"# der-fast train [DATA] --preset THIS_FILE.toml\n\n{recipe_text(config)}")


def say_error(text: str) -> None:
    """Write an error to standard error, as one paragraph."""
    errors().print(f"error: {text}", style="bold red")


def say_note(text: str) -> None:
    """Write something worth knowing to standard error."""
    errors().print(f"note: {text}", style="dim")


def say_where(what: str, path: Path) -> None:
    """Write where a result is; never wrapped, so that it can be copied."""
    output().print(f"{what}: {path}", soft_wrap=True)
