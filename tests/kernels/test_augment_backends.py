"""The counter-based draw against published numbers, and the fused augmentation against the reference."""

from __future__ import annotations

import pytest
import torch

from der_fast.errors import BackendError
from der_fast.kernels import triton_runtime
from der_fast.kernels.augment import Draw, augment, augment_drawn, draw_augmentation
from der_fast.kernels.augment.draw import bounds, philox

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
NORMAL = {"mean": MEAN, "std": STD}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KEY = (0x123456789ABCDEF, 5_000_000_000)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that was not written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def pixels(count, height, width, seed=0):
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def same_up_to_the_last_product(found, expected, dtype=torch.float32):
    """The last step may be one fused multiply-add: it lacks the product's rounding, and then the sum may round to a neighbour."""
    largest = 1 / torch.tensor(STD).min()
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    bound = 2.0**-24 * largest + 2 * unit * expected.float().abs()
    assert found.dtype == expected.dtype == dtype
    assert bool(((found.float() - expected.float()).abs() <= bound).all())


# Known answers of the authors' library Random123 for philox4x32-10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_words(counter, key, words):
    found = philox(key, tuple(torch.tensor([word, word]) for word in counter))
    assert [word.tolist() for word in found] == [[word, word] for word in words]


def test_draw_is_the_published_words_scaled():
    words = KNOWN[0][2]
    draw = draw_augmentation(0, 0, torch.zeros(1, dtype=torch.int64), padding=4, jitter=0.5, flip=True)
    assert draw.row.tolist() == [words[0] * 9 // 2**32] and draw.col.tolist() == [words[1] * 9 // 2**32]
    assert draw.flip.tolist() == [words[2] >= 2**31]
    assert torch.equal(draw.brightness, torch.tensor([0.5 + (words[3] // 256) / 2**24]))


def test_draw_uses_every_bit_of_seed_stream_and_number():
    base = draw_augmentation(7, 9, torch.tensor([11]), padding=2**20, jitter=1.0, flip=True)
    for bit in range(0, 63, 7):
        for seed, stream, number in ((7 ^ 1 << bit, 9, 11), (7, 9 ^ 1 << bit, 11), (7, 9, 11 ^ 1 << bit)):
            other = draw_augmentation(seed, stream, torch.tensor([number]), padding=2**20, jitter=1.0, flip=True)
            assert not torch.equal(other.row, base.row) and not torch.equal(other.brightness, base.brightness)


def test_an_image_s_draw_depends_on_its_number_alone():
    whole = draw_augmentation(3, 4, torch.arange(1000), padding=4, jitter=0.3, flip=True)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    for numbers in (order, torch.arange(400, 500), torch.tensor([999])):
        part = draw_augmentation(3, 4, numbers, padding=4, jitter=0.3, flip=True)
        assert all(torch.equal(one, all_of_them[numbers]) for one, all_of_them in zip(part, whole, strict=True))
    assert torch.equal(whole.at(torch.arange(10, 20)).row, whole.row[10:20])


def test_draws_are_spread_evenly():
    count = 90_000
    draw = draw_augmentation(1, 2, torch.arange(count), padding=4, jitter=0.25, flip=True)
    for offsets in (draw.row, draw.col):
        share = torch.bincount(offsets, minlength=9) / count
        # Six standard deviations of a count.
        assert len(share) == 9 and float((share - 1 / 9).abs().max()) < 6 * (1 / 9 * 8 / 9 / count) ** 0.5
    assert abs(float(draw.flip.float().mean()) - 0.5) < 6 * 0.5 / count**0.5
    factors = draw.brightness.sort().values
    assert float(factors[0]) >= 0.75 and float(factors[-1]) < 1.25
    assert float((factors - torch.linspace(0.75, 1.25, count)).abs().max()) / 0.5 < 2.7 / count**0.5
    table = torch.stack([values.double() for values in draw])
    assert float((torch.corrcoef(table) - torch.eye(4)).abs().max()) < 6 / count**0.5


def test_what_is_switched_off_is_not_drawn():
    draw = draw_augmentation(1, 2, torch.arange(500), padding=0, jitter=0.0, flip=False)
    assert not draw.row.any() and not draw.col.any() and not draw.flip.any() and bool((draw.brightness == 1).all())
    strong = draw_augmentation(1, 2, torch.arange(500), padding=0, jitter=3.0, flip=False).brightness
    assert float(strong.min()) >= 0 and float(strong.max()) < 4
    assert bounds(0.0) == (1.0, 0.0) and bounds(3.0) == (0.0, 4.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": -1}, "seed must lie in 0 … 2⁶³ − 1, not be -1"),
        ({"stream": 2**63}, "stream must lie in"),
        ({"numbers": torch.arange(3).int()}, "numbers must be int64 of one dimension, not torch.int32"),
        ({"numbers": torch.zeros(2, 2, dtype=torch.int64)}, r"not torch.int64, \(2, 2\)"),
        ({"padding": -1}, "padding must be ≥ 0"),
        ({"jitter": -0.1}, "jitter must be a number ≥ 0, not -0.1"),
        ({"jitter": float("nan")}, "jitter must be"),
        ({"jitter": float("inf")}, "jitter must be"),
    ],
)
def test_draws_that_make_no_sense_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        draw_augmentation(**{"seed": 1, "stream": 2, "numbers": torch.arange(3), "padding": 4, "jitter": 0.5, "flip": True, **change})


@pytest.mark.parametrize(("height", "width", "padding"), [(32, 32, 4), (1, 1, 0), (1, 1, 3), (7, 5, 2), (3, 8, 0), (20, 23, 9)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_is_the_reference_with_given_crops(height, width, padding, dtype):
    generator = torch.Generator().manual_seed(2)
    count = 5
    row, col = torch.randint(0, 2 * padding + 1, (2, count), generator=generator).to(DEVICE)
    flip, brightness = torch.tensor([True, False, True, False, False]).to(DEVICE), torch.rand(count, generator=generator).to(DEVICE) * 2
    images = pixels(count, height, width).to(DEVICE)
    options = {"row": row, "col": col, "flip": flip, "brightness": brightness, "padding": padding, "dtype": dtype, **NORMAL}
    expected, found = augment(images, **options), augment(images, **options, backend="fused")
    assert found.shape == expected.shape and found.stride() == expected.stride()
    same_up_to_the_last_product(found, expected, dtype)
    rotated = augment(images, **options, channels_last=False, backend="fused")
    assert rotated.is_contiguous() and torch.equal(rotated, found)


@pytest.mark.parametrize(("padding", "jitter", "flip"), [(4, 63 / 255, True), (0, 0.0, False), (3, 3.0, True), (2, 0.1, False)])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_fused_draws_what_the_reference_draws(padding, jitter, flip, as_tensor):
    images = pixels(24, 9, 8).to(DEVICE)
    numbers = torch.cat([torch.arange(20), torch.tensor([2**31, 2**32 + 3, 2**40, 2**62])]).to(DEVICE)
    key = torch.tensor(KEY, device=DEVICE) if as_tensor else KEY
    options = {"key": key, "numbers": numbers, "padding": padding, "jitter": jitter, "flip": flip, **NORMAL}
    expected = augment_drawn(images, **options)
    found = augment_drawn(images, **options, backend="fused")
    draw = draw_augmentation(*KEY, numbers, padding=padding, jitter=jitter, flip=flip)
    same_up_to_the_last_product(found, expected)
    assert torch.equal(found, augment(images, **draw._asdict(), padding=padding, **NORMAL, backend="fused")), "the same bits"
    assert torch.equal(expected, augment(images, **draw._asdict(), padding=padding, **NORMAL))


def test_brightness_is_drawn_bit_for_bit():
    # White images become the factor itself: min(b·255, 255)/255 is b where b ≤ 1 is a product without rounding.
    numbers = torch.arange(50, device=DEVICE)
    images = torch.ones(50, 1, 1, 3, dtype=torch.uint8, device=DEVICE)
    plain = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "padding": 0}
    found = augment_drawn(images, key=KEY, numbers=numbers, jitter=0.7, flip=False, backend="fused", **plain)
    expected = draw_augmentation(*KEY, numbers, padding=0, jitter=0.7, flip=False).brightness
    assert torch.equal(found[:, 0, 0, 0], expected)


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_images_of_a_resident_data_set(backend):
    data = pixels(50, 6, 7).to(DEVICE)
    index = torch.tensor([49, 0, 3, 3, 17], device=DEVICE)
    options = {"key": KEY, "numbers": torch.arange(5, device=DEVICE), "padding": 2, "jitter": 0.3, "flip": True, **NORMAL}
    gathered = augment_drawn(data, index=index, **options, backend=backend)
    assert torch.equal(gathered, augment_drawn(data[index].contiguous(), **options, backend=backend))
    assert not torch.equal(gathered[2], gathered[3]), "the same image, drawn twice"
    draw = draw_augmentation(*KEY, torch.arange(5, device=DEVICE), padding=2, jitter=0.3, flip=True)
    assert torch.equal(gathered, augment(data, index=index, **draw._asdict(), padding=2, **NORMAL, backend=backend))


@pytest.mark.parametrize("backend", ["reference", "fused"])
def test_no_images(backend):
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    for images, index in ((pixels(0, 4, 4), None), (pixels(3, 4, 4), none)):
        out = augment_drawn(
            images.to(DEVICE), key=KEY, numbers=none, index=index, padding=2, jitter=0.1, flip=True, **NORMAL, backend=backend
        )
        assert out.shape == (0, 3, 4, 4)


def arguments(**change):
    return {
        "images": pixels(4, 6, 6),
        "key": KEY,
        "numbers": torch.arange(4),
        "padding": 2,
        "jitter": 0.5,
        "flip": True,
        **NORMAL,
        **change,
    }


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.zeros(4, 6, 6, 3)}, "images must be uint8"),
        ({"numbers": torch.arange(3)}, r"numbers must hold one int64 per image \(4\)"),
        ({"numbers": torch.zeros(4)}, "numbers must hold one int64"),
        ({"key": torch.zeros(3, dtype=torch.int64)}, r"key must be .* int64 of two .*got torch.int64, \(3,\)"),
        ({"key": torch.zeros(2)}, "got torch.float32"),
        ({"key": (-1, 0)}, "seed must lie in"),
        ({"key": (0, 2**63)}, "stream must lie in"),
        ({"jitter": -1.0}, "jitter must be"),
        ({"padding": -1}, "padding must be"),
        ({"index": torch.tensor([0, 1, 2])}, r"numbers must hold one int64 per image \(3\)"),
        ({"index": torch.tensor([0, 1, 2, 4])}, r"index must lie in \[0, 3\]; got 0 to 4"),
        ({"index": torch.tensor([0, 1, 2, -1])}, r"index must lie in \[0, 3\]; got -1 to 2"),
        ({"index": torch.arange(4).int()}, "index must be int64"),
        ({"std": (0.1, 0.1, 0.0)}, "std > 0"),
        ({"images": pixels(4, 6, 6).permute(0, 3, 1, 2)}, r"N × H × W × 3, not torch.uint8, \(4, 3, 6, 6\)"),
        ({"numbers": torch.arange(4, device="meta")}, r"on cpu; got torch.int64, \(4,\) on meta"),
        ({"index": torch.arange(4, device="meta")}, r"index must be .* on cpu; got torch.int64, \(4,\) on meta"),
        ({"key": torch.zeros(2, dtype=torch.int64, device="meta")}, "key must be .* on cpu; got .* on meta"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, words, backend):
    with pytest.raises(ValueError, match=words):
        augment_drawn(**arguments(**change), backend=backend)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "cuda"}, "augment: unknown backend 'cuda': choose from reference, fused"),
        ({"dtype": torch.float64, "backend": "fused"}, "returns float32, bfloat16 or float16; .* and torch.float64"),
        ({"images": pixels(4, 6, 12)[:, :, ::2], "backend": "fused"}, "takes contiguous images"),
    ],
)
def test_what_the_fused_backend_cannot_do_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        augment_drawn(**arguments(**change))


def test_without_triton_the_fused_backend_says_so(monkeypatch):
    monkeypatch.setattr(triton_runtime, "usable", lambda device: (False, "Triton is not installed (gone)"))
    with pytest.raises(BackendError, match="augment cannot run here: Triton is not installed.*'reference' or 'auto'"):
        augment_drawn(**arguments(), backend="fused")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestOnCuda:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_large_batch_from_a_data_set_of_more_than_two_gib(self, dtype):
        # Byte offsets beyond 2³¹.
        data = torch.zeros(720_000, 32, 32, 3, dtype=torch.uint8, device="cuda")
        data[-4096:] = pixels(4096, 32, 32).cuda()
        index = torch.arange(len(data) - 4096, len(data), device="cuda").flip(0)
        numbers = torch.arange(4096, device="cuda")
        options = {"key": KEY, "numbers": numbers, "padding": 4, "jitter": 0.25, "flip": True, "dtype": dtype, **NORMAL}
        found = augment_drawn(data, index=index, **options, backend="fused")
        expected = augment_drawn(data[index], **options)
        same_up_to_the_last_product(found, expected, dtype)
        for _ in range(20):
            assert torch.equal(found, augment_drawn(data, index=index, **options, backend="fused"))

    def test_the_gpu_draws_what_the_cpu_draws(self):
        numbers = torch.arange(100_000)
        draws = [draw_augmentation(*KEY, numbers.to(device), padding=4, jitter=0.3, flip=True) for device in ("cpu", "cuda")]
        assert all(torch.equal(one, two.cpu()) for one, two in zip(*draws, strict=True))

    def test_an_image_that_is_not_there_is_not_black(self):
        images = pixels(3, 5, 5).cuda()
        index = torch.tensor([1, 3, -1], device="cuda")
        draw = Draw(*(values.cuda() for values in draw_augmentation(0, 0, torch.arange(3), padding=0, jitter=0.0, flip=False)))
        found = augment(images, index=index, **draw._asdict(), padding=0, **NORMAL, backend="fused")
        assert bool(found[0].isfinite().all()) and bool(found[1:].isnan().all())

    def test_a_captured_graph_replays_with_another_key(self):
        data, index = pixels(64, 32, 32).cuda(), torch.arange(32, device="cuda")
        key, numbers = torch.tensor([1, 1], device="cuda"), torch.arange(32, device="cuda")
        options = {"padding": 4, "jitter": 0.25, "flip": True, "index": index, "numbers": numbers, "backend": "fused", **NORMAL}
        augment_drawn(data, key=key, **options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            held = augment_drawn(data, key=key, **options)
        for stream in (2, 3):
            key[1], index[:] = stream, torch.randperm(64, device="cuda")[:32]
            graph.replay()
            assert torch.equal(held, augment_drawn(data, key=(1, stream), **options))
