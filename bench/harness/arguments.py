"""The command line of a study."""

from __future__ import annotations

import argparse


def study_parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """Return a parser for `python -m bench <name>`, with the study's docstring as its description, layout unchanged."""
    return argparse.ArgumentParser(prog=f"python -m bench {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
