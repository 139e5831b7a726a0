import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from remanence.errors import InputError
from remanence.jobs.speech import extract as extract_module
from remanence.jobs.speech.extract import extract
from remanence.jobs.speech.features import open_features, rate_doubt
from remanence.kit.audio import read_audio
from remanence.speech.abx.items import Items
from remanence.speech.cpc.model import CPC

LENGTHS = {"ann/a": 4000, "ann/b": 5123, "bob/c": 801, "bob/d": 3000, "bob/e.f": 2400}

OWN = """
import torch

class Frames(torch.nn.Module):
    def __init__(self, hop=160, fill=None):
        super().__init__()
        self.hop, self.fill = hop, fill

    def forward(self, wave):
        frames = wave.unfold(1, self.hop, self.hop)
        out = torch.stack([frames.mean(2), frames.std(2)], 2)
        return out if self.fill is None else torch.full_like(out, self.fill)

def hop80():
    return Frames(80)

def hop50():
    return Frames(50)

def nan():
    return Frames(80, float("nan"))

def flat():
    return torch.nn.Flatten(0)
"""


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(0)
    for name, n in LENGTHS.items():
        path = folder / f"{name}.wav"
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, 0.1 * rng.normal(size=n), 8000)
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    torch.manual_seed(0)
    sizes = {"hidden": 8, "context_layers": 2, "steps": 2, "heads": 2, "ffn": 8, "window": 8}
    CPC(**sizes, sample_rate=8000).save(folder)
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(OWN)
    return path


def written(folder):
    return dict(open_features(str(folder)))


def same(first, second, **kwargs):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **kwargs)


def test_a_cpc_networks_features_do_not_depend_on_the_batch(audio, network, tmp_path):
    found = extract(str(audio), model=str(network), out=tmp_path / "run", batch_size=3)
    features = open_features(str(tmp_path / "run"))
    assert features.names == tuple(sorted(LENGTHS))
    model = CPC.load(network)
    for name, samples in LENGTHS.items():
        alone = model.features(read_audio(audio / f"{name}.wav"))
        torch.testing.assert_close(features[name], alone, atol=1e-6, rtol=0)
        assert len(alone) == (samples + 1) // 80
    facts = json.loads((tmp_path / "run" / "results.json").read_text())
    assert facts == found.results
    assert facts["frames"] == sum((n + 1) // 80 for n in LENGTHS.values())
    assert (facts["files"], facts["dimensions"], facts["frame_rate"]) == (5, 8, 100)
    assert facts["audio_seconds"] == pytest.approx(sum(LENGTHS.values()) / 8000)
    assert facts["real_time_factor"] == pytest.approx(1 / facts["times_real_time"])
    assert (tmp_path / "run" / "report.html").read_text().count("<svg") == 1
    # What is written equals what the same network gives when it is asked directly.
    same(written(tmp_path / "run"), dict(open_features(str(network), audio=str(audio))),
         atol=1e-6, rtol=0)  # fmt: skip


@pytest.mark.parametrize("options", [{"layer": "1"}, {"layer": "encoder", "seq_norm": True},
                                     {"chunk": 0.1, "strict": True, "seq_norm": True}])  # fmt: skip
def test_layers_and_chunks(audio, network, tmp_path, options):
    extract(str(audio), model=str(network), out=tmp_path / "run", **options)
    model, wave = CPC.load(network), read_audio(audio / "ann" / "b.wav")
    own = dict(options, layer={"1": 1}.get(options.get("layer"), options.get("layer", "context")))
    if "chunk" in own:
        own["chunk"] = 800
    wanted = model.features(wave, **own)
    torch.testing.assert_close(written(tmp_path / "run")["ann/b"], wanted, atol=2e-5, rtol=1e-5)


def test_shares_make_one_set_and_a_lacking_one_is_named(audio, own, tmp_path):
    whole, options = tmp_path / "whole", {"model": f"{own}:hop80", "sample_rate": 8000}
    extract(str(audio), out=whole, **options)
    part = tmp_path / "part"
    extract(str(audio), out=part, rank=0, world_size=2, format="npz", **options)
    with pytest.raises(InputError, match="part-1-of-2: this share is not there yet"):
        open_features(str(part))
    extract(str(audio), out=part, rank=1, world_size=2, format="npz", **options)
    same(written(whole), written(part), rtol=0, atol=0)
    with np.load(tmp_path / "part-0-of-2" / "features" / "bob" / "c.npz") as arrays:
        np.testing.assert_allclose(arrays["times"], (np.arange(10) + 0.5) / 100)


def test_an_interrupted_run_goes_on_with_what_is_missing(audio, own, tmp_path, monkeypatch):
    options = {"model": f"{own}:hop80", "sample_rate": 8000, "batch_size": 2}
    extract(str(audio), out=tmp_path / "whole", **options)
    encode, calls = extract_module.encode, []

    def counted(encoder, recordings, waves):
        calls.append([r.name for r in recordings])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(encoder, recordings, waves)

    monkeypatch.setattr(extract_module, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        extract(str(audio), out=tmp_path / "run", **options)
    assert (tmp_path / "run.partial").is_dir()
    found = extract(str(audio), out=tmp_path / "run", resume=True, **options)
    assert not set(calls[0]) & {name for call in calls[1:] for name in call}
    assert found.results["already_there"] == 2
    assert not list((tmp_path / "run").rglob("*.ckpt"))
    same(written(tmp_path / "whole"), written(tmp_path / "run"), rtol=0, atol=0)
    assert found.results["frames"] == sum(n // 80 for n in LENGTHS.values())


def test_mfcc_of_a_list_and_their_frame_rate(audio, tmp_path):
    (tmp_path / "list.txt").write_text(f"{audio}/ann/a.wav\n{audio}/ann/b.wav\n")
    found = extract(str(tmp_path / "list.txt"), model="mfcc", out=tmp_path / "run")
    features = open_features(str(tmp_path / "run"), audio=str(audio / "ann"))
    assert features.names == ("a", "b")
    assert features["a"].shape == (50, 13)
    assert found.results["model"] == "mfcc"


def test_the_frame_rate_that_was_written_is_read(audio, own, tmp_path):
    options = {"model": f"{own}:hop50", "sample_rate": 8000, "frame_rate": 160.0}
    extract(str(audio), out=tmp_path / "run", **options)
    assert open_features(str(tmp_path / "run")).rate == 160
    assert open_features(str(tmp_path / "run" / "features")).rate == 160


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "{own}:hop50", "sample_rate": 8000}, "'bob/c' have 16 frames for 0.10 s, wh"),
        ({"model": "{own}:nan", "sample_rate": 8000}, "'bob/c' hold NaN"),
        ({"model": "{own}:flat"}, "must give"),
        ({"model": "{own}:none"}, "has no attribute"),
        ({"model": "hubert"}, "hubert: neither mfcc nor a CPC run"),
        ({"model": "mfcc", "layer": "encoder"}, "are for CPC networks"),
        ({"model": "mfcc", "frame_rate": 50.0}, "mfcc has its own"),
        ({"model": "{network}", "layer": "7"}, "give 'context', 'encoder', or 0 to 2"),
        ({"model": "{network}", "strict": True}, "give --chunk as well"),
        ({"model": "{network}", "sample_rate": 16000}, "takes 8000"),
        ({"model": "mfcc", "rank": 2, "world_size": 2}, "--rank 2: must be 0 to 1"),
        ({"model": "mfcc", "rank": 7, "world_size": 9}, "--rank 7 has none"),
        ({"model": "mfcc", "batch_size": 0}, "--batch-size 0"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    audio, own, network, tmp_path, options, words
):
    options["model"] = options["model"].format(own=own, network=network)
    with pytest.raises(InputError, match=words) as caught:
        extract(str(audio), out=tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def save(folder, **arrays):
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return str(folder)


def test_folders_of_features_are_checked(tmp_path):
    for name, kinds in {
        "twice": ("a.npy", "a.npz"), "none": (),
    }.items():  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        for kind in kinds:
            (folder / kind).write_bytes(b"")
    with pytest.raises(InputError, match=r"a\.npy and a\.npz are features of one name, 'a'"):
        open_features(str(tmp_path / "twice"))
    with pytest.raises(InputError, match="holds no"):
        open_features(str(tmp_path / "none"))
    with pytest.raises(InputError, match="no such folder"):
        open_features(str(tmp_path / "nowhere"))
    folder = tmp_path / "odd"
    folder.mkdir()
    good, bad = np.zeros((5, 3)), np.zeros((5, 3))
    bad[2, 1] = np.inf
    features = open_features(
        save(folder, a=good, b=bad, c=np.zeros((5, 4)), d=np.zeros(5), e=np.zeros((5, 3), "U1"),
             f=np.zeros((0, 3)), g=np.full((5, 3), 1e300))
    )  # fmt: skip
    (folder / "h.npy").write_bytes(b"\x93NUMPY broken")
    assert features["a"].dtype == torch.float32
    for name, words in {
        "b": "'b' hold NaN or infinity",
        "c": "'c' are 4 floats a frame, of 'a' 3 floats",
        "d": r"'d' have shape \(5,\)",
        "e": "holds <U1",
        "f": r"'f' have shape \(0, 3\)",
        "g": "'g' hold NaN or infinity",
    }.items():
        with pytest.raises(InputError, match=words):
            features[name]
    with pytest.raises(InputError, match=r"h\.npy: damaged"):
        open_features(str(folder))["h"]
    with pytest.raises(InputError, match=r"no features of 'x0', 'x1', 'x2' and 2 more"):
        features.require(["a", *(f"x{i}" for i in range(5))])
    assert "x" not in features
    with pytest.raises(KeyError):
        features["x"]


def test_kinds_of_files_and_whole_numbers(tmp_path):
    x = torch.rand(6, 2)
    np.save(tmp_path / "a.npy", x.double().numpy())
    np.savez(tmp_path / "b.npz", x.numpy())
    torch.save(x, tmp_path / "c.pt")
    np.savetxt(tmp_path / "d.txt", x.numpy(), fmt="%.9g")
    for frames in open_features(str(tmp_path)).values():
        torch.testing.assert_close(frames, x)
    units = tmp_path / "units"
    units.mkdir()
    np.save(units / "u.npy", np.array([3, 3, 9], dtype="u2"))
    found = open_features(str(units))["u"]
    assert (found.dtype, found.tolist()) == (torch.int64, [[3], [3], [9]])
    torch.save({"x": x}, tmp_path / "c.pt")
    with pytest.raises(InputError, match=r"c\.pt: holds dict"):
        open_features(str(tmp_path))["c"]
    np.savez(tmp_path / "b.npz", p=x.numpy(), q=x.numpy())
    with pytest.raises(InputError, match=r"b\.npz: holds 2 arrays"):
        open_features(str(tmp_path))["b"]


def test_times_of_frames_are_read_from_every_file_or_none(audio, tmp_path):
    x, times = np.zeros((3, 2)), np.array([0.1, 0.125, 0.15])
    np.savez(tmp_path / "a.npz", features=x, times=times)
    features = open_features(str(tmp_path), audio=str(audio / "ann"))
    assert features.rate == 40
    assert features["a"].shape == (3, 2)
    assert features.when(["a"])["times"]["a"].tolist() == times.tolist()
    even = open_features(str(tmp_path), frame_rate=50.0)
    assert even.when(["a"]) == {"frame_rate": 50}
    item = {"file": ["a"], "phone": ["x"], "onset": [0], "offset": [0.03]}
    assert rate_doubt(Items.from_table(item), even).startswith("features last 2.0 times as long")
    assert not rate_doubt(Items.from_table(item), open_features(str(tmp_path)))
    assert not rate_doubt(Items.from_table(item | {"offset": [0]}), even)
    np.save(tmp_path / "b.npy", x)
    with pytest.raises(InputError, match=r"a\.npz holds times and b\.npy none: .*--frame-rate"):
        open_features(str(tmp_path))
    assert open_features(str(tmp_path), frame_rate=50.0)["a"].shape == (3, 2)
    (tmp_path / "b.npy").unlink()
    for wrong, words in (
        (times[:, None], "times of shape"),
        (np.array([0, np.nan, 1]), "times of shape .* NaN"),
        (times + 1, r"last frame of 'a' is at 1\.15 s of 0\.50 s"),
    ):
        np.savez(tmp_path / "a.npz", features=x, times=wrong)
        with pytest.raises(InputError, match=words):
            open_features(str(tmp_path), audio=str(audio / "ann"))["a"]
    (tmp_path / "a.npz").write_bytes(b"PK broken")
    with pytest.raises(InputError, match=r"a\.npz: damaged"):
        open_features(str(tmp_path))


def test_the_times_that_extract_writes_change_nothing(audio, own, tmp_path):
    options = {"model": f"{own}:hop50", "sample_rate": 8000, "frame_rate": 160.0}
    extract(str(audio), out=tmp_path / "run", format="npz", **options)
    features = open_features(str(tmp_path / "run"))
    assert features.rate == 160
    assert np.allclose(features.when(["bob/c"])["times"]["bob/c"], (np.arange(16) + 0.5) / 160)


def test_windows_without_padding_are_no_wrong_frame_rate(audio, tmp_path):
    """Kaldi's windows of 25 ms every 10 ms, none beyond the end: up to 2.5 frames are lacking."""
    seconds = {name: samples / 8000 for name, samples in LENGTHS.items()}
    for name, samples in LENGTHS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / f"{name}.npy", np.zeros((1 + (samples - 200) // 80, 2)))
    features = open_features(str(tmp_path), audio=str(audio))
    lacking = [100 * seconds[name] - len(features[name]) for name in features]
    assert max(lacking) > 2


def test_durations_are_checked_where_recordings_are_given(audio, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((53, 2)))  # 0.5 s: three frames too many may be
    np.save(tmp_path / "b.npy", np.zeros((70, 2)))
    features = open_features(str(tmp_path), audio=str(audio / "ann"))
    assert features["a"].shape == (53, 2)
    with pytest.raises(InputError, match=r"'b' have 70 frames for 0\.64 s, which is 64 at 100"):
        features["b"]
    np.save(tmp_path / "a.npy", np.zeros((46, 2)))
    with pytest.raises(InputError, match="missing padding explains 3 at most: check --frame-"):
        open_features(str(tmp_path), audio=str(audio / "ann"))["a"]
    with pytest.raises(InputError, match="no file is named like a recording"):
        open_features(str(tmp_path), audio=str(audio / "bob"))
    with pytest.raises(InputError, match="give them with --audio"):
        open_features("mfcc")
    with pytest.raises(InputError, match="are for networks"):
        open_features(str(tmp_path), layer="encoder")


@pytest.mark.slow
def test_torchrun_writes_one_folder(audio, own, tmp_path):
    code = tmp_path / "run.py"
    code.write_text(
        "import sys\nfrom pathlib import Path\n"
        "from remanence.jobs.speech.extract import extract\n"
        "extract(sys.argv[1], model=sys.argv[2], out=Path(sys.argv[3]), sample_rate=8000)\n"
    )
    words = [str(code), str(audio), f"{own}:hop80", str(tmp_path / "run")]
    subprocess.run(
        [Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "--master-port",
         "29631", *words],
        check=True,
        timeout=120,
    )  # fmt: skip
    extract(str(audio), model=f"{own}:hop80", out=tmp_path / "one", sample_rate=8000)
    same(written(tmp_path / "one"), written(tmp_path / "run"), rtol=0, atol=0)
    facts = [json.loads((tmp_path / n / "results.json").read_text()) for n in ("run", "one")]
    assert facts[0]["frames"] == facts[1]["frames"]
