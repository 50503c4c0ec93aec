"""The page: its numbers are the run's, it needs nothing from outside, and it bears whatever a run is called."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from der_fast.errors import CheckpointError, StorageError
from der_fast.report import style, write_report

CLASSES = [["cat", "dog"], ["hen", "owl"], ["elk", "fox"]]
PICTURES = {
    "accuracy_per_step",
    "class_sets_over_time",
    "confusion_matrix",
    "epochs",
    "kept_channels",
    "latency_per_step",
    "parameters_per_step",
}


@pytest.fixture(scope="module")
def full(tmp_path_factory, make_run, read_page):
    """Folder, metrics and page of a whole pruned run."""
    folder = tmp_path_factory.mktemp("full")
    metrics = make_run(
        folder,
        CLASSES,
        backbone="resnet20",
        epochs=4,
        settle_from=3,
        classifier_epochs=2,
        fwt=1.49,
        notes=["3 images were skipped"],
    )
    return folder, metrics, read_page(write_report(folder))


def colours(png: bytes) -> int:
    image = Image.open(io.BytesIO(png)).convert("RGB")
    return len(image.getcolors(image.width * image.height) or [])


@pytest.fixture
def undrawn(monkeypatch):
    """Spare the encoding of pictures where only words are looked at."""
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1)).save(buffer, "png")
    monkeypatch.setattr(style, "picture", lambda figure, stem, title, caption: style.Picture(stem, title, caption, buffer.getvalue(), 1, 1))


def test_step_table_holds_the_metrics(full):
    _, metrics, page = full
    rows = page.table("step", "classes", "top-1 %", "top-5 %")
    assert [row[0] for row in rows] == ["1", "2", "3", "average"]
    assert [row[1] for row in rows[:3]] == ["2", "4", "6"]
    assert [row[2] for row in rows] == [f"{value:.2f}" for value in [*metrics["top1"], metrics["average_top1"]]]
    assert [row[3] for row in rows] == [f"{value:.2f}" for value in [*metrics["top5"], metrics["average_top5"]]]
    assert [row[5] for row in rows[:3]] == ["464 k", "928 k", "1.39 M"]
    assert [row[8] for row in rows[:3]] == ["2.3", "3.1", "3.9"]
    assert [row[11] for row in rows] == ["31 s", "35 s", "39 s", "35 s"]


def test_growth_table_holds_what_every_step_adds_beside_the_unpruned_model(full):
    _, metrics, page = full
    rows = page.table("step", "parameters added", "unpruned", "latency added ms")
    assert [row[0] for row in rows] == ["1", "2", "3"]
    assert [row[1] for row in rows] == [style.count(value) for value in metrics["params_added"]]
    assert [row[2] for row in rows] == ["464 k"] * 3
    assert [row[3] for row in rows] == ["2.3", "0.8", "0.8"]
    assert [row[4] for row in rows] == ["3"] * 3
    assert [row[9] for row in rows] == [style.size(4 * value) for value in metrics["params"]]
    assert [row[10] for row in rows] == ["1.86 MB", "3.71 MB", "5.57 MB"]
    # What an older version took for time lost is nothing that is known.
    assert [row[11] for row in rows] == ["–", "–", "4.0 s"]


def test_sizes_are_written_in_bytes():
    assert [style.size(value) for value in (None, 12, 1_264, 371_000, 1_264_000)] == ["–", "12 B", "1.26 kB", "371 kB", "1.26 MB"]


def test_summary_comes_first_with_the_key_numbers(full):
    _, metrics, page = full
    sentence = f"After 3 steps the model knows 6 classes and classifies {metrics['last_top1']:.1f} % of their test images correctly"
    assert sentence in page.text
    assert page.text.index(sentence) < page.text.index("Accuracy after every step")
    for number in (f"{metrics['average_top1']:.1f} %", "−1.25", "+1.49", "3.9 ms", "1 min 46 s"):
        assert number in page.text
    assert "waiting for images" in page.text and "of the time spent in training epochs" in page.text
    assert "3 images were skipped" in page.text


def test_every_class_is_listed_with_its_accuracy(full):
    _, metrics, page = full
    rows = page.table("no.", "class")
    assert [row[1] for row in rows] == metrics["class_names"]
    assert [row[3] for row in rows] == ["1", "1", "2", "2", "3", "3"]
    for index, counts in enumerate(metrics["confusion"]):
        assert rows[index][5] == f"{100 * counts[index] / sum(counts):.1f}"
        worst = max(counts[:index] + counts[index + 1 :])
        assert rows[index][2].endswith(f"({worst})" if worst else "–")


def test_config_is_collapsed_and_marks_what_was_changed(full):
    folder, _, page = full
    rows = {row[0]: row for row in page.table("key", "value", "meaning")}
    assert rows["masks.sparsity"][1] == "3.0"
    assert rows["data.flip"][:2] == ["data.flip", "false"]
    assert "λ_s" in rows["masks.sparsity"][2]
    html = (folder / "report.html").read_text()
    # later.lr has its default, data.name, data.flip and masks.sparsity have not.
    assert "3 of 5 keys differ" in html
    assert "<td>masks.sparsity</td>" in html.split('class="emphasised"', 2)[2]
    assert html.rindex("<details>", 0, html.index("masks.sparsity")) > html.index('id="config"')


def test_needs_nothing_from_outside(full):
    folder, _, page = full
    assert page.links
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert not {"script", "iframe", "object", "embed", "form"} & set(page.tags)
    html = (folder / "report.html").read_text()
    assert "url(" not in html and "@import" not in html
    assert "default-src 'none'" in html


def test_links_within_the_page_lead_somewhere(full):
    folder, _, page = full
    html = (folder / "report.html").read_text()
    for link in page.links:
        if link.startswith("#"):
            assert f'id="{link[1:]}"' in html


def test_pictures_lie_beside_the_page_and_in_it(full):
    folder, _, page = full
    files = {file.stem: file.read_bytes() for file in (folder / "figures").glob("*.png")}
    assert set(files) == PICTURES | {f"{kind}_step_0{step}" for kind in ("masks", "reasons") for step in (1, 2, 3)}
    inlined = [base64.b64decode(link.partition(",")[2]) for link in page.links if link.startswith("data:image/png")]
    assert sorted(inlined) == sorted(files.values())
    for stem, png in files.items():
        assert colours(png) > 20, f"{stem} is (nearly) blank"


def test_captions_are_sentences_about_the_run(full):
    _, metrics, page = full
    kept = sum(pair[0] for row in metrics["kept"] for pair in row.values())
    assert f"the channels kept: {kept} of 1200 over all steps." in page.text
    of_step_1 = sum(pair[0] for pair in metrics["kept"][0].values())
    assert f"{of_step_1} of 400 channels are kept. The losses alone moved" in page.text
    assert "from epoch 3 on (shaded) the masks are held binary" in page.text
    assert "12 epochs trained the representation, 6 of them with binary masks; 4 epochs trained only the classifier" in page.text
    assert "by at most 3e-07 (relative)" in page.text


def test_equal_runs_give_equal_pages(tmp_path, make_run):
    make_run(tmp_path, [["a", "b"]], epochs=2)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


HOSTILE = [
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'],
    ["$\\frac{1}{$", "猫 & 犬", "{{ 7 * 7 }}", "a\nb\x07", "half \ud800 pair", "x" * 300],
]


def test_hostile_names_are_shown_not_obeyed(tmp_path, make_run, read_page):
    names = dict.fromkeys(("name", "dataset", "protocol", "backend", "device"), "<b onclick=alert(1)>&</b>")
    make_run(tmp_path, HOSTILE, epochs=1, notes=["<script>alert(2)</script>"], versions={"<i>": "<u>"}, **names)
    page = read_page(write_report(tmp_path))
    assert not {"script", "b", "i", "u"} & set(page.tags)
    assert page.tags.count("img") == len([link for link in page.links if link.startswith("data:image/png")])
    shown = [row[1] for row in page.table("no.", "class")]
    assert shown[:5] == [*HOSTILE[0], *HOSTILE[1][:3]]
    assert shown[6:] == ["half ? pair", "x" * 300]
    assert "<script>alert(2)</script>" in page.text


def test_one_step_without_masks_says_what_is_missing(tmp_path, make_run, read_page, undrawn):
    make_run(tmp_path, [["a", "b"]], epochs=1)
    (tmp_path / "history.json").unlink()
    page = read_page(write_report(tmp_path))
    assert "Not in this report" in page.text
    assert "the run was not pruned (masks.enabled = false)" in page.text
    assert "the run has no history.json" in page.text
    assert "backward transfer" not in page.text
    stems = {file.stem for file in (tmp_path / "figures").iterdir()}
    assert stems == PICTURES - {"class_sets_over_time", "epochs", "kept_channels"}


def test_a_run_in_the_middle_of_a_step(tmp_path, make_run, read_page, undrawn):
    make_run(tmp_path, [["a", "b"], ["c", "d"]], epochs=3, steps=[["a", "b"], ["c", "d"], ["e"]], protocol="B0-3")
    history = json.loads((tmp_path / "history.json").read_text())["epochs"]
    history.append({**history[0], "step": 3, "epochs": 3})
    (tmp_path / "history.json").write_text(json.dumps({"epochs": history}))
    page = read_page(write_report(tmp_path))
    assert "After 2 of 3 steps the model knows 4 classes" in page.text
    assert "Step 3 is not finished: its last finished epoch is 1 of 3 of the representation stage" in page.text
    assert (tmp_path / "figures" / "epochs.png").exists()


def test_the_least_that_can_be_reported(tmp_path, read_page, undrawn):
    (tmp_path / "metrics.json").write_text('{"top1": [90.0], "steps": [["a"]]}')
    page = read_page(write_report(tmp_path))
    assert "After 1 step the model knows 1 class and classifies 90.0 % of their test images correctly." in page.text
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == {"accuracy_per_step"}


def test_a_run_without_test_images(tmp_path, make_run, read_page, undrawn):
    unknown = {"top1": [None, None], "top5": [None, None], "class_set_top1": [[None], [None, None]]}
    metrics = make_run(tmp_path, CLASSES[:2], epochs=1, **unknown, confusion=None, average_top1=None, last_top1=None, average_top5=None)
    assert metrics["top1"] == [None, None]
    page = read_page(write_report(tmp_path))
    assert "After 2 steps the model knows 4 classes, with 928 k parameters." in page.text
    assert "the run had no test images" in page.text


def test_unfinished_run_says_how_far_it_got(tmp_path, make_run, read_page, undrawn):
    make_run(tmp_path, CLASSES[:2], epochs=1, protocol="B0-3")
    assert "After 2 of 3 steps the model knows 4 classes" in read_page(write_report(tmp_path)).text


def test_paper_stands_beside_a_paper_run(tmp_path, make_run, read_page, undrawn):
    classes = [[f"c{20 * step + index}" for index in range(20)] for step in range(2)]
    make_run(tmp_path, classes, epochs=1, dataset="cifar100", protocol="B0-5", top1=[86.0, 80.0], average_top1=83.0, last_top1=80.0)
    page = read_page(write_report(tmp_path))
    rows = page.table("", "average top-1 %")
    assert [row[:3] for row in rows] == [
        ["this run", "83.00", "80.00"],
        ["paper, pruned", f"{(85.35 + 79.267) / 2:.2f}", "79.27"],
        ["paper, not pruned", f"{(86.517 + 80.342) / 2:.2f}", "80.34"],
    ]
    # The paper's average parameters are over five steps, this run has two.
    assert [row[3] for row in rows[1:]] == ["–", "–"]
    assert "+0.7 points from the paper's pruned 82.3 % in top-1 over the same steps" in page.text
    assert "Rhyssiyan/DER-ClassIL.pytorch" in page.text


def test_paper_is_withheld_from_a_part_of_its_data(tmp_path, make_run, read_page, undrawn):
    classes = [[f"c{index}" for index in range(20)]]
    config = {"data": {"name": "cifar100", "train_per_class": 50}}
    make_run(tmp_path, classes, epochs=1, dataset="cifar100", protocol="B0-5", config=config)
    page = read_page(write_report(tmp_path))
    assert "The paper's curve is not drawn: this run used only part of the images per class" in page.text
    assert "Rhyssiyan" not in page.text


def test_many_steps_show_a_choice_of_trajectories(tmp_path, make_run, read_page, monkeypatch, undrawn):
    from der_fast.report import page as page_module

    monkeypatch.setattr(page_module, "_MOST_TRAJECTORIES", 3)
    make_run(tmp_path, [[f"c{step}"] for step in range(5)], backbone="resnet20", epochs=2)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "masks_step_02.png").write_bytes(b"of an earlier report")
    (tmp_path / "figures" / "reasons_step_04.png").write_bytes(b"of an earlier report")
    (tmp_path / "figures" / "mine.png").write_bytes(b"the user's own")
    page = read_page(write_report(tmp_path))
    assert "3 of 5 steps are shown." in page.text
    stems = {file.stem for file in (tmp_path / "figures").iterdir()}
    assert {stem for stem in stems if stem.startswith("masks")} == {"masks_step_01", "masks_step_03", "masks_step_05"}
    assert {stem for stem in stems if stem.startswith("reasons")} == {"reasons_step_01", "reasons_step_03", "reasons_step_05"}
    assert {row[0] for row in page.table("step", "group")} == {"1", "2", "3", "4", "5"}
    assert "mine" in stems


def test_damaged_metrics_leave_an_earlier_report_alone(tmp_path, make_run, undrawn):
    make_run(tmp_path, [["a", "b"]], epochs=1)
    before = write_report(tmp_path).read_bytes()
    text = (tmp_path / "metrics.json").read_text()
    (tmp_path / "metrics.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match=r"metrics\.json cannot be read as JSON"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_a_page_that_cannot_be_written_is_a_storage_error(tmp_path, make_run, undrawn):
    make_run(tmp_path, [["a", "b"]], epochs=1)
    (tmp_path / "report.html").mkdir()
    with pytest.raises(StorageError, match=r"could not write .*report\.html"):
        write_report(tmp_path)


def test_config_json_stands_in_for_a_missing_config(tmp_path, make_run, read_page, undrawn):
    make_run(tmp_path, [["a", "b"]], epochs=1, config=None)
    (tmp_path / "config.json").write_text(json.dumps({"later": {"lr": 0.025}, "config_sha256": "0" * 64}))
    rows = {row[0]: row[1] for row in read_page(write_report(tmp_path)).table("key", "value")}
    assert rows["later.lr"] == "0.025"


EVENTS = [
    {"kind": "renamed", "step": 1, "class_names": ["kit", "cat"], "images": None, "params": None},
    {
        "kind": "refreshed", "step": 2, "class_names": ["cat", "owl"], "images": 1234, "top1": 91.25, "top5": 99.0, "params": 1000,
        "params_added": 0, "latency_ms": 1.5, "seconds": 4.0, "memory_per_class": 20,
    },
    {"kind": "forgotten", "step": 3, "class_names": ["<b>emu"], "images": None, "top1": None, "params": 900, "params_added": 0},
]  # fmt: skip


def test_what_happened_to_classes_is_in_the_report(tmp_path, make_run, read_page, undrawn):
    make_run(tmp_path, [["cat"], [], ["elk", "fox"]], events=EVENTS, last_top1=77.0)
    page = read_page(write_report(tmp_path))
    assert page.table("after step", "what") == [
        ["1", "renamed", "kit → cat", "", "–"],
        ["2", "refreshed", "cat, owl", "1,234", "91.25"],
        ["3", "forgotten", "<b>emu", "", "–"],
    ]
    steps = page.table("step", "classes", "top-1 %")
    assert [row[0] for row in steps] == ["1", "2", "2 refreshed", "3", "3 forgotten", "average"]
    assert (steps[2][2], steps[2][7]) == ("91.25", "0")
    assert "77.0" in page.text
    assert "Classes refreshed, renamed, forgotten" in page.text


def test_a_step_without_classes_is_drawn(tmp_path, make_run):
    steps, sets = [[], ["cat", "dog"], ["elk", "fox"]], [[90.0], [None, 80.0], [None, 70.0, 60.0]]
    names = [name for step in steps for name in step]
    make_run(tmp_path, [["ape"], *steps[1:]], steps=steps, class_names=names, class_set_top1=sets, confusion=[[5, 0, 0, 0]] * 4)
    assert {path.stem for path in write_report(tmp_path).parent.glob("figures/*.png")} >= {"class_sets_over_time", "confusion_matrix"}


def test_a_run_without_such_events_says_nothing_of_them(full):
    assert "refreshed" not in full[2].text


def test_uneven_steps(tmp_path, make_run, read_page, undrawn):
    make_run(tmp_path, [["cat", "dog", "hen"], ["owl"]], protocol="3,1,2")
    text = read_page(write_report(tmp_path)).text
    assert "After 2 of 3 steps" in text and "synthetic 3,1,2" in text


def test_named_steps_are_told_apart_in_the_configuration(tmp_path, make_run, read_page, undrawn):
    make_run(tmp_path, [["cat", "dog"], ["owl"]], config={"protocol": {"steps": [["cat", "dog"], ["owl"]]}})
    rows = read_page(write_report(tmp_path)).table("key", "value")
    assert ["protocol.steps", "cat, dog; owl"] in [row[:2] for row in rows]
