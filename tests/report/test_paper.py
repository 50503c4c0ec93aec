"""The paper's numbers as shipped, and when they are shown."""

from __future__ import annotations

import pytest

from der_fast.report.paper import curve_beside, paper_curve
from der_fast.report.record import read_run

B0_10 = range(10, 101, 10)


@pytest.mark.parametrize(
    ("dataset", "protocol", "counts", "pruned", "unpruned"),
    [
        # Averages as printed in the paper's tables: the curves must reproduce them.
        ("cifar100", "B0-5", range(20, 101, 20), 75.55, 76.80),
        ("cifar100", "B0-10", B0_10, 74.64, 75.36),
        ("cifar100", "B0-20", range(5, 101, 5), 73.98, 74.09),
        ("cifar100", "B0-50", range(2, 101, 2), 72.05, 72.41),
        ("cifar100", "B50-2", range(50, 101, 25), 74.57, 74.61),
        ("cifar100", "B50-5", range(50, 101, 10), 72.60, 73.21),
        ("cifar100", "B50-10", range(50, 101, 5), 72.45, 72.81),
        ("imagenet100", "B0-10", B0_10, 92.79, 93.23),
        ("imagenet100", "B50-10", range(50, 101, 5), 77.73, 78.20),
        ("imagenet1000", "B0-10", range(100, 1001, 100), 87.08, 88.17),
    ],
)
def test_curves_average_to_the_printed_tables(dataset, protocol, counts, pruned, unpruned):
    curve = paper_curve(dataset, protocol, list(counts))
    assert curve is not None
    assert curve.class_counts == tuple(counts)
    assert sum(curve.pruned) / len(curve.pruned) == pytest.approx(pruned, abs=0.006)
    # The printed 78.20 of ImageNet-100 B50-10 is 0.012 above the mean of the published curve.
    assert sum(curve.unpruned) / len(curve.unpruned) == pytest.approx(unpruned, abs=0.015)


def test_metric_and_parameters_belong_to_the_protocol():
    cifar, imagenet = paper_curve("cifar100", "B0-10", B0_10), paper_curve("imagenet100", "B0-10", B0_10)
    assert cifar is not None and imagenet is not None
    assert (cifar.metric, imagenet.metric) == ("top1", "top5")
    assert (cifar.average_params_pruned, cifar.average_params_unpruned) == (4_960_000, 61_600_000)
    assert (imagenet.average_params_pruned, imagenet.average_params_unpruned) == (7_670_000, None)
    assert "Rhyssiyan/DER-ClassIL.pytorch" in cifar.source


@pytest.mark.parametrize("dataset", ["/data/ImageNet-100", "/data/imagenet_100/", "C:\\data\\imagenet100", "imagenet100"])
def test_a_folder_is_known_by_its_name(dataset):
    assert paper_curve(dataset, "B0-10", B0_10) is not None


@pytest.mark.parametrize(
    ("dataset", "protocol", "counts"),
    [
        ("cifar10", "B0-10", B0_10),
        ("my-imagenet100-sketches", "B0-10", B0_10),
        ("cifar100", "B0-25", range(4, 101, 4)),
        ("cifar100", "B0-10", [10, 25]),
        ("cifar100", "B0-10", [*B0_10, 105]),
    ],
    ids=["another data set", "a folder that only resembles", "another protocol", "other class counts", "classes learned later"],
)
def test_other_runs_have_no_curve(dataset, protocol, counts):
    assert paper_curve(dataset, protocol, list(counts)) is None


def test_a_part_of_the_data_is_not_the_papers_data(tmp_path, make_run):
    classes = [[f"c{10 * step + index}" for index in range(10)] for step in range(2)]
    make_run(tmp_path / "whole", classes, dataset="cifar100", protocol="B0-10")
    make_run(tmp_path / "part", classes, dataset="cifar100", protocol="B0-10", config={"data": {"train_per_class": 100}})
    assert curve_beside(read_run(tmp_path / "whole")) is not None
    assert curve_beside(read_run(tmp_path / "part")) is None


def test_even_sizes_are_the_papers_protocol(tmp_path, make_run):
    steps = [[f"c{number}" for number in range(50)], *([f"d{step}{number}" for number in range(25)] for step in range(2))]
    make_run(tmp_path, steps, dataset="cifar100", protocol="50,25,25", config={})
    assert curve_beside(read_run(tmp_path)) == paper_curve("cifar100", "B50-2", [50, 75, 100])
