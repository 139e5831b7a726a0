"""Lists of recordings: nothing is written outside of OUT, and no recording is touched."""

import numpy as np
import soundfile

from remanence.jobs.speech.augment import augment
from remanence.jobs.speech.extract import extract


def test_a_list_that_leaves_its_folder_writes_into_out_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("remanence.jobs.speech.augment.build_report", lambda *_: NoReport())
    for name in ("corpus/a", "other/b"):
        (tmp_path / name).parent.mkdir()
        wave = np.random.default_rng(0).normal(0, 0.1, 1600)
        soundfile.write(tmp_path / f"{name}.wav", wave, 16000)
    lists = tmp_path / "corpus" / "list.txt"
    up = "../" * 12  # to the root, whence any file can be named
    for number, line in enumerate(("../other/b.wav", f"{up}{tmp_path}/other/b.wav")):
        lists.write_text(f"a.wav\n{line}\n")
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        augmented = tmp_path / f"augmented{number}"
        augment(str(lists), out=augmented, chain="clip[0.5]")
        extracted = tmp_path / f"extracted{number}"
        extract(str(lists), out=extracted, model="mfcc")
        there = {p for p in tmp_path.rglob("*") if p.is_file()}
        new = {p.relative_to(tmp_path).as_posix() for p in there - before.keys()}
        assert all(p.startswith((augmented.name, extracted.name)) for p in new)
        assert {p for p in new if p.endswith((".wav", ".npy"))} == {
            f"{augmented.name}/audio/corpus/a.wav",
            f"{augmented.name}/audio/other/b.wav",
            f"{extracted.name}/features/corpus/a.npy",
            f"{extracted.name}/features/other/b.npy",
        }
        assert {p: p.read_bytes() for p in before} == before


class NoReport:
    def write(self, path):
        path.write_text("")
