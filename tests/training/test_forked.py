"""Servers that load a model and fork (gunicorn --preload), pools, scripts: whatever was loaded before works in the forked process."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"

# Two threads: one alone never hangs.
PROGRAM = """
import numpy as np
import der_fast

def images(classes, count=8):
    pixels = np.random.default_rng(0).integers(0, 256, (count * len(classes), 16, 16, 3), dtype=np.uint8)
    return [(image, label) for image, label in zip(pixels, classes * count)]

settings = {
    "first.epochs": 1, "later.epochs": 1, "classifier.epochs": 1, "first.batch_size": 16, "later.batch_size": 16,
    "model.backbone": "resnet20", "model.width": 2, "memory.total": 8, "runtime.threads": 2, "runtime.device": "cpu",
}
def train(out=None):
    return der_fast.train((images([0, 1]), images([0, 1])), "B0-1", out=out, settings=settings).learner
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks processes")
def test_what_a_parent_loaded_works_in_its_child(tmp_path: Path) -> None:
    """A child that waits for threads which are no more is ended by its alarm."""
    code = f"""
import os, signal, sys
{PROGRAM}
run = {str(tmp_path / "run")!r}
learner = train(run)
loaded = der_fast.Learner.load(run)
files = [run + suffix for suffix in sys.argv[1:]]
for file in files:
    der_fast.export(learner, file)
deployed = [der_fast.load(path) for path in (run, *files)]
many = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)
named = lambda model: [prediction.class_name for prediction in model.predict(many)]
wanted = [named(model) for model in (learner, loaded, *deployed)]
accuracy = loaded.evaluate(images([0, 1])).top1

def work():
    assert [named(model) for model in (learner, loaded, *deployed)] == wanted
    assert loaded.evaluate(images([0, 1])).top1 == accuracy
    assert named(der_fast.Learner.load(run)) == named(der_fast.load(run)) == wanted[1]
    der_fast.export(learner, files[0])
    loaded.learn(images([2, 3]))
    assert len(loaded.class_names) == 4

child = os.fork()
if not child:
    signal.alarm(60)
    try:
        work()
    except BaseException:
        import traceback
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
status = os.waitpid(child, 0)[1]
assert not os.WIFSIGNALED(status), "it hung"
assert status == 0
assert named(loaded) == wanted[1]
"""
    # Threads that wait for others should leave them the processor.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    subprocess.run([sys.executable, "-c", code, ".safetensors", ".onnx"], env=environment, timeout=200, check=True)


def test_a_script_that_its_own_processes_run_again_is_told_of_the_guard(tmp_path: Path) -> None:
    """It starts processes of its own, without the guard: they would train before they do what they are for."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\nimport der_fast\n\n"
        "for begin in (lambda: der_fast.train('nowhere'), lambda: der_fast.learn_run('nowhere', 'nowhere')):\n"
        "    try:\n        begin()\n"
        "    except der_fast.errors.UserError as error:\n        print(type(error).__name__, error, flush=True)\n"
        "process = multiprocessing.get_context('spawn').Process(target=print)\nprocess.start()\nprocess.join()\n"
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100, check=False)
    lines = ended.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["DataError", "CheckpointError", "ConfigError", "ConfigError"], ended.stderr
    assert all('if __name__ == "__main__":' in line for line in lines[2:])


def test_readme_shows_the_guard() -> None:
    program = README.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    *imports, guarded = ast.parse(program).body
    assert all(isinstance(node, ast.Import) for node in imports)
    assert isinstance(guarded, ast.If) and ast.unparse(guarded.test) == "__name__ == '__main__'"
