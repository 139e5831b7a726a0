"""Which recordings a source holds, and under which names: files are written under them."""

from pathlib import Path

import pytest
import torch

from remanence.errors import InputError
from remanence.kit import audio, recordings


def write(path: Path, value: float = 0.1) -> None:
    audio.write_wav(path, torch.full((80,), value), 8000)


def names_of(source: object) -> list[str]:
    return [recording.name for recording in recordings.list_recordings(str(source))]


def test_a_name_never_leads_out_of_its_folder(tmp_path, monkeypatch):
    for name in ("x/a", "y/b", "top"):
        write(tmp_path / f"{name}.wav")
    lists = tmp_path / "x" / "list.txt"
    # What lies beside the list, under its folder's other name, and named from the root.
    for lines, expected in (
        ("a.wav\n../y/b.wav\n", ["x/a", "y/b"]),
        ("../x/a.wav\n./../y/../y/b.wav\n", ["x/a", "y/b"]),
        ("a.wav\n../top.wav\n", ["x/a", "top"]),
        (f"../y/b.wav\n{tmp_path}/y/../x/a.wav\n", ["y/b", "x/a"]),
        (f"a.wav\n{tmp_path}/x/../../{tmp_path.name}/y/b.wav\n", ["x/a", "y/b"]),
        ("../top.wav\n", ["top"]),
    ):
        lists.write_text(lines)
        assert names_of(lists) == expected
    # A list that is given by a relative path may hold absolute ones.
    monkeypatch.chdir(tmp_path / "x")
    lists.write_text(f"a.wav\n{tmp_path}/y/b.wav\n")
    assert names_of("list.txt") == ["x/a", "y/b"]
    assert names_of("../x/list.txt") == ["x/a", "y/b"]


def test_a_glob_that_leads_out_of_its_folder_is_refused(tmp_path, monkeypatch):
    for name in ("x/deep/a", "y/b"):
        write(tmp_path / f"{name}.wav")
    monkeypatch.chdir(tmp_path / "x")
    assert names_of("../[xy]/*.wav") == ["y/b"]
    assert names_of("deep/../d*/a.wav") == ["deep/a"]
    with pytest.raises(InputError, match=r"b\.wav lies outside of \.: give a folder that holds"):
        names_of("*/../../y/b.wav")


def test_a_file_that_is_all_dots_is_refused(tmp_path):
    lists = tmp_path / "list.txt"
    for name in ("...wav", "x/...wav", "a.wav"):
        write(tmp_path / name)
        lists.write_text(f"{name}\n{tmp_path}/...wav\n")
        with pytest.raises(InputError, match=r"\.\.\.wav lies outside"):
            names_of(lists)


def test_a_name_with_dots_goes_to_the_file_that_the_machine_means(tmp_path):
    write(tmp_path / "elsewhere" / "a.wav", 0.5)
    write(tmp_path / "here" / "a.wav", 0.25)
    (tmp_path / "elsewhere" / "deep").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    (tmp_path / "here" / "list.txt").write_text("link/../a.wav\n")  # that of elsewhere
    (found,) = recordings.list_recordings(tmp_path / "here" / "list.txt")
    assert float(audio.read_audio(found)[0]) == 0.5


def test_a_list_may_hold_comments_blank_lines_and_a_byte_order_mark(tmp_path):
    for name in ("a", "b", "#c"):
        write(tmp_path / f"{name}.wav")
    lists = tmp_path / "list.txt"
    lists.write_bytes(b"\xef\xbb\xbfa.wav\r\n\r\n# the second day\n  # and its noon\n \n b.wav \n")
    assert names_of(lists) == ["a", "b"]
    lists.write_text("./#c.wav\n")
    assert names_of(lists) == ["#c"]
    lists.write_text("# nothing yet\n\n")
    with pytest.raises(InputError, match="holds no recordings"):
        names_of(lists)


def test_a_missing_file_is_named_with_its_list_and_line(tmp_path):
    write(tmp_path / "a.wav")
    (tmp_path / "folder.wav").mkdir()
    for missing in ("none.wav", "folder.wav"):
        (tmp_path / "list.txt").write_text(f"# one\n\na.wav\n{missing}\n")
        with pytest.raises(InputError, match=rf"list\.txt, line 4: there is no file .*{missing}"):
            names_of(tmp_path / "list.txt")


def test_linked_folders_are_entered_once(tmp_path):
    write(tmp_path / "disk" / "deep" / "a.wav")
    write(tmp_path / "data" / "own" / "b.wav")
    data = tmp_path / "data"
    (data / "again").symlink_to(data / "own")  # read under its own name
    (data / "own" / "up").symlink_to(data)
    (data / "one").symlink_to(tmp_path / "disk")
    (data / "two").symlink_to(tmp_path / "disk")
    (data / "gone").symlink_to(tmp_path / "nowhere")
    assert names_of(data) == ["one/deep/a", "own/b"]
    (data / "c.wav").symlink_to(tmp_path / "disk" / "deep" / "a.wav")
    assert names_of(data) == ["c", "one/deep/a", "own/b"]
    assert names_of(data / "one") == ["deep/a"]


def test_a_folder_with_the_name_of_a_recording_is_none(tmp_path):
    write(tmp_path / "a.wav")
    write(tmp_path / "folder.wav" / "b.wav")
    assert names_of(f"{tmp_path}/*.wav") == ["a"]
    assert names_of(tmp_path) == ["a", "folder.wav/b"]
    with pytest.raises(InputError, match="holds no recordings"):
        names_of(f"{tmp_path}/f*.wav")


def test_one_and_several_names_that_stand_for_two(tmp_path):
    for name in ("a.wav", "a.flac", "b.wav", "b.flac"):
        write(tmp_path / name)
    with pytest.raises(InputError, match="2 names stand for two recordings, such as 'a'"):
        names_of(tmp_path)
    (tmp_path / "b.flac").unlink()
    with pytest.raises(InputError, match="1 name stands for two recordings, such as 'a'"):
        names_of(tmp_path)
