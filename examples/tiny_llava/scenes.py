"""Pictures of handwritten digits.

A scene is a 16x16 grey image with 8x8 digits in some of its quadrants `a` (top left), `b` (top
right), `c` (bottom left) and `d` (bottom right). The digits are scikit-learn's.
"""

import random
from functools import cache

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from splits import Split

QUADRANTS = "abcd"
DIGIT_SIZE = 8
TRAIN_DIGITS = 1300  # of 1797
TRAIN_NOISE = 0.1  # standard deviation, on a scale where black is 0 and white is 1


@cache
def _digits(split: Split) -> list[tuple[np.ndarray, int]]:
    """The split's handwritten digits: pixels of shape `(8, 8)` in [0, 1], and the digit."""
    data = load_digits()
    digits = list(zip(data.images / 16, data.target.tolist(), strict=True))
    random.Random(0).shuffle(digits)
    return digits[:TRAIN_DIGITS] if split == "train" else digits[TRAIN_DIGITS:]


def draw_scene(
    rng: np.random.Generator, split: Split, digits: int, contrast: float = 1.0
) -> tuple[Image.Image, dict[str, int]]:
    """Draw a scene with `digits` digits in as many random quadrants.

    Args:
        rng: source of all choices.
        split: which digit images to use; scenes for training also get noise.
        digits: how many of the four quadrants are occupied.
        contrast: 1 is black to white; less shrinks the range towards mid-grey.

    Returns:
        The 16x16 grey image, and the digit in each occupied quadrant, in quadrant order.
    """
    pool = _digits(split)
    canvas = np.zeros((2 * DIGIT_SIZE, 2 * DIGIT_SIZE))
    layout = {}
    for place in sorted(rng.permutation(len(QUADRANTS))[:digits]):
        pixels, digit = pool[rng.integers(len(pool))]
        top, left = DIGIT_SIZE * (place // 2), DIGIT_SIZE * (place % 2)
        canvas[top : top + DIGIT_SIZE, left : left + DIGIT_SIZE] = pixels
        layout[QUADRANTS[place]] = digit
    canvas = 0.5 + contrast * (canvas - 0.5)
    if split == "train":
        canvas += rng.normal(0, TRAIN_NOISE, canvas.shape)
    return Image.fromarray((255 * canvas.clip(0, 1)).round().astype(np.uint8)), layout


def draw_any_scene(rng: np.random.Generator, split: Split) -> tuple[Image.Image, dict[str, int]]:
    """Draw a scene with one to four digits in full contrast, as the upstream tasks show it."""
    return draw_scene(rng, split, digits=int(rng.integers(1, 5)))
