"""docs/configuration.md is what the schema, the ranges and the presets say."""

from __future__ import annotations

from pathlib import Path

import pytest

from der_fast.config.document import configuration_page, main
from der_fast.config.presets import list_presets
from der_fast.config.tree import declared
from der_fast.errors import ConfigError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date() -> None:
    hint = "run: python -m der_fast.config.document docs/configuration.md"
    assert PAGE.read_text(encoding="utf-8") == configuration_page(), hint


def test_every_key_and_preset_is_on_the_page() -> None:
    rows = [line for line in configuration_page().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [*declared(), *list_presets()]
    assert any(row.startswith("| `first.milestones` | `20,30` | epochs in increasing order") for row in rows)
    assert any(row.startswith("| `runtime.threads` | `none` | a whole number of at least 1 |") for row in rows)
    change = {row.split("`")[1]: row.split(" | ")[-1].strip(" |") for row in rows}
    assert [change[name] for name in ("model.width", "later.lr", "runtime.device", "data.root")] == ["never", "learn", "resume", "place"]


def test_the_page_is_written_where_asked(tmp_path: Path) -> None:
    main([str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == configuration_page()
    with pytest.raises(ConfigError):
        main([])
