"""docs/metrics.md is what the figures' declarations say, and metrics.json holds nothing else."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from der_fast.config.schema import Config
from der_fast.data import MemorySource
from der_fast.training.document import main, metrics_page
from der_fast.training.learner import Learner

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def test_the_page_is_up_to_date(tmp_path: Path) -> None:
    main([str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == metrics_page()
    assert PAGE.read_text(encoding="utf-8") == metrics_page(), "run: python -m der_fast.training.document docs/metrics.md"


def test_every_key_of_a_run_is_on_the_page(tiny: Callable[..., Config], synthetic: Callable[..., MemorySource]) -> None:
    learner = Learner(tiny({"protocol.name": "B0-2"}))
    for classes in ("ab", "cd", "ab"):
        learner.learn(synthetic(classes))
    metrics = learner.metrics()
    rows = [row.split("|")[1:] for row in metrics_page().splitlines() if row.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row[0])} == set(metrics)
    (events,) = (row[1] for row in rows if row[0].strip() == "`events`")
    assert re.findall(r"`(\w+)`", events) == list(metrics["events"][0])
