"""Several processes (torchrun, gloo) and one count every sample once and agree."""

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from remanence.cli import main

TRAIN = (
    "learn classifier digits --model {model} --size {size} --epochs 2 --limit 101 --batch-size 16 "
    "--flip 0 --lr 0.02 --seed 1 --out {out}"
)
FIX = (
    "learn fixres digits --model {model} --sizes 12 --sizes 16 --tune-sizes 16 --epochs 1 "
    "--limit 101 --batch-size 16 --flip 0 --scope bn_stats --scope classifier --out {out}"
)


def run(words, processes):
    if processes == 1:
        assert main(words.split()) == 0
        return
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += [f"--nproc-per-node={processes}", "-m", "remanence"]
    done = subprocess.run(
        [*start, *words.split()], check=False, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for processes in (1, 2):
        # Layer norm: batch norm would see half of each step in each of two processes.
        out = folder / f"train{processes}"
        run(TRAIN.format(model="convnext_atto", size=32, out=out), processes)
    run(TRAIN.format(model="cifar_convnet5", size=12, out=folder / "bn"), 1)
    for processes in (1, 2, 4):
        words = FIX.format(model=folder / "bn" / "model", out=folder / f"fix{processes}")
        run(words, processes)
    return folder


def test_training_takes_the_same_steps(trained):
    one, two = (load_file(trained / f"train{n}" / "model" / "model.safetensors") for n in (1, 2))
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-4, name
    losses = []
    for n in (1, 2):
        lines = (trained / f"train{n}" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_every_sample_is_evaluated_once(trained):
    tables = [pq.read_table(trained / f"fix{n}" / "predictions.parquet") for n in (1, 2, 4)]
    for table in tables:
        ids = table.column("id").to_pylist()
        assert len(ids) == len(set(ids)) == 101
    assert all(table.column("id") == tables[0].column("id") for table in tables)


@pytest.mark.parametrize("processes", [2, 4])
def test_metrics_agree(trained, processes):
    one, several = (
        json.loads((trained / f"fix{n}" / "results.json").read_text()) for n in (1, processes)
    )
    assert one["images"] == several["images"] == 101  # divisible by neither 2 nor 4
    measured = ("latency_ms", "pareto")
    for a, b in zip(one["candidates"], several["candidates"], strict=True):
        for key in a.keys() - set(measured):
            assert a[key] == pytest.approx(b[key], abs=1e-5), key
