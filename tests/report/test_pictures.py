"""The pictures: what they draw, and that labels stay readable in the hardest cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from der_fast.report import accuracy, channels, cost, reasons, style, training
from der_fast.report.paper import curve_beside
from der_fast.report.record import read_run

CIFAR100 = [[f"class_{10 * step + index}" for index in range(10)] for step in range(10)]
HARD = {
    "ten steps of ten classes, ResNet-18": {"class_sets": CIFAR100, "backbone": "resnet18", "dataset": "cifar100", "protocol": "B0-10"},
    "fifty steps, ResNet-32": {
        "class_sets": [[f"c{2 * step}", f"c{2 * step + 1}"] for step in range(50)],
        "backbone": "resnet32",
        "dataset": "cifar100",
        "protocol": "B0-50",
    },
    "long names, ResNet-50": {
        "class_sets": [[f"a long class name, number {2 * step + index}" for index in (0, 1)] for step in range(6)],
        "backbone": "resnet50",
    },
    "perfect accuracy": {
        "class_sets": [["a", "b"]] * 5,
        "top1": [100.0, 100.0, 99.9, 97.0, 60.0],
        "top5": [100.0] * 5,
        "backbone": "resnet20",
    },
    "one step, one epoch": {"class_sets": [["a", "b"]], "backbone": "resnet32", "epochs": 1, "settle_from": None},
}


@pytest.fixture
def figures(monkeypatch):
    """Return the list that every figure drawn from now on is put into, instead of being encoded."""
    drawn = []

    def keep(figure, stem, title, caption):
        FigureCanvasAgg(figure).draw()
        drawn.append((stem, figure))
        return style.Picture(stem, title, caption, b"", 0, 0)

    monkeypatch.setattr(style, "picture", keep)
    return drawn


def draw_all(run):
    paper = curve_beside(run)
    with style.look():
        accuracy.accuracy_per_step(run, paper)
        accuracy.class_sets_over_time(run)
        accuracy.confusion_matrix(run)
        cost.parameters_per_step(run, paper)
        cost.latency_per_step(run)
        channels.kept_channels(run)
        training.epochs_of_the_run(run)
        channels.mask_trajectories(run.trajectories[-1])
        reasons.picture_of(run.trajectories[-1])


def overlaps(texts, slack=1.0):
    """Return pairs of visible texts whose boxes overlap by more than `slack` pixels in both directions."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_visible() and text.get_text().strip()]
    found = []
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        if across > slack and down > slack:
            found.append((one, other))
    return found


@pytest.mark.parametrize("case", HARD)
def test_no_text_lies_on_another_or_outside(tmp_path, make_run, figures, case):
    make_run(tmp_path, **{"epochs": 6, "settle_from": 4, **HARD[case]})
    draw_all(read_run(tmp_path))
    for stem, figure in figures:
        texts = [text for axes in figure.findobj(lambda artist: hasattr(artist, "get_xticklabels")) for text in ticks_and_words(axes)]
        assert not overlaps(texts), stem
        width, height = figure.canvas.get_width_height()
        for text in texts:
            if text.get_visible() and text.get_text().strip():
                box = text.get_window_extent()
                assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1, (stem, text.get_text())


def ticks_and_words(axes):
    """Tick labels inside the axes' limits, axis labels, titles, annotations and legend entries."""
    low, high = sorted(axes.get_xlim())
    labels = [tick.label1 for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    low, high = sorted(axes.get_ylim())
    labels += [side for tick in axes.yaxis.get_major_ticks() for side in (tick.label1, tick.label2) if low <= tick.get_loc() <= high]
    legend = axes.get_legend()
    words = [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *(legend.get_texts() if legend else [])]
    return labels + words


def only(figures, stem):
    return next(figure for name, figure in figures if name == stem)


def test_accuracy_draws_run_and_paper(tmp_path, make_run, figures):
    metrics = make_run(tmp_path, CIFAR100, dataset="cifar100", protocol="B0-10")
    run = read_run(tmp_path)
    with style.look():
        accuracy.accuracy_per_step(run, curve_beside(run))
    (axes,) = only(figures, "accuracy_per_step").axes
    lines = {line.get_label(): line for line in axes.lines}
    assert lines["this run, top-1"].get_ydata().tolist() == metrics["top1"]
    assert lines["this run, top-1"].get_xdata().tolist() == list(range(10, 101, 10))
    assert lines["paper, top-1, pruned"].get_ydata()[:2].tolist() == [87.816, 83.666]
    assert lines["paper, top-1, not pruned"].get_ydata()[-1] == 65.221


@pytest.mark.parametrize(
    ("dataset", "order", "words"),
    [
        ("cifar100", "podnet-2", "averaged over 3 class orders, including this run's."),
        ("cifar100", "numpy-1993", "averaged over 3 class orders, but not over this run's."),
        ("imagenet100", "numpy-1993", "with the same class order."),
        ("imagenet100", None, "with another class order."),
    ],
)
def test_the_caption_says_in_which_order_the_papers_classes_came(dataset, order, words, tmp_path, make_run, figures):
    make_run(tmp_path, CIFAR100, dataset=dataset, protocol="B0-10", config={"protocol": {"class_order": order}})
    run = read_run(tmp_path)
    with style.look():
        picture = accuracy.accuracy_per_step(run, curve_beside(run))
    assert picture is not None and picture.caption.endswith(f"published values, with ResNet-18, {words}")


def test_top5_of_five_classes_is_not_drawn(tmp_path, make_run, figures):
    make_run(tmp_path, [["a", "b"], ["c", "d", "e"]])
    with style.look():
        accuracy.accuracy_per_step(read_run(tmp_path), None)
    assert "this run, top-5" not in {line.get_label() for line in only(figures, "accuracy_per_step").axes[0].lines}


def test_class_sets_are_rows_and_steps_columns(tmp_path, make_run, figures):
    make_run(tmp_path, [["a"], ["b"], ["c"]], class_set_top1=[[90.0], [80.0, 95.0], [70.0, 97.0, 99.0]])
    with style.look():
        picture = accuracy.class_sets_over_time(read_run(tmp_path))
    grid, change, *_ = only(figures, "class_sets_over_time").axes
    assert np.ma.filled(grid.images[0].get_array(), np.nan).tolist()[0] == [90.0, 80.0, 70.0]
    assert np.isnan(np.ma.filled(grid.images[0].get_array(), np.nan)[2, :2]).all()
    assert [text.get_text() for text in change.texts] == ["−20", "+2"]
    assert picture is not None and "class set 1 has lost the most, 20.0 points" in picture.caption


def test_nothing_forgotten_is_said(tmp_path, make_run, figures):
    make_run(tmp_path, [["a"], ["b"]], class_set_top1=[[90.0], [91.0, 95.0]])
    with style.look():
        picture = accuracy.class_sets_over_time(read_run(tmp_path))
    assert picture is not None and "no class set has lost accuracy" in picture.caption


def test_confusion_rows_are_shares_of_the_true_class(tmp_path, make_run, figures):
    make_run(tmp_path, [["a", "b"]], confusion=[[3, 1], [0, 0]])
    with style.look():
        picture = accuracy.confusion_matrix(read_run(tmp_path))
    shares = only(figures, "confusion_matrix").axes[0].images[0].get_array()
    assert shares.tolist() == [[75.0, 25.0], [0.0, 0.0]]
    assert picture is not None and "75.0 % of 4 test images" in picture.caption


def test_parameters_compare_with_the_unpruned_model(tmp_path, make_run, figures):
    make_run(tmp_path, [["a"], ["b"]], params=[100_000, 300_000], params_unpruned=[400_000, 800_000], final_params=300_000)
    with style.look():
        cost.parameters_per_step(read_run(tmp_path), None)
    total, added = only(figures, "parameters_per_step").axes
    assert {line.get_label(): line.get_ydata().tolist() for line in total.lines} == {
        "unpruned": [400_000, 800_000],
        "this run": [100_000, 300_000],
    }
    assert [text.get_text() for text in added.texts] == ["25 %", "50 %"]


def test_unpruned_run_is_not_compared_with_itself(tmp_path, make_run, figures):
    make_run(tmp_path, [["a"], ["b"]])
    run = read_run(tmp_path)
    with style.look():
        pictures = [cost.parameters_per_step(run, None), cost.latency_per_step(run)]
    for _, figure in figures:
        assert all(line.get_label() != "unpruned" for axes in figure.axes for line in axes.lines)
    assert [picture.title for picture in pictures if picture is not None] == ["Parameters", "Latency"]


def test_kept_channels_are_written_in_the_cells(tmp_path, make_run, figures):
    metrics = make_run(tmp_path, [["a"], ["b"]], backbone="resnet20", epochs=2)
    with style.look():
        channels.kept_channels(read_run(tmp_path))
    axes = only(figures, "kept_channels").axes[0]
    names = list(metrics["kept"][0])
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"{name}  ({metrics['kept'][0][name][1]})" for name in names]
    assert [text.get_text() for text in axes.texts] == [str(row[name][0]) for name in names for row in metrics["kept"]]


def test_a_step_without_masks_leaves_its_column_empty(tmp_path, make_run, figures):
    make_run(tmp_path, [["a"], ["b"]], kept=[{"stage1": [3, 4]}, None])
    with style.look():
        channels.kept_channels(read_run(tmp_path))
    grid = only(figures, "kept_channels").axes[0].images[0].get_array()
    assert np.ma.filled(grid, np.nan)[0, 0] == 75.0 and np.isnan(np.ma.filled(grid, np.nan)[0, 1])


def test_training_lines_do_not_join_steps_or_stages(tmp_path, make_run, figures):
    make_run(tmp_path, [["a"], ["b"]], epochs=3, classifier_epochs=2)
    with style.look():
        training.epochs_of_the_run(read_run(tmp_path))
    loss = only(figures, "epochs").axes[0]
    assert [line.get_xdata().tolist() for line in loss.lines if len(line.get_xdata())] == [[1, 2, 3], [4, 5, 6], [7, 8]]


def test_lambda_is_drawn_where_it_changes(tmp_path, make_run, figures):
    import json

    make_run(tmp_path, [["a"]], backbone="resnet20", epochs=3)
    history = json.loads((tmp_path / "history.json").read_text())
    for step, row in enumerate(history["epochs"]):
        row["sparsity_weight"] = 1.0 + step
    (tmp_path / "history.json").write_text(json.dumps(history))
    with style.look():
        training.epochs_of_the_run(read_run(tmp_path))
    panels = {axes.get_ylabel(): axes for axes in only(figures, "epochs").axes}
    assert panels["λ_s"].lines[0].get_ydata().tolist() == [1.0, 2.0, 3.0]


def test_class_sets_of_which_no_change_is_known(tmp_path, make_run, figures):
    # The first data set could not be read any more when the second was learned.
    make_run(tmp_path, [["a"], ["b"]], class_set_top1=[[90.0], [None, 95.0]])
    with style.look():
        picture = accuracy.class_sets_over_time(read_run(tmp_path))
    assert picture is not None and picture.caption.endswith("did to the classes of that step.")
