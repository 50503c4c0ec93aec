"""Runs every narrow 1×1 convolution with stride 2 against float64 and prints the largest errors; started by test_strided.py."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F

from der_fast.kernels.conv.strided import convolve, convolve_backward

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def relative(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours - truth).abs().max() / truth.abs().max())


def errors(channels: int, height: int, batch: int, layout: torch.memory_format) -> dict[str, float]:
    generator = torch.Generator().manual_seed(channels + 100 * height)
    x = torch.randn(batch, channels, height, 24 - height, generator=generator)
    weight = torch.randn(5, channels, 1, 1, generator=generator)
    precise = [value.double().requires_grad_() for value in (x, weight)]
    truth = F.conv2d(*precise, stride=2)
    g = torch.randn(truth.shape, generator=generator)
    truth_x, truth_weight = torch.autograd.grad(truth, precise, g.double())
    x, weight, g = (value.to(memory_format=layout) for value in (x, weight, g))
    by_autograd = [x.requires_grad_(), weight.requires_grad_()]
    y = convolve(*by_autograd, 2, 0)
    for_x, for_weight = torch.autograd.grad(y, by_autograd, g)
    by_hand_x = convolve_backward(g, x.detach(), weight.detach(), 2, 0, (True, False))[0]
    by_hand_weight = convolve_backward(g, x.detach(), weight.detach(), 2, 0, (False, True))[1]
    return {
        "forward": relative(y.detach(), truth.detach()),
        "x": max(relative(for_x, truth_x), relative(by_hand_x, truth_x)),
        "weight": max(relative(for_weight, truth_weight), relative(by_hand_weight, truth_weight)),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    worst = {"forward": 0.0, "x": 0.0, "weight": 0.0}
    count = 0
    for shape in itertools.product(range(1, 10), range(7, 18), range(1, 4), LAYOUTS):
        for name, error in errors(*shape).items():
            worst[name] = max(worst[name], error)
        count += 1
    print(count, *worst.values())
