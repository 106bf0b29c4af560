"""LIBERO-Plus's noise on the first view's pictures: three of its five kinds of blur, in ten strengths each.

The kinds and strengths are LIBERO-Plus's, after ImageNet-C (Hendrycks and Dietterich, "Benchmarking Neural Network
Robustness to Common Corruptions and Perturbations", 2019). Its motion blur needs ImageMagick, and its fog fails with
NumPy 2. Pictures are those that robosuite renders, upside down; glass blur draws from NumPy's global generator, which
LIBERO seeds.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geomcache.errors import UserInputError

KINDS = ("motion blur", "gaussian blur", "zoom blur", "fog", "glass blur")
STRENGTHS = 10
_ZOOM_TOP_STEP = ((11, 1), (16, 1), (21, 2), (26, 2), (31, 3), (36, 1), (41, 1), (46, 2), (51, 2), (56, 3))  # percent
_GLASS = (  # sigma, reach in pixels, rounds
    *((0.5, 1, 3), (0.7, 1, 3), (0.9, 2, 3), (1.0, 2, 2), (1.1, 3, 2), (1.3, 3, 2), (1.5, 4, 2), (1.8, 4, 2)),
    *((2.2, 5, 1), (2.5, 5, 1)),
)
_GLASS_SIDE = 224  # pixels: what LIBERO-Plus shuffles, whatever the picture's size

Noise = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""Changes a picture [H, W, 3]."""


def kind_of(number: int) -> str:
    """Return the kind of a noise, by its number in a variant's name, 1 to 50."""
    return KINDS[(number - 1) // STRENGTHS]


def noise_of(number: int) -> Noise:
    """Return a noise by its number in a variant's name.

    Raises:
        UserInputError: its kind cannot be made here.
    """
    kind, strength = kind_of(number), (number - 1) % STRENGTHS
    makers: dict[str, Callable[[int], Noise]] = {
        "gaussian blur": gaussian_blur,
        "zoom blur": zoom_blur,
        "glass blur": glass_blur,
    }
    if kind not in makers:
        raise UserInputError(f"noise {number}: expected {', '.join(makers)}, got {kind}, which cannot be made here")
    return makers[kind](strength)


def can_be_made(number: int) -> bool:
    """Return whether a noise's kind is one that this module has."""
    return kind_of(number) in ("gaussian blur", "zoom blur", "glass blur")


def gaussian_blur(strength: int) -> Noise:
    """Return a blur with a standard deviation of `strength` + 1 pixels."""

    def blur(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return _to_uint8(_smooth(picture / 255.0, strength + 1))

    return blur


def zoom_blur(strength: int) -> Noise:
    """Return the mean of a picture and its magnifications up to a factor of about 1 + 0.05 (`strength` + 2)."""
    top, step = _ZOOM_TOP_STEP[strength]

    def blur(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        from scipy.ndimage import zoom

        pixels = (picture / 255.0).astype(np.float32)
        height = len(pixels)
        total = np.zeros_like(pixels)
        factors = np.arange(1, 1 + top / 100, step / 100)
        for factor in factors:
            side = int(np.ceil(height / float(factor)))
            corner = (height - side) // 2
            middle = pixels[corner : corner + side, corner : corner + side]
            larger = zoom(middle, (factor, factor, 1), order=1)
            trim = (len(larger) - height) // 2
            total += larger[trim : trim + height, trim : trim + height]
        return _to_uint8((pixels + total) / (len(factors) + 1))

    return blur


def glass_blur(strength: int) -> Noise:
    """Return a blur that gives each pixel the value of a random neighbour, between two gaussian ones."""
    sigma, reach, rounds = _GLASS[strength]

    def blur(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if min(picture.shape[:2]) < _GLASS_SIDE:
            raise UserInputError(
                f"glass blur: expected pictures of at least {_GLASS_SIDE} pixels a side, got"
                f" {picture.shape[0]}x{picture.shape[1]}: set --env.observation_height and --env.observation_width"
            )
        pixels = np.uint8(_smooth(picture / 255.0, sigma) * 255)
        rows: Any = pixels.tolist()  # single pixels are faster in lists
        places = range(_GLASS_SIDE - reach, reach, -1)
        for _ in range(rounds):
            # LIBERO seeds the global generator, and LIBERO-Plus draws from it.
            offsets = np.random.randint(-reach, reach, size=(len(places) ** 2, 2)).tolist()  # noqa: NPY002
            moves = iter(offsets)
            for row in places:
                line = rows[row]
                for column in places:
                    across, down = next(moves)
                    line[column] = rows[row + down][column + across]
        return _to_uint8(_smooth(np.array(rows, np.uint8) / 255, sigma))

    return blur


def _smooth(pixels: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """Blur [H, W, 3] with a gaussian, each channel by itself, the edges repeated."""
    from scipy.ndimage import gaussian_filter

    smooth: NDArray[np.float64] = gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest", truncate=4.0)
    return smooth


def _to_uint8(pixels: NDArray[np.floating]) -> NDArray[np.uint8]:
    return (np.clip(pixels, 0, 1) * 255).astype(np.uint8)
