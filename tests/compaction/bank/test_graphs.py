"""Extractors on a GPU: parallel branches in one CUDA graph."""

from __future__ import annotations

import logging

import pytest
import torch

from der_fast.compaction.bank import FrozenBank
from der_fast.compaction.bank.execute import execute
from der_fast.compaction.bank.extractor import CompactExtractor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def make(arena_of, dtype=torch.float32):
    names = ("resnet18", "resnet20", "resnet20", "preact_resnet18")
    patterns = ("most", "few", "nothing", "lost")
    arenas = [arena_of(*pair, width=8, seed=seed, dtype=dtype) for seed, pair in enumerate(zip(names, patterns, strict=True))]
    return arenas, FrozenBank([CompactExtractor(arena) for arena in arenas]).to("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_to_the_cpu_in_double_precision(arena_of, pictures, dtype):
    arenas, bank = make(arena_of, dtype)
    for count in (1, 7, 16, 7):
        images = pictures(count, 16, 16).to(dtype)
        exact = torch.cat([execute(a.ops, {n: t.double() for n, t in a.tensors().items()}, images.double()) for a in arenas], 1)
        found = bank(images.cuda()).double().cpu()
        # cuDNN may use TF32 (10 bits of mantissa) for float32.
        bound = 4 * max(torch.finfo(dtype).eps, 2.0**-10)
        assert float((found - exact).abs().max()) <= bound * float(exact.abs().max())


def test_a_replay_does_not_change_what_an_earlier_one_returned(arena_of, pictures):
    _, bank = make(arena_of)
    first, second = pictures(4, 16, 16).cuda(), pictures(4, 16, 16).cuda().flip(0)
    one = bank(first)
    kept = one.clone()
    other = bank(second)
    torch.cuda.synchronize()
    assert torch.equal(one, kept) and not torch.equal(other, kept)
    assert torch.equal(bank(first), kept)


def test_an_extractor_added_later_is_run(arena_of, pictures):
    arenas, bank = make(arena_of)
    images = pictures(4, 16, 16).cuda()
    before = bank(images)
    bank.append(CompactExtractor(arenas[0]).to("cuda"))
    after = bank(images)
    torch.testing.assert_close(after[:, : before.shape[1]], before)
    torch.testing.assert_close(after[:, before.shape[1] :], before[:, : arenas[0].features])


def test_without_a_graph_the_same_comes_out_with_one_line_in_the_log(arena_of, pictures, monkeypatch, caplog):
    _, bank = make(arena_of)
    images = pictures(4, 16, 16).cuda()
    expected = bank(images)
    _, eager = make(arena_of)

    def refuse(*args, **kwargs):
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            torch.testing.assert_close(eager(images), expected)
    assert [record.message for record in caplog.records if "no graphs today" in record.message] == [caplog.records[0].message]
