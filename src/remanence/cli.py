"""The menu: which command is which job. Jobs are imported only when they are called."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import re
import sys
from typing import TYPE_CHECKING, Any

import cyclopts
from cyclopts import App

from remanence.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOMS = {
    "learn": "Train and sharpen networks.",
    "compress": "Shrink a network that is too big.",
    "search": "Find vectors, images and patches again, in a few bytes each.",
    "speech": "Augment recordings, learn features of speech, measure them.",
    "audit": "Ask whether a model saw data.",
}

# command -> (job, one line of help): the help of the menu must not import the job.
COMMANDS = {
    ("reproduce",): (
        "remanence.claims.reproduce:reproduce",
        "Run every paper's claim, small, with its control; write one report.",
    ),
    ("learn", "classifier"): (
        "remanence.jobs.learn.classifier:classifier",
        "Train an image classifier.",
    ),
    ("learn", "fixres"): (
        "remanence.jobs.learn.fixres:fixres",
        "Fix the train-test resolution discrepancy of a trained classifier.",
    ),
    ("compress", "quantize"): (
        "remanence.jobs.compress.quantize:quantize",
        "Write a network in a twentieth of its bytes, by quantising what it outputs.",
    ),
    ("compress", "inspect"): (
        "remanence.jobs.compress.inspect:inspect",
        "What a compressed file holds, to the byte, and how well its network still does.",
    ),
    ("compress", "expand"): (
        "remanence.jobs.compress.expand:expand",
        "Make a plain timm or torch checkpoint of a compressed file, or ONNX.",
    ),
    ("search", "train"): (
        "remanence.jobs.search.train:train",
        "Learn a map that spreads vectors on a sphere, for codes of a few bytes.",
    ),
    ("search", "index"): (
        "remanence.jobs.search.index:index",
        "Code vectors into an index that is saved, extended and merged.",
    ),
    ("search", "query"): (
        "remanence.jobs.search.query:query",
        "Find the nearest vectors of an index.",
    ),
    ("search", "bench"): (
        "remanence.jobs.search.bench:bench",
        "Which code finds most at so many bytes: ours, PQ, OPQ, RQ, LSQ, ITQ or PCA?",
    ),
    ("search", "describe"): (
        "remanence.jobs.search.describe:describe",
        "Describe the local patches of images, and learn a whitening from them.",
    ),
    ("search", "match"): (
        "remanence.jobs.search.match:match",
        "Do two photographs show one scene? Match them, draw it, write the homography.",
    ),
    ("speech", "augment"): (
        "remanence.jobs.speech.augment:augment",
        "Augment recordings: pitch, reverberation, noise, dropped bands and spans.",
    ),
    ("speech", "cpc"): (
        "remanence.jobs.speech.cpc:cpc",
        "Learn features of speech from recordings without transcripts.",
    ),
    ("speech", "extract"): (
        "remanence.jobs.speech.extract:extract",
        "Write features of recordings: of a trained network, MFCC, or a network of yours.",
    ),
    ("speech", "probe"): (
        "remanence.jobs.speech.probe:probe",
        "Which phones, words or speakers does a probe read from features, with how few labels?",
    ),
    ("speech", "abx"): (
        "remanence.jobs.speech.abx:abx",
        "How well do features tell phones apart? ABX errors, nothing trained.",
    ),
    ("audit", "membership"): (
        "remanence.jobs.audit.membership:membership",
        "Was each sample in training? Membership inference, and how leaky the network is.",
    ),
    ("audit", "dejavu"): (
        "remanence.jobs.audit.dejavu:dejavu",
        "Was this data set, or part of it, in training?",
    ),
    ("audit", "memorize"): (
        "remanence.jobs.audit.memorize:memorize",
        "How many arbitrary images can an architecture store?",
    ),
    ("audit", "layers"): (
        "remanence.jobs.audit.layers:layers",
        "Which layers of a network still tell who was a member?",
    ),
    ("audit", "mark"): (
        "remanence.jobs.audit.mark:mark",
        "Mark images so that training on them can be proved.",
    ),
    ("audit", "detect"): (
        "remanence.jobs.audit.detect:detect",
        "Was a network trained on images that were marked with this key?",
    ),
}


def _version() -> str:
    from remanence.kit.devices import device_name, versions

    found = versions()
    return (
        f"remanence {found['remanence']}\nPython {found['python']}\n"
        f"torch {found['torch']}\ndevice {device_name()}"
    )


def build(called: Sequence[str] = ()) -> App:
    """Build the command line.

    Args:
        called: Words of a command line. If they ask for a command's help, it is the job's own.

    Returns:
        The application; `remanence --install-completion` sets up shell completion.
    """
    app = App(
        name="remanence",
        help="Fifteen published methods on what data leaves behind in a network.",
        version=_version,
        version_format="plaintext",
        help_format="plaintext",  # markup would eat what looks like it: (?P<speaker>...)_
        default_parameter=cyclopts.Parameter(negative_iterable=()),
    )
    rooms = {name: App(name=name, help=text) for name, text in ROOMS.items()}
    for room in rooms.values():
        app.command(room)
    for path, (job, text) in COMMANDS.items():
        parent = app if len(path) == 1 else rooms[path[0]]
        if path == tuple(called[: len(path)]) and {"--help", "-h"} & set(called):
            parent.command(_documented(job), name=path[-1])
        else:
            parent.command(job, name=path[-1], help=text)
    app.register_install_completion_command()
    return app


def _documented(job: str) -> Callable[..., Any]:
    """Import a job, with the lines of its docstring joined: they are as wide as our screen."""
    module, name = job.split(":")
    function = getattr(importlib.import_module(module), name)

    @functools.wraps(function)
    def documented(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    description, arguments, rest = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")
    description = re.sub(r"(?<=\S)\n(?=\S)", " ", description)
    documented.__doc__ = description + arguments + re.sub(r"(?<=\S)\n {8,}", " ", rest)
    return documented


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Command-line words; those of the process where None.

    Returns:
        Exit status: 0 done, 1 a claim does not hold, 2 bad input, 130 interrupted.
    """
    try:
        words = sys.argv[1:] if arguments is None else arguments
        result = build(words)(
            words,
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except cyclopts.UnknownCommandError as error:
        return _refuse(_unknown(error))
    except (InputError, cyclopts.CycloptsError) as error:
        return _refuse(str(error))
    except OSError as error:
        # A full disk or a folder that cannot be written is the user's to mend; the rest is ours.
        if error.errno is None or error.strerror is None:
            raise
        return _refuse(f"{error.filename or 'writing'}: {error.strerror}")
    except KeyboardInterrupt:
        return 130
    return int(getattr(result, "exit_status", 0))


def _unknown(error: cyclopts.UnknownCommandError) -> str:
    # cyclopts would import every job to find a near name.
    word = (error.unused_tokens or [""])[0]
    chain = tuple(error.command_chain or ())
    known = sorted({path[len(chain)] for path in COMMANDS if path[: len(chain)] == chain})
    near = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"{word}: unknown {'option' if word.startswith('-') else 'command'}; {hint}"


def _refuse(message: str) -> int:
    # An error in a loader process arrives with its traceback before it.
    message = message.rpartition("InputError: ")[2]
    # Of several processes, one speaks.
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
        print(f"remanence: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201  # the one line a user reads
    return 2


if __name__ == "__main__":
    sys.exit(main())
