"""Which options of `remanence audit dejavu` go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from remanence.audit.dejavu import Test
from remanence.errors import InputError
from remanence.jobs.audit.outputs import is_array


def hypotheses(
    candidate: str | None, reference: str | None, hypothesis: list[str] | None
) -> dict[str, tuple[str, str]]:
    """Candidate and reference source of each hypothesis; of one without a name, its name is "".

    Raises:
        InputError: Neither or both kinds of option are given, or a hypothesis is no
            NAME=CANDIDATE,REFERENCE.
    """
    if not hypothesis:
        if candidate is None or reference is None:
            raise InputError(
                "give --candidate and --reference, or --hypothesis NAME=CANDIDATE,REFERENCE"
            )
        return {"": (candidate, reference)}
    if candidate is not None or reference is not None:
        raise InputError("--hypothesis names its own sets: leave out --candidate and --reference")
    pairs = {}
    for text in hypothesis:
        name, equals, sources = text.partition("=")
        theirs, comma, held_out = sources.partition(",")
        if not (name and equals and theirs and comma and held_out) or name in pairs:
            raise InputError(f"--hypothesis {text}: give NAME=CANDIDATE,REFERENCE, each name once")
        pairs[name] = (theirs, held_out)
    return pairs


def check_combination(
    options: Mapping[str, Any], tests: Sequence[Test], pairs: Mapping[str, tuple[str, str]]
) -> None:
    """Refuse options that do not go together, before anything is opened.

    Args:
        options: All options, by name.
        tests: The declared test, then those to explore.
        pairs: Sources of candidates and references.

    Raises:
        InputError: Names the option and why.
    """
    for test in tests:
        if test not in get_args(Test):
            raise InputError(f"--test {test}: unknown; give one of {', '.join(get_args(Test))}")
    if len(set(tests)) < len(tests):
        raise InputError(f"--explore: give other tests than {tests[0]}, each once")
    sources = [source for pair in pairs.values() for source in pair]
    sources += [options["known_members"]] if options["known_members"] else []
    arrays = [is_array(source) for source in sources]
    if any(arrays) and not all(arrays):
        raise InputError("give either images for all sets, with --model, or .npy files for all")
    if all(arrays):
        for name in ("model", "reference_model", "limit"):
            if options[name]:
                raise InputError(f"--{name.replace('_', '-')}: is for images; leave it out")
    elif options["model"] is None:
        raise InputError("--model: give the folder of the network under audit")
    needs = {
        "candidate_labels": "arrays" if all(arrays) else None,
        "reference_labels": "arrays" if all(arrays) else None,
        "known_labels": options["known_members"] if all(arrays) else None,
        "reference_model": "calibrated" if "calibrated" in tests else None,
        "equivalence": options["known_members"],
    }
    why = {
        "candidate_labels": "images bring their labels",
        "reference_labels": "images bring their labels",
        "known_labels": "goes with --known-members and arrays",
        "reference_model": "is for --test calibrated",
        "equivalence": "needs --known-members",
    }
    for name, met in needs.items():
        if options[name] is not None and met is None:
            raise InputError(f"--{name.replace('_', '-')}: {why[name]}")
    if "calibrated" in tests and not all(arrays) and not options["reference_model"]:
        raise InputError(
            "--test calibrated: give --reference-model, a network that saw neither set; repeat it "
            "for several"
        )
    if tests[0] == "learned" and options["known_members"]:
        raise InputError("--known-members: the learned test has no leaked fraction; leave it out")
    if tests[0] == "learned" and options["stream"]:
        raise InputError("--stream: the learned test needs all images at once; take another --test")
    alone = ("known_members", "explore", "equivalence", "null_check", "stream")
    for name in alone if options["hypothesis"] else alone[:4] if options["stream"] else ():
        if options[name] is not None:
            other = "--hypothesis" if options["hypothesis"] else "--stream"
            raise InputError(f"--{name.replace('_', '-')} does not go with {other}; leave it out")
