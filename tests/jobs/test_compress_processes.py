"""Processes that are killed, and processes that share the work, write the same codes."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from remanence.cli import main
from remanence.errors import InputError
from remanence.jobs.compress.inputs import open_inputs
from remanence.jobs.compress.subject import open_subject
from remanence.jobs.learn.classifier import classifier

FILE = "compressed.safetensors"
WORDS = (
    "compress quantize {model} digits --no-controls --calibration 80 --batch-size 16 --limit 200 "
    "--positions 4096 --finetune-steps {steps} --out {out}"
)
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    width = ["width=8"]
    classifier(
        "digits", out=folder / "base", model="cifar_convnet5", model_arg=width, size=16, epochs=1,
        limit=300, flip=0.0, lr=0.05,
    )  # fmt: skip
    assert main(words(folder, "one", 0)) == 0
    return folder


def words(folder, name, steps):
    return WORDS.format(model=folder / "base" / "model", out=folder / name, steps=steps).split()


def launch(*command):
    return subprocess.Popen(
        [sys.executable, *command],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def torchrun(*command):
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "remanence"]
    return launch(*start, *command)


def test_two_processes_find_the_codes_of_one(place):
    process = torchrun(*words(place, "two", 4))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    one, two = (load_file(place / name / FILE) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith(".codes"):  # the codewords were tuned since
            assert torch.equal(one[name], two[name]), name
    found = [json.loads((place / n / "results.json").read_text()) for n in ("one", "two")]
    assert found[0]["samples"] == found[1]["samples"]
    assert found[0]["size"]["total"] == found[1]["size"]["total"]
    assert found[1]["curve"][-1]["step"] == 4
    assert said.count("layers to quantise") == 1  # of two processes, one speaks


def test_a_killed_run_goes_on_to_the_same_bytes(place):
    process = launch("-m", "remanence", *words(place, "killed", 0))
    log = place / "killed.partial" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") >= 1) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.communicate()
    assert not (place / "killed").exists()
    assert (place / "killed.partial").exists()
    assert main([*words(place, "killed", 0), "--resume"]) == 0
    assert (place / "killed" / FILE).read_bytes() == (place / "one" / FILE).read_bytes()
    names = []
    for name in ("one", "killed"):
        lines = (place / name / "metrics.jsonl").read_text().splitlines()
        names.append([json.loads(line)["name"] for line in lines])
    assert names[0] == names[1]


def test_fewer_batches_than_processes_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((64, 4), np.float32))
    subject = open_subject(torch.nn.Sequential(torch.nn.Linear(4, 4)))
    options = {"scale": (1.0, 1.0), "flip": 0.0, "skip_broken": False, "limit": None}
    for rank in range(2):
        fabric = SimpleNamespace(global_rank=rank, world_size=2, is_global_zero=rank == 0)
        with pytest.raises(InputError, match="1 calibration batches are too few for 2 processes"):
            open_inputs(
                str(tmp_path / "x.npy"), subject, fabric, calibration=16, batch_size=16,
                workers=None, seed=0, **options,
            )  # fmt: skip
