"""What reading and writing do to files that are cut off, and on a disk that is full."""

import errno
import resource
import signal
import struct
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
import soundfile
import torch

from remanence.errors import InputError
from remanence.kit import audio, recordings

NOISE = 0.1 * torch.randn(40_000, generator=torch.Generator().manual_seed(0))


@contextmanager
def largest_file(size):
    """Writing beyond so many bytes fails, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_full_disk_is_a_system_error_and_leaves_nothing(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    audio.write_wav(path, NOISE, 16000)
    whole = path.stat().st_size
    path.unlink()
    for size in (10, 30_000, whole - 2000, whole - 1):  # libsndfile loses a flac's end in silence
        with largest_file(size), pytest.raises(OSError, match="File too large") as caught:
            audio.write_wav(path, NOISE, 16000)
        assert caught.value.errno == errno.EFBIG
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "subtype"), [("ogg", "VORBIS"), ("opus", "OPUS")])
def test_an_ogg_that_is_cut_off_is_refused(tmp_path, suffix, subtype):
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, NOISE.numpy(), 16000, subtype, format="OGG")
    (whole,) = recordings.list_recordings(path)
    assert len(audio.read_audio(whole)) == whole.frames == len(NOISE)
    data = path.read_bytes()
    last = data.rindex(b"OggS")
    for kept in (len(data) - 1, len(data) // 2, last + 27, last + 10):
        path.write_bytes(data[:kept])
        with pytest.raises(InputError, match=rf"x\.{suffix} is cut off"):
            recordings.list_recordings(path)
    for more in (b"TAG" + bytes(125), bytes(70_000)):  # an ID3 tag, and what hides every page
        path.write_bytes(data + more)
        found = []
        with suppress(InputError):  # older libsndfiles find no end there
            found = recordings.list_recordings(path)
        assert [r.frames for r in found] in ([], [len(NOISE)])


def test_a_recording_without_an_end_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.wav"
    audio.write_wav(path, NOISE, 16000)
    endless = SimpleNamespace(samplerate=16000, frames=2**63 - 1, channels=1)
    monkeypatch.setattr(soundfile, "info", lambda _: endless)
    with pytest.raises(InputError, match="does not say how long it is"):
        recordings.list_recordings(path)


def test_a_chunk_of_odd_length_is_stepped_over(tmp_path):
    path = tmp_path / "x.wav"
    audio.write_wav(path, NOISE, 16000)
    data = path.read_bytes()
    data = data[:36] + struct.pack("<4sI", b"note", 5) + b"hello\0" + data[36:]
    path.write_bytes(data)
    assert recordings.list_recordings(path)[0].frames == len(NOISE)
    path.write_bytes(data[:-1000])
    with pytest.raises(InputError, match="promises 80000 bytes of samples, it has 79000"):
        recordings.list_recordings(path)


def test_another_rate_folds_nothing_back_and_keeps_the_highest_tones(tmp_path):
    seconds = torch.arange(44_100, dtype=torch.float64) / 44_100
    for hz, expected in ((7000, 0.5), (9000, 0.0)):
        wave = 0.5 * torch.sin(2 * torch.pi * hz * seconds)
        audio.write_wav(tmp_path / "x.wav", wave, 44_100, subtype="FLOAT")
        heard = audio.read_audio(tmp_path / "x.wav", sample_rate=16_000)[1000:-1000]
        assert (2 * heard.square().mean()).sqrt() == pytest.approx(expected, abs=1e-3)
