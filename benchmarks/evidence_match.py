r"""What `remanence search match` finds on the Oxford affine sequences, and on unrelated pairs.

    python benchmarks/evidence_match.py --data ../shared/data

Each first image against the five others of its sequence: inliers, and how far the corners of the
first image land from where the published homography puts them, in pixels of the second. Then every
image of a sequence against the one of the same number of each other sequence, which must not match.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np

from remanence.jobs.search.match import match
from remanence.search.kernel_descriptor.homography import transform

SEQUENCES = ("bikes", "boat", "leuven", "wall")
NEAR = 10  # pixels


def main() -> None:
    """Match all pairs, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    folder = options.data / "oxford_affine"
    near = called = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name in SEQUENCES:
            first = folder / name / "img1.png"
            height, width = cv2.imread(str(first), cv2.IMREAD_GRAYSCALE).shape
            right, bottom = width - 1.0, height - 1.0
            corners = np.array([[0.0, 0.0], [right, 0.0], [right, bottom], [0.0, bottom]])
            for number in range(2, 7):
                second = folder / name / f"img{number}.png"
                found = match(first, second, out=Path(scratch) / f"{name}{number}")
                truth = np.loadtxt(folder / name / f"H1to{number}p")
                truth /= truth[2, 2]  # one file holds minus the homography
                said = "does not match"
                if found.homography is not None:
                    there = transform(np.asarray(found.homography), corners)
                    errors = np.linalg.norm(there - transform(truth, corners), axis=1)
                    near += bool((errors < NEAR).all())
                    said = f"corners off by {errors.min():.1f} to {errors.max():.1f} px"
                print(f"{name} 1-{number}: {said}")
        for one, other in combinations(SEQUENCES, 2):
            for number in range(1, 7):
                pair = [folder / name / f"img{number}.png" for name in (one, other)]
                found = match(*pair, out=Path(scratch) / f"{one}{other}{number}")
                called += found.matched
    print(f"corners within {NEAR} px: {near} of 20 pairs of one scene")
    print(f"called one scene: {called} of 36 pairs of two scenes")


if __name__ == "__main__":
    main()
