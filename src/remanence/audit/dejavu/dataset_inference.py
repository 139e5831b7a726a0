"""Features of dataset inference (Maini et al. 2021): how far an image is from another label.

Training pushes the decision boundary away from training images, so a walk away from one takes
longer to change its label. Black-box: random walks of three noise laws. White-box: gradient steps
towards every class under three norms.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from remanence.audit.dejavu.scores import Floats
from remanence.errors import InputError

Classifier = Callable[[Tensor], Tensor]

# Uniform half width, Gaussian deviation, Laplace scale: for images in [0, 1].
UNIFORM, GAUSSIAN, LAPLACE = 0.005, 0.005, 0.01
# Each law's walk is measured in its own norm.
WALK_NORMS = (float("inf"), 2.0, 1.0)
# MinGD: step length per norm, and how many coordinates an L1 step moves.
DESCENT_STEPS = {float("inf"): 0.001, 2.0: 0.01, 1.0: 1 / 100}
TOP_K = 100


def blind_walk(
    model: Classifier,
    images: Tensor,
    *,
    labels: Tensor | None = None,
    restarts: int = 10,
    steps: int = 50,
    scale: float = 1.0,
    batch_size: int = 512,
    seed: int = 0,
) -> Floats:
    """Walk along random noise until the label changes, and measure how far that was.

    One noise tensor is multiplied by k = 1, 2, ..., the image clipped to [0, 1], until the model no
    longer gives the label. The feature is the norm of the last perturbation: L-infinity for
    uniform noise, L2 for Gaussian, L1 for Laplace. Every image meets the same noise tensors, so a
    row depends on its image alone and rows stay exchangeable. Only walks that have not ended are
    sent through the model.

    Args:
        model: Takes images (B, C, H, W), returns logits (B, K); in evaluation mode.
        images: (N, C, H, W) floats in [0, 1], on the model's device.
        labels: True labels (N,); None for the label that the model gives to the clean image.
        restarts: Noise tensors of each law.
        steps: Longest walk; 50 in the paper, 100 for SVHN.
        scale: Multiplies the noise; 1 in the paper, 2 for SVHN.
        batch_size: Images in one forward pass.
        seed: For the noise.

    Returns:
        Features (N, 3 restarts): all uniform walks, then all Gaussian, then all Laplace.

    Raises:
        InputError: Images are not (N, C, H, W) in [0, 1], or the model is in training mode.
    """
    _check(model, images)
    noise = scale * _noise(images.shape[1:], restarts, seed).to(images)
    walks = len(noise)
    laws = torch.arange(walks, device=images.device) // restarts
    features = torch.zeros(len(images), walks, dtype=torch.float64, device=images.device)
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            x = images[start : start + batch_size]
            kept = model(x).argmax(1) if labels is None else labels[start : start + len(x)]
            kept = kept.to(x.device)
            active = torch.arange(len(x) * walks, device=x.device)
            for k in range(1, steps + 1):
                going = []
                for part in torch.split(active, batch_size):
                    image, walk = part // walks, part % walks
                    moved = (x[image] + k * noise[walk]).clamp(0, 1)
                    ended = model(moved).argmax(1) != kept[image]
                    going.append(part[~ended])
                    done = torch.ones_like(ended) if k == steps else ended
                    delta = (moved[done] - x[image[done]]).flatten(1).double()
                    norms = torch.stack([torch.linalg.vector_norm(delta, p, 1) for p in WALK_NORMS])
                    own = norms.gather(0, laws[walk[done]][None])[0]
                    features[start + image[done], walk[done]] = own
                active = torch.cat(going)
                if not len(active):
                    break
    return features.cpu().numpy()


def min_gd(
    model: Classifier,
    images: Tensor,
    *,
    steps: int = 500,
    batch_size: int = 512,
) -> Floats:
    """Step down the loss of every class until the model gives it, and measure how far that was.

    Steps are of length 0.001 along the gradient's signs (L-infinity), 0.01 along the gradient (L2),
    and 1/100 in each of the 100 steepest coordinates that are free to move (L1). An image that is
    given the class already is at distance 0.

    Args:
        model: Takes images (B, C, H, W), returns logits (B, K), differentiable; in evaluation mode.
        images: (N, C, H, W) floats in [0, 1], on the model's device.
        steps: Longest descent.
        batch_size: Images in one forward and backward pass.

    Returns:
        Features (N, 3 K): distances to the K classes in L-infinity, then in L2, then in L1.

    Raises:
        InputError: Images are not (N, C, H, W) in [0, 1], or the model is in training mode.
    """
    _check(model, images)
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    features = torch.zeros(len(images), len(DESCENT_STEPS), classes, dtype=torch.float64)
    # Descents of one chunk end at different times: several batches of them keep batches full.
    chunk = max(1, 8 * batch_size // classes)
    for start in range(0, len(images), chunk):
        x = images[start : start + chunk]
        for column, (norm, step) in enumerate(DESCENT_STEPS.items()):
            moved = x.repeat_interleave(classes, 0)
            active = torch.arange(len(moved), device=x.device)
            for _ in range(steps):
                going = []
                for part in torch.split(active, batch_size):
                    here, target = moved[part].requires_grad_(), part % classes
                    logits = model(here)
                    open_ = logits.argmax(1) != target
                    loss = functional.cross_entropy(logits, target, reduction="sum")
                    (gradient,) = torch.autograd.grad(loss, here)
                    further = _descend(here.detach()[open_], gradient[open_], norm, step)
                    moved[part[open_]] = further
                    going.append(part[open_])
                active = torch.cat(going)
                if not len(active):
                    break
            delta = (moved - x.repeat_interleave(classes, 0)).flatten(1).double()
            distance = torch.linalg.vector_norm(delta, norm, 1).view(len(x), classes)
            features[start : start + len(x), column] = distance.cpu()
    return features.flatten(1).numpy()


def _descend(x: Tensor, gradient: Tensor, norm: float, step: float) -> Tensor:
    flat, g = x.flatten(1), gradient.flatten(1)
    if norm == 2:
        move = g / torch.linalg.vector_norm(g, 2, 1, keepdim=True).clamp(min=1e-12)
    else:
        move = g.sign()
    if norm == 1:
        free = torch.where(move > 0, flat > 0, flat < 1)
        steepest = (g.abs() * free).topk(min(TOP_K, g.shape[1]), dim=1).indices
        move = torch.zeros_like(move).scatter(1, steepest, move.gather(1, steepest))
    moved: Tensor = (flat - step * move).clamp(0, 1).view_as(x)
    return moved


def _noise(shape: torch.Size, restarts: int, seed: int) -> Tensor:
    """Noise tensors (3 restarts, C, H, W), the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    size = (restarts, *shape)
    uniform = (2 * torch.rand(size, generator=generator) - 1) * UNIFORM
    gaussian = torch.randn(size, generator=generator) * GAUSSIAN
    centred = torch.rand(size, generator=generator, dtype=torch.float64) - 0.5
    laplace = -LAPLACE * centred.sign() * torch.log1p(-2 * centred.abs().clamp(max=0.5 - 1e-12))
    return torch.cat([uniform, gaussian, laplace.float()])


def _check(model: Classifier, images: Tensor) -> None:
    if isinstance(model, nn.Module) and any(module.training for module in model.modules()):
        raise InputError("the model is in training mode: call model.eval() first")
    if images.ndim != 4 or not len(images):
        raise InputError(f"images have shape {tuple(images.shape)}: give (N, C, H, W), N >= 1")
    if not images.is_floating_point() or not bool(((images >= 0) & (images <= 1)).all()):
        raise InputError(
            "images are not floats in [0, 1]: undo the normalisation and put it first in the model"
        )
