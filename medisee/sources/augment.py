"""Random but repeatable changes to a slice that a scanner, a posture or another head could have made."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy import ndimage

ROTATION = np.deg2rad(12)
SCALE = 0.12
SHEAR = 0.06
SHIFT = 8.0  # px
ELASTIC = 4.0  # px
ELASTIC_GRID = (5, 5)
GAMMA = (0.7, 1.4)
BIAS = 0.2
BIAS_GRID = (4, 4)
NOISE = 8.0  # grey levels
CONTRAST = 0.1


def augment(
    image: NDArray[np.uint8], classes: NDArray[np.uint8], rng: Generator, *, mirror: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Warps a picture, grey (h, w) or RGB (h, w, 3), and its class numbers (h, w) together, then changes its intensities.

    `mirror` says that the slice may be flipped left to right, which is only right where both sides look alike.
    """
    if mirror and rng.random() < 0.5:
        image, classes = image[:, ::-1], classes[:, ::-1]
    places = random_places(classes.shape, rng)
    return change_intensity(warp_image(image, places), rng), warp_classes(classes, places)


def random_places(shape: tuple[int, ...], rng: Generator) -> NDArray[np.float64]:
    """Draws an affine and a smooth elastic motion: (2, h, w), the input's (row, column) in pixels for each output pixel."""
    angle = rng.uniform(-ROTATION, ROTATION)
    zoom = rng.uniform(1 - SCALE, 1 + SCALE)
    shear = np.eye(2) + np.diag(rng.uniform(-SHEAR, SHEAR, 1), 1)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    center = (np.array(shape) - 1) / 2
    grid = np.indices(shape, dtype=np.float64)
    shift = center + rng.uniform(-SHIFT, SHIFT, 2)
    places = np.tensordot(turn @ shear / zoom, grid - center[:, None, None], axes=1) + shift[:, None, None]
    return places + np.stack([smooth_field(shape, ELASTIC_GRID, rng) * ELASTIC for _ in range(2)])


def smooth_field(shape: tuple[int, ...], grid: tuple[int, int], rng: Generator) -> NDArray[np.float64]:
    """Returns a smooth random field (h, w) through values within -1..1 on a coarse grid."""
    coarse = rng.uniform(-1, 1, grid)
    zoom = [size / cells for size, cells in zip(shape, grid, strict=True)]
    return np.asarray(ndimage.zoom(coarse, zoom, order=3))


def warp_image(image: NDArray[np.uint8], places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Samples an image, (h, w) or (h, w, 3), at places (2, h, w) by cubic splines; outside is 0. Returns levels 0..255."""
    if image.ndim == 3:
        return np.stack([warp_image(channel, places) for channel in np.moveaxis(image, 2, 0)], axis=2)
    return np.clip(ndimage.map_coordinates(image.astype(np.float64), places, order=3), 0, 255)


def warp_classes(classes: NDArray[np.uint8], places: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Samples class numbers (h, w) at places (2, h, w); outside is 0.

    Each pixel gets the class with the largest bilinear weight among its four neighbours: the same as warping every
    class' mask linearly and taking the largest, without a warp per class.
    """
    padded = np.pad(classes, 1)
    limits = np.array(classes.shape)[:, None, None]
    inside = np.clip(places, -1, limits) + 1
    corner = np.minimum(inside.astype(int), limits)
    (row, column), (down, right) = corner, inside - corner
    neighbours = np.stack([padded[row + i, column + j] for i in (0, 1) for j in (0, 1)])
    weights = np.stack([a * b for a in (1 - down, down) for b in (1 - right, right)])
    votes = np.stack([(weights * (neighbours == one)).sum(axis=0) for one in neighbours])
    return np.take_along_axis(neighbours, votes.argmax(axis=0)[None], axis=0)[0]


def change_intensity(image: NDArray[np.float64], rng: Generator) -> NDArray[np.uint8]:
    """Applies gamma, a bias field, contrast, brightness and noise to levels 0..255, (h, w) or (h, w, 3)."""
    # Air and fluid stay black: only what has signal gets brighter, fading in to leave no edge.
    tissue = np.clip(image / 32, 0, 1)
    image = 255 * (image / 255) ** rng.uniform(*GAMMA)
    bias = 1 + BIAS * smooth_field(image.shape[:2], BIAS_GRID, rng)
    image = image * (bias if image.ndim == 2 else bias[..., None])
    mean = np.average(image, weights=tissue + 1e-6)
    contrast, brightness = rng.uniform(-CONTRAST, CONTRAST, 2)
    image = image + tissue * ((image - mean) * contrast + 255 * brightness)
    image = image + rng.normal(0, rng.uniform(0, NOISE), image.shape)
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)
