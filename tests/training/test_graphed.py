"""A step on static tensors: eager at first, then replayed; every batch counts once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from der_fast.training.graphed import WARM_UP, GraphedStep

CPU = torch.device("cpu")


def test_the_batch_lies_in_the_same_place_every_time() -> None:
    seen: list[tuple[int, int, float]] = []
    step = GraphedStep(CPU, pytest.fail)

    def body(images: torch.Tensor, labels: torch.Tensor) -> None:
        seen.append((images.data_ptr(), labels.data_ptr(), float(images.sum())))

    odd = torch.full((2, 3, 4, 4), 7.0), torch.zeros(2, dtype=torch.int64)
    for number in range(6):
        images = torch.full((3, 3, 4, 4), float(number)).contiguous(memory_format=torch.channels_last)
        step(body, images, torch.full((3,), number))
        step(body, *odd)
    assert len(seen) == 12 and not step.captured
    assert [value for *_, value in seen[::2]] == [144.0 * number for number in range(6)]
    assert len({place[:2] for place in seen[::2]}) == 1
    assert {place[:2] for place in seen[1::2]} == {(odd[0].data_ptr(), odd[1].data_ptr())}


class Pretending(GraphedStep):
    """A step that believes to be on a GPU; what would be captured is a list of calls."""

    def __init__(self, say: Any, problem: str | None = None) -> None:
        super().__init__(CPU, say)
        self._captures, self.problem, self.captures = True, problem, 0

    def _eagerly(self, body: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
        body(images, labels)

    def _record(self, graph: Any, body: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.captures += 1
        if self.problem is not None:
            raise RuntimeError(self.problem)
        graph.replay = lambda: body(images, labels)

    def _new_graph(self) -> Any:
        return type("Graph", (), {})()


def test_every_batch_counts_once_before_and_after_the_capture() -> None:
    seen: list[float] = []
    step = Pretending(pytest.fail)

    def body(images: torch.Tensor, labels: torch.Tensor) -> None:
        seen.append(float(images[0]))

    for number in range(WARM_UP + 4):
        assert step.captured == (number > WARM_UP)
        step(body, torch.tensor([float(number), 0.0]), torch.zeros(2))
        step(body, torch.tensor([-float(number)]), torch.zeros(1))
    assert step.captures == 1 and step.captured
    assert seen == [value for number in range(WARM_UP + 4) for value in (float(number), -float(number))]


def test_where_no_graph_can_be_captured_one_line_says_so_and_every_batch_still_counts() -> None:
    seen: list[float] = []
    said: list[str] = []
    step = Pretending(said.append, "operation not permitted\nwhen a stream is capturing")

    def body(images: torch.Tensor, labels: torch.Tensor) -> None:
        seen.append(float(images[0]))

    for number in range(WARM_UP + 4):
        step(body, torch.tensor([float(number)]), torch.zeros(1))
    assert seen == [float(number) for number in range(WARM_UP + 4)]
    assert step.captures == 1 and not step.captured
    assert said == ["training steps are launched kernel by kernel, because no CUDA graph could be captured: operation not permitted"]
