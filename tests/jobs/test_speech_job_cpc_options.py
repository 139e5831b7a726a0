"""That each option of `remanence speech cpc` reaches what trains or measures."""

import json

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from remanence.errors import InputError
from remanence.jobs.speech.cpc import cpc
from remanence.jobs.speech.cpc_audio import Speech, hold_out, open_speech
from remanence.jobs.speech.cpc_validation import ABX, Validation
from remanence.jobs.speech.cpc_waves import Waves
from remanence.kit.recordings import list_recordings
from remanence.speech.cpc.loss import CPCLoss
from remanence.speech.cpc.model import CPC
from remanence.speech.cpc.sampler import WindowSampler
from remanence.speech.cpc.training import Contrast, cpc_losses

RATE, WINDOW = 8000, 2400
NAMES = "(?P<speaker>[a-z]+)_"
QUICK = {
    "names": NAMES, "preset": "small", "window": 0.3, "batch_size": 3, "negatives": 8,
    "steps_ahead": 3, "max_steps": 3, "augment": "none", "valid_fraction": 0.25,
}  # fmt: skip


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """Two speakers, four takes each of 0.5 to 0.9 s."""
    folder = tmp_path_factory.mktemp("audio")
    for i, speaker in enumerate(("anna", "bert")):
        for take in range(4):
            rng = np.random.default_rng((i, take))
            wave = 0.1 * rng.standard_normal(4000 + 1000 * take).cumsum() % 0.5
            soundfile.write(folder / f"{speaker}_{take}.wav", wave, RATE)
    return str(folder)


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def results(out):
    return json.loads((out / "results.json").read_text())


def divided(audio):
    """Recordings to learn from, and held out."""
    speech = open_speech(audio, NAMES, speakers=True)
    return tuple(speech[part] for part in hold_out(speech, 0.25, 0))


def places(window, recordings):
    """Recordings that a window is cut from."""
    window = window.numpy()
    for number, wave in enumerate(recordings):
        for start in np.flatnonzero(wave[: len(wave) - len(window) + 1] == window[0]):
            if np.array_equal(wave[start : start + len(window)], window):
                yield number


@pytest.mark.parametrize("augment", ["past", "future"])
def test_one_copy_is_augmented_and_the_other_is_cut_from_what_is_not_held_out(
    audio, tmp_path, monkeypatch, augment
):
    seen, forward = [], Contrast.forward
    monkeypatch.setattr(
        Contrast, "forward", lambda self, *given: seen.append(given) or forward(self, *given)
    )
    cpc(audio, out=tmp_path / "run", **QUICK | {"augment": augment, "chain": "reverb"})
    learn, held = (Waves(part.recordings, RATE) for part in divided(audio))
    assert (len(learn.lengths), len(held.lengths)) == (6, 2)
    whole = [learn.whole(i).numpy() for i in range(6)]
    past = torch.cat([given[0] for given in seen])
    future = torch.cat([given[1] for given in seen])
    plain, changed = (future, past) if augment == "past" else (past, future)
    assert all(len(list(places(window, whole))) == 1 for window in plain)
    assert not any(list(places(window, whole)) for window in changed)
    said = results(tmp_path / "run")["speakers"]
    assert [(row["recordings"], row["held_out"]) for row in said.values()] == [(3, 1)] * 2


@pytest.mark.parametrize("sampling", ["speaker", "sequence"])
def test_held_out_losses_are_those_of_the_weights_without_dropout_and_batched_as_in_training(
    audio, tmp_path, sampling
):
    done = cpc(audio, out=tmp_path / "run", **QUICK | {"sampling": sampling, "seed": 0})
    _, held = divided(audio)
    waves, model, loss = Waves(held.recordings, RATE), CPC.load(done.out), CPCLoss(3, 8)
    generator, sums, count = torch.Generator().manual_seed(0), 0, 0
    batches = WindowSampler(waves.lengths, held.speakers, window=WINDOW, batch=3, mode=sampling)
    for batch in batches:
        wave = torch.stack([waves.window(pieces) for pieces in batch.windows])
        with torch.no_grad():
            found = torch.stack(cpc_losses(model, loss, wave, wave, generator))
        sums, count = sums + found.double() * len(wave), count + len(wave)
    np.testing.assert_allclose((done.losses, done.accuracies), sums / count, rtol=1e-6)


def test_held_out_batches_are_those_of_the_sampling(audio, tmp_path, monkeypatch):
    modes = []
    given = WindowSampler.__init__
    monkeypatch.setattr(
        WindowSampler,
        "__init__",
        lambda self, *a, **k: modes.append((k["mode"], k["straddle"])) or given(self, *a, **k),
    )
    for sampling, straddle in (("sequential", False), ("uniform", True), ("sequence", False)):
        options = {"sampling": sampling, "straddle": straddle, "max_steps": 1}
        cpc(audio, out=tmp_path / sampling, **QUICK | options)
        assert modes[-2:] == [(sampling, straddle)] * 2


def test_the_learning_rate_rises_and_is_halved(audio, tmp_path):
    options = QUICK | {"max_steps": None, "epochs": 3, "lr": 0.01}
    cpc(audio, out=tmp_path / "halved", **options | {"ramp": 0, "halve_lr_every": 1})
    assert [row["learning_rate"] for row in rows(tmp_path / "halved")[1:]] == [0.01, 0.005, 0.0025]
    cpc(audio, out=tmp_path / "rising", **options | {"ramp": 1000})
    for row in rows(tmp_path / "rising")[1:]:
        assert row["learning_rate"] == pytest.approx(0.01 * row["step"] / 1000)
    recipe = results(tmp_path / "rising")["recipe"]
    assert (recipe["ramp, steps"], recipe["learning rate"]) == (1000, 0.01)


def test_gradients_are_clipped(audio, tmp_path):
    # Adam moves a weight by lr, whatever the gradient's size, unless this is below its epsilon.
    def weights(name, **options):
        out = tmp_path / name
        cpc(audio, out=out, **QUICK | {"ramp": 0} | options)
        return torch.cat([w.flatten() for w in load_file(out / "model.safetensors").values()])

    start, free = weights("start", lr=1e-12), weights("free")
    clipped = weights("clipped", clip=1e-12)
    assert (free - start).abs().max() > 1e-3
    assert (clipped - start).abs().max() < 1e-5


def test_what_is_left_out_of_negatives_and_where_windows_run_is_in_the_recipe(audio, tmp_path):
    for on in (False, True):
        out = tmp_path / f"{on}"
        cpc(audio, out=out, **QUICK | {"max_steps": 1, "exclude_positive": on, "straddle": on})
        recipe = results(out)["recipe"]
        assert (recipe["exclude positive"], recipe["straddle"]) == (on, on)
        assert recipe["negatives scope"] == "local"
    bits = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("False", "True")]
    assert bits[0] != bits[1]


def test_both_kinds_of_abx_error_choose_the_weights():
    validation = Validation(Speech((), None), None, [], CPCLoss(3, 8), {}, 0, by=ABX)
    assert validation.merit({"abx_within": 0.1, "abx_across": 0.3}) == pytest.approx(-0.2)
    assert validation.merit({"abx_across": 0.3}) == pytest.approx(-0.3)
    assert validation.merit({"valid_accuracy": 0.5}) is None


def test_items_without_a_frame_are_counted(audio, tmp_path):
    lines = ["#file onset offset #phone prev next speaker"]
    for speaker in ("anna", "bert"):
        for take in range(4):
            # The last holds the centre of no frame, 0.305 s and so on.
            for phone, times in zip("aabba", ("0.1 0.15", "0.15 0.2", "0.2 0.25", "0.25 0.3",
                                              "0.301 0.303"), strict=True):  # fmt: skip
                lines.append(f"{speaker}_{take} {times} {phone} SIL SIL {speaker}")
    (tmp_path / "a.item").write_text("\n".join(lines) + "\n")
    options = QUICK | {"items": tmp_path / "a.item", "max_steps": 1}
    found = results(cpc(audio, out=tmp_path / "run", **options).out)
    assert found["abx_items"] == {"within": 10, "across": 10}
    assert {kind: row["items_without_frame"] for kind, row in found["abx"].items()} == {
        "within": 2, "across": 2
    }  # fmt: skip
    html = (tmp_path / "run" / "report.html").read_text()
    assert "10 items, 2 too short for a frame and left out" in html


def test_16_bit_recordings_take_two_bytes_a_sample_and_stay_the_same(tmp_path):
    wave = np.random.default_rng(0).uniform(-1, 1, 900)
    wave[:2] = -1, 32767 / 32768
    kinds = {"a": "PCM_16", "b": "ULAW", "c": "PCM_24", "d": "FLOAT"}
    for name, subtype in kinds.items():
        soundfile.write(tmp_path / f"{name}.wav", wave, RATE, subtype=subtype)
    soundfile.write(tmp_path / "e.wav", wave[:450], RATE // 2, subtype="PCM_16")  # resampled
    soundfile.write(tmp_path / "f.wav", np.ones(900), RATE, subtype="FLOAT")
    recordings = list_recordings(tmp_path)
    waves, disk = Waves(recordings, RATE), Waves(recordings, RATE, in_memory=0)
    assert [Waves([r], RATE).bytes for r in recordings] == [1800, 1800, 3600, 3600, 3600, 3600]
    assert (waves.bytes, waves.kept, disk.bytes, disk.kept) == (18_000, 6, 0, 0)
    for i in range(6):
        assert waves.whole(i).dtype == torch.float32
        assert torch.equal(waves.whole(i), disk.whole(i))
    some = Waves(recordings, RATE, in_memory=6000)
    assert (some.kept, some.bytes) == (2, 3600)
    assert some.lengths == waves.lengths


def test_windows_read_from_disk_train_to_the_same_bits(audio, tmp_path):
    for name, memory in (("kept", 4), ("some", 4e-5), ("disk", 0)):
        cpc(audio, out=tmp_path / name, **QUICK | {"memory": memory})
    bits = {(tmp_path / n / "model.safetensors").read_bytes() for n in ("kept", "some", "disk")}
    assert len(bits) == 1
    said = {n: " ".join(results(tmp_path / n)["preparation"]) for n in ("kept", "some", "disk")}
    assert "from disk" not in said["kept"]
    assert "0 of 8 recordings are in memory" in said["disk"]
    assert "--memory 1 would keep all" in said["some"]


def test_another_number_of_processes_does_not_resume(audio, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    forward = Contrast.forward
    monkeypatch.setattr(Contrast, "forward", stopped)
    with pytest.raises(KeyboardInterrupt):
        cpc(audio, out=tmp_path / "run", **QUICK)
    monkeypatch.setattr(Contrast, "forward", forward)
    (path,) = (tmp_path / "run.partial").glob("*.ckpt")
    state = torch.load(path, weights_only=True)
    torch.save(state | {"processes": 2}, path)
    with pytest.raises(InputError, match=r"number of processes: .* had 2, not 1; give") as error:
        cpc(audio, out=tmp_path / "run", resume=True, **QUICK)
    assert "\n" not in str(error.value)
    torch.save(state, path)
    assert cpc(audio, out=tmp_path / "run", resume=True, **QUICK).steps == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"negatives_scope": "all"}, "--negatives-scope all: give one of local, global"),
        ({"negatives_scope": "global", "candidates": "all"}, "--candidates all: takes the batch"),
        ({"memory": -1}, "--memory -1: must be at least 0"),
    ],
)
def test_bad_options(audio, tmp_path, change, words):
    with pytest.raises(InputError, match=words) as error:
        cpc(audio, out=tmp_path / "run", **QUICK | change)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
