"""What a recipe says: a rule for each role that a layer plays in a network.

A recipe is a mapping of plain values that JSON, YAML or TOML can hold:

    {"base": "small",                                  # start from a recipe of `RECIPES`
     "pointwise": {"channels": 8, "codewords": 256},   # change one role
     "first": "keep",                                  # leave it in float
     "layers": {"re:.*downsample.*": "keep"}}          # names, or patterns after "re:"

A block holds the weights of `channels` input channels: 9 * channels weights in a 3 x 3 convolution,
`channels` weights elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from remanence.compress.layout import codeword_count
from remanence.errors import InputError

# A layer has the first role of this list that fits it.
ROLES = ("first", "head", "depthwise", "embedding", "transposed", "spatial", "pointwise", "linear")

_POLICY: dict[str, Any] = {
    "first": "keep",
    "depthwise": "keep",
    "embedding": "keep",
    "head": {"channels": 4, "codewords": 1024},
}
_MASK_RCNN_KEPT = (
    "backbone.body.conv1",
    "rpn.head.cls_logits",
    "rpn.head.bbox_pred",
    "roi_heads.mask_predictor.mask_fcn_logits",
)

# `small` and `large` suit any network; the others repeat the paper's networks, layer by layer.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "small": _POLICY
    | {"spatial": {"channels": 1, "codewords": 256}}
    | {role: {"channels": 4, "codewords": 256} for role in ("pointwise", "linear", "transposed")},
    "large": _POLICY
    | {"spatial": {"channels": 2, "codewords": 256}}
    | {role: {"channels": 8, "codewords": 256} for role in ("pointwise", "linear", "transposed")},
    "resnet18-small": {"base": "small", "head": {"codewords": 2048}},
    "resnet18-large": {
        "base": "large",
        "head": {"codewords": 2048},
        "pointwise": {"channels": 4},
    },
    "resnet50-small": {"base": "small"},
    "resnet50-large": {"base": "large"},
    "resnet50-semisupervised": {
        "base": "small",
        "layers": {"layer1.0.conv3": "keep", "layer1.0.downsample.0": "keep"},
    },
    "mask-rcnn": {
        "base": "small",
        "head": {"codewords": 256},
        "layers": dict.fromkeys(_MASK_RCNN_KEPT, "keep")
        | {"roi_heads.box_head.fc6": {"channels": 16}},
    },
}


def read_recipe(recipe: str | Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Check a recipe and resolve what it is based on.

    Args:
        recipe: A name of `RECIPES`, or a mapping.

    Returns:
        The rule of every role, and the rules of single layers: each `keep`, or channels and
        codewords (of a single layer, perhaps one of the two).

    Raises:
        InputError: A name, a role or a rule is unknown.
    """
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise InputError(f"recipe {recipe!r} is unknown: give one of {', '.join(RECIPES)}")
        recipe = RECIPES[recipe]
    unknown = set(recipe) - {"base", "layers", *ROLES}
    if unknown:
        legal = ", ".join(("base", "layers", *ROLES))
        raise InputError(f"recipe: {min(unknown)!r} is unknown; it may hold {legal}")
    own = {role: recipe[role] for role in ROLES if role in recipe}
    layers = recipe.get("layers", {})
    if not isinstance(layers, Mapping):
        raise InputError('recipe: give layers as a mapping, for example {"layer1.0.conv1": "keep"}')
    for key, rule in {**own, **layers}.items():
        _check_rule(key, rule)
    below: dict[str, Any] = dict(RECIPES["small"])
    overrides: dict[str, Any] = {}
    if "base" in recipe:
        below, overrides = read_recipe(recipe["base"])
    for role, rule in own.items():
        before = below[role] if isinstance(below[role], Mapping) else {"channels": 4}
        below[role] = "keep" if rule == "keep" else {"codewords": 256, **before, **rule}
    return below, {**overrides, **layers}


def _check_rule(key: str, rule: object) -> None:
    if rule == "keep":
        return
    example = '"keep" or {"channels": 4, "codewords": 256}'
    if not isinstance(rule, Mapping) or set(rule) - {"channels", "codewords"} or not rule:
        raise InputError(f"recipe: {key} is {rule!r}; give {example}")
    for value in rule.values():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"recipe: {key} is {rule!r}; give whole numbers, {example}")
    codeword_count(rule.get("codewords", 256), 4 * 65_536)
