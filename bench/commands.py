"""The cases: list and run them, compare two results files, write tables and pictures. bench/README.md explains them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.harness import ceilings, facts, records, registry
from bench.harness.runner import Runner, append
from bench.reports import compare, gpu_table, picture, plots, readme
from der_fast.errors import BackendError
from der_fast.kernels import triton_runtime
from der_fast.kernels.backend import resolve_device


def setting_of(args: argparse.Namespace) -> registry.Setting:
    """Return where and how the cases run.

    Raises:
        BackendError: the device does not exist, or backend 'fused' was asked for and does not run on it.
    """
    device = resolve_device(args.device)
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    scale = "smoke" if args.smoke else "quick" if args.quick else "full"
    backend = args.backend
    works, _ = triton_runtime.usable(device)
    if backend == "auto":
        # The interpreter is meant for checking one kernel, not for hundreds of cases.
        backend = "fused" if works and not triton_runtime.interpreting() else "reference"
    elif backend == "fused":
        triton_runtime.require(device, "the benchmark's own variants")
    return registry.Setting(device, scale, backend, backend == "fused" and triton_runtime.interpreting())


class Mistake(ValueError):
    """The request cannot be carried out; the message says why and what can."""


def chosen_cases(args: argparse.Namespace, setting: registry.Setting) -> list[registry.Case]:
    """Return the requested cases.

    Raises:
        Mistake: no case matches.
    """
    cases = registry.chosen(registry.cases_of(setting, args.groups or registry.GROUPS), args.cases)
    if not cases:
        raise Mistake("no case matches; `python -m bench list` shows them")
    return cases


def check_variants(wanted: Sequence[str], cases: Sequence[registry.Case]) -> None:
    """Raise Mistake if none of the cases has a variant of that name."""
    known = sorted({variant.name for case in cases for variant in case.variants})
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise Mistake(f"no case here has a variant {', '.join(map(repr, unknown))}: choose from {', '.join(known)}")


def check_writable(path: Path) -> None:
    """Raise Mistake if the file cannot be appended to, before an hour of measuring is lost."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise Mistake(f"cannot write {path}: {error.strerror or error}") from error


def list_cases(args: argparse.Namespace) -> int:
    """Print every case with its variants."""
    setting = setting_of(args)
    cases = chosen_cases(args, setting)
    for case in cases:
        print(f"{case.id}: {', '.join(variant.name for variant in case.variants)}")
    print(f"{len(cases)} cases, {sum(len(case.variants) for case in cases)} variants")
    return 0


def run_cases(args: argparse.Namespace) -> int:
    """Run cases and write their records; return 1 if one failed."""
    setting = setting_of(args)
    cases = chosen_cases(args, setting)
    check_variants(args.variants or (), cases)
    if args.json:
        check_writable(args.json)
    if setting.cuda:
        torch.cuda.set_device(setting.device)
        # cuDNN tries out its algorithms, as a careful user of eager PyTorch would let it.
        torch.backends.cudnn.benchmark = True
    if setting.cuda:
        with torch.cuda.stream(torch.cuda.Stream(setting.device)):
            limits = ceilings.measured(setting)
    else:
        limits = ceilings.measured(setting)
    known = facts.facts_of(setting.device, args.commit)
    print(f"{known['device']}: copy {limits.gb_per_s:.1f} GB/s, bf16 product {limits.tflop_per_s['bf16']:.3g} TFLOP/s")
    if not setting.cuda:
        print("on a CPU: this shows that the cases run and agree; it says nothing about speed on a GPU")
    runner = Runner(setting, limits, known, args.variants or (), args.without, args.seed, lambda line: print(line, flush=True))
    found = [runner.header()]
    if args.json:
        append(args.json, found[0])
    for record in runner.run(cases):
        found.append(record)
        if args.json:
            append(args.json, record)
    broken = [record for record in found if record.get("status") == "failed"]
    for record in broken:
        if record.get("trace"):
            print(f"\n{record['case']} {record['params']} {record['variant']}\n{record['trace']}", file=sys.stderr)
    print(f"\n{gpu_table.goals_table(found)}" if setting.cuda else "")
    print(f"{len(found) - 1} measurements, {len(broken)} failed")
    return 1 if broken else 0


def compare_files(args: argparse.Namespace) -> int:
    """Print what changed from the first file to the second."""
    print(compare.text(compare.compare(records.read(args.before), records.read(args.after))))
    return 0


def write_table(args: argparse.Namespace) -> int:
    """Print the full table of results files, and the goals."""
    found = [record for path in args.files for record in records.read(path)]
    print(f"{gpu_table.full_table(found)}\n\n{gpu_table.goals_table(found)}")
    return 0


def write_readme(args: argparse.Namespace) -> int:
    """Rewrite the tables and the picture, or check that the tables match the results."""
    pages = readme.written()
    stale = [path for path, (before, after) in pages.items() if before != after]
    if args.check:
        for path in stale:
            print(f"{path} does not match bench/results/: run `python -m bench readme`", file=sys.stderr)
        return int(bool(stale))
    for path in stale:
        path.write_text(pages[path][1], encoding="utf-8")
    picture.draw(readme.PLACE, readme.RESULTS)
    return 0


def draw(args: argparse.Namespace) -> int:
    """Draw pictures of results files."""
    paths = plots.plot([record for file in args.files for record in records.read(file)], args.out)
    for path in paths:
        print(path)
    if not paths:
        raise Mistake("nothing to draw: no case in these files has a measured eager baseline")
    return 0


def parser(studies: Sequence[str]) -> argparse.ArgumentParser:
    """Return the command line; the studies are named in its help."""
    top = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, epilog=f"studies, each with its own options (STUDY --help): {', '.join(studies)}"
    )
    commands = top.add_subparsers(dest="command", required=True)
    for name, function, text in (
        ("list", list_cases, "show the cases"),
        ("run", run_cases, "check that results are right, then measure"),
    ):
        command = commands.add_parser(name, help=text)
        command.set_defaults(function=function)
        command.add_argument("cases", nargs="*", help="names, groups or ids, * for anything: 'masked_bn.*', 'conv.dgrad[layer=stage1,*'")
        command.add_argument("--groups", nargs="+", choices=registry.GROUPS, metavar="GROUP", help=f"of {', '.join(registry.GROUPS)}")
        command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 or auto")
        command.add_argument("--backend", default="auto", choices=["auto", "fused", "reference"], help="for der_fast's variants")
        scale = command.add_mutually_exclusive_group()
        scale.add_argument("--quick", action="store_true", help="fewer shapes, fewer samples")
        scale.add_argument("--smoke", action="store_true", help="tiny shapes, one sample, to check that everything runs")
    command.add_argument("--variants", nargs="+", metavar="NAME", help="only these (baselines are still computed, for the gate)")
    command.add_argument("--without", nargs="+", metavar="NAME", default=(), help="skip these variants")
    command.add_argument("--json", type=Path, help="file to append records to")
    command.add_argument("--seed", type=int, default=0, help="seed of the inputs")
    command.add_argument("--commit", help="name of the commit, for a copy without its repository")
    command = commands.add_parser("compare", help="compare two results files")
    command.set_defaults(function=compare_files)
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    command = commands.add_parser("table", help="write results files and the goals as Markdown")
    command.set_defaults(function=write_table)
    command.add_argument("files", type=Path, nargs="+")
    command = commands.add_parser("readme", help="write the tables of README.md and bench/README.md, and the picture, from bench/results/")
    command.set_defaults(function=write_readme)
    command.add_argument("--check", action="store_true", help="change nothing; exit code 1 if they differ")
    command = commands.add_parser("plot", help="draw results files as pictures")
    command.set_defaults(function=draw)
    command.add_argument("files", type=Path, nargs="+")
    command.add_argument("--out", type=Path, default=Path("bench/results/plots"))
    return top


def main(arguments: Sequence[str], studies: Sequence[str] = ()) -> int:
    """Run a command; return the exit code: 0, 1 if a case failed or the README differs, 2 for a mistake by the caller."""
    args = parser(studies).parse_args(arguments)
    try:
        return int(args.function(args))
    except (BackendError, Mistake, records.ResultsError, readme.MarkerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
