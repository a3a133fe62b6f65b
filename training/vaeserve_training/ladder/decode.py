"""Decode saved codes in a process of its own: `python -m vaeserve_training.ladder.decode SYSTEM CODES.npz IMAGES.npz`.

Step 4 runs this: a code that was written to a file is worth something only if another program can read an image from
it. SYSTEM is an entry of the ladder's cache, which says how to build its decoder and holds the weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from vaeserve_training.ladder.cache import load_decoder


def main(arguments: list[str]) -> int:
    """Read the array `codes` (N, D), write the array `images` (N, C, H, W)."""
    system, codes_file, images_file = (Path(argument) for argument in arguments)
    decoder = load_decoder(system)
    with np.load(codes_file, allow_pickle=False) as arrays, torch.no_grad():
        images = decoder(torch.from_numpy(arrays["codes"]))
    np.savez(images_file, images=images.numpy())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
