"""Carriers: secret directions, one a class, that anyone can recompute from a published key.

arXiv 2002.00937, Section 3.1, draws each carrier uniformly on the unit sphere. Here they come out
of a 32-byte secret, so that the owner can publish a commitment at marking time and open it in a
dispute: without that, carriers could be chosen after seeing the suspect model.
"""

import hashlib
import hmac
import json
import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from remanence.errors import InputError

Floats = NDArray[np.float64]

KEY_BYTES = 32

# Part of what is hashed: carriers of another recipe can never be taken for these.
_RECIPE = "remanence radioactive carriers 1"


@dataclass(frozen=True)
class SecretKey:
    """The owner's secret; whoever holds it can detect the marks, and could remove them.

    Attributes:
        secret: 32 bytes, kept out of `repr`.

    Raises:
        InputError: the secret does not have 32 bytes.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.secret) != KEY_BYTES:
            raise InputError(
                f"the secret key has {len(self.secret)} bytes: give the {KEY_BYTES} it was made of"
            )

    @classmethod
    def generate(cls) -> Self:
        """Draw a key from the operating system's randomness."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_bytes(cls, secret: bytes) -> Self:
        """Take 32 bytes as the key."""
        return cls(bytes(secret))

    @classmethod
    def from_hex(cls, text: str) -> Self:
        """Read what `to_hex` wrote; surrounding white space is ignored.

        Raises:
            InputError: the text is not 64 hexadecimal digits.
        """
        try:
            secret = bytes.fromhex(text.strip())
        except ValueError as error:
            raise InputError("the secret key is not 64 hexadecimal digits: give the key") from error
        return cls(secret)

    def to_hex(self) -> str:
        """The key as 64 hexadecimal digits."""
        return self.secret.hex()

    def commitment(self, extra: bytes = b"") -> str:
        """SHA-256(secret || extra) in hexadecimal, to publish at marking time.

        Args:
            extra: what is committed to beside the key: the hash of the manifest of marked images.

        Returns:
            64 hexadecimal digits. They tell nothing about the key.
        """
        return hashlib.sha256(self.secret + extra).hexdigest()

    def verify(self, commitment: str, extra: bytes = b"") -> bool:
        """Whether a published commitment is that of this key and this `extra`."""
        published = commitment.strip().lower().encode()
        return hmac.compare_digest(published, self.commitment(extra).encode())


def carriers(
    key: SecretKey,
    num_classes: int,
    dim: int,
    recipient: str | None = None,
    *,
    decoy: int | None = None,
) -> Floats:
    """Derive one direction a class, independent and uniform on the unit sphere.

    SHAKE-256(key, dimension, recipient, decoy, class) -> 53-bit uniforms -> Box-Muller ->
    normalised. Only additions, multiplications, divisions and square roots of float64 are used,
    which IEEE 754 rounds in one way, and correctly rounded sums: the same key gives the same bits
    on every machine and with every version of NumPy. A class's carrier does not depend on
    `num_classes`.

    Args:
        key: the secret.
        num_classes: K, at least 1.
        dim: d, length of the marking network's features, at least 2.
        recipient: name of who gets the marked copy; other names give independent carriers.
        decoy: number of a decoy set, 0 and up, for the black-box test; None for the real set.

    Returns:
        (K, d) float64, unit rows.

    Raises:
        InputError: K, d or `decoy` is out of range.
    """
    if num_classes < 1 or dim < 2:
        raise InputError(
            f"{num_classes} carriers of dimension {dim} cannot be drawn: give K >= 1 and d >= 2"
        )
    if decoy is not None and decoy < 0:
        raise InputError(f"decoy set {decoy} does not exist: number them from 0")
    pairs = (dim + 1) // 2
    words = np.empty((num_classes, 2, pairs), dtype=np.uint64)
    for k in range(num_classes):
        # JSON, so that no two different fields ever run together into the same bytes.
        label = json.dumps([_RECIPE, dim, recipient, decoy, k]).encode()
        stream = hashlib.shake_256(key.secret + label).digest(16 * pairs)
        words[k] = np.frombuffer(stream, dtype="<u8").reshape(2, pairs)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 1) * 2.0**-53  # (0, 1]
    radius = np.sqrt(-2 * _log(uniform[:, 0]))
    cosine, sine = _cos_sin_of_turn(uniform[:, 1])
    normal = np.concatenate([radius * cosine, radius * sine], axis=1)[:, :dim]
    # fsum rounds once, in whatever order a NumPy version would add.
    norms = [math.sqrt(math.fsum(row)) for row in (normal * normal).tolist()]
    return np.asarray(normal / np.array(norms)[:, None])


def decoy_carriers(
    key: SecretKey, num_classes: int, dim: int, count: int, recipient: str | None = None
) -> Iterator[Floats]:
    """Derive the decoy sets 0 .. count - 1 of the black-box test, one (K, d) set at a time.

    They come from the same key, so that a commitment covers them too and nobody can pick them.
    """
    return (carriers(key, num_classes, dim, recipient, decoy=b) for b in range(count))


def recipient_carriers(
    keys: Mapping[str, SecretKey], num_classes: int, dim: int
) -> dict[str, Floats]:
    """Derive the carriers of every recipient, each from a key of their own.

    Args:
        keys: recipient -> key.
        num_classes: K.
        dim: d.

    Returns:
        recipient -> (K, d) carriers, independent of each other.

    Raises:
        InputError: two recipients share a key: opening it against one would expose the other's
            marks.
    """
    owner_of: dict[bytes, str] = {}
    for name, key in keys.items():
        if (other := owner_of.setdefault(key.secret, name)) != name:
            raise InputError(f"{other} and {name} share a key: generate one for each recipient")
    return {name: carriers(key, num_classes, dim, name) for name, key in keys.items()}


def _log(x: Floats) -> Floats:
    """Natural logarithm for x in (0, 1], to about 1e-15, of basic arithmetic only.

    x = m 2^e with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh(z), z = (m - 1) / (m + 1).
    """
    m, e = np.frexp(x)
    low = m < math.sqrt(0.5)
    m, e = np.where(low, 2 * m, m), e - low
    z = (m - 1) / (m + 1)
    return np.asarray(e * _LN2 + 2 * z * _series(z * z, [1 / (2 * j + 1) for j in range(13)]))


def _cos_sin_of_turn(u: Floats) -> tuple[Floats, Floats]:
    """Cosine and sine of 2 pi u for u in [0, 1], of basic arithmetic only.

    The turn is cut into quarters around 0, 1/4, 1/2, 3/4, within which Taylor's series is short.
    """
    quarter = np.floor(4 * u + 0.5)
    angle = (4 * u - quarter) * (_PI / 2)  # [-pi/4, pi/4]; the difference is exact
    square = angle * angle
    cos = _series(square, [(-1) ** j / math.factorial(2 * j) for j in range(10)])
    sin = angle * _series(square, [(-1) ** j / math.factorial(2 * j + 1) for j in range(10)])
    turned = quarter.astype(np.int64) % 4
    return (
        np.choose(turned, [cos, -sin, -cos, sin]),
        np.choose(turned, [sin, cos, -sin, -cos]),
    )


def _series(x: Floats, coefficients: list[float]) -> Floats:
    """Horner's rule, one rounding an operation: no fused steps that machines round differently."""
    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * x
        total = total + coefficient
    return total


_PI = float.fromhex("0x1.921fb54442d18p+1")
_LN2 = float.fromhex("0x1.62e42fefa39efp-1")
