import errno
import importlib
import inspect
import json
import multiprocessing
import os
import resource
import shlex
import signal
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from remanence.cli import COMMANDS, build
from remanence.errors import InputError
from remanence.kit.run import run_folder

OPTIONS = {"data": "digits", "epochs": 2, "resume_free": None}


def begin(out, **changes):
    return run_folder(out, "learn test", OPTIONS | changes.pop("options", {}), seed=1, **changes)


def carry_out(out, job):
    with begin(out) as run:
        job(run)


def interrupted(out):
    def job(run):
        for step in range(1, 6):
            run.log(stage="train", step=step, loss=1 / step)
            if step in (2, 4):
                run.save_state("train", {"step": step, "weight": torch.full((2,), float(step))})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(out, job)


def test_a_run_is_whole_when_its_name_is_there(tmp_path):
    out = tmp_path / "deep" / "run"
    with begin(out) as run:
        assert run.first
        assert not out.exists()
        assert (tmp_path / "deep" / "run.partial" / "run.json").exists()
        run.path("artefact").write_text("x")
        run.log(stage="train", step=1, loss=0.5)
        run.save_state("train", {"step": 1})
        run.write_results({"accuracy": 0.5})
        assert run.metrics("train") == [{"stage": "train", "step": 1, "loss": 0.5}]
        assert run.metrics("other") == []
    assert sorted(path.name for path in out.iterdir()) == [
        "artefact",
        "metrics.jsonl",
        "results.json",
        "run.json",
    ]
    assert not (tmp_path / "deep" / "run.partial").exists()
    facts = json.loads((out / "run.json").read_text())
    assert facts["command"] == "learn test"
    assert facts["options"] == OPTIONS
    assert facts["seed"] == 1
    assert facts["seconds"] >= 0
    assert {"remanence", "python", "torch", "timm"} <= facts["versions"].keys()
    assert facts["device"]
    assert facts["started"].endswith("+00:00")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_an_output_that_exists_is_left_alone(tmp_path, kind):
    out = tmp_path / "run"
    out.mkdir() if kind == "folder" else out.write_text("mine")
    with pytest.raises(InputError, match="run: already exists"), begin(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("out", [".", "/", "..", ""])
def test_an_output_without_a_name_exists_already(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="already exists"), begin(tmp_path.__class__(out)):
        pass
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "run", tmp_path.__class__("/proc/run")):
        with pytest.raises(InputError, match="cannot be created"), begin(out):
            pass


@pytest.mark.parametrize("error", [InputError("bad"), RuntimeError("ours"), KeyboardInterrupt()])
def test_an_error_before_the_first_checkpoint_leaves_nothing(tmp_path, error):
    def job(run):
        run.path("artefact").write_text("x")
        raise error

    with pytest.raises(type(error)):
        carry_out(tmp_path / "run", job)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_is_kept_and_goes_on(tmp_path, capsys):
    out = tmp_path / "run"
    interrupted(out)
    partial = tmp_path / "run.partial"
    assert f"interrupted: {partial} is kept; the same command with --resume" in " ".join(
        capsys.readouterr().err.split()
    )
    with pytest.raises(InputError, match="pass --resume"), begin(out):
        pass
    with begin(out, resume=True) as run:
        state = run.load_state("train")
        assert state["step"] == 4
        assert torch.equal(state["weight"], torch.full((2,), 4.0))
        assert run.load_state("other") is None
        run.log(stage="eval", step=9, accuracy=1)
        run.keep_metrics({"train": state["step"]})
        assert [row["step"] for row in run.metrics("train")] == [1, 2, 3, 4]
        assert len(run.metrics("eval")) == 1
    assert out.exists()
    assert not partial.exists()
    assert not list(out.glob("*.ckpt"))


def test_the_remark_on_an_interruption_is_one_line(tmp_path, capsys):
    interrupted(tmp_path / ("long-" * 30))
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_fresh_run_ignores_an_earlier_checkpoint_file(tmp_path):
    with begin(tmp_path / "run") as run:
        run.save_state("train", {"step": 1})
        assert run.load_state("train") is None


def test_a_resumed_run_must_have_the_same_options(tmp_path):
    interrupted(tmp_path / "run")
    for options, message in (
        ({"epochs": 3}, "--epochs: the interrupted run in .* had 2, not 3"),
        ({"mix_up": 0.5}, "--mix-up: .* had None, not 0.5"),
    ):
        with (
            pytest.raises(InputError, match=message),
            begin(tmp_path / "run", resume=True, options=options),
        ):
            pass
    assert (tmp_path / "run.partial" / "train.ckpt").exists()


def test_nothing_to_resume(tmp_path):
    with pytest.raises(InputError, match="no interrupted run to resume"):
        begin(tmp_path / "run", resume=True).__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_run_file_is_refused(tmp_path, text):
    interrupted(tmp_path / "run")
    (tmp_path / "run.partial" / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json: damaged"):
        begin(tmp_path / "run", resume=True).__enter__()
    assert (tmp_path / "run.partial" / "train.ckpt").exists()


class Trap:
    def __reduce__(self):
        return os.mkdir, ("sprung",)


def test_a_damaged_or_unsafe_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupted(tmp_path / "run")
    path = tmp_path / "run.partial" / "train.ckpt"
    whole = path.read_bytes()
    torch.save({"step": Trap()}, tmp_path / "trap")
    for blob in (b"", b"x", whole[:-50], (tmp_path / "trap").read_bytes()):
        path.write_bytes(blob)
        with (
            pytest.raises(InputError, match=r"train\.ckpt: damaged checkpoint"),
            begin(tmp_path / "run", resume=True) as run,
        ):
            run.load_state("train")
    assert not (tmp_path / "sprung").exists()


def test_what_is_left_of_a_run_without_checkpoint_is_replaced(tmp_path):
    partial = tmp_path / "run.partial"
    partial.mkdir()
    (partial / "run.json").write_text("{}")
    (partial / "old").write_text("x")
    with begin(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_a_folder_of_someone_else_is_not_removed(tmp_path):
    partial = tmp_path / "run.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not a run of ours"):
        begin(tmp_path / "run").__enter__()
    assert (partial / "thesis.tex").exists()


def test_other_ranks_write_nothing(tmp_path):
    with begin(tmp_path / "run", rank=1) as run:
        assert not run.first
        run.log(stage="train", step=1)
        run.save_state("train", {})
        run.write_results({})
        run.keep_metrics({})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_run_and_leaves_nothing(tmp_path):
    def job(run):
        run.path("metrics.jsonl").symlink_to("/dev/full")
        run.log(stage="train", step=1)

    with pytest.raises(OSError, match="No space left") as caught:
        carry_out(tmp_path / "run", job)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "run.partial")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_on_a_full_disk_keeps_the_one_before(tmp_path, monkeypatch):
    def full(_, path):
        path.write_bytes(b"half")
        # What torch says when the disk is full.
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534")

    def job(run):
        run.save_state("train", {"step": 1})
        monkeypatch.setattr(torch, "save", full)
        run.save_state("train", {"step": 2})

    with pytest.raises(OSError, match="is the disk full") as caught:
        carry_out(tmp_path / "run", job)
    monkeypatch.undo()
    partial = tmp_path / "run.partial"
    assert caught.value.filename == partial / "train.part"
    assert sorted(path.name for path in partial.iterdir()) == ["run.json", "train.ckpt"]
    with begin(tmp_path / "run", resume=True) as run:
        assert run.load_state("train") == {"step": 1}


def test_an_array_on_a_full_disk_is_no_mystery(tmp_path):
    def job(run):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        try:
            np.save(run.path("x.npy"), np.zeros(100_000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    with pytest.raises(OSError, match="is the disk full") as caught:
        carry_out(tmp_path / "run", job)
    assert caught.value.errno == errno.EIO
    assert caught.value.filename == tmp_path / "run.partial"
    assert not list(tmp_path.iterdir())


def killed(out):
    with begin(out) as run:
        run.save_state("train", {"step": 7})
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_can_be_resumed(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path / "run",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "run").exists()
    with begin(tmp_path / "run", resume=True) as run:
        assert run.load_state("train") == {"step": 7}
    assert (tmp_path / "run").exists()


def test_the_summary_gives_the_command_to_type(tmp_path):
    options = {"batch_size": 8, "flag": True, "off": False, "none": None, "data": Path("my data")}
    options |= {"names": "(?P<phone>[0-9])", "warmup": 0, "layer": ["a", "b c"], "scale": (0.1, 1)}
    options |= {"chain": "-x", "base": ("one", "two"), "db": [-3.0], "nothing": [], "on": ()}
    with run_folder(tmp_path / "run", "learn test", options, seed=3) as run:
        summary = run.summary()
    assert summary["command"] == (
        "remanence learn test one two --batch-size 8 --flag --no-off --data 'my data' "
        "--names '(?P<phone>[0-9])' --warmup 0 --layer a --layer 'b c' --scale 0.1 1 --chain=-x "
        f"--db=-3.0 --out {tmp_path}/run"
    )
    assert summary["seed"] == "3"


def test_the_command_of_a_share_gives_the_folder_of_all(tmp_path):
    options = {"rank": 0, "world_size": 2}
    with run_folder(tmp_path / "run-0-of-2", "learn test", options) as run:
        command = run.summary()["command"]
    assert command == f"remanence learn test --rank 0 --world-size 2 --out {tmp_path}/run"


# The other rooms' commands have no kinds of options that these have not, and take long to import.
TYPED = [path for path in COMMANDS if path[0] == "speech"] + [("search", "index")]


@pytest.mark.parametrize("path", TYPED, ids=" ".join)
def test_the_command_in_a_report_is_read_as_what_was_asked(path, tmp_path):
    """Every job's options, each with a value other than its default where it can have one."""
    module, name = COMMANDS[path][0].split(":")
    job = getattr(importlib.import_module(module), name)
    hints = get_type_hints(job)
    asked = {
        parameter.name: (
            ("a b", "c")
            if parameter.kind is parameter.VAR_POSITIONAL
            else some(hints[parameter.name], parameter.default)
        )
        for parameter in inspect.signature(job).parameters.values()
    }
    out = asked.pop("out")
    asked.pop("resume", None)
    with run_folder(tmp_path / out, " ".join(path), asked) as run:
        words = shlex.split(run.summary()["command"])
    _, bound, _ = build()[path[0]][path[1]].parse_args(words[3:], exit_on_error=False)
    assert words[:3] == ["remanence", *path]
    assert bound.arguments == {k: v for k, v in asked.items() if v is not None} | {
        "out": tmp_path / out
    }


def some(hint, default):
    """A value of a type that is not the default."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Union, UnionType):
        hint = next(one for one in get_args(hint) if one is not type(None))
    if get_origin(hint) is Literal:
        return next((one for one in get_args(hint) if one != default), get_args(hint)[0])
    if get_origin(hint) is list:
        return [some(get_args(hint)[0], None)] * 2
    if get_origin(hint) is tuple:
        return tuple(some(one, None) for one in get_args(hint))
    values = {bool: not default, int: 0, float: -0.5, str: "-x y", Path: Path("-x y")}
    return values[hint]


def test_results_hold_no_nan(tmp_path):
    with run_folder(tmp_path / "run", "learn test", {}) as run:
        run.write_results({"a": float("nan"), "b": [1.5, {"c": float("nan")}], "d": (2, "x")})
        assert "seed" not in run.summary()
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found == {"a": None, "b": [1.5, {"c": None}], "d": [2, "x"]}
