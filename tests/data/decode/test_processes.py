"""Processes that decode: started without the user's script, noticed when they die, gone when nobody wants them any more."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from der_fast.data.decode import crops, decoder, processes
from der_fast.data.decode.crops import Cropped, Crops
from der_fast.data.decode.decoder import Failed, serve
from der_fast.data.decode.processes import DecodingProcesses
from der_fast.errors import DataError

WAIT = 60.0

posix = pytest.mark.skipif(os.name != "posix", reason="needs the signals of a POSIX system")

READ = """
from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset, transforms_for

def read(folder):
    config = DataConfig(name=folder, reader="pillow", image_size=48, random_resized_crop=True, workers=2)
    train, test = load_dataset(config)
    transform = transforms_for(config, test.image_size)[1]
    return sum(len(batch.images) for _ in range(2) for batch in test.batches(None, 2, transform=transform))
"""


def paths(photos: Path) -> list[str]:
    return sorted(str(path) for path in photos.rglob("*.jpg"))


def some(photos: Path) -> Crops:
    return Crops(paths(photos)[:3], None, (55, 55), (48, 48))


@pytest.fixture
def pool():
    made = DecodingProcesses(1)
    yield made
    made.close()


def test_pixels_are_those_of_this_process(photos, pool):
    (photos / "train" / "ape" / "1.jpg").write_bytes(b"no image")
    found, wanted = pool.submit(some(photos)).result(WAIT), crops.decode_crops(some(photos))
    assert np.array_equal(found.pixels, wanted.pixels) and found.kept.tolist() == wanted.kept.tolist() == [0, 2]
    assert found.problems == wanted.problems == [(str(photos / "train" / "ape" / "1.jpg"), "not an image of a known format")]
    assert found.pixels.flags.writeable


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_script_without_a_guard_runs_once(photos, tmp_path, method):
    """As README's example has run on macOS, on Windows and under Python 3.14: once more for every process that decodes."""
    if os.name != "posix" and method != "spawn":
        pytest.skip("this system only spawns processes")
    script = tmp_path / "script.py"
    script.write_text(
        f"import multiprocessing\nprint('begun', flush=True)\nmultiprocessing.set_start_method({method!r})\n{READ}\n"
        f"print(read({str(photos)!r}))\n"
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=WAIT, check=False)
    assert ended.stdout.split() == ["begun", "18"], ended.stderr


def test_a_daemonic_process_reads_too(photos, tmp_path):
    """Such processes may have no children of multiprocessing: a data set inside a DataLoader's worker, a pool's function."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import multiprocessing\n{READ}\nif __name__ == '__main__':\n    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        f"        print(pool.apply(read, [{str(photos)!r}]))\n"
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=WAIT, check=False)
    assert ended.stdout.split() == ["18"], ended.stderr


def test_a_process_that_decodes_loads_no_pytorch_and_nothing_from_the_current_folder(photos, tmp_path):
    """PyTorch takes seconds to load, and hundreds of megabytes, once for every core."""
    (tmp_path / "pickle.py").write_text("raise SystemExit('this is not the library')")
    code = f"import os; os.chdir({str(tmp_path)!r}); " + decoder.START.replace(
        "main()", "import os; os._exit(7 * ('torch' in sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(sys.path), timeout=WAIT, check=False, cwd=tmp_path)
    assert ended.returncode == 0


@posix
def test_one_that_is_killed_is_noticed_and_others_follow(photos, open_photos):
    """The message tells of the signal: nobody waited for data.timeout."""
    _, test, _, transform = open_photos(photos, "pillow", workers=1)
    walk = test.batches(None, 1, transform=transform)
    next(walk)
    (number,) = test.library.reader()._processes.ids
    os.kill(number, signal.SIGKILL)
    with pytest.raises(DataError, match=rf"pid {number}\) was killed \(SIGKILL\), .*memory.*data\.workers"):
        list(walk)
    assert len(list(test.batches(None, 1, transform=transform))) == 9
    assert number not in test.library.reader()._processes.ids


@posix
@posix
def test_signals_to_the_whole_group_are_for_the_main_process(photos, pool):
    before = pool.submit(some(photos)).result(WAIT)
    for process in pool.ids:
        os.kill(process, signal.SIGINT)
        os.kill(process, signal.SIGTERM)
    assert np.array_equal(pool.submit(some(photos)).result(WAIT).pixels, before.pixels)


def test_one_that_crashes_names_its_files(photos, pool):
    pool.submit(some(photos)).result(WAIT)
    os.kill(pool.ids[0], signal.SIGSTOP)
    waiting = pool.submit(some(photos))
    os.kill(pool.ids[0], signal.SIGSEGV)
    os.kill(pool.ids[0], signal.SIGCONT)
    with pytest.raises(DataError, match=rf"ended by SIGSEGV while reading {paths(photos)[0]} and 2 more"):
        waiting.result(WAIT)


def test_one_that_cannot_begin_says_its_exit_code(photos, pool, monkeypatch, capfd):
    monkeypatch.setattr(processes, "START", "import sys; sys.exit('no such thing')")
    with pytest.raises(DataError, match=r"ended with exit code 1; .*data\.workers=0"):
        pool.submit(some(photos)).result(WAIT)
    assert "no such thing" in capfd.readouterr().err


def test_one_that_cannot_be_started(photos, pool, monkeypatch):
    monkeypatch.setattr(processes, "get_executable", lambda: str(photos / "python"))
    with pytest.raises(DataError, match=r"cannot start a decoding process: .*No such file.*data\.workers=0"):
        pool.submit(some(photos)).result(WAIT)


@posix
def test_one_that_does_not_answer_is_not_waited_for(photos, open_photos):
    _, test, _, transform = open_photos(photos, "pillow", workers=1, timeout=0.5)
    # The first batches come from a process that has to start.
    test.library.reader().settings = test.library.settings.__class__("pillow", 1, timeout=WAIT)
    walk = test.batches(None, 1, transform=transform)
    next(walk)
    stopped = test.library.reader()._processes._started[0]
    os.kill(stopped.pid, signal.SIGSTOP)
    test.library.reader().settings = test.library.settings
    with pytest.raises(DataError, match=r"data\.timeout=0\.5 seconds"):
        list(walk)
    assert stopped.wait(WAIT) == -signal.SIGKILL


def test_they_end_when_closed_or_forgotten(photos):
    for end in (DecodingProcesses.close, lambda pool: None):
        pool = DecodingProcesses(2)
        pool.submit(some(photos)).result(WAIT)
        (process,) = pool._started
        end(pool)
        del pool
        assert process.wait(WAIT) != 0
    pool = DecodingProcesses(1)
    pool.close()
    with pytest.raises(DataError, match="stopped"):
        pool._take()


@posix
def test_they_end_with_the_process_that_wants_them(photos):
    """It is killed, so nobody ends them; they hold its standard error, which ends only when they have."""
    code = f"""
import os, signal, sys
from der_fast.data.decode.crops import Crops
from der_fast.data.decode.processes import DecodingProcesses
pool = DecodingProcesses(2)
both = [pool.submit(Crops([path], None, (55, 55), (48, 48))) for path in {paths(photos)[:2]!r}]
[one.result() for one in both]
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, timeout=WAIT, check=False)
    assert ended.returncode == -signal.SIGKILL and ended.stderr == b""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")
def test_a_forked_process_has_others(photos, reader):
    """Two processes that talk to one by the same pipe would take each other's pixels; a pipeline of DALI has lost its threads."""
    code = f"""
import os, torch
from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset, transforms_for
torch.set_num_threads(1)
config = DataConfig(name={str(photos)!r}, reader={reader!r}, image_size=48, random_resized_crop=True, workers=2)
train, test = load_dataset(config)
def read():
    batches = test.batches(None, 2, transform=transforms_for(config, test.image_size)[1])
    return torch.cat([batch.images for batch in batches])
before = read()
child = os.fork()
if not child:
    os._exit(0 if torch.equal(read(), before) else 1)
assert os.waitpid(child, 0)[1] == 0 and torch.equal(read(), before)
"""
    subprocess.run([sys.executable, "-c", code], timeout=WAIT, check=True)


def test_memory_that_runs_out_and_faults_of_ours(photos, monkeypatch):
    given, answers = io.BytesIO(), io.BytesIO()
    pickle.dump(some(photos), given)
    pickle.dump(some(photos), given)
    given.seek(0)
    errors = iter([MemoryError("too much"), KeyError("ours")])

    def fail(crops: Crops) -> Cropped:
        raise next(errors)

    monkeypatch.setattr(decoder, "decode_crops", fail)
    serve(given, answers)
    answers.seek(0)
    memory, fault = pickle.load(answers), pickle.load(answers)
    assert isinstance(memory, Failed) and memory.memory and not fault.memory and "KeyError: 'ours'" in fault.traceback

    class Process:
        stdin, stdout = io.BytesIO(), io.BytesIO(pickle.dumps(memory) + pickle.dumps(fault))

    with pytest.raises(DataError, match=r"ran out of memory on .*0\.jpg and 2 more; lower data\.workers"):
        processes._answer(Process(), some(photos))
    with pytest.raises(RuntimeError, match=r"KeyError: 'ours'"):
        processes._answer(Process(), some(photos))


def test_a_frozen_program_decodes_by_itself(photos, open_photos, monkeypatch):
    """Its executable is no Python: it would start the program once more."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    _, test, _, transform = open_photos(photos, "pillow", workers=2)
    assert len(list(test.batches(None, 1, transform=transform))) == 9
    assert "images are decoded by Pillow in this process" in test.notes[-1]
