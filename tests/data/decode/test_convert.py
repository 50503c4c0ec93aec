"""Images in every form a caller may hold them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from der_fast.data import as_image_batch, load_folder_images
from der_fast.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 6, 5, 3), dtype=np.uint8)
SIZE = (6, 5)


def test_every_form_gives_the_same_pixels(tmp_path):
    paths = []
    for index, entry in enumerate(PIXELS):
        paths.append(tmp_path / f"{index}.png")
        Image.fromarray(entry).save(paths[-1])
    forms = {
        "array": PIXELS,
        "tensor": torch.from_numpy(PIXELS),
        "strided tensor": torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy()).permute(0, 2, 3, 1),
        "Pillow images": [Image.fromarray(entry) for entry in PIXELS],
        "arrays": list(PIXELS),
        "tensors C × H × W": [torch.from_numpy(entry.transpose(2, 0, 1).copy()) for entry in PIXELS],
        "floating tensors": [torch.from_numpy(entry.transpose(2, 0, 1) / np.float32(255)) for entry in PIXELS],
        "paths": paths,
        "texts": [str(path) for path in paths],
        "a mixture": (paths[0], PIXELS[1], Image.fromarray(PIXELS[2])),
        "a generator": (Image.fromarray(entry) for entry in PIXELS),
    }
    for name, form in forms.items():
        batch = as_image_batch(form, SIZE)
        assert batch.dtype == torch.uint8 and batch.is_contiguous(), name
        assert np.array_equal(batch.numpy(), PIXELS), name


def test_one_image_is_a_batch_of_one(tmp_path):
    Image.fromarray(PIXELS[0]).save(tmp_path / "one.png")
    for form in (tmp_path / "one.png", str(tmp_path / "one.png"), Image.fromarray(PIXELS[0]), PIXELS[0], torch.from_numpy(PIXELS[0])):
        assert np.array_equal(as_image_batch(form, SIZE).numpy(), PIXELS[:1])


def test_grey_is_repeated():
    grey = PIXELS[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=3)
    for form in (
        grey[..., None],
        grey[:, None],
        torch.from_numpy(grey.copy())[:, None],
        list(grey),
        [torch.from_numpy(entry.copy())[None] for entry in grey],
        list(grey[..., None]),
    ):
        assert np.array_equal(as_image_batch(form, SIZE).numpy(), expected)


def test_other_sizes_are_resized_alike_in_every_form():
    batch = as_image_batch(PIXELS, (4, 4))
    assert batch.shape == (3, 4, 4, 3)
    assert torch.equal(batch, as_image_batch([Image.fromarray(entry) for entry in PIXELS], (4, 4)))
    assert as_image_batch([PIXELS[0], PIXELS[1][:, :4].repeat(2, 1)], SIZE).shape == (2, 6, 5, 3)


def test_nothing_is_an_empty_batch():
    assert as_image_batch([], SIZE).shape == (0, 6, 5, 3)
    assert as_image_batch(PIXELS[:0], SIZE).shape == (0, 6, 5, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((2, 6, 5, 3), 1.5), r"\(2, 6, 5, 3\) and floating values from 1.5 to 1.5, outside \[0, 1\]"),
        (PIXELS.astype(np.int64), r"\(3, 6, 5, 3\) and dtype int64"),
        (torch.zeros(6, dtype=torch.uint8), r"shape \(6,\)"),
        ([PIXELS], r"image 0 has shape \(3, 6, 5, 3\)"),
        ([PIXELS[0], PIXELS[0].repeat(2, 2)], r"image 1 has shape \(6, 5, 6\)"),
        ([PIXELS[0].astype(np.int32)], r"image 0 has shape \(6, 5, 3\) and dtype int32"),
        ([PIXELS[0] / 1.0], r"image 0 has shape \(6, 5, 3\) and floating values from .* outside \[0, 1\]"),
        ([np.full((4, 4), np.nan)], r"outside \[0, 1\]"),
        ([np.zeros((0, 4, 3), dtype=np.uint8)], r"\(0, 4, 3\)"),
        ([None], "image 0 is a NoneType"),
        (7, "images is a int"),
        ("/nowhere/at_all.png", "/nowhere/at_all.png cannot be read: no such file"),
        ([Image.new("F", (4, 4))], r"image 0 \(4 × 4 pixels, mode F\) cannot be converted"),
    ],
)
def test_other_forms_are_refused(images, message):
    with pytest.raises(DataError, match=message):
        as_image_batch(images, SIZE)


def test_a_broken_file_is_refused_by_path(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"broken\.jpg cannot be read"):
        as_image_batch([tmp_path / "broken.jpg"], SIZE)


def test_folders_and_files_for_prediction(tmp_path, write_images):
    write_images(tmp_path / "new" / "inner", 2, value=10)
    write_images(tmp_path / "new", 2, value=20)
    write_images(tmp_path / "single", 1, value=30)
    (tmp_path / "new" / "broken.png").write_bytes(b"junk")
    (tmp_path / "new" / "notes.txt").write_text("no image")
    (tmp_path / "new" / ".hidden").mkdir()
    write_images(tmp_path / "new" / ".hidden", 1)
    single = tmp_path / "single" / "c00.png"
    pixels, paths, problems = load_folder_images([single, tmp_path / "new"], (8, 8))
    assert [str(path.relative_to(tmp_path)) for path in paths] == [
        "single/c00.png",
        "new/c00.png",
        "new/c01.png",
        "new/inner/c00.png",
        "new/inner/c01.png",
    ]
    assert pixels[:, 0, 0, 0].tolist() == [30, 20, 20, 10, 10]
    assert problems == [f"{tmp_path / 'new' / 'broken.png'}: not an image of a known format"]
    assert load_folder_images(str(single), (4, 4))[0].shape == (1, 4, 4, 3)


def test_nothing_to_predict_is_refused(tmp_path):
    with pytest.raises(DataError, match="no image files in"):
        load_folder_images(tmp_path, (8, 8))
    with pytest.raises(DataError, match="there is no file or folder"):
        load_folder_images([tmp_path / "nowhere"], (8, 8))


def test_all_files_broken_gives_no_pixels_and_all_problems(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    pixels, paths, problems = load_folder_images(tmp_path, (8, 8))
    assert pixels.shape == (0, 8, 8, 3) and paths == [] and len(problems) == 1
