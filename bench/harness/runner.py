"""Runs cases: first the gate, then timing, then a record per variant.

A record is one JSON object. The first of a run has "kind": "run" with facts and ceilings; every other has "kind": "result" and the run's
number, device and commit, so that it is complete on its own. "status" is 'ok', 'failed' (wrong result or an error; the run continues and
ends with exit code 1) or 'unavailable' (something it needs is missing).
"""

from __future__ import annotations

import gc
import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.harness.ceilings import Ceilings, dtype_name
from bench.harness.gate import Baselines, GateError, bounds_of, errors_of, pass_gate, refuse_above
from bench.harness.records import Record
from bench.harness.registry import OURS, Case, Setting, Tensors, Variant, seeded
from bench.harness.timing import Timing, capture, measure, replayed
from der_fast.errors import BackendError


class Unavailable(Exception):
    """A variant needs something that is missing; the message says what."""


@dataclass
class Runner:
    """Runs cases in one setting.

    Attributes:
        setting: device, scale and der_fast's backend.
        ceilings: of the same run.
        facts: of the same run; device and commit go into every record.
        variants: names of the variants to time; empty for all. Baselines are always computed, for the gate.
        without: names of variants to skip.
        seed: of the inputs.
    """

    setting: Setting
    ceilings: Ceilings
    facts: dict[str, Any]
    variants: Sequence[str] = ()
    without: Sequence[str] = ()
    seed: int = 0
    say: Callable[[str], None] = field(default=lambda line: None)

    def header(self) -> Record:
        """Return the run's own record."""
        setting = self.setting
        return {
            "kind": "run",
            "run": self._run,
            "scale": setting.scale,
            "backend": setting.backend,
            "interpreted": setting.interpreted,
            "facts": self.facts,
            "ceilings": self.ceilings.as_dict(),
        }

    @property
    def _run(self) -> str:
        return f"{self.facts['time']}-{self.facts['commit']}"

    def run(self, cases: Iterable[Case]) -> Iterator[Record]:
        """Yield a record per variant of every case, on a separate stream (graphs cannot be captured on the default one)."""
        for case in cases:
            if self.setting.cuda:
                with torch.cuda.stream(torch.cuda.Stream(self.setting.device)):
                    yield from self._case(case)
                if not self._alive():
                    self.say(f"{case.id} broke the GPU's context: nothing else can run in this process")
                    return
                torch.cuda.empty_cache()
            else:
                yield from self._case(case)
            gc.collect()

    def _alive(self) -> bool:
        """Return whether the GPU still answers; after an illegal access it never does again."""
        try:
            torch.cuda.synchronize(self.setting.device)
        except RuntimeError:
            return False
        return True

    def _case(self, case: Case) -> Iterator[Record]:
        try:
            sets = [case.inputs(seeded(self.setting.device, 1000 * self.seed + number)) for number in range(self._sets(case))]
            exact = case.expected(sets[0])
        except Exception as error:
            yield from (self._failed(case, variant, error) for variant in case.variants if self._wanted(variant))
            return
        baselines: Baselines = {}
        for variant in case.variants:
            if not self._wanted(variant) and not variant.baseline:
                continue
            try:
                record = self._variant(case, variant, sets, exact, baselines)
            except (BackendError, Unavailable) as error:
                record = self._record(case, variant, "unavailable", reason=str(error))
            except Exception as error:
                record = self._failed(case, variant, error)
            if self._wanted(variant):
                self.say(line_of(record))
                yield record

    def _sets(self, case: Case) -> int:
        return 1 if self.setting.smoke or case.timing == "once" else case.sets

    def _wanted(self, variant: Variant) -> bool:
        return variant.name not in self.without and (not self.variants or variant.name in self.variants)

    def _variant(self, case: Case, variant: Variant, sets: Sequence[Tensors], exact: Tensors, baselines: Baselines) -> Record:
        setting = self.setting
        if variant.needs_cuda and not setting.cuda:
            raise Unavailable("needs a GPU")
        begin = self._reset_peak()
        run = variant.prepare(sets[0])
        errors = pass_gate(case, variant, run, exact, baselines)
        peak = self._peak_since(begin)
        if not self._wanted(variant):
            return {}
        how = "launch" if case.timing == "graph" and not (setting.cuda and variant.graphed) else case.timing
        runs: list[Callable[[], object]] = [run]
        runs += [variant.prepare(inputs) for inputs in sets[1:]]
        if how == "graph":
            graphs = [capture(one, case.inner) for one in runs]  # type: ignore[arg-type]
            self._gate_replay(case, variant, graphs[0], exact, baselines)
            runs = list(graphs)
        timing = measure(runs, case, setting, how)
        return self._record(case, variant, "ok", timing=timing, errors=errors, peak=peak)

    def _gate_replay(self, case: Case, variant: Variant, graph: Any, exact: Tensors, baselines: Baselines) -> None:
        outputs = replayed(graph)
        bounds = bounds_of(case, variant.dtype, baselines.get(variant.dtype, {}), exact)
        refuse_above(case, variant, errors_of(variant.shown(outputs), exact), bounds)

    def _reset_peak(self) -> int:
        if not self.setting.cuda:
            return 0
        torch.cuda.synchronize(self.setting.device)
        torch.cuda.reset_peak_memory_stats(self.setting.device)
        return torch.cuda.memory_allocated(self.setting.device)

    def _peak_since(self, begin: int) -> float | None:
        return (torch.cuda.max_memory_allocated(self.setting.device) - begin) / 1e6 if self.setting.cuda else None

    def _failed(self, case: Case, variant: Variant, error: Exception) -> Record:
        kind = "wrong result" if isinstance(error, GateError) else type(error).__name__
        where = "" if isinstance(error, GateError) else traceback.format_exc(limit=-3)
        return self._record(case, variant, "failed", reason=f"{kind}: {error}", trace=where)

    def _record(
        self,
        case: Case,
        variant: Variant,
        status: str,
        *,
        timing: Timing | None = None,
        errors: dict[str, float] | None = None,
        peak: float | None = None,
        **more: str,
    ) -> Record:
        label = self.setting.backend + (", interpreted" if self.setting.interpreted else "")
        record: Record = {
            "kind": "result",
            "run": self._run,
            "case": case.name,
            "params": dict(case.params),
            "variant": variant.name,
            "dtype": dtype_name(variant.dtype),
            "backend": label if variant.name.startswith(OURS) else "",
            "note": variant.note,
            "status": status,
            "scale": self.setting.scale,
            "device": self.facts["device"],
            "commit": self.facts["commit"],
            **more,
        }
        if timing is not None:
            record |= {"ms": timing.median, "ms_p20": timing.p20, "ms_p80": timing.p80, "samples": timing.samples, "timing": timing.how}
            record |= {"cold": case.cold and timing.how == "graph", "errors": errors or {}, "peak_mb": peak}
            record |= rates(case, variant, timing, self.ceilings)
        return record


def rates(case: Case, variant: Variant, timing: Timing, ceilings: Ceilings) -> Record:
    """Return GB/s, TFLOP/s, images/s and the shares of the measured ceilings, if the case states its work."""
    work = case.work(variant.dtype)
    found: Record = {}
    seconds = timing.median / 1e3
    if work.bytes:
        found |= {"bytes": work.bytes, "gb_per_s": work.bytes / seconds / 1e9}
        found["share_of_copy"] = found["gb_per_s"] / ceilings.gb_per_s
    if work.flops:
        found |= {"flops": work.flops, "tflop_per_s": work.flops / seconds / 1e12}
        ceiling = ceilings.tflop_per_s.get(dtype_name(variant.dtype))
        if ceiling:
            found["share_of_matmul"] = found["tflop_per_s"] / ceiling
    if work.images:
        found |= {"images": work.images, "images_per_s": work.images / seconds}
    return found


def line_of(record: Record) -> str:
    """Return one line of text."""
    inner = ",".join(f"{key}={value}" for key, value in record["params"].items())
    begin = f"{record['case']}[{inner}] {record['variant']:<16}"
    if record["status"] != "ok":
        return f"{begin} {record['status'].upper()}: {record['reason']}"
    line = f"{begin} {record['ms']:10.4f} ms ({record['ms_p20']:.4f}–{record['ms_p80']:.4f}, {record['samples']} × {record['timing']})"
    for key, text in (("share_of_copy", "copy"), ("share_of_matmul", "matmul")):
        if key in record:
            line += f" {100 * record[key]:.0f} % of {text}"
    if record.get("errors"):
        line += f" error {max(record['errors'].values()):.1e}"
    if "images_per_s" in record:
        line += f" {record['images_per_s']:.0f} images/s"
    return line


def append(path: Path, record: Record) -> None:
    """Append a record to a file at once, so that it survives any later failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
