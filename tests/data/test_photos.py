"""Images that stay in their files, as the source that a learner is given: which they are, and what is refused."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from der_fast.data import load_dataset
from der_fast.data.memory_source import MemorySource
from der_fast.data.read.dali import is_installed
from der_fast.errors import DataError
from der_fast.seeds import generator


def test_it_holds_what_the_same_folder_in_memory_holds(photos, open_photos, reader):
    train, test, _, transform = open_photos(photos, reader)
    held, held_test, *_ = open_photos_in_memory(photos)
    assert (train.class_names, train.image_size, train.files) == (held.class_names, held.image_size, held.files)
    assert torch.equal(train.labels, held.labels) and len(test) == len(held_test) == 9
    for one, other in zip(test.batches(None, 4, transform=transform), held_test.batches(None, 4, transform=transform), strict=True):
        assert torch.equal(one.indices, other.indices) and torch.equal(one.labels, other.labels)
        assert one.images.is_contiguous(memory_format=torch.channels_last)
        # Windows start at whole pixels here and between them there.
        assert (one.images - other.images).abs().mean() < 0.03
    chosen = torch.tensor([20, 0, 7])
    assert torch.equal(train.pixels(chosen), held.pixels(chosen))


def open_photos_in_memory(folder):
    from der_fast.config.schema import DataConfig

    return load_dataset(DataConfig(name=str(folder), reader="memory", image_size=48, random_resized_crop=True))


def test_parts_are_those_of_a_source_in_memory(photos, open_photos):
    train, test, *_ = open_photos(photos, "pillow")
    held = MemorySource(torch.zeros(21, 55, 55, 3, dtype=torch.uint8), train.labels, train.class_names, files=train.files)
    for change in (
        lambda source: source.of_classes(["cow", "ape"]),
        lambda source: source.subset(torch.tensor([3, 20, 3])),
        lambda source: source.relabelled(["x", "cow", "bee", "ape"]),
        lambda source: source.of_classes(["bee"]).relabelled(["bee", "ape"]).concatenated(source.of_classes(["bee", "ape"])),
    ):
        one, other = change(train), change(held)
        assert (one.files, one.class_names, one.labels.tolist()) == (other.files, other.class_names, other.labels.tolist())
        assert one.fingerprint() != train.fingerprint()
    both = train.concatenated(test)
    assert both.files == train.files + test.files and both.groups.tolist() == [0] * 21 + [1] * 9


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda source: source.of_classes(["yak"]), "unknown class 'yak'"),
        (lambda source: source.of_classes(["ape", "ape"]), "more than once"),
        (lambda source: source.relabelled(["ape", "bee"]), "'cow' is not among"),
        (lambda source: source.subset(torch.tensor([21])), "out of range"),
        (lambda source: source.concatenated(source.relabelled(["cow", "bee", "ape"])), "class names differ"),
        (lambda source: source.concatenated(held()), "cannot join image files with images in memory"),
        (lambda source: held().concatenated(source), "cannot join images in memory with PhotoSource"),
    ],
)
def test_mistakes_are_refused(photos, open_photos, wrong, words):
    with pytest.raises(DataError, match=words):
        wrong(open_photos(photos, "pillow")[0])


def held():
    return MemorySource(torch.zeros(1, 55, 55, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ["ape", "bee", "cow"])


def test_dali_is_imported_by_whoever_decodes_with_it_only(photos):
    code = f"""
import sys
from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset, transforms_for
import der_fast.data.read.dali
config = DataConfig(name={str(photos)!r}, reader="auto", image_size=48, random_resized_crop=True, workers=1)
train, _ = load_dataset(config)
assert "nvidia.dali" not in sys.modules
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_auto_leaves_photos_in_their_files_and_decodes_small_images(photos, open_photos, write_images, tmp_path):
    train, *_ = open_photos(photos, "auto")
    assert train.library.settings.reader == ("dali" if is_installed() else "pillow")
    for name in ("ape", "bee"):
        write_images(tmp_path / "small" / name, 4)
    small, *_ = open_photos_with(tmp_path / "small", random_resized_crop=True)
    assert isinstance(small, MemorySource)
    assert isinstance(open_photos_with(photos)[0], MemorySource)


def open_photos_with(folder, **keys):
    from der_fast.config.schema import DataConfig

    return load_dataset(DataConfig(name=str(folder), **keys))


def test_only_some_classes(photos, open_photos):
    train, test, *_ = open_photos(photos, "pillow", classes=("cow", "ape"))
    assert train.class_names == test.class_names == ("ape", "cow") and len(train) == 14
    with pytest.raises(DataError, match=r"data\.classes names 'yak'"):
        open_photos(photos, "pillow", classes=("cow", "yak"))


def test_what_is_held_out_and_a_test_folder_without_classes_are_said(photos, open_photos):
    for path in (photos / "val").glob("*/*"):
        path.rename(photos / "val" / f"{path.parent.name}{path.name}")
    for name in ("ape", "bee", "cow"):
        (photos / "val" / name).rmdir()
    train, test, *_ = open_photos(photos, "pillow", test_share=0.3)
    assert (len(train), len(test)) == (15, 6)
    assert train.notes[0].endswith("; 6 of them are held out for testing")
    assert train.notes[1] == f"{photos / 'val'} is not used: it has no class folders"


def test_a_text_file_of_paths_and_classes(photos, open_photos):
    lines = {
        part: [f"{path.relative_to(photos)} {path.parent.name}" for path in sorted(photos.glob(f"{part}/*/*"))] for part in ("train", "val")
    }
    for part, entries in lines.items():
        # With the mark that editors on Windows put in front.
        (photos / f"{part}.txt").write_text("\n".join([*entries, ""]), encoding="utf-8-sig")
    train, test, transform, _ = open_photos(photos / "train.txt", "pillow", test_list=str(photos / "val.txt"))
    folder, folder_test, *_ = open_photos(photos, "pillow")
    assert train.files == folder.files and test.files == folder_test.files and torch.equal(train.labels, folder.labels)
    assert torch.equal(shuffled(train, transform), shuffled(folder, transform))
    (photos / "one.txt").write_text("\n".join(f"{photos / entry}" for entry in lines["train"]))
    whole = open_photos(photos / "one.txt", "pillow", classes=("ape", "bee"))
    assert (len(whole[0]), len(whole[1])) == (12, 2) and whole[0].class_names == ("ape", "bee")
    assert torch.equal(shuffled(whole[0], transform), shuffled(whole[0], transform))


def shuffled(source, transform):
    return torch.cat([batch.images for batch in source.batches(None, 4, transform=transform, generator=generator(1), shuffle=True)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "lists no images"),
        ("a.jpg", "line 1: 'a.jpg' is not 'path class'"),
        ("\n\nape/\n", "line 3"),
        (b"\xff\xfe", "cannot read the list"),
    ],
)
def test_lists_that_are_none(tmp_path, open_photos, text, words):
    (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=words):
        open_photos(tmp_path / "list.txt", "pillow")


def test_a_class_in_one_list_only(photos, open_photos):
    (photos / "a.txt").write_text("train/ape/0.jpg ape\n")
    (photos / "b.txt").write_text("train/bee/0.jpg bee\n")
    with pytest.raises(DataError, match="'ape', 'bee' is in only one of"):
        open_photos(photos / "a.txt", "pillow", test_list=str(photos / "b.txt"))


def test_a_fingerprint_is_the_same_wherever_the_folder_lies(photos, open_photos, tmp_path):
    before = open_photos(photos, "pillow")[0].fingerprint()
    moved = photos.rename(tmp_path / "elsewhere")
    assert open_photos(moved, "pillow")[0].fingerprint() == before
    with (moved / "train" / "ape" / "0.jpg").open("ab") as file:
        file.write(b"\0")
    assert open_photos(moved, "pillow")[0].fingerprint() != before


def test_the_transform_must_fit(photos, open_photos):
    train, _, transform, _ = open_photos(photos, "pillow")
    wrong = open_photos(photos, "pillow", image_size=64)[2]
    with pytest.raises(DataError, match="55 × 55 pixels"):
        train.batches(None, 2, transform=wrong, generator=generator(1), shuffle=True)
    with pytest.raises(ValueError, match=r"torch\.Generator"):
        train.batches(None, 2, transform=transform)
    with pytest.raises(ValueError, match="batch_size"):
        train.batches(None, 0, transform=transform, generator=generator(1))
    assert np.array_equal(train.rows, np.arange(21))
