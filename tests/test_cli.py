import importlib
import os
import resource
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from remanence import __version__, cli
from remanence.cli import COMMANDS, build, main
from remanence.errors import InputError


def run(*words, **env):
    return subprocess.run(
        [sys.executable, "-m", "remanence", *words],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | env,
    )


def cpu_seconds(*words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run(*words).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def command(app, path):
    for word in path:
        app = app[word]
    return app


def test_help_takes_less_than_half_a_second():
    assert min(cpu_seconds("--help") for _ in range(3)) < 0.5


@pytest.mark.parametrize("words", [["--help"], [], ["learn"], ["learn", "--help"], ["lern"]])
def test_the_menu_imports_no_job(words):
    code = (
        "import sys; from remanence.cli import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'timm', 'matplotlib', 'PIL'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *words], check=False, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr


def test_python_m_remanence_lists_the_commands():
    found = run("--help")
    assert found.returncode == 0
    assert found.stderr == ""
    for path in COMMANDS:
        assert path[0] in found.stdout


def test_version_gives_four_lines(capsys):
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["remanence", "Python", "torch", "device"]
    assert lines[0] == f"remanence {__version__}"
    assert lines[2] == f"torch {torch.__version__}"


def test_help_is_the_whole_docstring_in_lines_as_wide_as_the_screen():
    found = run("learn", "fixres", "--help", COLUMNS="200").stdout
    assert "Fix the train-test resolution discrepancy" in found
    # The docstring breaks these lines.
    assert "a classifier is best tested at a larger size than it was trained at, and" in found
    assert "classifier, released, classifier+last_bn (default), head_block" in found


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_has_help(path, capsys):
    arguments = command(build(), path).assemble_argument_collection(parse_docstring=True)
    assert len(arguments) > 0
    for argument in arguments:
        assert argument.parameter.help, argument.name
    assert main([*path, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for argument in arguments:
        assert argument.name in shown
        assert argument.parameter.help.split()[0] in shown


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_a_command_is_the_function_of_the_same_name(path):
    module, _, name = COMMANDS[path][0].partition(":")
    assert name == path[-1]
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("lern", "lern: unknown command; did you mean learn?"),
        ("learn clasifier", "clasifier: unknown command; did you mean classifier?"),
        ("quantize", "quantize: unknown command; there are audit, compress, learn, reproduce"),
        ("--bogus", "--bogus: unknown option; "),
        ("learn --bogus", "--bogus: unknown option; "),
        ("learn classifier digits --out x --bogus 3", "Unknown option: --bogus"),
        ("learn classifier digits --out x --epochs ten", "Invalid value for --epochs"),
        ("learn classifier digits --out x --epochs", "--epochs requires an argument"),
        ("learn classifier digits --out x --scale 0.5", "--scale requires 2"),
        ("learn classifier digits --out x --schedule linear", '"cosine", "one-cycle", "constant"'),
        ("learn classifier digits", "--out requires an argument"),
        ("learn classifier --out x", "--data requires an argument"),
        ("learn classifier digits more --out x", "['more']"),
        ("--install-completion --shell tcsh", "Invalid value"),
    ],
)
def test_a_wrong_word_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("remanence: ")
    assert message in line
    assert not list(tmp_path.iterdir())


def test_the_process_exits_with_the_status():
    found = run("lern")
    assert found.returncode == 2
    assert found.stderr == "remanence: lern: unknown command; did you mean learn?\n"


def test_shell_completion_knows_the_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    assert main(["--install-completion", "--shell", "bash"]) == 0
    (script,) = (tmp_path / ".local/share/bash-completion/completions").iterdir()
    text = script.read_text()
    for word in ("reproduce", "learn", "classifier", "fixres", "--skip-broken", "one-cycle"):
        assert word in text
    subprocess.run(["bash", "-n", str(script)], check=True)  # noqa: S607  # any bash will do
    for shell in ("zsh", "fish"):
        assert "classifier" in build().generate_completion(shell=shell)


class Failing(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, _):
        raise InputError("cat/0.jpg: unreadable image (truncated); pass --skip-broken")


def test_an_error_from_a_loader_process_is_one_line(monkeypatch, capsys):
    def job(*_, **__):
        list(DataLoader(Failing(), num_workers=1))

    monkeypatch.setattr(cli, "build", lambda _: job)
    assert main([]) == 2
    assert capsys.readouterr().err == (
        "remanence: cat/0.jpg: unreadable image (truncated); pass --skip-broken\n"
    )


def raising(error):
    def job(*_, **__):
        raise error

    return lambda _: job


def test_an_interruption_has_status_130(monkeypatch):
    monkeypatch.setattr(cli, "build", raising(KeyboardInterrupt()))
    assert main([]) == 130


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    for error in (ZeroDivisionError(), OSError("no number")):
        monkeypatch.setattr(cli, "build", raising(error))
        with pytest.raises(type(error)):
            main([])


def test_a_system_error_names_the_file(monkeypatch, capsys):
    monkeypatch.setattr(cli, "build", raising(PermissionError(13, "Permission denied", "/data/x")))
    assert main([]) == 2
    assert capsys.readouterr().err == "remanence: /data/x: Permission denied\n"


def test_of_several_processes_one_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["lern"]) == 2
    assert capsys.readouterr().err == ""
