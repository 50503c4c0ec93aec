"""What a captured step launches: never more than today, nothing that asks the device or the host; and the list counts what it should."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import aten
from bench.harness.facts import ROOT
from bench.harness.launches import BANDWIDTH, LEAST_SECONDS, PEAK, HostAccess, Launch, launches_of, no_kernels
from bench.reports.launch_table import GOAL
from bench.studies import launches as study
from bench.subjects.bodies import MOMENTS, Bodies
from der_fast.kernels.conv import conv_dgrad, conv_forward, conv_wgrad
from der_fast.kernels.grouped_conv import GroupMember, grouped_conv, pack_layer
from der_fast.training.methods.der.sparsity import MOST_BATCHES

# Stage, t, parameter target: kernels of a batch of ResNet-18, the most there may be. The goal for a captured step is 200: lower these
# whenever a change takes launches away, and never raise them.
MOST = {
    ("representation", 1, False): 144,
    ("representation", 1, True): 144,
    ("representation", 10, False): 178,
    ("representation", 10, True): 178,
    ("settled", 1, False): 134,
    ("settled", 1, True): 134,
    ("settled", 10, False): 168,
    ("settled", 10, True): 168,
    ("kept", 10, False): 150,
    ("kept", 10, True): 150,
    ("classifier", 10, False): 19,
    ("classifier", 10, True): 19,
    ("between", 1, False): 0,
    ("between", 1, True): 33,
}


@pytest.fixture(scope="module")
def bodies():
    return Bodies()


def test_every_moment_has_a_bound():
    assert set(MOST) == {(moment.stage, moment.steps, moment.target) for moment in MOMENTS}
    assert GOAL == 200


def test_a_target_costs_a_batch_less_than_five_launches():
    assert MOST["between", 1, True] / MOST_BATCHES < 5
    assert MOST["between", 1, False] == 0
    assert MOST["representation", 10, True] == MOST["representation", 10, False]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment.stage}-{moment.steps}-{'target' if moment.target else 'none'}")
def test_a_step_launches_what_is_committed_and_asks_for_nothing(bodies, moment):
    # A body that asked the device or the host for something would have raised.
    found = study.row(moment, study.listed(bodies, moment))
    assert found["launches"] <= MOST[moment.stage, moment.steps, moment.target]
    lines = (ROOT / "bench" / "results" / "launches.jsonl").read_text(encoding="utf-8").splitlines()
    committed = {(row["stage"], row["steps"], row["target"]): row for row in map(json.loads, lines)}
    again = "run `python -m bench launches --json bench/results/launches.jsonl` and `python -m bench readme`"
    assert found == committed[moment.stage, moment.steps, moment.target], again


def test_the_study_writes_every_launch_in_order(tmp_path, capsys):
    study.main(["--smoke", "--batch", "4", "--each", "--json", str(tmp_path / "launches.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "launches.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(MOMENTS)
    for row in rows:
        assert len(row["each"]) == row["launches"] == sum(count for count, _ in row["kinds"].values())
        assert sum(one["modelled_us"] for one in row["each"]) == pytest.approx(1e3 * row["modelled_ms"], abs=2)
    names = [one["name"] for one in rows[0]["each"]]
    assert names.index("conv.conv_forward") < names.index("conv.conv_dgrad") < names.index("aten._fused_sgd_.tensor_lr")
    assert "modelled, not measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), torch.zeros((), device="cpu")),
        lambda x: x + torch.ones(3),
        lambda x: x.copy_(torch.tensor([1.0, 2.0, 3.0])),
        lambda x: torch.tensor([1.0], device=x.device),
    ],
    ids=["item", "bool", "tolist", "cpu", "nonzero", "masked", "masked write", "host operand", "host copy", "numbers"],
)
def test_what_no_graph_can_hold_is_refused(body):
    x = torch.ones(3)
    with pytest.raises(HostAccess, match="a CUDA graph cannot hold it"):
        launches_of(lambda: body(x))


def test_an_operation_that_nothing_is_assumed_about_is_named():
    x = torch.eye(3)
    with pytest.raises(aten.UnknownOperation, match=r"aten\._linalg_det.*add it to the table"):
        launches_of(lambda: torch.linalg.det(x))


A, B, MASK = torch.ones(8, 8), torch.ones(8, 8), torch.ones(8, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (lambda: A + B, 1),
        (lambda: A.view(64)[:32].t(), 0),
        (lambda: torch.empty_like(A), 0),
        (lambda: torch.zeros_like(A), 1),
        (lambda: A.new_zeros(0, 8) + 1, 0),
        (lambda: A.copy_(A.view(8, 8)), 0),
        (lambda: A.copy_(B), 1),
        (lambda: A.masked_fill(MASK, 0.0), 2),
        (lambda: A.flatten().sort(), 3),
        (lambda: torch.zeros(5000, device="cpu").sort(), 1 + 7),
        (lambda: F.pad(A, (0, 1)), 2),
        (lambda: torch._foreach_add_([A, A], [B, B]), 1),
        (lambda: torch._foreach_copy_([A, A.t()], [B, B]), 2),
    ],
)
def test_operations_count_as_assumed(body, count):
    assert len(launches_of(body)) == count


def test_a_backward_pass_is_listed_and_its_origin_named():
    x = torch.ones(4, requires_grad=True)
    found = launches_of(lambda: (x * x).sum().backward())
    assert [launch.name for launch in found if launch.where == "autograd"] == ["aten.mul.Tensor", "aten.mul.Tensor", "aten.add.Tensor"]


@pytest.mark.parametrize(
    ("lists", "tensors", "elements", "launches"),
    [
        (3, 48, 10, 1),
        (3, 49, 10, 2),
        (2, 64, 10, 1),
        (2, 65, 10, 2),
        (1, 1, 320 * 65536, 1),
        (1, 1, 320 * 65536 + 1, 2),
        (1, 5, 0, 0),
        # The first launch ends in the middle of the second tensor, which counts in the next one as well.
        (3, 50, 200 * 65536, 32),
    ],
)
def test_lists_are_cut_as_pytorch_cuts_them(lists, tensors, elements, launches):
    with torch.device("meta"):
        assert aten.chunks_of([[torch.empty(elements)] * tensors] * lists) == launches


def test_bytes_are_read_and_written_once():
    x, row, index = torch.ones(100, 10), torch.ones(1, 10), torch.tensor([3, 3])

    def moved(body):
        return [launch.bytes for launch in launches_of(body)]

    assert moved(lambda: x + x) == [8000]
    assert moved(lambda: x + row.expand(100, 10)) == [8040]
    assert moved(lambda: x.add_(1.0)) == [8000]
    assert moved(lambda: x.zero_()) == [4000]
    assert moved(lambda: x.index_select(0, index)) == [2 * 80 + 16]
    assert moved(lambda: torch._foreach_copy_([x], [x.bfloat16()])) == [6000, 6000]


def test_the_optimizer_moves_weights_gradients_and_momentum():
    weight = torch.nn.Parameter(torch.zeros(1000))
    weight.grad = torch.ones(1000)
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=True)
    sgd.step()
    assert [launch.bytes for launch in launches_of(sgd.step)] == [5 * 4000]


def _image(channels: int, side: int) -> Tensor:
    return torch.zeros(2, channels, side, side, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)


def test_products_count_their_operations():
    x, g = _image(8, 16), _image(16, 8)
    weight = torch.zeros(16, 8, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    layer = pack_layer(
        [GroupMember(torch.zeros(16, 8, 3, 3), None, 0, 0, 16)], kernel=3, stride=1, relu=True, inputs=8, dtype=x.dtype, device=x.device
    )
    calls = [
        lambda: conv_forward(x, weight, stride=2, prologue=None, statistics=False, backend="fused"),
        lambda: conv_dgrad(g, weight, (16, 16), stride=2, g_affine=None, epilogue=None, backend="fused"),
        lambda: conv_wgrad(x, g, 3, stride=2, split=1, backend="fused"),
        lambda: grouped_conv(x, layer, backend="fused"),
        lambda: A @ B,
    ]
    one = 2.0 * (2 * 8 * 8) * 16 * 8 * 9
    with no_kernels():
        grouped_conv(x, layer, backend="fused")
        found = [launches_of(call) for call in calls]
    assert [[launch.flops for launch in launches] for launches in found] == [[one], [one], [one], [4 * one], [2.0 * 8**3]]
    # Images, weights, result; the weight's gradient is float32.
    sizes = [2 * 8 * 256 * 2, 2 * 16 * 64 * 2, 16 * 72 * 2]
    assert [launches[0].bytes for launches in found[:3]] == [sum(sizes), sum(sizes), sum(sizes) + 16 * 72 * 2]


def test_the_longest_of_three_is_modelled():
    def seconds(moved: float, flops: float, dtype: torch.dtype = torch.bfloat16) -> float:
        return Launch("name", "kind", "where", (), moved, flops, dtype).seconds

    assert seconds(8.0, 8.0) == LEAST_SECONDS == 1.5e-6
    assert seconds(BANDWIDTH, 1.0) == 1.0 == seconds(1.0, PEAK[torch.bfloat16])
    assert seconds(1.0, PEAK[torch.float32], torch.float32) == 1.0
