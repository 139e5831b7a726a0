import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from remanence import kernels
from remanence.kernels import fused_kernel, in_threads, kernel, reordered_kernel

SCRIPT = """
import time
import numpy as np
from remanence.kernels import kernel

@kernel
def total(x):
    found = 0.0
    for value in x:
        found += value
    return found

print(total(np.arange(4.0)), sum(total.stats.cache_hits.values()))
"""


def test_rows_are_shared_among_as_many_threads_as_torch_uses():
    parts = []

    def run(start, stop):
        parts.append((start, stop))
        return stop - start

    torch.set_num_threads(1)
    assert in_threads(run, 11, 100) == [11]
    torch.set_num_threads(2)
    assert in_threads(run, 11, 2) == [5, 6]
    assert in_threads(run, 11, 1) == [11]
    assert in_threads(run, 1, 9) == [1]
    assert in_threads(run, 0, 9) == [0]
    assert sorted(parts) == [(0, 0), (0, 1), (0, 5), (0, 11), (0, 11), (5, 11)]


def test_kernels_say_what_the_function_says():
    def mean(x, y):
        return (x * y + y) / 2

    for compiled in (kernel(mean), fused_kernel(mean), reordered_kernel(mean)):
        assert compiled(3.0, 4.0) == 8.0


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_compiled_is_kept_where_there_is_a_place(tmp_path, kept):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    place = {}
    if not kept:
        # Neither beside the code nor in the home folder: files stand where folders should.
        (tmp_path / "__pycache__").write_text("")
        (tmp_path / "home").write_text("")
        place = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home")}

    def run():
        words = [sys.executable, str(script)]
        env = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | place
        done = subprocess.run(words, check=True, capture_output=True, text=True, env=env)
        return done.stdout.split()

    assert run() == ["6.0", "0"]
    assert run() == ["6.0", "1" if kept else "0"]
    if kept:
        # Other code is compiled anew, and lies in another folder.
        script.write_text(SCRIPT.replace("0.0", "1.0"))
        assert run() == ["7.0", "0"]
        assert len(list((tmp_path / "__pycache__").glob("kernels-*"))) == 2


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_other_versions_and_other_flags_keep_their_code_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    code, changed = tmp_path / "code.py", tmp_path / "changed.py"
    code.write_text("def half(x):\n    return x / 2\n")
    half = load(code).half

    def place(module=kernels):
        return Path(module.reordered_kernel(half).stats.cache_path).parent

    first = place()
    assert first.parent == tmp_path / "__pycache__"
    assert place() == first
    for library in (numba, np):
        with monkeypatch.context() as other:
            other.setattr(library, "__version__", "0.1")
            assert place() != first
    flags = Path(kernels.__file__).read_text().replace('"reassoc"', '"reassoc", "nnan"')
    changed.write_text(flags)
    assert place(load(changed)) != first
