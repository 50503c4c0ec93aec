"""One image, however it is held as numbers or by Pillow, is one image with the right pixels, or is refused with its shape."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from der_fast.data import as_image_batch, from_dataset
from der_fast.errors import DataError

SIZE = (6, 7)
RGB = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = np.random.default_rng(1).integers(0, 256, SIZE, dtype=np.uint8)
ALPHA[0], ALPHA[1] = 0, 255
SIXTEEN = np.random.default_rng(2).integers(256, 65536, SIZE, dtype=np.uint16)
BITS = GREY > 127

# What one image's H × W × C numbers are as pixels, by Pillow, which everything else is compared with.
WANTED: dict[str, tuple[np.ndarray, Image.Image]] = {
    "grey": (GREY[..., None], Image.fromarray(GREY)),
    "grey and alpha": (np.stack([GREY, ALPHA], 2), Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])),
    "rgb": (RGB, Image.fromarray(RGB)),
    "rgb and alpha": (np.dstack([RGB, ALPHA]), Image.fromarray(np.dstack([RGB, ALPHA]))),
    "bits": (BITS[..., None], Image.fromarray(BITS)),
    "16 bits": (SIXTEEN[..., None], Image.fromarray(SIXTEEN)),
}


def over_white(image: Image.Image) -> np.ndarray:
    """Pixels as a viewer with a white background shows them."""
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    layer = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))


def layouts(pixels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The same H × W × C numbers with every order of axes and every kind of memory."""
    orders = {"H × W × C": pixels, "C × H × W": pixels.transpose(2, 0, 1)}
    if pixels.shape[2] == 1:
        orders["H × W"] = pixels[..., 0]
    for order, view in orders.items():
        yield order, np.ascontiguousarray(view)
        yield f"{order}, transposed strides", view.T.copy().T
        yield f"{order}, negative strides", np.ascontiguousarray(np.flip(view)).__getitem__((slice(None, None, -1),) * view.ndim)
        yield f"{order}, every other", np.repeat(view, 2, axis=-1)[..., ::2]
        frozen = np.ascontiguousarray(view)
        frozen.flags.writeable = False
        yield f"{order}, read-only", frozen
        yield f"{order}, other byte order", view.astype(view.dtype.newbyteorder())


def tensors(array: np.ndarray) -> Iterator[tuple[str, Any]]:
    yield "array", array
    yield "tensor", torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    # With strides of its own.
    turned = np.array(array.T, dtype=array.dtype.newbyteorder("="))
    yield "strided tensor", torch.from_numpy(turned).permute(*reversed(range(array.ndim)))


def holders(form: Any) -> Iterator[tuple[str, Any]]:
    """One image where one or many are taken."""
    yield "alone", form
    yield "in a list", [form]
    yield "in a tuple", (form,)
    yield "from a generator", (entry for entry in [form])


def check(form: Any, wanted: np.ndarray, what: str, most: int = 0) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for where, given in holders(form):
            batch = as_image_batch(given, SIZE)
            assert batch.shape == (1, *SIZE, 3) and batch.dtype == torch.uint8 and batch.is_contiguous(), (what, where)
            assert np.abs(batch[0].numpy().astype(int) - wanted).max() <= most, (what, where)
        source = from_dataset([(form, 0), (form, 1)])
        assert source.images.shape == (2, *SIZE, 3), what
        assert np.abs(source.images[1].numpy().astype(int) - wanted).max() <= most, what


@pytest.mark.parametrize("kind", WANTED)
def test_one_image_as_an_array_or_tensor(kind: str) -> None:
    pixels, image = WANTED[kind]
    wanted = over_white(image)
    for layout, array in layouts(pixels):
        for holder, form in tensors(array):
            check(form, wanted, f"{kind}: {holder}, {layout}")


@pytest.mark.parametrize("kind", ["grey", "grey and alpha", "rgb", "rgb and alpha"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_one_floating_image(kind: str, dtype: Any) -> None:
    pixels, image = WANTED[kind]
    for layout, array in layouts((pixels / 255).astype(dtype)):
        for holder, form in tensors(array):
            check(form, over_white(image), f"{kind}: {holder}, {layout}")


def test_bfloat16_is_exact_to_its_eight_bits() -> None:
    for order in (torch.from_numpy(RGB.copy()), torch.from_numpy(RGB.transpose(2, 0, 1).copy())):
        check((order / 255).bfloat16(), RGB, "bfloat16", most=1)


@pytest.mark.parametrize("kind", WANTED)
def test_many_images_as_one_array_or_tensor(kind: str) -> None:
    pixels, image = WANTED[kind]
    wanted = over_white(image)
    for count in (0, 1, 3, 5):
        many = np.repeat(pixels[None], count, 0)
        for order in (many, many.transpose(0, 3, 1, 2), many[:, ::-1, ::-1][:, ::-1, ::-1], many.T.copy().T):
            for holder, form in tensors(order):
                batch = as_image_batch(form, SIZE)
                assert batch.shape == (count, *SIZE, 3), (holder, order.shape)
                assert all(np.array_equal(entry.numpy(), wanted) for entry in batch), (holder, order.shape)


def test_many_floating_images() -> None:
    many = np.stack([RGB, RGB[::-1]])
    for form in (many / 255, torch.from_numpy(many.transpose(0, 3, 1, 2) / np.float32(255)), (many / 255).astype(np.float16)):
        assert np.array_equal(as_image_batch(form, SIZE).numpy(), many)


@pytest.mark.parametrize("shape", [(33, 47, 4), (32, 32, 1), (4, 33, 47), (1, 32, 32), (3, 224, 224), (28, 28), (2, 9, 9), (9, 9, 2)])
@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_of_another_size_it_is_one_image_too(shape: tuple[int, ...], make: Callable[..., Any]) -> None:
    black = make(shape, dtype=np.uint8 if make is np.zeros else torch.uint8)
    assert as_image_batch(black, (8, 8)).shape == (1, 8, 8, 3)
    assert as_image_batch([black, black], (8, 8)).shape == (2, 8, 8, 3)
    assert from_dataset([(black, 0), (black, 1)], image_size=np.int64(8)).images.shape == (2, 8, 8, 3)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 3, 3), "which can be read in two ways: 3 × 3 pixels of 3 channel"),
        ((3, 200, 3), "read in two ways: 3 × 200 pixels of 3 channel.*200 × 3 pixels of 3"),
        ((1, 20, 3), "read in two ways"),
        ((5, 3, 20, 4), "read in two ways: 3 × 20 pixels of 4 channel"),
        ((10, 28, 28), r"many grey images are N × H × W × 1: give x\[\.\.\., None\]"),
        ((5, 6, 7), "one image is H × W, H × W × C or C × H × W"),
        ((2, 9, 9, 9), "many are N × H × W × C"),
        ((2, 2, 9, 9, 3), "many are N × H × W × C"),
        ((), "one image is"),
        ((7,), "one image is"),
        ((0, 9, 3), "it has no pixels"),
        ((2, 9, 0, 3), "it has no pixels"),
    ],
)
@pytest.mark.parametrize("make", [np.zeros, torch.zeros])
def test_what_is_not_certain_is_refused_with_its_shape(shape: tuple[int, ...], words: str, make: Callable[..., Any]) -> None:
    form = make(shape, dtype=np.uint8 if make is np.zeros else torch.uint8)
    named = r"\(" + ", ".join(map(str, shape)) + r",?\)"
    with pytest.raises(DataError, match=f"shape {named}.*{words}"):
        as_image_batch(form, SIZE)
    for given in ([form], [RGB, form]):
        with pytest.raises(DataError, match=rf"image {len(given) - 1} has shape {named}"):
            as_image_batch(given, SIZE)
    with pytest.raises(DataError, match=rf"image 0 has shape {named}"):
        from_dataset([(form, 0)])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_many_images_within_a_list_are_refused(count: int) -> None:
    with pytest.raises(DataError, match=rf"image 1 has shape \({count}, 6, 7, 3\)"):
        as_image_batch([RGB, np.repeat(RGB[None], count, 0)], SIZE)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (RGB.astype(np.int64), r"shape \(6, 7, 3\) and dtype int64"),
        (torch.from_numpy(RGB.astype(np.int32)), r"shape \(6, 7, 3\) and dtype int32"),
        (RGB.astype(np.uint16), r"shape \(6, 7, 3\) and dtype uint16.*no value above 2.*as uint8"),
        (RGB.astype(np.complex64), "dtype complex64"),
        (RGB.astype(np.float32), r"shape \(6, 7, 3\) and floating values from 0 to 2.*outside \[0, 1\]"),
        (np.where(RGB > 3, np.nan, 0.5), "floating values from nan"),
        (torch.full((3, 6, 7), float("inf")), "floating values from inf"),
        (np.full((6, 7, 3), -0.1, np.float16), "floating values from -0.09"),
        (torch.zeros(3, 6, 7, device="meta"), "a tensor whose pixels cannot be read .*meta"),
        (torch.zeros(3, 6, 7).to_sparse(), "a tensor whose pixels cannot be read .*sparse"),
        (np.ma.masked_equal(GREY, GREY[0, 0]), "masked values"),
        (np.array([[object()] * 7] * 6), "dtype object"),
    ],
)
def test_numbers_that_are_no_brightness_are_refused(form: Any, words: str) -> None:
    for given in (form, [form]):
        with pytest.raises(DataError, match=words):
            as_image_batch(given, SIZE)
    with pytest.raises(DataError, match=f"image 0.*{words}"):
        from_dataset([(form, 0)])


@pytest.mark.parametrize("form", [b"\x89PNG", {"a.png": 1}, {"a.png"}, 3, None, iter([b"\x89PNG"]), [("a", 1)], [[1, 2], [3, 4]]])
def test_what_holds_no_images_is_refused(form: Any) -> None:
    with pytest.raises(DataError, match="is a (bytes|dict|set|int|NoneType|tuple|list)"):
        as_image_batch(form, SIZE)


def test_tensors_of_every_making() -> None:
    tensor = torch.from_numpy(RGB.transpose(2, 0, 1) / np.float32(255))
    check(tensor.requires_grad_(), RGB, "with a gradient")
    check(torch.complex(torch.zeros_like(tensor), -tensor).conj().imag, RGB, "negated when it is read")

    class Photo(torch.Tensor):
        """As torchvision's tv_tensors."""

    check(torch.from_numpy(RGB.copy()).as_subclass(Photo), RGB, "of a class of its own")
    check(np.ma.masked_array(RGB), RGB, "nothing is masked")

    class Foreign:
        """As arrays of other libraries."""

        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return RGB

    check(Foreign(), RGB, "an array of another library")


def lab(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    assert converted is not None
    return converted


def palette_and_alpha() -> Image.Image:
    image = Image.fromarray(GREY).convert("P")
    image.putalpha(Image.fromarray(ALPHA))
    return image


PILLOW: dict[str, tuple[Image.Image, np.ndarray]] = {
    **{image.mode: (image, over_white(image)) for _, image in WANTED.values()},
    **{mode: (Image.fromarray(RGB).convert(mode), np.asarray(Image.fromarray(RGB).convert(mode).convert("RGB")))
       for mode in ("CMYK", "YCbCr", "HSV", "RGBX", "P")},
    "LAB": (lab(Image.fromarray(RGB)), np.asarray(lab(Image.fromarray(RGB)).convert("RGB"))),
    "PA": (palette_and_alpha(), over_white(WANTED["grey and alpha"][1])),
    "I;16B": (Image.frombytes("I;16B", SIZE[::-1], SIXTEEN.astype(">u2").tobytes()), over_white(WANTED["16 bits"][1])),
}  # fmt: skip


@pytest.mark.parametrize("mode", PILLOW)
def test_pillow_images_of_every_mode(mode: str) -> None:
    image, wanted = PILLOW[mode]
    assert image.mode == mode
    check(image, wanted, mode)


def test_premultiplied_alpha() -> None:
    image = Image.fromarray(np.dstack([RGB, ALPHA])).convert("RGBa")
    check(image, over_white(image.convert("RGBA")), "RGBa")


def test_palettes_and_colours_that_are_transparent(tmp_path: Any) -> None:
    image = Image.new("P", (7, 6), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    check(image, np.asarray(image.convert("RGB")), "opaque palette")
    image.info["transparency"] = 1
    check(image, np.full((6, 7, 3), 255), "transparent palette")
    for mode, key in (("L", 9), ("RGB", (9, 9, 9))):
        keyed = Image.new(mode, (7, 6), key)
        keyed.save(tmp_path / "keyed.png", transparency=key)
        with Image.open(tmp_path / "keyed.png") as opened:
            check(opened, np.full((6, 7, 3), 255), f"transparent colour of {mode}")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pillow_images_of_unknown_range_are_refused(mode: str) -> None:
    with pytest.raises(DataError, match=rf"image 0 \(7 × 6 pixels, mode {mode}\) cannot be converted"):
        as_image_batch(Image.new(mode, (7, 6)), SIZE)
    with pytest.raises(DataError, match=r"image 0 \(0 × 6 pixels, mode L\).*no pixels"):
        as_image_batch(Image.new("L", (0, 6)), SIZE)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_an_opened_photo_is_upright_as_its_file_is(suffix: str, tmp_path: Any) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    path = tmp_path / f"lying.{suffix}"
    Image.fromarray(RGB).resize((64, 48)).save(path, exif=turned)
    wanted = as_image_batch(path, (40, 30))
    with Image.open(path) as image:
        assert torch.equal(as_image_batch(image, (40, 30)), wanted)
        assert torch.equal(as_image_batch([image.convert("RGB")], (40, 30)), wanted)
        assert torch.equal(from_dataset([(image, 0)], image_size=(40, 30)).images, wanted)
        # The caller's own image stays as it was.
        assert image.size == ((64, 48) if suffix != "tif" else (48, 64))


def test_arrays_of_paths_are_lists_of_them(tmp_path: Any) -> None:
    for index in range(2):
        Image.fromarray(RGB + np.uint8(index)).save(tmp_path / f"{index}.png")
    paths = [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    for form in (np.array(paths), np.array(paths, dtype=object), paths, tuple(paths), iter(paths)):
        assert as_image_batch(form, SIZE)[:, 0, 0, 0].tolist() == [RGB[0, 0, 0], RGB[0, 0, 0] + 1]
