"""Between two blocks no pass is left, and whatever else uses or watches what lies there, every gradient is what autograd computes."""

from __future__ import annotations

import pytest
import torch

from der_fast.kernels.masked_bn import Running
from der_fast.model import chain_backward, paths
from der_fast.model.architecture import build_architecture
from der_fast.model.chain import IDENTITY, NOTHING, PROJECTION, WIDENED, ChainBlock
from der_fast.model.chain_node import Passage, run_block
from der_fast.model.extractor import Extractor
from der_fast.model.fused_training import FusedTraining
from der_fast.model.paths import APART, CHAIN, CUDNN, Layer

EXACT = 1e-10


def draw(*shape, seed):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else drawn


@pytest.fixture
def passes(monkeypatch):
    """By what every pass went through a ReLU: bits at the end of a block, else the sign."""
    found, original = [], chain_backward.backward_reduce

    def counted(g, y, affine, **options):
        found.append(options["relu_from"])
        return original(g, y, affine, **options)

    monkeypatch.setattr(chain_backward, "backward_reduce", counted)
    return found


class Pair:
    """Two blocks, one behind the other; `results` runs them forward and backward and returns every gradient."""

    def __init__(self, before, behind, path=CHAIN):
        self.passages = []
        self.before, self.first = self.block(before, 3, 3 if before == IDENTITY else 5, path, seed=10)
        self.behind, self.second = self.block(behind, self.first[-5].shape[0], 7, path, seed=40)
        self.x = draw(2, 3, 6, 7, seed=1).requires_grad_(before != NOTHING)

    @staticmethod
    def block(residual, inputs, outputs, path, seed):
        outputs, stride = (inputs, 1) if residual == IDENTITY else (outputs, 1 if residual == NOTHING else 2)
        shapes = [(4, inputs, 3, stride), (outputs, 4, 3, 1)] if residual != NOTHING else [(outputs, inputs, 3, 1)]
        if residual == PROJECTION:
            shapes.append((outputs, inputs, 1, stride))
        layers = paths.forward_layers([Layer(kernel, step) for _, _, kernel, step in shapes], CHAIN if path == APART else path)
        flat = []
        for number, (filters, channels, kernel, _) in enumerate(shapes):
            weight = draw(filters, channels, kernel, kernel, seed=seed + number).requires_grad_()
            vectors = [(0.3 * draw(filters, seed=seed + 10 + 3 * number + i) + 1).requires_grad_() for i in range(3)]
            flat += [weight, weight.detach(), *vectors]
        return ChainBlock(paths.backward_layers(layers, path), residual, stride, "reference"), flat

    def running(self, flat):
        return [Running(gamma.detach().clone(), gamma.detach().clone(), 0.1) for gamma in flat[2::5]]

    def forward(self, joined):
        passage = Passage() if joined else None
        self.passages.append(passage)
        middle = run_block(self.before, self.x, self.first, self.running(self.first), leave=passage)
        out = run_block(self.behind, middle, self.second, self.running(self.second), entry=passage)
        return middle, (out * draw(*out.shape, seed=2)).sum()

    @property
    def leaves(self):
        return [leaf for leaf in (self.x, *self.first, *self.second) if leaf.requires_grad]

    def gradients(self, joined, use=lambda middle, loss: loss.backward()):
        for leaf in self.leaves:
            leaf.grad = None
        extra = use(*self.forward(joined))
        return [*(leaf.grad for leaf in self.leaves), *(extra or [])]

    def check(self, use=lambda middle, loss: loss.backward()):
        found, wanted = self.gradients(True, use), self.gradients(False, use)
        for one, other in zip(found, wanted, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert float((one - other).abs().max()) <= EXACT * float(other.abs().max())
        # Nothing is kept beyond the backward pass.
        assert self.passages[0].join is None and self.passages[0].prepared is None


@pytest.mark.parametrize("path", [CHAIN, CUDNN, APART, paths.DGRAD])
@pytest.mark.parametrize("behind", [IDENTITY, WIDENED, PROJECTION])
@pytest.mark.parametrize("before", [NOTHING, IDENTITY, WIDENED, PROJECTION])
def test_a_block_goes_through_the_end_of_the_one_before(before, behind, path, passes):
    pair = Pair(before, behind, path)
    pair.gradients(True)
    fused = path in (CHAIN, paths.DGRAD) and behind != WIDENED
    inside = 0 if path != CUDNN else 1 + (before != NOTHING)
    # The last join of all has a pass of its own.
    assert len(passes) == inside + (1 if fused else 2)
    pair.check()


def other_consumer(middle, loss):
    (loss + (middle * draw(*middle.shape, seed=3)).sum()).backward()


def other_consumer_first(middle, loss):
    ((middle * draw(*middle.shape, seed=3)).sum() + loss).backward()


def hook_that_is_not_linear(middle, loss):
    middle.register_hook(lambda g: g.clamp(-0.5, 0.5))
    loss.backward()


def hook_that_looks(middle, loss):
    seen = []
    middle.register_hook(lambda g: seen.append(g.clone()))
    loss.backward()
    return seen


def retained(middle, loss):
    middle.retain_grad()
    loss.backward()
    return [middle.grad]


def changed_in_place(middle, loss):
    middle.grad_fn.register_prehook(lambda gradients: (gradients[0].mul_(2),))
    loss.backward()


def replaced(middle, loss):
    middle.grad_fn.register_prehook(lambda gradients: (gradients[0] * 3,))
    loss.backward()


def twice(middle, loss):
    loss.backward(retain_graph=True)
    loss.backward()


def twice_the_second_time_by_another_way(middle, loss):
    loss.backward(retain_graph=True)
    (middle * draw(*middle.shape, seed=3)).sum().backward()


def a_part_first(middle, loss):
    weight = loss.grad_fn.next_functions[0][0].next_functions[0][0].next_functions[1][0].variable
    (alone,) = torch.autograd.grad(loss, [weight], retain_graph=True)
    loss.backward()
    return [alone]


USES = [other_consumer, other_consumer_first, hook_that_is_not_linear, hook_that_looks, retained]
USES += [changed_in_place, replaced, twice, twice_the_second_time_by_another_way, a_part_first]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize(("before", "behind"), [(NOTHING, IDENTITY), (PROJECTION, IDENTITY), (IDENTITY, PROJECTION)])
def test_whatever_else_happens_to_the_gradient_in_between(before, behind, use):
    Pair(before, behind).check(use)


@pytest.mark.parametrize("use", [other_consumer, hook_that_looks, retained, changed_in_place, replaced], ids=lambda use: use.__name__)
def test_another_gradient_than_the_prepared_one_has_a_pass_of_its_own(use, passes):
    Pair(IDENTITY, IDENTITY).gradients(True, use)
    assert len(passes) == 2


@pytest.mark.parametrize(("path", "count"), [(CHAIN, 1), (paths.UNSTRIDED, 4), (CUDNN, 8)])
def test_a_residual_network_has_one_pass_through_the_end_of_a_block(path, count, passes):
    """Of eight blocks; three of them begin with a stride."""
    extractor = Extractor(build_architecture("resnet18", width=2)).double().train()
    FusedTraining(extractor, torch.float64, path=path, backend="reference")(draw(2, 3, 16, 16, seed=1)).sum().backward()
    assert sum(isinstance(bits, torch.Tensor) for bits in passes) == count
