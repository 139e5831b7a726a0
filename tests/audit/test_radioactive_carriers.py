import hashlib
import json
import math
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from remanence.audit.radioactive.carriers import (
    SecretKey,
    carriers,
    decoy_carriers,
    recipient_carriers,
)
from remanence.errors import InputError

KEY = SecretKey.from_bytes(bytes(range(32)))


def by_the_book(secret, k, dim, recipient=None, decoy=None):
    """The recipe of the docstring in plain Python, with the C library's log, cos and sin."""
    label = json.dumps(["remanence radioactive carriers 1", dim, recipient, decoy, k]).encode()
    pairs = (dim + 1) // 2
    stream = hashlib.shake_256(secret + label).digest(16 * pairs)
    u = [((w >> 11) + 1) / 2**53 for w in struct.unpack(f"<{2 * pairs}Q", stream)]
    radius = [math.sqrt(-2 * math.log(a)) for a in u[:pairs]]
    angle = [2 * math.pi * b for b in u[pairs:]]
    normal = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
    normal += [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
    normal = normal[:dim]
    norm = math.sqrt(math.fsum(v * v for v in normal))
    return [v / norm for v in normal]


@pytest.mark.parametrize(("dim", "recipient", "decoy"), [(64, None, None), (7, 'a"b', 3)])
def test_an_independent_implementation_gives_the_same_directions(dim, recipient, decoy):
    ours = carriers(KEY, 5, dim, recipient, decoy=decoy)
    book = [by_the_book(KEY.secret, k, dim, recipient, decoy) for k in range(5)]
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, book, rtol=0, atol=4e-15)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-15)


def test_the_bits_are_pinned():
    # Whoever changes these digests makes every published commitment unopenable.
    digest = hashlib.sha256(carriers(KEY, 10, 512).astype("<f8").tobytes()).hexdigest()
    assert digest == "0bc4a09ac8aa8cb6d01ea384c839bdbad018a744a602ce04683b16575a5e15ef"
    digest = hashlib.sha256(carriers(KEY, 3, 65, "Ada").astype("<f8").tobytes()).hexdigest()
    assert digest == "96eb4b297725bb069752af5c44ff2e60e910d27fa30cb8d34e389c187788ffc5"


def test_the_bits_do_not_depend_on_vector_instructions_or_on_the_way_through_torch():
    # NumPy's own log and cos change their last bit with the processor's vector instructions.
    code = (
        "import hashlib; from remanence.audit.radioactive.carriers import SecretKey, carriers;"
        "u = carriers(SecretKey(bytes(range(32))), 10, 512);"
        "print(hashlib.sha256(u.astype('<f8').tobytes()).hexdigest())"
    )
    # The names of NumPy 1.26 and of 2; unknown ones are only warned about.
    off = "AVX2 FMA3 AVX512F AVX512_SKX AVX512_ICL AVX512_SPR X86_V3 X86_V4"
    plain = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={"NPY_DISABLE_CPU_FEATURES": off, "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.strip()
    here = carriers(KEY, 10, 512)
    assert plain == hashlib.sha256(here.astype("<f8").tobytes()).hexdigest()
    assert torch.from_numpy(here).clone().numpy().tobytes() == here.tobytes()
    assert carriers(SecretKey.from_hex(KEY.to_hex()), 10, 512).tobytes() == here.tobytes()


def test_they_are_uniform_on_the_sphere():
    u = carriers(KEY, 3000, 8)
    # A coordinate of a uniform direction: (1 + x) / 2 is Beta((d - 1) / 2, (d - 1) / 2).
    for axis in range(8):
        assert stats.kstest((1 + u[:, axis]) / 2, stats.beta(3.5, 3.5).cdf).pvalue > 1e-3
    # Neither pairs of one Box-Muller draw nor successive classes lean on each other.
    assert np.abs(u.T @ u / 3000 - np.eye(8) / 8).max() < 5 / math.sqrt(3000 * 8 * 8)
    assert stats.kstest((u[1:] * u[:-1]).sum(1) / 2 + 0.5, stats.beta(3.5, 3.5).cdf).pvalue > 1e-3


def test_sets_of_other_names_decoys_keys_and_dimensions_are_unrelated():
    real = carriers(KEY, 10, 512)
    others = [
        carriers(KEY, 10, 512, "a"),
        carriers(KEY, 10, 512, "b"),
        carriers(KEY, 10, 512, ""),
        carriers(SecretKey(bytes(32)), 10, 512),
        carriers(KEY, 10, 513)[:, :512],
        *decoy_carriers(KEY, 10, 512, 3),
    ]
    several = np.concatenate([real, *others])
    cosines = several @ several.T
    assert np.abs(cosines - np.diag(np.diag(cosines))).max() < 6 / math.sqrt(512)


def test_a_class_keeps_its_carrier_when_classes_are_added():
    assert carriers(KEY, 12, 64)[:5].tobytes() == carriers(KEY, 5, 64).tobytes()


@given(st.integers(0, 255), st.binary(max_size=40))
def test_a_commitment_binds_every_bit_of_the_key_and_of_the_manifest(bit, extra):
    published = KEY.commitment(extra)
    assert published == hashlib.sha256(KEY.secret + extra).hexdigest()
    assert KEY.verify(published.upper() + "\n", extra)
    flipped = bytearray(KEY.secret)
    flipped[bit // 8] ^= 1 << bit % 8
    assert not SecretKey(bytes(flipped)).verify(published, extra)
    assert not KEY.verify(published, extra + b"\0")
    assert not KEY.verify("é" + published[1:], extra)


def test_keys_are_fresh_and_never_shown():
    a, b = SecretKey.generate(), SecretKey.generate()
    assert a != b
    assert len(a.secret) == 32
    assert a.to_hex() not in repr(a)
    assert repr(a.secret) not in repr(a)


def test_recipients_need_a_key_each():
    keys = {"Ada": KEY, "Bo": SecretKey(bytes(32))}
    made = recipient_carriers(keys, 10, 64)
    assert made["Ada"].tobytes() == carriers(KEY, 10, 64, "Ada").tobytes()
    with pytest.raises(InputError, match="Ada and Cy share a key: generate one"):
        recipient_carriers(keys | {"Cy": SecretKey(bytes(range(32)))}, 10, 64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: SecretKey(b"short"), "5 bytes"),
        (lambda: SecretKey.from_hex("xy"), "hexadecimal"),
        (lambda: SecretKey.from_hex("00" * 31), "31 bytes"),
        (lambda: carriers(KEY, 0, 64), "K >= 1"),
        (lambda: carriers(KEY, 10, 1), "d >= 2"),
        (lambda: carriers(KEY, 10, 64, decoy=-1), "from 0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(InputError, match=words):
        call()
