"""A step on static tensors: eager at first, then replayed; every shape has its own graph, and every batch counts once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from der_fast.training.graphed import WARM_UP, GraphedStep

CPU = torch.device("cpu")


def test_batches_of_a_shape_lie_in_the_same_place_every_time() -> None:
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
    assert [value for *_, value in seen] == [value for number in range(6) for value in (144.0 * number, 672.0)]
    assert len({place[:2] for place in seen[::2]}) == len({place[:2] for place in seen[1::2]}) == 1
    assert seen[0][:2] != seen[1][:2] != (odd[0].data_ptr(), odd[1].data_ptr())


class Pretending(GraphedStep):
    """A step that believes to be on a GPU; what would be captured is a list of calls."""

    def __init__(self, say: Any, problem: Exception | None = None) -> None:
        super().__init__(CPU, say)
        self._captures, self.problem, self.captures, self.replays = True, problem, 0, 0

    def _eagerly(self, body: Any, tensors: tuple[torch.Tensor, ...]) -> None:
        body(*tensors)

    def _record(self, graph: Any, body: Any, tensors: tuple[torch.Tensor, ...]) -> None:
        self.captures += 1
        if self.problem is not None:
            raise self.problem

        def replay() -> None:
            self.replays += 1
            body(*tensors)

        graph.replay = replay

    def _new_graph(self) -> Any:
        return type("Graph", (), {})()


def test_every_batch_counts_once_before_and_after_the_capture() -> None:
    seen: list[float] = []
    step = Pretending(pytest.fail)

    def body(images: torch.Tensor, labels: torch.Tensor) -> None:
        seen.append(float(images[0]))

    for number in range(WARM_UP + 4):
        assert step.captured == 2 * (number > WARM_UP)
        step(body, torch.tensor([float(number), 0.0]), torch.zeros(2))
        step(body, torch.tensor([-float(number)]), torch.zeros(1))
    assert step.captures == step.captured == 2 and step.replays == 2 * 4
    assert seen == [value for number in range(WARM_UP + 4) for value in (float(number), -float(number))]


def test_a_run_that_resumes_in_front_of_an_odd_batch_captures_full_batches_too() -> None:
    seen: list[int] = []
    step = Pretending(pytest.fail)

    def body(positions: torch.Tensor) -> None:
        seen.append(len(positions))

    sizes = [2] + 2 * (4 * [5] + [2])
    for size in sizes:
        step(body, torch.zeros(size, dtype=torch.int64))
    assert seen == sizes and step.captured == 1 and step.replays == 8 - WARM_UP


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (RuntimeError("operation not permitted\nwhen a stream is capturing"), "operation not permitted"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore"), "CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_where_no_graph_can_be_captured_one_line_says_so_and_every_batch_still_counts(problem: Exception, reason: str) -> None:
    seen: list[float] = []
    said: list[str] = []
    step = Pretending(said.append, problem)

    def body(images: torch.Tensor, labels: torch.Tensor) -> None:
        seen.append(float(images[0]))

    for number in range(WARM_UP + 4):
        step(body, torch.tensor([float(number)]), torch.zeros(1))
        step(body, torch.tensor([-float(number), 0.0]), torch.zeros(2))
    assert seen == [value for number in range(WARM_UP + 4) for value in (float(number), -float(number))]
    assert step.captures == 1 and not step.captured
    assert said == [f"training steps are launched kernel by kernel, because no CUDA graph could be captured: {reason}"]
