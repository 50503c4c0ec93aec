"""Packing an arena: the native loop gives the reference's bits, rounds once, and refuses what does not fit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from der_fast import native
from der_fast.kernels.compact import COPY, SCALE, SHIFT, WEIGHT, Job, Norm, compact, compact_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SOURCES = [torch.float32, torch.float64]
ZEROS = torch.zeros(256, dtype=torch.int32)
CUDA_REASON = ""
if not torch.cuda.is_available():
    CUDA_REASON = "PyTorch sees no CUDA device"
elif not native.build_info()["cuda"]:
    CUDA_REASON = "der_fast._C was built without CUDA"


def seeded(number):
    return torch.Generator().manual_seed(number)


def norm_of(size, dtype, generator, stride=1):
    """γ of both signs, β, μ and σ² > 0, each every `stride`-th entry of a longer vector."""
    vectors = torch.randn(4, size * stride, generator=generator, dtype=dtype)
    vectors[3] = vectors[3].square() + 1e-3
    return Norm(*(vector[::stride] for vector in vectors))


def index_of(size, count, generator):
    """Positions in any order, some twice, some -1."""
    return (
        torch.randint(-1, size, (count,), generator=generator, dtype=torch.int32) if size else torch.full((count,), -1, dtype=torch.int32)
    )


def draw_jobs(seed, dtype, source, sizes):
    """One weight with batch-norm, one without, and the three kinds of vectors, with gaps between them; and an arena full of NaN."""
    generator = seeded(seed)
    rows, columns, height, width, kept_rows, kept_columns = sizes
    weights = [
        torch.randn(rows, columns, height, width, generator=generator, dtype=source),
        torch.randn(rows, columns, height, width, generator=generator, dtype=source).contiguous(memory_format=torch.channels_last),
        torch.randn(rows, 2 * columns + 1, height, width + 1, generator=generator, dtype=source)[:, 1::2, :, 1:],
    ]
    jobs, offset = [], 64 * (seed % 3)
    for number, weight in enumerate(weights):
        norm = None if number == 1 else norm_of(rows, source, generator, stride=1 + number)
        parts = (index_of(rows, kept_rows, generator), index_of(columns, kept_columns, generator), weight, norm)
        jobs.append(Job(WEIGHT, offset, dtype, *parts))
        offset = behind(jobs[-1], 64 * (seed % 2))
    for kind in (SCALE, SHIFT, COPY):
        norm = None if kind == COPY else norm_of(rows, source, generator, stride=2)
        vector = torch.randn(2 * rows, generator=generator, dtype=source)[::2] if kind == COPY else None
        jobs.append(Job(kind, offset, dtype, index_of(rows, kept_rows, generator), None, vector, norm))
        offset = behind(jobs[-1], 0)
    return jobs, poisoned(offset + 64)


def behind(job, gap):
    size = math.prod(job.shape) * job.dtype.itemsize
    return job.offset + -(-size // 64) * 64 + gap


def poisoned(size, device="cpu"):
    return torch.full((size,), 0xFF, dtype=torch.uint8, device=device)


def reference_of(jobs, size, layout):
    expected = poisoned(size)
    compact_reference(jobs, expected, layout=layout)
    return expected


sizes = st.tuples(*(st.integers(1, 6) for _ in range(4)), st.integers(0, 9), st.integers(0, 9))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from(DTYPES),
    source=st.sampled_from(SOURCES),
    sizes=sizes,
    layout=st.sampled_from(["KCRS", "KRSC"]),
    threads=st.sampled_from([0, 1, 3]),
)
def test_same_bits_as_the_reference(seed, dtype, source, sizes, layout, threads):
    jobs, storage = draw_jobs(seed, dtype, source, sizes)
    bad = compact(jobs, storage, layout=layout, threads=threads)
    assert bad == -1
    assert torch.equal(storage, reference_of(jobs, len(storage), layout))


@pytest.mark.parametrize("layout", ["KCRS", "KRSC"])
def test_reference_by_hand(layout):
    weight = torch.arange(16.0).reshape(2, 2, 2, 2)
    norm = Norm(torch.tensor([2.0, -3.0]), torch.tensor([0.5, 1.0]), torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.25]))
    rows, columns = torch.tensor([1, -1], dtype=torch.int32), torch.tensor([-1, 0, 1], dtype=torch.int32)
    jobs = [
        Job(WEIGHT, 0, torch.float32, rows, columns, weight, norm),
        Job(SHIFT, 128, torch.float32, rows, norm=norm),
        Job(SCALE, 192, torch.float32, rows, norm=norm),
        Job(COPY, 256, torch.float32, rows, weight=torch.tensor([7.0, 8.0])),
    ]
    for fill in (compact_reference, compact):
        storage = poisoned(320)
        fill(jobs, storage, layout=layout, epsilon=0.0)
        values = storage.view(torch.float32)
        found = values[:24].view(2, 3, 2, 2) if layout == "KCRS" else values[:24].view(2, 2, 2, 3).permute(0, 3, 1, 2)
        # γ/√σ² is -3/0.5 for the second row.
        expected = torch.zeros(2, 3, 2, 2)
        expected[0, 1:] = torch.tensor([[[8.0, 9.0], [10.0, 11.0]], [[12.0, 13.0], [14.0, 15.0]]]) * -6
        assert torch.equal(found, expected)
        assert values[32:34].tolist() == [1.0 + 6 * 2, 0] and values[48:50].tolist() == [-6, 0] and values[64:66].tolist() == [8, 0]
        rest = torch.ones(80, dtype=torch.bool)
        rest[[*range(24), 32, 48, 64]] = False
        assert not bool(values[rest].any())


def boundaries(dtype):
    """Every finite number of a 16-bit type beside its upper neighbour: (bits below, midpoint), non-negative."""
    bits = torch.arange({torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype], dtype=torch.int32)
    low = bits.to(torch.int16).view(dtype).double()
    # Above the largest number the next one would be where infinity begins to be nearer.
    high = torch.cat([low[1:], (2 * low[-1] - low[-2]).reshape(1)])
    return bits, (low + high) / 2


def copied(values, dtype, fill=compact):
    rows = torch.arange(len(values), dtype=torch.int32)
    storage = poisoned(len(values) * dtype.itemsize)
    fill([Job(COPY, 0, dtype, rows, weight=values)], storage)
    return storage.view(torch.int16).int() & 0xFFFF


@pytest.mark.parametrize("fill", [compact, compact_reference])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sign", [0, 0x8000])
def test_rounding_at_every_boundary_between_two_numbers(dtype, sign, fill):
    bits, middle = boundaries(dtype)
    factor = -1.0 if sign else 1.0
    for side, expected in ((0.0, bits), (2.0, bits + 1)):
        # One float64 step beside the midpoint: rounding to float32 first would land on the midpoint and lose the side.
        beside = torch.nextafter(middle, middle * side)
        assert torch.equal(copied(beside * factor, dtype, fill), expected | sign)
    assert torch.equal(copied(middle * factor, dtype, fill), (bits + bits % 2) | sign), "ties go to the even number"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_numbers_that_are_exact_stay_and_what_is_not_finite_is_reported(dtype):
    exact = torch.tensor([0.0, -0.0, 1.0, -1.5, 2.0**-14, 2.0**-24, 0.333251953125], dtype=torch.float64)
    exact = exact if dtype != torch.bfloat16 else exact[:-1]
    for tail, bad in (([], -1), ([math.nan], 0), ([math.inf], 0), ([-math.inf], 0), ([1e39], 0), ([-1e300], 0)):
        values = torch.cat([exact, torch.tensor(tail, dtype=torch.float64)])
        storage = poisoned(64 * 2)
        job = Job(COPY, 0, dtype, torch.arange(len(values), dtype=torch.int32), weight=values)
        assert compact([job], storage) == bad
        found = storage.view(dtype)[: len(values)].double()
        assert torch.equal(found[: len(exact)], exact) and torch.equal(found.signbit(), values.signbit())
        assert not bool(found[len(exact) :].isfinite().any())


def test_the_first_bad_job_is_reported_and_what_is_not_read_does_not_matter():
    rows = torch.tensor([0, 2], dtype=torch.int32)
    good, hidden, bad = torch.ones(3), torch.tensor([1.0, math.nan, 1.0]), torch.tensor([1.0, 1.0, math.inf])
    jobs = [Job(COPY, 64 * i, torch.float32, rows, weight=weight) for i, weight in enumerate([good, hidden, bad, good, bad])]
    assert compact(jobs[:2], poisoned(128)) == -1
    assert compact(jobs, poisoned(320)) == 2


def test_overflow_of_float16_is_reported():
    weight = torch.full((1, 1, 1, 1), 70000.0)
    index = torch.zeros(1, dtype=torch.int32)
    assert compact([Job(WEIGHT, 0, torch.float16, index, index, weight)], poisoned(64)) == 0
    assert compact([Job(WEIGHT, 0, torch.bfloat16, index, index, weight)], poisoned(64)) == -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_threads_write_what_one_writes(dtype):
    generator = seeded(3)
    weight, index = torch.randn(700, 110, 3, 3, generator=generator), torch.arange(700, dtype=torch.int32)
    job = Job(WEIGHT, 0, dtype, index.flip(0), index[:110], weight, norm_of(700, torch.float32, generator))
    results = []
    for threads in (1, 4):
        storage = poisoned(weight.numel() * dtype.itemsize)
        assert compact([job], storage, layout="KRSC", threads=threads) == -1
        results.append(storage)
    assert torch.equal(*results) and torch.equal(results[0], reference_of([job], len(storage), "KRSC"))


def test_no_job_and_no_storage():
    storage = poisoned(64)
    assert compact([], storage) == -1 and not bool(storage.any())
    assert compact([], poisoned(0)) == -1


def rejected(change, words):
    """A case of bad input: how the good call is changed, and the words of the message."""
    return pytest.param(change, words, id=words)


def one_job(**change):
    generator = seeded(0)
    facts = {
        "kind": WEIGHT,
        "offset": 0,
        "dtype": torch.float32,
        "rows": torch.tensor([0, 1], dtype=torch.int32),
        "columns": torch.tensor([0, 2], dtype=torch.int32),
        "weight": torch.randn(2, 3, 3, 3, generator=generator),
        "norm": norm_of(2, torch.float32, generator),
    }
    return Job(**{**facts, **change})


def with_norm(**change):
    norm = norm_of(2, torch.float32, seeded(0))
    facts = {"weight": norm.weight, "bias": norm.bias, "mean": norm.mean, "variance": norm.variance}
    return one_job(norm=Norm(**{**facts, **change}))


@pytest.mark.parametrize(
    ("job", "words"),
    [
        rejected(lambda: one_job(kind=7), r"jobs\[0\].kind is unknown: 7"),
        rejected(lambda: one_job(offset=32), r"jobs\[0\].offset must be a multiple of 64, not 32"),
        rejected(lambda: one_job(offset=-64), r"jobs\[0\].offset is -64"),
        rejected(lambda: one_job(dtype=torch.int32), r"jobs\[0\].dtype must be a floating-point type, not int32"),
        rejected(lambda: one_job(dtype=torch.int8), "the native module does not know torch.int8"),
        rejected(lambda: one_job(rows=torch.tensor([0, 2], dtype=torch.int32)), r"jobs\[0\].rows has the entry 2, which is outside -1..1"),
        rejected(lambda: one_job(rows=torch.tensor([-2], dtype=torch.int32)), r"jobs\[0\].rows has the entry -2"),
        rejected(lambda: one_job(rows=torch.tensor([0, 1])), "the native module does not know torch.int64"),
        rejected(lambda: one_job(rows=torch.tensor([0.0, 1.0])), r"jobs\[0\].rows must be a contiguous int32 vector"),
        rejected(lambda: one_job(columns=torch.tensor([3], dtype=torch.int32)), r"jobs\[0\].columns has the entry 3, .* -1..2"),
        rejected(lambda: one_job(columns=torch.arange(4, dtype=torch.int32)[::2]), r"jobs\[0\].columns must be a contiguous int32"),
        rejected(lambda: one_job(columns=None), r"jobs\[0\].columns must be a tuple"),
        rejected(lambda: one_job(weight=None), r"jobs\[0\].weight must be a tuple"),
        rejected(lambda: one_job(weight=torch.ones(2, 3)), r"jobs\[0\].weight must have 4 dimensions, not \(2, 3\)"),
        rejected(lambda: one_job(weight=torch.ones(2, 3, 1, 1).half()), r"jobs\[0\].weight must be float32 or float64, not float16"),
        rejected(
            lambda: one_job(weight=torch.zeros(1).expand(1, 1, 2**24, 2**24), rows=ZEROS, columns=ZEROS, norm=None),
            r"jobs\[0\] is too large: 256 rows, each of 256 × 16777216 × 16777216 entries",
        ),
        rejected(lambda: one_job(kind=COPY), r"jobs\[0\].weight must have 1 dimensions"),
        rejected(lambda: one_job(kind=SHIFT, norm=None), r"jobs\[0\].norm is missing"),
        rejected(lambda: with_norm(weight=torch.ones(3)), r"jobs\[0\].gamma must have the shape \(2\), not \(3\)"),
        rejected(lambda: with_norm(bias=torch.ones(1)), r"jobs\[0\].beta must have the shape \(2\), not \(1\)"),
        rejected(lambda: with_norm(mean=torch.ones(2).double()), r"jobs\[0\].mean must be float32, not float64"),
        rejected(lambda: with_norm(variance=torch.ones(2, 1)), r"jobs\[0\].variance must have the shape \(2\), not \(2, 1\)"),
    ],
)
def test_bad_jobs_are_refused_by_name(job, words):
    storage = poisoned(1024)
    with pytest.raises(ValueError, match=words):
        compact([job()], storage)
    assert bool((storage == 0xFF).all()), "nothing was written"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        rejected({"storage": lambda: poisoned(128)}, "storage has 128 bytes, but jobs.0. ends at 144"),
        rejected({"storage": lambda: poisoned(1025)[1:]}, "storage must start at a multiple of 64 bytes"),
        rejected({"storage": lambda: poisoned(2048)[::2]}, "storage must be a contiguous uint8 vector"),
        rejected({"storage": lambda: torch.zeros(1024)}, "storage must be a contiguous uint8 vector"),
        rejected({"layout": "NHWC"}, "layout must be one of KCRS, KRSC, not 'NHWC'"),
        rejected({"epsilon": -1.0}, "epsilon must be a finite number of at least 0, not -1.0"),
        rejected({"epsilon": math.nan}, "epsilon must be a finite number of at least 0, not nan"),
        rejected({"threads": -1}, "threads must be a whole number from 0 to 1024, not -1"),
    ],
)
def test_other_bad_arguments_are_refused_by_name(change, words):
    options = dict(change)
    storage = options.pop("storage", lambda: poisoned(1024))()
    with pytest.raises(ValueError, match=words):
        compact([one_job()], storage, **options)


def test_what_lies_on_another_device_is_refused():
    with pytest.raises(ValueError, match=r"jobs\[1\].weight must be on cpu, not on meta"):
        compact([one_job(), one_job(weight=torch.ones(2, 3, 3, 3, device="meta"))], poisoned(1024))
    with pytest.raises(ValueError, match=r"jobs\[0\].rows must be on cpu, not on meta"):
        compact([one_job(rows=torch.zeros(2, dtype=torch.int32, device="meta"))], poisoned(1024))
    with pytest.raises(ValueError, match=r"jobs\[0\].variance must be on cpu, not on meta"):
        compact([with_norm(variance=torch.ones(2, device="meta"))], poisoned(1024))
    with pytest.raises(ValueError, match="storage must be on the CPU or a CUDA device, not on meta"):
        compact([], torch.empty(1024, dtype=torch.uint8, device="meta"))


def test_jobs_that_overlap_are_refused():
    with pytest.raises(ValueError, match=r"jobs\[1\].offset is 128, but the data before it ends at 144"):
        compact([one_job(), one_job(offset=128)], poisoned(1024))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (7, r"storage must be a tuple \(address, shape, strides, dtype code\), not 7"),
        ((0, (4,), (1,), 6), "storage has no data"),
        ((64, (4,), (1, 1), 6), "storage has 1 sizes but 2 strides"),
        ((64, (-4,), (1,), 6), r"storage.shape\[0\] must be a whole number from 0 to 2147483648, not -4"),
        ((64, (4,), (-1,), 6), r"storage.strides\[0\] must be a whole number from 0 to 1099511627776, not -1"),
        ((64, ("4",), (1,), 6), r"storage.shape\[0\] must be a whole number from 0 to 2147483648, not '4'"),
        ((64, (4,), (1,), 9), "storage has the unknown dtype code 9"),
        ((66, (4,), (1,), 1), "storage is not aligned to its dtype"),
        ((64, [4], (1,), 6), r"storage.shape must be a tuple of whole numbers, not \[4\]"),
        ((64, (2**31, 2**31), (1, 1), 6), "is too large"),
    ],
)
def test_facts_of_a_tensor_are_checked(facts, words):
    with pytest.raises(ValueError, match=words):
        native.pack([], facts, layout=0, epsilon=0.0, threads=1)


@pytest.mark.gpu
@pytest.mark.skipif(bool(CUDA_REASON), reason=CUDA_REASON)
class TestOnCuda:
    @staticmethod
    def moved(job):
        norm = job.norm and Norm(*(tensor.cuda() for tensor in (job.norm.weight, job.norm.bias, job.norm.mean, job.norm.variance)))
        return Job(job.kind, job.offset, job.dtype, job.rows, job.columns, None if job.weight is None else job.weight.cuda(), norm)

    @pytest.mark.parametrize("layout", ["KCRS", "KRSC"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("source", SOURCES)
    def test_same_bits_as_the_reference(self, dtype, source, layout):
        for seed, shape in enumerate(
            [(1, 1, 1, 1, 1, 1), (5, 4, 3, 3, 9, 7), (6, 6, 1, 1, 0, 4), (3, 300, 3, 3, 200, 250), (400, 2, 1, 3, 300, 2)]
        ):
            jobs, storage = draw_jobs(seed, dtype, source, shape)
            on_device = storage.cuda()
            assert compact([self.moved(job) for job in jobs], on_device, layout=layout) == -1
            assert torch.equal(on_device.cpu(), reference_of(jobs, len(storage), layout))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_rounding_at_every_boundary(self, dtype):
        _, middle = boundaries(dtype)
        for values in (middle, torch.nextafter(middle, middle * 0), -torch.nextafter(middle, middle * 2)):
            storage = poisoned(len(values) * 2, "cuda")
            compact([Job(COPY, 0, dtype, torch.arange(len(values), dtype=torch.int32), weight=values.cuda())], storage)
            assert torch.equal(storage.cpu().view(torch.int16).int() & 0xFFFF, copied(values, dtype))

    def test_the_first_bad_job_is_reported(self):
        rows = torch.tensor([0], dtype=torch.int32)
        jobs = [
            Job(COPY, 64 * i, torch.float32, rows, weight=torch.tensor([value]).cuda()) for i, value in enumerate([1.0, math.nan, math.inf])
        ]
        assert compact(jobs, poisoned(192, "cuda")) == 1

    def test_on_a_stream_behind_work_that_is_still_running(self):
        jobs, storage = draw_jobs(1, torch.bfloat16, torch.float32, (64, 64, 3, 3, 50, 40))
        moved = [self.moved(job) for job in jobs]
        expected, on_device = reference_of(jobs, len(storage), "KRSC"), storage.cuda()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        for _ in range(5):
            with torch.cuda.stream(side):
                torch.cuda._sleep(1_000_000)
                on_device.fill_(0xFF)
                assert compact(moved, on_device, layout="KRSC") == -1
            # compact() has waited for its stream: another one may read at once.
            assert torch.equal(on_device.cpu(), expected)

    def test_the_table_of_jobs_needs_room(self):
        facts = native.facts_of(poisoned(64, "cuda"))
        with pytest.raises(ValueError, match="workspace must be contiguous uint8 of at least 16 bytes"):
            native.pack_cuda([], facts, native.facts_of(poisoned(8, "cuda")), layout=0, epsilon=0.0, device=0, stream=0)

    def test_weights_elsewhere_are_refused(self):
        with pytest.raises(ValueError, match=r"jobs\[0\].weight must be on cuda"):
            compact([one_job()], poisoned(1024, "cuda"))
