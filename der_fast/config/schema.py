"""The configuration: one tree of frozen dataclasses; each key is declared here and nowhere else.

A key's line holds its default, the values it takes, its meaning, and what may change it later (`Change`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

from der_fast.config.key import Change, key
from der_fast.config.methods import METHODS
from der_fast.config.rules import (
    ABOVE_ONE,
    BELOW_ONE,
    CLASSES,
    DEVICE,
    EPOCHS,
    FACTOR,
    INSIDE,
    NOT_NEGATIVE,
    ORDER,
    ORDER_SEED,
    POSITIVE,
    SEED,
    SHARE,
    SHARE_BELOW_ONE,
    STEPS,
    SWITCH,
    TEXT,
    at_least,
    between,
    channels,
    count,
    one_of,
)

BACKBONES = ("resnet18", "resnet34", "resnet50", "preact_resnet18", "resnet20", "resnet32")
STEMS = ("auto", "imagenet", "small")
BACKENDS = ("auto", "reference", "fused")
PRECISIONS = ("auto", "fp32", "bf16")
READERS = ("auto", "memory", "dali", "pillow")

# A method's own keys: any other method refuses them by name.
_der = partial(key, method="der")


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are augmented."""

    name: str = key(
        "digits",
        TEXT,
        "'digits', 'cifar10', 'cifar100', a folder of class folders (with or without train/ and test/) or of WebDataset tars, or a text "
        "file of 'path class'",
        Change.PLACE,
    )
    root: str | None = key(
        None,
        TEXT,
        "folder that holds cifar10 or cifar100: official archive, strips or images (docs/data.md); default: the user's cache folder",
        Change.PLACE,
    )
    download: bool = key(False, SWITCH, "download a missing official archive", Change.RESUME)
    image_size: int | None = key(
        None,
        count(4, 1024),
        "side of the network's input in pixels; default: the data set's own size (folders: 32 if all are ≤ 32, else 224)",
        Change.NEVER,
    )
    test_list: str | None = key(None, TEXT, "text file of 'path class' with the test images, if `name` is such a file", Change.PLACE)
    classes: tuple[str, ...] | None = key(None, CLASSES, "use only these classes of the data set; default: all")
    train_per_class: int | None = key(None, at_least(1), "use at most this many training images per class, the first by name")
    test_per_class: int | None = key(None, at_least(1), "use at most this many test images per class, the first by name")
    test_share: float = key(0.2, INSIDE, "share of each class held out for testing if a folder has no train/test split")
    crop_padding: int = key(4, count(0, 128), "zero padding in pixels for the random crop; 0 = no random crop")
    flip: bool = key(True, SWITCH, "random horizontal flip")
    brightness: float = key(63 / 255, between(0, 1), "brightness jitter: factor drawn from [1 − b, 1 + b]; 0 = off")
    random_resized_crop: bool = key(
        False, SWITCH, "random-resized-crop (area 0.08–1, aspect 3/4–4/3) instead of the padded crop: for photos", Change.NEVER
    )
    mean: tuple[float, float, float] = key(
        (0.5071, 0.4867, 0.4408), channels(between(0, 1)), "per-channel mean of the normalised images, in [0, 1]", Change.NEVER
    )
    std: tuple[float, float, float] = key(
        (0.2675, 0.2565, 0.2761), channels(POSITIVE), "per-channel standard deviation, in [0, 1]", Change.NEVER
    )
    max_gib: float = key(8.0, POSITIVE, "refuse to hold more than this many GiB of decoded images in memory", Change.RESUME)
    # Images held in memory and images left in their files have different checksums.
    reader: str = key(
        "auto",
        one_of(READERS),
        "'memory' decodes a folder once and holds it; 'dali' and 'pillow' leave photos in files and decode each batch; 'auto': photos "
        "(random_resized_crop, more than 32 pixels) from files, with nvidia-dali if it is installed, all else from memory",
        Change.RESUME,
    )
    workers: int | None = key(
        None, at_least(0), "threads (dali) or processes (pillow) that decode; default: one per core, at most 16", Change.RESUME
    )
    prefetch: int = key(2, count(1, 64), "batches decoded ahead", Change.RESUME)
    timeout: float = key(120.0, POSITIVE, "seconds to wait for a batch of images before giving up", Change.RESUME)
    cache_gib: float | None = key(
        None,
        NOT_NEGATIVE,
        "GiB for images decoded once (short side 256/224 of image_size) and cropped from memory, if all fit; 0: none; default: none on the "
        "CPU, half of the free memory on a GPU",
        Change.RESUME,
    )
    hardware_load: float = key(
        0.65, between(0, 1), "share of JPEGs decoded by the GPU's hardware decoder, if it has one (dali)", Change.RESUME
    )
    width_hint: int = key(
        0, at_least(0), "width of the largest images, to make the GPU's decoding buffers in advance (dali); 0 = as needed", Change.RESUME
    )
    height_hint: int = key(0, at_least(0), "height of the largest images; see width_hint", Change.RESUME)


@dataclass(frozen=True)
class ProtocolConfig:
    """How classes are divided into steps (docs/method.md: classes in steps)."""

    name: str = key(
        "B0-5",
        TEXT,
        "'B0-n': all classes in n equal steps; 'B<base>-<n>': base classes first, the rest in n steps; '10,10,5': the sizes of all steps",
    )
    steps: tuple[tuple[str, ...], ...] | None = key(
        None, STEPS, 'the class names of every step, e.g. [["cat", "dog"], ["car"]], instead of sizes and order'
    )
    class_order: tuple[str, ...] | str | None = key(
        None,
        ORDER,
        "class names in the order they arrive, or the name of a published order of the alphabetical class names: 'icarl', 'podnet-2', "
        "'podnet-3' (100 classes each), 'numpy-1993'; 'torch-<seed>': what a seed meant up to version 0.1.0; default: from "
        "class_order_seed",
    )
    class_order_seed: int | None = key(
        1993,
        ORDER_SEED,
        "seed N of the class order, numpy.random.RandomState(N).permutation(n) over the n alphabetical class names; 'none' keeps the data "
        "set's own order",
    )


@dataclass(frozen=True)
class ModelConfig:
    """The feature extractor."""

    backbone: str = key("resnet32", one_of(BACKBONES), "resnet18, resnet34, resnet50, preact_resnet18, resnet20, resnet32", Change.NEVER)
    width: int | None = key(
        None, count(1, 1024), "channels of the first stage; default: the backbone's own (64, or 16 for resnet20/32)", Change.NEVER
    )
    stem: str = key(
        "auto",
        one_of(STEMS),
        "'imagenet' (7×7 stride 2 + pooling), 'small' (3×3 stride 1), or 'auto': by image size, small up to 64 pixels",
        Change.NEVER,
    )


@dataclass(frozen=True)
class MasksConfig:
    """Channel masks, their sparsity loss and how a step is pruned."""

    enabled: bool = _der(True, SWITCH, "learn channel masks and prune; false = DER without pruning")
    s_max: float = _der(100.0, ABOVE_ONE, "largest mask scale; s runs from 1/s_max to s_max within every epoch")
    lr: float = _der(1.0, NOT_NEGATIVE, "learning rate of the mask logits (they have no momentum and no weight decay)")
    init_low: float = _der(
        0.0,
        between(-100, 100),
        "mask logits start uniformly in [init_low, init_high], the same at every step",
    )
    init_high: float = _der(2.0, between(-100, 100), "see init_low")
    clamp: float = _der(6.0, POSITIVE, "mask logits are clamped to ± this after every optimizer step")
    sparsity: float = _der(1.0, NOT_NEGATIVE, "λ_s, the weight of the sparsity loss (its upper bound if target_params is given)")
    target_params: float | None = _der(
        0.24, SHARE, "share of an extractor's parameters to keep; λ_s is adapted to reach it during the step"
    )
    price_power: float = _der(
        1.5,
        NOT_NEGATIVE,
        "the threshold that meets target_params rises with a channel's price (parameters per convolution) to this power; 0 = same for all",
    )
    settle: float = _der(0.9, SHARE_BELOW_ONE, "share of a step's epochs, at the end, trained with the masks held binary; 0 = the paper")
    floor: float = _der(0.0, between(0, 1), "at least this share of every stream's channels is kept (never fewer than one); 0 = no floor")
    multiple: int = _der(
        1,
        count(1, 1024),
        "round kept channels to multiples of this (at most a quarter of a group) within the same parameters, for hardware that "
        "computes in blocks: 8 for tensor cores, 16 or 32 for ONNX Runtime on CPUs; 1 = the paper",
    )
    bn_images: int = _der(512, at_least(0), "training images used to re-estimate batch-norm statistics after binarising; 0 = off")


@dataclass(frozen=True)
class ScheduleConfig:
    """SGD over one stage of a step."""

    epochs: int = key(40, at_least(1), "number of epochs")
    lr: float = key(0.1, POSITIVE, "learning rate after the warm-up")
    milestones: tuple[int, ...] = key((20, 30), EPOCHS, "epochs (counted from the start) at which the learning rate is multiplied by gamma")
    gamma: float = key(0.1, FACTOR, "factor applied at every milestone")
    warmup_epochs: int = key(0, at_least(0), "epochs of linear warm-up; both classifiers are re-initialised at its end")
    warmup_lr: float = key(0.01, NOT_NEGATIVE, "learning rate at which the warm-up starts")
    momentum: float = key(0.9, BELOW_ONE, "SGD momentum")
    weight_decay: float = key(5e-4, NOT_NEGATIVE, "weight decay of weights and batch-norm parameters, never of mask logits")
    # Batch-norm cannot train on a single image.
    batch_size: int = key(128, at_least(2), "images per batch")


@dataclass(frozen=True)
class LaterConfig(ScheduleConfig):
    """SGD over the representation stage of the steps after the first."""

    views: int = _der(
        16,
        at_least(0),
        "each image's augmentations come from this many fixed views, one per epoch in turn: frozen extractors compute a view once and "
        "their features are kept; 0, or as many as epochs = fresh ones, as in the paper",
    )


@dataclass(frozen=True)
class ClassifierConfig(ScheduleConfig):
    """The classifier stage on the class-balanced subset (steps after the first)."""

    epochs: int = key(30, at_least(0), "number of epochs; 0 = no classifier stage")
    milestones: tuple[int, ...] = key((15,), EPOCHS, "epochs at which the learning rate is multiplied by gamma")
    views: int = key(
        8,
        at_least(0),
        "the classifier is retrained on features of this many fixed views of every image, one per epoch in turn, computed once; 0, or as "
        "many as epochs = fresh ones, as in the paper",
    )
    temperature: float = key(5.0, POSITIVE, "logits are divided by T (5 on CIFAR, 1 on ImageNet)")


@dataclass(frozen=True)
class MemoryConfig:
    """The rehearsal memory."""

    total: int = key(2000, at_least(0), "exemplars in total, divided equally among the seen classes")
    per_class: int | None = key(None, at_least(0), "a fixed number of exemplars per class instead of a fixed total")


@dataclass(frozen=True)
class MethodConfig:
    """The method, and its settings."""

    name: str = key(
        "der",
        one_of(METHODS),
        "; ".join(f"{name!r}: {meaning}" for name, meaning in METHODS.items()),
        Change.NEVER,
    )
    aux_weight: float = _der(1.0, NOT_NEGATIVE, "λ_a, the weight of the auxiliary loss after the first step; 0 = without it")
    fwt: bool = key(False, SWITCH, "also train the randomly initialised reference models that forward transfer needs")


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how a run computes."""

    seed: int = key(1993, SEED, "seed of all random numbers except the class order")
    device: str = key("auto", DEVICE, "'cpu', 'cuda', 'cuda:1', or 'auto'", Change.RESUME)
    backend: str = key(
        "auto",
        one_of(BACKENDS),
        "'reference': eager PyTorch; 'fused': on a GPU of compute capability 8.0 or newer with Triton the fastest of cuDNN and der_fast's "
        "kernels, measured once (`der-fast doctor` shows it), else reference with a warning; 'auto': the same without the warning",
        Change.RESUME,
    )
    precision: str = key(
        "auto",
        one_of(PRECISIONS),
        "'bf16': extractors run in bfloat16 autocast, weights and classifiers stay fp32; 'fp32'; 'auto': bf16 on a GPU of compute "
        "capability 8.0 or newer, else fp32. A run keeps what it began with",
    )
    threads: int | None = key(None, at_least(1), "CPU threads; default: PyTorch's choice", Change.RESUME)
    channels_last: bool = key(True, SWITCH, "keep activations channels-last")
    tune_allocator: bool = key(
        True, SWITCH, "keep large CPU buffers instead of returning them to the system after every batch (glibc)", Change.RESUME
    )
    eval_batch_size: int = key(256, at_least(1), "images per batch when nothing is trained")
    keep_checkpoints: int = key(2, at_least(1), "how many of the latest checkpoints stay on disk", Change.RESUME)
    checkpoint_seconds: float = key(
        600.0,
        NOT_NEGATIVE,
        "seconds of training between checkpoints, within epochs and between them; in any case one at the end of every stage; 0 = one after "
        "every epoch",
        Change.RESUME,
    )
    features_gib: float = key(
        2.0,
        NOT_NEGATIVE,
        "GiB for kept features of frozen extractors on the device, and as much again in host memory; what does not fit is computed again",
        Change.RESUME,
    )
    tensorboard: bool = key(False, SWITCH, "also write TensorBoard event files (needs the extra 'tensorboard')", Change.RESUME)


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    first: ScheduleConfig = field(default_factory=ScheduleConfig)
    later: LaterConfig = field(default_factory=LaterConfig)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
