import numpy as np
import pytest
import soundfile
import torch

from remanence.errors import InputError
from remanence.kit import audio, recordings


def tone(seconds=0.5, rate=8000, hz=440.0):
    t = torch.arange(int(seconds * rate), dtype=torch.float64) / rate
    return (0.5 * torch.sin(2 * torch.pi * hz * t)).float()


@pytest.fixture
def folder(tmp_path):
    for name in ("b/two", "a/one", "a/three"):
        audio.write_wav(tmp_path / f"{name}.wav", tone(), 8000)
    (tmp_path / "notes.md").write_text("not audio")
    return tmp_path


def test_sources(folder):
    names = [recording.name for recording in recordings.list_recordings(folder)]
    assert names == ["a/one", "a/three", "b/two"]
    assert [r.name for r in recordings.list_recordings(f"{folder}/a/t*.wav")] == ["three"]
    assert [r.name for r in recordings.list_recordings(f"{folder}/**/t*.wav")] == [
        "a/three",
        "b/two",
    ]
    assert [r.name for r in recordings.list_recordings(folder / "a" / "one.wav")] == ["one"]
    (folder / "list.txt").write_text("b/two.wav\na/one.wav\n")
    assert [r.name for r in recordings.list_recordings(folder / "list.txt")] == ["b/two", "a/one"]
    recording = recordings.list_recordings(folder)[0]
    assert (recording.sample_rate, recording.frames, recording.channels) == (8000, 4000, 1)
    assert recording.seconds == 0.5


def test_a_source_that_holds_nothing_is_refused(folder):
    for source, message in (
        (folder / "nowhere", "no such file or folder"),
        (f"{folder}/*.wav", "holds no recordings"),
        (folder / "notes.md", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            recordings.list_recordings(source)
    (folder / "list.txt").write_text("a/none.wav\n")
    with pytest.raises(InputError, match=r"list\.txt, line 1: there is no file .*a/none\.wav"):
        recordings.list_recordings(folder / "list.txt")
    audio.write_wav(folder / "a" / "one.flac", tone(), 8000)
    with pytest.raises(InputError, match="'a/one': rename"):
        recordings.list_recordings(folder)


def test_damaged_recordings_are_named(folder):
    path = folder / "a" / "one.wav"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(InputError, match=r"one\.wav is cut off: .* 8000 bytes .* it has 7000"):
        recordings.list_recordings(folder)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="empty file"):
        recordings.list_recordings(folder)
    path.write_bytes(whole[:44])
    with pytest.raises(InputError, match="is cut off"):
        recordings.list_recordings(folder)
    soundfile.write(path, np.zeros(0), 8000)
    with pytest.raises(InputError, match="is empty"):
        recordings.list_recordings(folder)
    wave = tone()
    wave[800] = float("nan")
    audio.write_wav(path, wave, 8000, subtype="FLOAT")
    with pytest.raises(InputError, match=r"one\.wav holds NaN .* at 0\.100 s"):
        audio.read_audio(path)
    path = folder / "a" / "four.flac"
    audio.write_wav(path, torch.rand(4000, generator=torch.Generator().manual_seed(0)), 8000)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(InputError, match=r"four\.flac"):
        audio.read_audio(path)


def test_a_wav_written_into_a_pipe_is_whole(folder):
    path = folder / "a" / "one.wav"
    data = bytearray(path.read_bytes())
    data[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(bytes(data))
    assert len(audio.read_audio(path)) == 4000


def test_samples_are_what_was_written(tmp_path):
    wave = tone()
    for subtype, tolerance in (("FLOAT", 0), ("PCM_24", 2**-23), ("PCM_16", 2**-15)):
        assert audio.write_wav(tmp_path / "x.wav", wave, 8000, subtype=subtype) == 0
        torch.testing.assert_close(
            audio.read_audio(tmp_path / "x.wav"), wave, atol=tolerance, rtol=0
        )
    stereo = torch.stack([wave, -wave / 2])
    audio.write_wav(tmp_path / "x.flac", stereo, 8000)
    torch.testing.assert_close(
        audio.read_audio(tmp_path / "x.flac", mono=False), stereo, atol=2**-15, rtol=0
    )
    torch.testing.assert_close(audio.read_audio(tmp_path / "x.flac"), wave / 4, atol=2**-15, rtol=0)


def test_samples_beyond_full_scale_are_counted_and_floats_keep_them(tmp_path):
    wave = 4 * tone()
    beyond = int((wave.abs() > 1).sum())
    assert audio.write_wav(tmp_path / "x.wav", wave, 8000) == beyond > 0
    assert audio.read_audio(tmp_path / "x.wav").abs().max() <= 1
    assert audio.write_wav(tmp_path / "x.wav", wave, 8000, subtype="FLOAT") == 0
    torch.testing.assert_close(audio.read_audio(tmp_path / "x.wav"), wave)
    with pytest.raises(InputError, match="does not hold FLOAT"):
        audio.write_wav(tmp_path / "x.flac", wave, 8000, subtype="FLOAT")
    assert [path.name for path in tmp_path.iterdir()] == ["x.wav"]


def test_another_rate_keeps_the_tone(tmp_path):
    audio.write_wav(tmp_path / "x.wav", tone(rate=44100), 44100, subtype="FLOAT")
    heard = audio.read_audio(tmp_path / "x.wav", sample_rate=16000)
    assert len(heard) == 8000
    torch.testing.assert_close(heard[200:-200], tone(rate=16000)[200:-200], atol=1e-4, rtol=0)


def test_speakers(folder):
    every = recordings.list_recordings(folder)
    assert recordings.speakers_of(every) == {"a/one": "a", "a/three": "a", "b/two": "b"}
    found = recordings.speakers_of(every, r"[ab]/(?P<speaker>.)")
    assert found == {"a/one": "o", "a/three": "t", "b/two": "t"}
    for pattern, message in (
        ("(", "is no regular expression"),
        ("a", "has no named group"),
        ("(?P<phone>a)", "does not match"),
        ("(?P<phone>[ab])", "has no group .?.?.P<speaker>"),
    ):
        with pytest.raises(InputError, match=message):
            recordings.speakers_of(every, pattern)
    with pytest.raises(InputError, match="no telling who speaks in 'one'"):
        recordings.speakers_of(recordings.list_recordings(folder / "a"))


def test_mfcc_frames_tell_of_their_own_ten_milliseconds():
    wave = torch.zeros(8000)
    wave[4000:4080] = torch.randn(80, generator=torch.Generator().manual_seed(0))
    found = audio.mfcc(wave, 8000)
    assert found.shape == (100, 13)
    assert found.dtype == torch.float32
    assert int(found[:, 0].argmax()) == 50
    torch.testing.assert_close(found.mean(0), torch.zeros(13), atol=1e-4, rtol=0)
    # The window of frame i is 25 ms about (i + 0.5) * 10 ms: that of frame 48 ends before.
    torch.testing.assert_close(found[48], found[0])
    assert (found[49] - found[0]).abs().max() > 1
    assert (found[51] - found[0]).abs().max() > 1
    torch.testing.assert_close(found[52], found[0])


def test_mfcc_of_any_length_and_with_deltas():
    for samples in (1, 79, 80, 81, 799, 805):
        assert audio.mfcc(tone()[:samples], 8000).shape == (max(1, samples // 80), 13)
    assert audio.mfcc(tone(rate=16000), 16000, deltas=True).shape == (50, 39)
    with pytest.raises(InputError, match="22050 Hz: give a multiple of 100"):
        audio.mfcc(tone(rate=22050), 22050)


def test_what_reading_does_is_said(tmp_path):
    two = torch.stack([tone(), tone()])
    audio.write_wav(tmp_path / "a.wav", two, 8000)
    audio.write_wav(tmp_path / "b.wav", tone(), 8000)
    audio.write_wav(tmp_path / "c.wav", tone(rate=16000), 16000)
    every = recordings.list_recordings(tmp_path)
    assert audio.treatment(every, None, mono=False) == ["the channels of 1 recording are all kept"]
    assert audio.treatment(every, 16000) == [
        "2 recordings of 8,000 Hz are resampled to 16,000 Hz, and hold nothing above 4,000 Hz",
        "the channels of 1 recording are averaged",
    ]
    assert audio.treatment(every[1:2], 8000) == []
    heard = audio.Heard()
    for wave in (tone(), 2 * tone(), -2 * two, torch.zeros(9)):
        heard.add(wave)
    assert heard.remarks() == [
        "2 recordings are at full scale, and may have been clipped",
        "1 recording is silent",
    ]
