"""Top-1 of a 1-nearest-neighbour classifier on the pixels, which a network must at least reach.

python demo/neighbour.py TRAIN VAL        (folders of class folders, images of one size)
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.image import imread


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """float32 [images, pixels] and the class names of all images."""
    files = sorted(folder.glob("*/*.png"))
    pixels = np.stack([imread(file) for file in files])
    return pixels.reshape(len(files), -1).astype(np.float32), np.array([file.parent.name for file in files])


def main(train: Path, val: Path) -> int:
    (known, labels), (queries, truth) = read(train), read(val)
    distances = (queries**2).sum(1)[:, None] - 2 * queries @ known.T + (known**2).sum(1)[None]
    right = labels[distances.argmin(1)] == truth
    print(f"nearest neighbour: top-1 {100 * right.mean():.2f} % ({right.sum()} of {len(right)})")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
