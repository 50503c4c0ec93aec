"""Arena files: what is saved comes back mapped, and what is damaged is refused by path."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch

from der_fast.compaction import Arena, ArenaTensor, pack, plan
from der_fast.compaction import arena as arena_module
from der_fast.compaction.bank.execute import execute
from der_fast.errors import CheckpointError, StorageError
from der_fast.files import sha256_of
from der_fast.model.architecture import BACKBONES, build_architecture
from der_fast.model.extractor import Extractor
from der_fast.model.layout import MaskLayout


def seeded(number):
    return torch.Generator().manual_seed(number)


def arena_of(backbone="resnet20", density=0.6, **options):
    net = Extractor(build_architecture(backbone, width=4)).initialise(seeded(0)).eval()
    layout = MaskLayout(net.architecture)
    keep = torch.rand(layout.channels, generator=seeded(1)) < density
    for name in layout.stream_groups() if density else ():
        layout.by_group(keep)[name][0] = True
    return pack(net, plan(layout, keep), **options)


def same(a, b):
    for name in ("architecture", "widths", "stored", "align", "dtype", "layout", "entries", "ops", "features", "parameters", "nbytes"):
        assert getattr(a, name) == getattr(b, name), name
    assert torch.equal(a.storage, b.storage)
    found, expected = a.tensors(), b.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) and found[name].stride() == value.stride() for name, value in expected.items())
    return True


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip(backbone, dtype, tmp_path):
    arena = arena_of(backbone, dtype=dtype, align=4, layout="KCRS" if dtype == torch.float16 else "KRSC")
    path = arena.save(tmp_path / "a.safetensors")
    assert path.read_bytes() == arena.to_bytes()
    loaded = Arena.load(path)
    assert same(loaded, arena) and loaded.storage.data_ptr() % 64 == 0
    assert same(Arena.load(path, sha256_of(path), arena.architecture), arena)


def test_an_extractor_of_which_nothing_is_left_is_saved_too(tmp_path):
    arena = arena_of(density=0.0)
    assert (arena.nbytes, arena.ops, arena.features, arena.parameters, arena.tensors()) == (0, (), 0, 0, {})
    loaded = Arena.load(arena.save(tmp_path / "a.safetensors"))
    assert same(loaded, arena)
    assert execute(loaded.ops, loaded.tensors(), torch.zeros(2, 3, 8, 8)).shape == (2, 0)


def test_saving_twice_gives_the_same_bytes():
    assert arena_of().to_bytes() == arena_of().to_bytes()


def test_the_file_is_a_safetensors_container_that_others_can_read(tmp_path):
    from safetensors.torch import load_file

    arena = arena_of()
    path = arena.save(tmp_path / "a.safetensors")
    assert torch.equal(load_file(path)["arena"], arena.storage)
    assert (int.from_bytes(path.read_bytes()[:8], "little") + 8) % 64 == 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
def test_a_loaded_arena_is_the_mapped_file(tmp_path):
    arena = arena_of("resnet18")
    path = arena.save(tmp_path / "a.safetensors")
    before = path.read_bytes()
    loaded = Arena.load(path)
    maps = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines() if line.endswith(str(path))]
    spans = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    assert any(low <= loaded.storage.data_ptr() < high for low, high in spans), "not a copy"
    # Copy on write: the file does not change with the memory.
    loaded.storage.fill_(1)
    assert path.read_bytes() == before and same(Arena.load(path), arena)


def test_views_share_the_storage():
    arena = arena_of()
    begin, end = arena.storage.data_ptr(), arena.storage.data_ptr() + arena.nbytes
    assert all(begin <= tensor.data_ptr() < end for tensor in arena.tensors().values())
    assert arena.to("cpu") is arena


def test_entries():
    arena = arena_of(dtype=torch.bfloat16)
    entry = arena.entries[0]
    assert entry == ArenaTensor("stem.weight", (arena.widths["stage1"], 3, 3, 3), 0, torch.bfloat16)
    assert entry.nbytes == 2 * arena.widths["stage1"] * 27


def rewritten(path, change, resign=True):
    """Change the facts of a saved file; with `resign` its checksum is made right again."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, content = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header["__metadata__"]
    facts = json.loads(metadata["facts"])
    change(metadata, facts)
    metadata["facts"] = json.dumps(facts, sort_keys=True)
    if resign:
        metadata["sha256"] = hashlib.sha256(metadata["facts"].encode() + content).hexdigest()
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1, -64, -1000])
def test_truncated_files_are_refused(cut, tmp_path):
    path = arena_of().save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"a.safetensors is damaged or not an arena .* copy the file again"):
        Arena.load(path)


@pytest.mark.parametrize("tail", [b"\0", b"garbage" * 100])
def test_trailing_garbage_is_refused(tail, tmp_path):
    path = arena_of().save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes() + tail)
    with pytest.raises(CheckpointError, match="a.safetensors is damaged or not an arena"):
        Arena.load(path)


def test_every_flipped_bit_is_noticed(tmp_path):
    arena = arena_of()
    path = arena.save(tmp_path / "a.safetensors")
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    spaces = len(data[8 : 8 + length].rstrip(b" ")) + 8
    for position in [*range(0, spaces, 7), *range(8 + length, len(data), 997), len(data) - 1]:
        damaged = bytearray(data)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="a.safetensors"):
            Arena.load(path)


def test_a_file_that_is_not_the_one_noted_is_refused(tmp_path):
    path = arena_of().save(tmp_path / "a.safetensors")
    other = arena_of(density=0.4).save(tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"a.safetensors is damaged: its checksum differs from the one recorded"):
        Arena.load(path, sha256_of(other))


@pytest.mark.parametrize("version", ["0", "2", "1.0", ""])
def test_other_versions_are_refused(version, tmp_path):
    path = arena_of().save(tmp_path / "a.safetensors")
    rewritten(path, lambda metadata, facts: metadata.update(version=version))
    with pytest.raises(CheckpointError, match=rf"a.safetensors is an arena of version {version}, but this der_fast reads version 1"):
        Arena.load(path)


def test_facts_that_were_changed_are_refused(tmp_path):
    path = arena_of().save(tmp_path / "a.safetensors")
    rewritten(path, lambda metadata, facts: facts["widths"].update(stage1=1), resign=False)
    with pytest.raises(CheckpointError, match="its content does not match its checksum"):
        Arena.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.update(backbone="resnet19"),
        lambda facts: facts.update(backbone="resnet32"),
        lambda facts: facts.update(width=0),
        lambda facts: facts.update(stem="large"),
        lambda facts: facts.update(align=0),
        lambda facts: facts.update(align="4"),
        lambda facts: facts.update(dtype="float8"),
        lambda facts: facts.update(layout="NHWC"),
        lambda facts: facts.pop("widths"),
        lambda facts: facts["widths"].pop("stage1"),
        lambda facts: facts["widths"].update(stage1=5),
        lambda facts: facts["widths"].update(stage1=-1),
        lambda facts: facts["widths"].update(stage1=4),
        lambda facts: facts["offsets"].update({"stem.weight": 64}),
        lambda facts: facts["offsets"].update({"stem.bias": 8}),
        lambda facts: facts["offsets"].update({"stem.bias": 1 << 40}),
        lambda facts: facts["offsets"].update({"other.bias": 0}),
        lambda facts: facts["offsets"].pop("stem.bias"),
        lambda facts: facts.update(dtype="float64"),
    ],
)
def test_facts_that_contradict_themselves_are_refused(change, tmp_path):
    arena = arena_of()
    assert arena.widths["stage1"] < 4
    path = arena.save(tmp_path / "a.safetensors")
    rewritten(path, lambda metadata, facts: change(facts))
    with pytest.raises(CheckpointError, match=r"a.safetensors describes a network that der_fast does not know"):
        Arena.load(path)


def test_another_network_s_arena_is_refused(tmp_path):
    path = arena_of("resnet20").save(tmp_path / "a.safetensors")
    wanted = build_architecture("resnet32", width=4)
    with pytest.raises(CheckpointError, match=r"belongs to another network: .*resnet20.*, not .*resnet32.*give the arena of this run"):
        Arena.load(path, architecture=wanted)


@pytest.mark.parametrize("content", [b"", b"not an arena at all, but longer than eight bytes", b"\x80\x04pickle" * 9])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="a.safetensors is damaged or not an arena of der_fast"):
        Arena.load(path)


def test_other_safetensors_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    for tensors, metadata in (({"arena": torch.zeros(64, dtype=torch.uint8)}, None), ({"w": torch.zeros(3)}, {"format": "der_fast-arena"})):
        save_file(tensors, path, metadata)
        with pytest.raises(CheckpointError, match="weights.safetensors is not an arena of der_fast"):
            Arena.load(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="there is no arena .*gone"):
        Arena.load(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="there is no arena .*gone"):
        Arena.load(tmp_path / "gone.safetensors", "0" * 64)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Arena.load(tmp_path)


def test_a_path_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="could not write"):
        arena_of().save(tmp_path / "file" / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_architecture_without_a_name_cannot_be_saved():
    arena = arena_of()
    odd = dataclasses.replace(arena, architecture=dataclasses.replace(arena.architecture, pool=True))
    with pytest.raises(ValueError, match="an architecture that differs from .* cannot be saved"):
        odd.to_bytes()


def test_storage_that_is_not_aligned_in_the_file_is_copied(tmp_path):
    arena = arena_of()
    path = arena.save(tmp_path / "a.safetensors")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    # Another writer's header: 8 spaces more are legal, but the content begins elsewhere.
    path.write_bytes((length + 8).to_bytes(8, "little") + data[8 : 8 + length] + b" " * 8 + data[8 + length :])
    loaded = Arena.load(path)
    assert same(loaded, arena) and loaded.storage.data_ptr() % arena_module.ALIGNMENT == 0
