"""Threads that read files."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import CancelledError

import pytest

from der_fast.data.io.threads import FileThreads

WAIT = 20.0


def named(name):
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def test_results_and_errors_come_back():
    threads = FileThreads(2, "test")
    found = [threads.submit(divmod, 7, number) for number in (2, 0, 3)]
    assert found[0].result(WAIT) == (3, 1) and found[2].result(WAIT) == (2, 1)
    with pytest.raises(ZeroDivisionError):
        found[1].result(WAIT)
    threads.close()


@pytest.mark.parametrize("how", ["closed", "forgotten"])
def test_they_end(how):
    threads, begun, go = FileThreads(2, f"test-{how}"), threading.Barrier(3), threading.Event()

    def wait():
        begun.wait(WAIT)
        return go.wait(WAIT)

    running = [threads.submit(wait) for _ in range(2)]
    begun.wait(WAIT)
    waiting, alive = threads.submit(int), named(f"test-{how}")
    if how == "closed":
        threads.close()
    del threads
    gc.collect()
    go.set()
    assert [call.result(WAIT) for call in running] == [True, True]
    with pytest.raises(CancelledError):
        waiting.result(WAIT)
    for thread in alive:
        thread.join(WAIT)
    assert len(alive) == 2 and not named(f"test-{how}")


# What never answers: for DALI, whose files are read by threads, the reading of one file; for Pillow the process that decodes.
STUCK = {
    "dali": """
read = members.read_bytes
def stuck(path):
    return threading.Event().wait() if path.endswith("3.jpg") else read(path)
encoded.read_bytes = stuck
""",
    "pillow": """
def stop(library):
    for process in library.reader()._processes.ids:
        os.kill(process, signal.SIGSTOP)
""",
}


@pytest.mark.skipif(os.name != "posix", reason="needs the signals of a POSIX system")
def test_a_drive_that_never_answers_keeps_no_process_alive(photos, reader):
    """Bytes never come: the pass ends in an error, and the process ends too."""
    code = f"""
import os, signal, threading
from der_fast.config.schema import DataConfig
from der_fast.data import load_dataset, transforms_for
from der_fast.data.decode import encoded
from der_fast.data.io import members
from der_fast.errors import DataError
stop = lambda library: None
{STUCK[reader]}
config = DataConfig(name={str(photos)!r}, reader={reader!r}, image_size=48, random_resized_crop=True, workers=1, timeout=1.0)
train, test = load_dataset(config)
try:
    for batch in train.batches(None, 2, transform=transforms_for(config, test.image_size)[1]):
        stop(train.library)
except DataError as error:
    print("refused:", error)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.startswith("refused: ") and "data.timeout" in ended.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")
def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, threading
from der_fast.data.io.threads import FileThreads
threads = FileThreads(2, "test")
here = threads.submit(os.getpid).result(20)
child = os.fork()
if not child:
    os._exit(0 if threads.submit(os.getpid).result(20) == os.getpid() != here else 1)
assert os.waitpid(child, 0)[1] == 0 and threads.submit(os.getpid).result(20) == here
"""
    subprocess.run([sys.executable, "-c", code], timeout=100, check=True)
