"""A run that is killed and resumed ends like one that was not."""

import json
import os
import signal
import subprocess
import sys
import time

from safetensors.torch import load_file


def command(out, *more):
    words = (
        "-m remanence learn classifier digits --model cifar_convnet5 --size 12 --epochs 4 "
        "--limit 240 --batch-size 16 --checkpoint-steps 5 --mixup 0.2 --erase 0.2 --seed 3 --out"
    )
    return [sys.executable, *words.split(), str(out), *more]


def test_sigkill_in_mid_epoch_then_resume_gives_the_same_weights(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(tmp_path / "whole"), check=True, env=env, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "cut"), env=env, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "cut.partial" / "train.ckpt"
    metrics = tmp_path / "cut.partial" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (checkpoint.exists() and metrics.exists()) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "cut").exists()

    refused = subprocess.run(
        command(tmp_path / "cut"), check=False, env=env, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "--resume" in refused.stderr

    subprocess.run(command(tmp_path / "cut", "--resume"), check=True, env=env, capture_output=True)
    whole, cut = (load_file(tmp_path / d / "model" / "model.safetensors") for d in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(whole[name].equal(cut[name]) for name in whole)
    results = [json.loads((tmp_path / d / "results.json").read_text()) for d in ("whole", "cut")]
    assert results[0] == results[1]
    lines = [(tmp_path / d / "metrics.jsonl").read_text() for d in ("whole", "cut")]
    assert lines[0] == lines[1]
    assert not (tmp_path / "cut.partial").exists()
    assert not list((tmp_path / "cut").glob("*.ckpt"))
