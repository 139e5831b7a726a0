"""One backbone, one adapted head and last norm per resolution, and their fusion.

The tensors that FixRes adapts (arXiv 1906.06423, section 4) are few, so several test
resolutions share everything else.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call

from remanence.errors import InputError
from remanence.learn.fixres.layers import find_head

FUSIONS: Final = ("logits", "prob", "embedding", "concat")


class MultiResolution(nn.Module):
    """A classifier that carries its own tensors for each of several image sizes.

    Called with a tensor it chooses the tensors of that size; called with `{size: images}` it
    fuses the sizes:

    - `logits`: mean of the logits.
    - `prob`: mean of the softmax, given back as its logarithm, so that softmax restores it.
    - `embedding`: mean embedding, classified by the mean of the sizes' heads.
    - `concat`: embeddings joined in ascending order of size, classified by `concat_head`.

    The classifier stays in eval mode; only `concat_head` follows `train()`.

    Args:
        model: the shared classifier; kept, not copied.
        bank: per image side in pixels, a state dict of the classifier adapted to that size, whole
            or only the tensors that were adapted. Only what differs from `model` is stored.
        fuse: one of `FUSIONS`.
        concat_head: linear layer from all embeddings to logits, for `concat`. Left out, it is made
            of the sizes' heads, each over the number of sizes: the untrained `concat` then equals
            `logits`.

    Raises:
        InputError: unknown fusion, empty bank, tensors that do not fit the classifier, or a
            head that is not linear where one must be made.
    """

    sizes: Tensor

    def __init__(
        self,
        model: nn.Module,
        bank: Mapping[int, Mapping[str, Tensor]],
        fuse: str = "logits",
        concat_head: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        if fuse not in FUSIONS:
            raise InputError(f"unknown fusion {fuse!r}: choose one of {', '.join(FUSIONS)}")
        if not bank:
            raise InputError("the bank is empty: give the adapted tensors of at least one size")
        self.fuse = fuse
        self.model = model.eval()
        self.register_buffer("sizes", torch.tensor(sorted(bank)))
        shared = model.state_dict()
        self.bank = nn.ModuleDict(
            {str(size): _nest(_differing(shared, bank[size], size)) for size in sorted(bank)}
        )
        weight = next(model.parameters())
        side = min(bank)
        example = torch.zeros(1, 3, side, side, dtype=weight.dtype, device=weight.device)
        self.head, _ = find_head(model, example=example)
        self.concat_head = concat_head
        if fuse == "concat" and concat_head is None:
            self.concat_head = self._join_heads()

    @classmethod
    def from_state_dict(
        cls, model: nn.Module, state: Mapping[str, Tensor], fuse: str = "logits"
    ) -> Self:
        """Restore from the flat `state_dict()`, as safetensors holds it.

        Args:
            model: the shared classifier's architecture; its weights are overwritten.
            state: `MultiResolution.state_dict()`.
            fuse: one of `FUSIONS`.
        """

        def under(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}

        model.load_state_dict(under("model."))
        bank = {int(size): under(f"bank.{size}.") for size in state["sizes"]}
        joint = under("concat_head.")
        if not joint:
            return cls(model, bank, fuse)
        classes, width = joint["weight"].shape
        concat_head = nn.Linear(width, classes, bias="bias" in joint).to(joint["weight"])
        concat_head.load_state_dict(joint)
        return cls(model, bank, fuse, concat_head)

    def save(self, path: Path) -> None:
        """Write the shared classifier and the bank to a safetensors file."""
        state = {
            name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()
        }
        save_file(state, path, metadata={"fuse": self.fuse})

    @classmethod
    def load(cls, model: nn.Module, path: Path) -> Self:
        """Read what `save` wrote.

        Args:
            model: the shared classifier's architecture; its weights are overwritten.
            path: a safetensors file.

        Raises:
            InputError: no such file, or it holds no bank.
        """
        try:
            with safe_open(path, "pt") as opened:
                fuse = (opened.metadata() or {}).get("fuse", "logits")
                state = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # not a dict
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: no readable bank ({error})") from error
        if "sizes" not in state:
            raise InputError(f"{path}: holds no bank of sizes; give a file that save() wrote")
        return cls.from_state_dict(model, state, fuse)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of `concat_head`; the classifier stays in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, x: Tensor | Mapping[int, Tensor]) -> Tensor:
        """Classify images of one size, or fuse several sizes of the same images.

        Args:
            x: (N, 3, K, K) images with K in the bank, or such images by size.

        Returns:
            (N, classes) logits.

        Raises:
            InputError: a size that the bank does not hold, or does not match its key.
        """
        if isinstance(x, Tensor):
            return self._run(x)[0]
        for size, images in x.items():
            if images.shape[-1] != size:
                raise InputError(
                    f"images under key {size} are {images.shape[-1]} px wide: fix the key"
                )
        if not x:
            raise InputError(f"no images: give some of the sizes {self._known()}")
        runs = [self._run(x[size]) for size in sorted(x)]
        if self.fuse == "logits":
            return torch.stack([logits for logits, _ in runs]).mean(0)
        if self.fuse == "prob":
            logs = torch.stack([logits.log_softmax(1) for logits, _ in runs])  # (sizes, N, classes)
            return logs.logsumexp(0) - math.log(len(runs))
        if self.fuse == "embedding":
            z = torch.stack([embedding for _, embedding in runs]).mean(0)
            return self._mean_head(sorted(x), z)
        if len(runs) != len(self.bank):
            raise InputError(f"concat needs every size of the bank: {self._known()}")
        assert self.concat_head is not None
        joined: Tensor = self.concat_head(torch.cat([z.flatten(1) for _, z in runs], dim=1))
        return joined

    def _known(self) -> str:
        return ", ".join(self.bank)

    def _tensors(self, size: int) -> dict[str, Tensor]:
        return dict(self.bank[str(size)].named_buffers())

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Give logits, and the embedding as it entered the head."""
        size = x.shape[-1]
        if x.ndim != 4 or x.shape[-2] != size or str(size) not in self.bank:
            raise InputError(
                f"images of shape {tuple(x.shape)} fit no size of the bank: "
                f"resize to one of {self._known()} px"
            )
        inputs: list[Tensor] = []
        head = self.model.get_submodule(self.head)
        handle = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        try:
            logits: Tensor = functional_call(self.model, self._tensors(size), (x,))
        finally:
            handle.remove()
        return logits, inputs[-1]

    def _head_tensors(self, size: int) -> dict[str, Tensor]:
        """Give the head's tensors at a size, under the head's own names."""
        prefix = f"{self.head}."
        state = self.model.state_dict() | self._tensors(size)
        return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}

    def _mean_head(self, sizes: Iterable[int], z: Tensor) -> Tensor:
        heads = [self._head_tensors(size) for size in sizes]
        mean = {n: torch.stack([head[n] for head in heads]).mean(0) for n in heads[0]}
        logits: Tensor = functional_call(self.model.get_submodule(self.head), mean, (z,))
        return logits.flatten(1)

    def _join_heads(self) -> nn.Linear:
        """Make the joint head whose output is the mean of the sizes' logits."""
        heads = [self._head_tensors(int(size)) for size in self.sizes]
        if not {"weight"} <= set(heads[0]) <= {"weight", "bias"}:
            raise InputError(f"head {self.head!r} is not linear: pass concat_head")
        weight = torch.cat([head["weight"].flatten(1) for head in heads], dim=1) / len(heads)
        joint = nn.Linear(
            weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype
        )
        zero = weight.new_zeros(len(weight))
        with torch.no_grad():
            joint.weight.copy_(weight)
            joint.bias.copy_(torch.stack([head.get("bias", zero) for head in heads]).mean(0))
        return joint


def relative_cost(sizes: Iterable[int], base_size: int) -> float:
    """Cost of one prediction over several sizes, relative to one at `base_size`.

    Counts sum (K_i / K_0)^2, as for convolutions; attention grows faster.
    """
    return sum((size / base_size) ** 2 for size in sizes)


def _differing(
    shared: Mapping[str, Tensor], tensors: Mapping[str, Tensor], size: int
) -> dict[str, Tensor]:
    """Copy what differs from the shared classifier."""
    kept = {}
    for name, tensor in tensors.items():
        if name not in shared or shared[name].shape != tensor.shape:
            raise InputError(
                f"tensor {name!r} of size {size} does not fit the classifier: build all sizes from "
                "one architecture (a ViT with dynamic_img_size=True)"
            )
        if not torch.equal(tensor.to(shared[name].device), shared[name]):
            kept[name] = tensor.detach().clone().to(shared[name].device)
    return kept


def _nest(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Hold tensors in modules named as in the classifier, so that state keys read alike."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in dict(module.named_children()):
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(leaf, tensor)
    return root
