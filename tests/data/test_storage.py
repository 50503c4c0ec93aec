"""A source of files, written down and found again."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace

import pytest
import torch

from der_fast.data import storage
from der_fast.data.storage import from_record, located, record_of
from der_fast.errors import DataError
from der_fast.seeds import generator

WAIT = 20.0


@pytest.fixture
def kept(photos, open_photos):
    """Five images as they are read back, and the source they were chosen from."""
    train, *_ = open_photos(photos, "pillow")
    chosen = train.subset(torch.tensor([20, 0, 3, 8, 1]))
    return from_record(*record_of(chosen), train.library.settings), chosen


def test_it_comes_back_as_it_was(kept, open_photos, photos):
    back, chosen = kept
    assert (back.files, back.class_names, back.image_size) == (chosen.files, chosen.class_names, chosen.image_size)
    assert torch.equal(back.labels, chosen.labels) and back.fingerprint() == chosen.fingerprint()
    found = located(back, [])
    assert found.table.roots == (str(photos),)
    transform = open_photos(photos, "pillow")[2]
    one, other = (next(iter(s.batches(None, 5, transform=transform, generator=generator(0), shuffle=True))) for s in (found, chosen))
    assert torch.equal(one.images, other.images)
    assert record_of(found)[1] == record_of(chosen)[1] and torch.equal(record_of(found)[0]["sha256"], record_of(chosen)[0]["sha256"])


def test_moved_files_are_found_at_their_new_place(kept, photos, tmp_path):
    moved = photos.rename(tmp_path / "new")
    with pytest.raises(DataError, match=r"5 of 5 images of the rehearsal memory are not where they were(.|\n)*as data of"):
        located(kept[0], [str(tmp_path / "nowhere")])
    found = located(kept[0], [str(tmp_path / "nowhere"), str(moved)])
    assert found.table.roots == (str(moved),) and found.files == kept[1].files
    assert record_of(found)[0]["sha256"].equal(record_of(kept[0])[0]["sha256"])


def test_a_copy_with_other_contents_is_refused(kept, photos, tmp_path):
    copy = shutil.copytree(photos, tmp_path / "new")
    shutil.rmtree(photos)
    for path in copy.rglob("*.jpg"):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    with pytest.raises(DataError, match="5 of 5 images .* have other contents"):
        located(kept[0], [str(copy)])


def test_a_few_that_are_gone_or_changed_are_borne(kept, photos):
    (photos / "train" / "cow" / "6.jpg").unlink()
    path = photos / "train" / "ape" / "0.jpg"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    found = located(kept[0], [])
    assert len(found) == 5 and any("0.jpg has other contents" in note for note in found.library.notes)


def test_files_of_two_roots(kept, photos, open_photos, tmp_path):
    other = shutil.copytree(photos, tmp_path / "second")
    second, *_ = open_photos(other, "pillow")
    both = kept[1].concatenated(second.subset(torch.tensor([2, 9])))
    back = from_record(*record_of(both), second.library.settings)
    assert back.table.roots == (str(photos), str(other)) and back.files == both.files
    moved = photos.rename(tmp_path / "third")
    assert located(back, [str(moved)]).table.roots == (str(moved), str(other))


def test_a_drive_that_does_not_answer_is_not_waited_for(kept, monkeypatch):
    back, chosen = kept
    answer = threading.Event()
    monkeypatch.setattr(storage, "read_bytes", lambda path: bytes(answer.wait(WAIT)))
    for source in (back, chosen):
        source.library.settings = replace(source.library.settings, timeout=0.2)
    with pytest.raises(DataError, match=r"reading .*\.jpg took longer than data\.timeout=0\.2 seconds"):
        located(back, [])
    chosen.library.digests.clear()
    with pytest.raises(DataError, match=r"reading .*\.jpg took longer than data\.timeout=0\.2 seconds"):
        record_of(chosen)
    answer.set()
