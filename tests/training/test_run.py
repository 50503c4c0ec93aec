from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from der_fast.config.key import Change
from der_fast.config.schema import Config
from der_fast.config.tree import keys_with
from der_fast.data import MemorySource
from der_fast.errors import CheckpointError, ConfigError, DataError, DivergenceError, StorageError
from der_fast.files import held
from der_fast.training.learner import Learner
from der_fast.training.progress import Observer
from der_fast.training.run import learn_more, run_protocol
from der_fast.training.storage.named_files import load_manifest, save_manifest

Tiny = Callable[..., Config]
Images = Callable[..., MemorySource]
Facts = Callable[[Path], dict[str, Any]]
SHORT = {"first.epochs": 1, "later.epochs": 1, "classifier.epochs": 1}


@pytest.fixture(scope="module")
def finished(tiny: Tiny, synthetic: Images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps of two classes."""
    out = tmp_path_factory.mktemp("run") / "new" / "folder"
    run_protocol(tiny(SHORT), synthetic("abcdef"), synthetic("abcdef", 2, seed=1), out)
    return out


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "copy")


def resumed(out: Path, tiny: Tiny, synthetic: Images, changes: dict[str, Any] | None = None, **rest: Any) -> Learner:
    test = synthetic("abcdef", 2, seed=1)
    return run_protocol(tiny({**SHORT, **(changes or {})}), synthetic("abcdef"), test, out, resume=True, **rest)


def test_steps_arrive_in_the_protocols_order(tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    changes = {**SHORT, "protocol.name": "B2-2", "protocol.class_order": ("f", "a", "d", "c", "b", "e")}
    learner = run_protocol(tiny(changes), synthetic("abcdef"), synthetic("abcdef", 2), None, observer=watcher)
    assert [result.class_names for result in learner.results] == [("f", "a"), ("d", "c"), ("b", "e")]
    assert [step for step, _, _ in watcher.steps] == [1, 2, 3]
    assert [summary["step"] for summary in watcher.summaries] == [1, 2, 3]
    assert any(text.startswith("backend reference") for text in watcher.messages)


def test_a_part_of_the_classes_can_be_learned(tiny: Tiny, synthetic: Images) -> None:
    changes = {**SHORT, "protocol.name": "B0-2", "protocol.class_order": ("e", "b")}
    assert run_protocol(tiny(changes), synthetic("abcdef"), synthetic("abcdef", 2), None).class_names == ("e", "b")


def test_what_a_run_leaves(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} >= {"config.json", "metrics.json", "history.json", "steps", "extractors"}
    assert not list((finished / "checkpoints").iterdir())
    assert not list(finished.rglob("*.tmp"))
    assert json.loads((finished / "config.json").read_text())["config"]["model"]["width"] == 2


class Never(Observer):
    """Fails as soon as anything is trained."""

    def step_begins(self, *event: Any) -> None:
        pytest.fail("a step began")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"protocol.name": "B0-4"}, ConfigError, "does not divide 6 classes"),
        ({"protocol.name": "whatever"}, ConfigError, "not of the form"),
        ({"protocol.class_order": ("a", "b", "a")}, ConfigError, "more than once"),
        ({"protocol.class_order": ("a", "z")}, ConfigError, "z, which the data set does not have"),
        ({"memory.total": 5}, ConfigError, "memory.total = 5 leaves no exemplar"),
        ({"first.lr": -1.0}, ConfigError, "first.lr"),
    ],
)
def test_a_configuration_that_cannot_work(changes: dict[str, Any], error: type[Exception], words: str, tiny: Tiny, synthetic: Images,
                                          tmp_path: Path) -> None:  # fmt: skip
    with pytest.raises(error, match=words):
        run_protocol(tiny({**SHORT, **changes}), synthetic("abcdef"), synthetic("abcdef", 2), tmp_path / "run", observer=Never())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["training", "test"])
def test_a_class_without_images_is_found_before_the_first_step(part: str, tiny: Tiny, synthetic: Images) -> None:
    whole, less = synthetic("abcdef", 2), synthetic("abcdef", 2).subset(torch.arange(10))
    sources = (less, whole) if part == "training" else (whole, less)
    with pytest.raises(DataError, match=f"no {part} images of 1 class.*'f'"):
        run_protocol(tiny(SHORT), *sources, None, observer=Never())


def test_classes_with_fewer_images_than_their_quota_are_named(tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    changes = {**SHORT, "memory.total": 60}
    learner = run_protocol(tiny(changes), synthetic("abcdef"), synthetic("abcdef", 2), None, observer=watcher)
    assert [text for text in watcher.messages if "quota" in text] == [
        "6 class(es) have fewer training images than their memory quota of 10: 'a' (5), 'b' (5), 'c' (5), 'd' (5), 'e' (5), …. All are "
        "kept, but the classifier stage takes only 5 of every class, as many as the scarcest has. Add images of these classes, or "
        "leave them out."
    ]
    assert learner.model.memory.labels.bincount().tolist() == [5] * 6


def test_the_upper_bound_has_no_memory(tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    changes = {**SHORT, "protocol.name": "B0-2", "method.name": "bound", "memory.total": 1}
    learner = run_protocol(tiny(changes), synthetic("abcd"), synthetic("abcd", 2), None, observer=watcher)
    assert learner.model.memory is None
    assert not any("quota" in text for text in watcher.messages)


def test_learning_more_never_empties_the_memory_unasked(copy: Path, tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    for keys in ({"memory.total": 7}, {"memory.total": 1}):
        with pytest.raises(ConfigError, match=r"leaves no exemplar for each of 8 classes; use at least 8 \(memory.total\), .* or 0"):
            learn_more(copy, synthetic("gh"), None, tiny({**SHORT, **keys}), observer=Never())
    assert Learner.load(copy).model.memory is not None
    learner = learn_more(copy, synthetic("gh"), None, tiny({**SHORT, "memory.total": 8}), observer=watcher)
    assert learner.model.memory.labels.bincount().tolist() == [1] * 8
    assert learn_more(copy, synthetic("ij"), None, tiny({**SHORT, "memory.total": 0})).model.memory is None


def test_a_folder_that_holds_a_run_is_not_touched(copy: Path, tiny: Tiny, synthetic: Images, run_facts: Facts) -> None:
    before = run_facts(copy)
    with pytest.raises(ConfigError, match="already holds a run.*resume=True"):
        run_protocol(tiny(SHORT), synthetic("abcdef"), synthetic("abcdef", 2), copy, observer=Never())
    assert run_facts(copy) == before


def test_a_run_cannot_be_resumed_from_nowhere(tiny: Tiny, synthetic: Images) -> None:
    with pytest.raises(ConfigError, match="no folder to resume from"):
        run_protocol(tiny(SHORT), synthetic("abcdef"), synthetic("abcdef", 2), None, resume=True)


def test_an_out_that_is_a_file(tiny: Tiny, synthetic: Images, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=str(out)):
            run_protocol(tiny(SHORT), synthetic("abcdef"), synthetic("abcdef", 2), out, observer=Never())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_finished_run_is_resumed_without_work(copy: Path, tiny: Tiny, synthetic: Images, run_facts: Facts) -> None:
    before = run_facts(copy)
    learner = resumed(copy, tiny, synthetic, observer=Never())
    assert learner.class_names == tuple("abcdef")
    assert run_facts(copy) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"later.lr": 0.5}, "later.lr was 0.05, now 0.5"),
        ({"model.width": 3, "runtime.seed": 8}, "model.width was 2, now 3, runtime.seed was 7, now 8"),
        ({"memory.per_class": 3}, "memory.per_class was None, now 3"),
        ({"first.milestones": (2, 3)}, r"first.milestones was \[1\], now \[2, 3\]"),
    ],
)
def test_a_changed_configuration_is_refused(changes: dict[str, Any], words: str, copy: Path, tiny: Tiny, synthetic: Images) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        resumed(copy, tiny, synthetic, changes, observer=Never())
    assert str(copy) in str(caught.value)


def test_where_it_computes_may_change(copy: Path, tiny: Tiny, synthetic: Images) -> None:
    changes = {"runtime.device": "auto", "runtime.backend": "reference", "runtime.threads": 2, "runtime.tune_allocator": False,
               "runtime.keep_checkpoints": 5, "runtime.checkpoint_seconds": 5.0, "data.name": "/moved", "data.root": "elsewhere",
               "data.download": True, "data.max_gib": 1.0, "runtime.tensorboard": True, "data.test_list": "elsewhere.txt",
               "data.reader": "memory", "data.workers": 3, "data.prefetch": 1, "data.timeout": 9.0, "data.cache_gib": 1.0,
               "data.hardware_load": 0.5, "data.width_hint": 640, "data.height_hint": 480, "runtime.features_gib": 0.5}  # fmt: skip
    assert set(changes) == set(keys_with(Change.RESUME, Change.PLACE))
    learner = resumed(copy, tiny, synthetic, changes)
    assert learner.config.runtime.keep_checkpoints == 5
    # What follows finds the images where they are now; the device of one resumed run says nothing about the next.
    kept = json.loads((copy / "config.json").read_text())["config"]
    assert (kept["data"]["name"], kept["data"]["root"], kept["runtime"]["threads"]) == ("/moved", "elsewhere", 1)
    assert Learner.load(copy).config.data.name == "/moved"
    resumed(copy, tiny, synthetic, changes, observer=Never())
    assert learner.backend.reason == "asked for"
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("what", ["pixel", "label", "order"])
def test_changed_data_are_refused(part: str, what: str, copy: Path, tiny: Tiny, synthetic: Images) -> None:
    sources = {"train": synthetic("abcdef"), "test": synthetic("abcdef", 2, seed=1)}
    images, labels = sources[part].images.clone(), sources[part].labels.clone()
    if what == "pixel":
        images[3, 2, 1, 0] ^= 1
    elif what == "label":
        labels[0] = 1
    else:
        images, labels = images.flip(0), labels.flip(0)
    sources[part] = MemorySource(images, labels, "abcdef")
    with pytest.raises(CheckpointError, match=f"other {part} images"):
        run_protocol(tiny(SHORT), sources["train"], sources["test"], copy, resume=True, observer=Never())


@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_a_damaged_configuration_is_named(damage: str, copy: Path, tiny: Tiny, synthetic: Images) -> None:
    path = copy / "config.json"
    path.unlink()
    if damage == "cut off":
        path.write_text('{"config": {')
    with pytest.raises(CheckpointError, match=str(path)):
        resumed(copy, tiny, synthetic, observer=Never())


def test_a_damaged_last_step_is_learned_again(copy: Path, tiny: Tiny, synthetic: Images, run_facts: Facts, watcher: Any) -> None:
    before = run_facts(copy)
    path = next((copy / "steps" / "03").glob("memory-*"))
    path.write_bytes(path.read_bytes()[:100])
    resumed(copy, tiny, synthetic, observer=watcher)
    assert any("the state after step 3 cannot be used" in text and "going back" in text for text in watcher.messages)
    assert [step for step, _, _ in watcher.steps] == [3]
    assert run_facts(copy) == before


def test_where_no_step_is_whole_the_folder_is_named(copy: Path, tiny: Tiny, synthetic: Images) -> None:
    for path in copy.glob("steps/*/learner.json"):
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="no saved step is complete") as caught:
        resumed(copy, tiny, synthetic, observer=Never())
    assert str(copy / "steps" / "03" / "learner.json") in str(caught.value)
    assert str(copy / "steps" / "02" / "learner.json") in str(caught.value)


def test_a_run_that_learned_something_else_meanwhile(tiny: Tiny, synthetic: Images, tmp_path: Path) -> None:
    class Stop(Observer):
        def step_ends(self, summary: dict[str, Any]) -> None:
            if summary["step"] == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_protocol(tiny(SHORT), synthetic("abcdef"), synthetic("abcdef", 2, seed=1), tmp_path, observer=Stop())
    learn_more(tmp_path, synthetic("xy"), None, tiny(SHORT))
    with pytest.raises(CheckpointError, match="did not learn its protocol's classes in step 2: x, y instead of c, d"):
        resumed(tmp_path, tiny, synthetic, observer=Never())


def test_learning_more(copy: Path, tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    config = tiny({**SHORT, "later.lr": 0.02, "later.epochs": 2, "runtime.seed": 70, "runtime.eval_batch_size": 5})
    learner = learn_more(copy, synthetic("gh"), synthetic("abcdefgh", 2), config, observer=watcher)
    assert learner.class_names == tuple("abcdefgh")
    assert [(record.stage, record.lr) for record in watcher.records[:2]] == [
        ("representation", 0.02),
        ("representation", pytest.approx(0.002)),
    ]
    assert not list((copy / "checkpoints").iterdir())
    again = Learner.load(copy)
    assert (again.config.later.lr, again.config.runtime.seed, again.config.runtime.eval_batch_size) == (0.02, 70, 5)
    assert again.predict(synthetic("gh").images) == learner.predict(synthetic("gh").images)
    # The run itself can no longer be changed by --resume, but is still what it was.
    assert resumed(copy, tiny, synthetic, observer=Never()).class_names == tuple("abcdefgh")


def test_what_was_learned_cannot_be_changed_by_learning_more(copy: Path, tiny: Tiny, synthetic: Images) -> None:
    for changes, words in (({"model.width": 3}, "model.width was 2, now 3"), ({"data.mean": (0.0, 0.0, 0.0)}, "data.mean")):
        with pytest.raises(ConfigError, match=words):
            learn_more(copy, synthetic("gh"), None, tiny({**SHORT, **changes}), observer=Never())
    with pytest.raises(ConfigError, match="images of known classes retrain the classifier .* classifier.epochs = 0 switches off"):
        learn_more(copy, synthetic("a", seed=9), None, tiny({**SHORT, "classifier.epochs": 0}), observer=Never())
    assert Learner.load(copy).class_names == tuple("abcdef")


def test_a_diverged_step_leaves_the_steps_before_it(tiny: Tiny, synthetic: Images, tmp_path: Path) -> None:
    changes = {**SHORT, "later.lr": 1e30, "masks.enabled": False}
    with pytest.raises(
        DivergenceError, match=r"step 2.*first\.lr.* Start again with another out and the lower value: resume=True cannot change"
    ):
        run_protocol(tiny(changes), synthetic("abcdef"), synthetic("abcdef", 2, seed=1), tmp_path)
    assert Learner.load(tmp_path).class_names == ("a", "b")
    with pytest.raises(DivergenceError, match="step 2"):
        resumed(tmp_path, tiny, synthetic, {"later.lr": 1e30, "masks.enabled": False})


def test_a_diverged_further_step_leaves_the_run(copy: Path, tiny: Tiny, synthetic: Images) -> None:
    with pytest.raises(DivergenceError, match=f"step 4.*later.lr.* {copy} did not change: learn the classes again, with the lower value"):
        learn_more(copy, synthetic("gh"), None, tiny({**SHORT, "later.lr": 1e30}))
    assert learn_more(copy, synthetic("gh"), None, tiny(SHORT)).class_names == tuple("abcdefgh")


def test_two_runs_in_one_folder(copy: Path, tiny: Tiny, synthetic: Images) -> None:
    import threading

    caught: list[BaseException] = []

    def other() -> None:
        for call in (lambda: resumed(copy, tiny, synthetic), lambda: learn_more(copy, synthetic("gh"), None, tiny(SHORT)),
                     lambda: Learner.load(copy).save(copy)):  # fmt: skip
            try:
                call()
            except StorageError as error:
                caught.append(error)

    with held(copy):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(caught) == 3
    assert all(str(copy) in str(error) for error in caught)


def test_leftovers_of_a_killed_writer_are_removed_and_nothing_else(copy: Path, tiny: Tiny, synthetic: Images) -> None:
    ours = [copy / ".metrics.json.123-0123abcd.tmp", copy / "steps" / "03" / ".model-1.safetensors.9-00000000.tmp",
            copy / "checkpoints" / ".a.json.1-ffffffff.tmp", copy / "extractors" / ".01-2.safetensors.7-12345678.tmp"]  # fmt: skip
    others = [copy / ".notes.tmp", copy / "mine.tmp", copy / "mine" / ".metrics.json.123-0123abcd.tmp"]
    (copy / "mine").mkdir()
    for path in (*ours, *others):
        path.write_text("half")
    resumed(copy, tiny, synthetic, observer=Never())
    assert [path.exists() for path in ours] == [False] * 4
    assert [path.exists() for path in others] == [True] * 3


def test_a_run_that_began_before_there_were_named_steps_goes_on(copy: Path, tiny: Tiny, synthetic: Images) -> None:
    facts = load_manifest(copy / "config.json")
    del facts["config"]["protocol"]["steps"]
    save_manifest(copy / "config.json", facts)
    assert resumed(copy, tiny, synthetic, observer=Never()).class_names == tuple("abcdef")


@pytest.mark.parametrize("changes", [{"protocol.name": "3,1,2"}, {"protocol.steps": (("a", "b", "c"), ("d",), ("e", "f"))}])
def test_uneven_steps_are_learned_and_resumed(changes: dict[str, Any], tiny: Tiny, synthetic: Images, tmp_path: Path) -> None:
    class Stop(Observer):
        def step_ends(self, summary: dict[str, Any]) -> None:
            if summary["step"] == 2:
                raise KeyboardInterrupt

    run = partial(run_protocol, tiny({**SHORT, **changes}), synthetic("abcdef"), synthetic("abcdef", 2, seed=1))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", observer=Stop())
    metrics = run(tmp_path / "stopped", resume=True).metrics()
    straight = run(None).metrics()
    assert metrics["steps"] == [["a", "b", "c"], ["d"], ["e", "f"]]
    assert metrics["bwt"] == straight["bwt"] is not None
    assert (metrics["top1"], metrics["class_set_top1"]) == (straight["top1"], straight["class_set_top1"])


def test_classes_in_no_step_are_named(tiny: Tiny, synthetic: Images, watcher: Any) -> None:
    run_protocol(
        tiny({**SHORT, "protocol.steps": (("a",), ("f", "b"))}), synthetic("abcdef"), synthetic("abcdef", 2), None, observer=watcher
    )
    assert any(text == "3 class(es) of the data set are in no step and are not learned: 'c', 'd', 'e'" for text in watcher.messages)
