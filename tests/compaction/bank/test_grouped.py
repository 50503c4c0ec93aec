"""All extractors in one launch per layer: what each of them computes alone, and when the bank takes it."""

from __future__ import annotations

import logging

import pytest
import torch

from der_fast.compaction.bank import FrozenBank, together
from der_fast.compaction.bank.execute import execute
from der_fast.compaction.bank.extractor import CompactExtractor
from der_fast.compaction.bank.grouped import GroupedProgram, reason_against
from der_fast.compaction.bank.strategies import GROUPED, STREAMS
from der_fast.compaction.bank.together import Together
from der_fast.kernels import choices, triton_runtime
from der_fast.kernels.choices import Choices

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERNS = ("most", "lost", "nothing", "one", "few")
FLOOR = 1e-6  # relative to the largest feature: a few float32 roundings per layer


@pytest.fixture
def poisoned():
    """torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def bank_of(arena_of):
    def make(backbone, patterns=PATTERNS, **options):
        return [arena_of(backbone, pattern, seed=seed, **{"width": 4, **options}) for seed, pattern in enumerate(patterns)]

    return make


def true_features(arena, stored):
    return stored if arena.feature_index is None else stored[:, arena.feature_index]


def one_by_one(arenas, images, dtype=torch.float64):
    tensors = [{name: tensor.to(dtype) for name, tensor in arena.tensors().items()} for arena in arenas]
    parts = [execute(arena.ops, known, images.to(dtype)) for arena, known in zip(arenas, tensors, strict=True)]
    return torch.cat([true_features(arena, part) for arena, part in zip(arenas, parts, strict=True)], 1).double()


def error(found, exact):
    assert found.shape == exact.shape
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
@pytest.mark.parametrize("backbone", ["resnet18", "resnet20", "resnet32", "resnet34", "resnet50"])
def test_the_program_is_every_extractor_in_double_precision(bank_of, pictures, poisoned, backbone, stem, align):
    arenas, images = bank_of(backbone, stem=stem, align=align, dtype=torch.float64), pictures(2, 13, 10, torch.float64)
    found = GroupedProgram(arenas, torch.float64, backend="reference")(images)
    assert found.dtype == torch.float64 and error(found, one_by_one(arenas, images)) <= 1e-13


@pytest.mark.parametrize("backbone", ["resnet18", "resnet20", "resnet50"])
def test_layers_whose_branch_every_extractor_lost(arena_of, pictures, poisoned, backbone):
    # The same masks twice, so that the blocks that are left are the same ones.
    arenas = [arena_of(backbone, "lost", width=4, dtype=torch.float64)] * 2
    program = GroupedProgram(arenas, torch.float64, backend="reference")
    whole = GroupedProgram([arena_of(backbone, "all", width=4, dtype=torch.float64)], torch.float64, backend="reference")
    assert program.launches < whole.launches
    images = pictures(2, 9, 12, torch.float64)
    assert error(program(images), one_by_one(arenas, images)) <= 1e-13


@pytest.mark.parametrize(
    ("backbone", "patterns", "options"),
    [
        ("resnet18", ("most", "lost", "nothing", "one"), {}),
        ("resnet20", ("most", "lost", "few"), {"width": 3}),
        ("resnet32", ("few",), {"align": 8}),
        ("resnet18", ("most",), {"stem": "imagenet", "width": 3}),
    ],
)
def test_the_fused_program_is_no_less_exact_than_pytorch(bank_of, pictures, poisoned, backbone, patterns, options):
    arenas, images = bank_of(backbone, patterns, **options), pictures(1, 7, 9)
    exact = one_by_one(arenas, images)
    allowed = max(2 * error(one_by_one(arenas, images, torch.float32), exact), FLOOR)
    found = GroupedProgram([arena.to(DEVICE) for arena in arenas], torch.float32)(images.to(DEVICE)).cpu()
    assert found.dtype == torch.float32
    # On a GPU, float32 products are TF32 here, as cuDNN's are.
    assert error(found, exact) <= (allowed if DEVICE == "cpu" else 4 * 2.0**-10)


def test_half_precision_from_float32_weights(bank_of, pictures, poisoned):
    arenas, images = bank_of("resnet18", ("few", "lost"), width=3), pictures(1, 5, 4)
    program = GroupedProgram([arena.to(DEVICE) for arena in arenas], torch.bfloat16)
    found = program(images.to(DEVICE)).cpu()
    assert found.dtype == torch.float32
    # One rounding per layer and branch, 20 of them, that partly cancel.
    assert error(found, one_by_one(arenas, images)) <= 4 * torch.finfo(torch.bfloat16).eps


def test_images_in_any_memory_format_and_dtype(bank_of, pictures):
    arenas, images = bank_of("resnet20", ("few", "most"), dtype=torch.float64), pictures(4, 8, 8, torch.float64)
    program = GroupedProgram(arenas, torch.float64, backend="reference")
    expected = program(images)
    spread = torch.zeros(4, 8, 3, 16, dtype=torch.float64)[..., ::2].permute(0, 2, 1, 3)
    spread.copy_(images)
    for view in (images.contiguous(memory_format=torch.channels_last), spread, images.clone().requires_grad_()):
        assert torch.equal(program(view), expected)
    assert torch.equal(program(images[:1].expand(4, -1, -1, -1)), program(images[:1].repeat(4, 1, 1, 1)))
    assert torch.equal(program(images.float()), program(images.float().double()))


@pytest.mark.parametrize(("backbone", "launches"), [("resnet18", 20), ("resnet20", 19), ("resnet32", 31)])
def test_as_many_launches_whatever_the_number_of_extractors(bank_of, backbone, launches):
    for count in (1, 2, 5):
        program = GroupedProgram(bank_of(backbone, ("all", "most", "few", "one", "lost")[:count]), torch.float32)
        assert program.launches == launches


def test_weights_are_copied_once_in_the_dtype_of_the_computation(bank_of):
    arenas = bank_of("resnet18", ("all", "all"), width=8)
    wide, narrow = (GroupedProgram(arenas, dtype).nbytes for dtype in (torch.float32, torch.bfloat16))
    stored = sum(arena.stored_parameters for arena in arenas)
    assert 4 * stored <= wide < 4.2 * stored and narrow < 0.52 * wide


def test_what_cannot_run_together_is_said(bank_of, arena_of, monkeypatch):
    def reason(*arenas, dtypes=(torch.float32,)):
        return reason_against(arenas, dtypes)

    one, two = bank_of("resnet18", ("most", "few"))
    monkeypatch.setattr(triton_runtime, "usable", lambda device: (True, "for a test"))
    assert reason(one, two, arena_of("resnet20", "nothing")) == ""
    assert "different backbones (resnet18, resnet20)" in reason(one, arena_of("resnet20", "most"))
    assert "their resnet18 have different full widths" in reason(one, arena_of("resnet18", "most", width=5))
    assert "preact_resnet18 has batch-norm before its convolutions" in reason(arena_of("preact_resnet18", "most"))
    assert "they compute in bfloat16 and float32" in reason(one, two, dtypes=(torch.float32, torch.bfloat16))
    assert "they compute in float64, not all in one of float32" in reason(one, dtypes=(torch.float64,))
    assert "no extractor has anything left" in reason(arena_of("resnet18", "nothing")) and "no extractor" in reason()
    assert "lie on different devices" in reason(one, two.to("meta"))
    monkeypatch.setattr(triton_runtime, "usable", lambda device: (False, "Triton is not installed"))
    assert reason(one) == "Triton is not installed"


class FakeGraph:
    """A bank's way of running, without a GPU: notes what is run and forgotten."""

    log: list[str]

    def __init__(self, branches):
        self.name = GROUPED if isinstance(branches[0], str) else STREAMS

    def __call__(self, images):
        self.log.append(self.name)
        return images

    def forget(self):
        self.log.append(f"forget {self.name}")


@pytest.fixture
def faked(monkeypatch, bank_of):
    """`Together` of two extractors whose ways of running only note that they run."""
    log = []
    monkeypatch.setattr(FakeGraph, "log", log, raising=False)
    monkeypatch.setattr(together, "GraphedBranches", FakeGraph)
    monkeypatch.setattr(together, "GroupedProgram", lambda arenas, dtype: "program")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(triton_runtime, "usable", lambda device: (True, "for a test"))
    members = [CompactExtractor(arena) for arena in bank_of("resnet20", ("most", "few"))]
    return lambda strategy="auto", remembered=None, more=(): (Together([*members, *more], strategy, remembered or Choices()), log)


def times(monkeypatch, **milliseconds):
    def measure(runs, device):
        for run in runs.values():
            run()
        return milliseconds

    monkeypatch.setattr(choices, "measure", measure)


@pytest.mark.parametrize("faster", [STREAMS, GROUPED])
def test_the_faster_way_is_taken_and_remembered(faked, monkeypatch, faster):
    times(monkeypatch, **{STREAMS: 2.0, GROUPED: 3.0, faster: 1.0})
    slower = STREAMS if faster == GROUPED else GROUPED
    remembered, images = Choices(), torch.zeros(5, 3, 8, 9)
    bank, log = faked(remembered=remembered)
    bank(images)
    # Once to see that they agree, once to be timed.
    assert log == [STREAMS, GROUPED, STREAMS, GROUPED, f"forget {slower}", faster]
    bank(images[:4])
    bank(images[:1])
    (first, *others) = remembered.record()
    assert "resnet20|float32|bank of 2|" in first and first.endswith("|Some GPU|8x8x9") and others[0].endswith("4x8x9")
    again, log = faked(remembered=remembered)
    log.clear()
    again(images)
    again(images)
    assert log == [f"forget {slower}", faster, faster]


def test_grouped_is_not_taken_where_it_computes_something_else(faked, monkeypatch, caplog):
    monkeypatch.setattr(choices, "measure", lambda runs, device: {name: {STREAMS: 2.0, GROUPED: 1.0}[name] for name in runs})
    right = FakeGraph.__call__
    monkeypatch.setattr(FakeGraph, "__call__", lambda self, images: right(self, images) + (self.name == GROUPED))
    bank, log = faked()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(bank(torch.ones(5, 3, 8, 9)), torch.ones(5, 3, 8, 9))
    assert log[-1] == STREAMS
    assert "frozen extractors run together as 'grouped' is not used, because it computes something else" in caplog.text


def test_what_is_asked_for_is_run(faked, monkeypatch):
    times(monkeypatch, **{STREAMS: 1.0, GROUPED: 1.0})
    for strategy in (STREAMS, GROUPED):
        bank, log = faked(strategy)
        log.clear()
        bank(torch.zeros(2, 3, 8, 8))
        assert log == [strategy]


def test_nothing_is_measured_inside_somebody_elses_graph(faked, monkeypatch):
    times(monkeypatch, **{STREAMS: 2.0, GROUPED: 1.0})
    images, remembered = torch.zeros(2, 3, 8, 8), Choices()
    bank, log = faked(remembered=remembered)
    with monkeypatch.context() as inside:
        inside.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        bank(images)
        assert log == [STREAMS] and not remembered.record()
    bank(images)
    with monkeypatch.context() as inside:
        inside.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        log.clear()
        bank(images)
    assert log == [GROUPED]


def test_a_kernel_that_fails_here_is_said_once_and_left_out(faked, monkeypatch, caplog):
    def measure(runs, device):
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(choices, "measure", measure)
    bank, log = faked()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            bank(torch.zeros(2, 3, 8, 8))
    assert log == [STREAMS, GROUPED, STREAMS, STREAMS] and bank.reason == "RuntimeError: out of shared memory"
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1 and "parallel streams" in caplog.text


def test_a_dense_extractor_runs_on_a_stream_beside_the_others(faked, network_of, caplog):
    with caplog.at_level(logging.INFO):
        bank, log = faked(GROUPED, more=[network_of("resnet20", width=2)])
    assert bank.reason == "a dense extractor is among them" and bank.reason in caplog.text
    bank(torch.zeros(2, 3, 8, 8))
    assert log == [STREAMS]


gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32])
def on_gpu(request, bank_of):
    """Arenas on the CPU, and a function strategy → bank on the GPU."""
    arenas = bank_of("resnet18", ("most", "lost", "nothing", "all", "few"), width=32, dtype=request.param)

    def make(strategy):
        return FrozenBank([CompactExtractor(arena) for arena in arenas], strategy=strategy, choices=Choices()).to("cuda")

    return arenas, make


@pytest.mark.parametrize("strategy", [pytest.param(name, marks=gpu) for name in (GROUPED, STREAMS, "auto")])
def test_both_ways_equal_double_precision(on_gpu, pictures, strategy):
    arenas, make = on_gpu
    bank = make(strategy)
    for count in (16, 128, 16):
        images = pictures(count, 32, 32).to(arenas[0].dtype)
        exact = one_by_one(arenas, images)
        # cuDNN and the kernel may use TF32 (10 bits of mantissa) for float32.
        assert error(bank(images.cuda()).cpu(), exact) <= 4 * max(torch.finfo(arenas[0].dtype).eps, 2.0**-10)
    assert bank._together.reason == ("not asked for" if strategy == STREAMS else "")


@pytest.mark.parametrize("strategy", [pytest.param(GROUPED, marks=gpu)])
def test_a_replay_follows_the_images(on_gpu, pictures, strategy):
    _, make = on_gpu
    bank, images = make(strategy), pictures(32, 32, 32).cuda()
    first = bank(images)
    kept = first.clone()
    other = bank(images.flip(0))
    torch.cuda.synchronize()
    assert torch.equal(first, kept) and not torch.equal(other, kept)
    torch.testing.assert_close(other.flip(0), kept)
    for _ in range(20):
        assert torch.equal(bank(images), kept)


@pytest.mark.parametrize("strategy", [pytest.param(name, marks=gpu) for name in (GROUPED, "auto")])
def test_inside_a_larger_graph(on_gpu, pictures, strategy):
    _, make = on_gpu
    bank, static = make(strategy), pictures(32, 32, 32).cuda()
    other = static.flip(0)
    expected = [bank(images) + 1 for images in (static, other)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = bank(static) + 1
    graph.replay()
    assert torch.equal(found, expected[0])
    static.copy_(other)
    graph.replay()
    assert torch.equal(found, expected[1])
