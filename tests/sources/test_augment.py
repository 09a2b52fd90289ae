"""Augmentation moves image and classes together, changes intensities within bounds and repeats exactly."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medisee.sources.augment import (
    augment,
    change_intensity,
    random_places,
    smooth_field,
    warp_classes,
    warp_image,
)


def _blob(shape: tuple[int, int] = (150, 120)) -> np.ndarray:
    """An ellipse off the centre with a notch, so that neither a flip nor a turn maps it onto itself."""
    rows, columns = np.indices(shape)
    blob = ((rows - 70) / 45) ** 2 + ((columns - 52) / 25) ** 2 < 1
    blob[40:60, 50:90] = False
    return blob


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("seed", range(8))
def test_image_and_classes_stay_aligned(seed: int) -> None:
    blob = _blob()
    image, classes = augment(
        (blob * 150).astype(np.uint8), (blob * 3).astype(np.uint8), np.random.default_rng(seed), mirror=True
    )
    inside = classes == 3
    assert _overlap(image > np.median(image[inside]) / 2, inside) > 0.95
    assert _overlap(inside, blob) < 0.95
    assert image.dtype == classes.dtype == np.uint8
    assert image.shape == classes.shape == blob.shape


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_classes_follow_the_largest_linear_weight(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = np.kron(rng.integers(0, 5, (6, 7)), np.ones((8, 8))).astype(np.uint8)
    places = random_places(classes.shape, rng)
    weights = np.stack(
        [ndimage.map_coordinates((classes == n).astype(float), places, order=1, mode="grid-constant") for n in range(5)]
    )
    weights[0] += 1 - weights.sum(axis=0)  # outside is background
    chosen = warp_classes(classes, places)
    np.testing.assert_allclose(
        np.take_along_axis(weights, chosen[None].astype(int), 0)[0], weights.max(axis=0), atol=1e-9
    )


def test_staying_in_place_changes_nothing() -> None:
    blob = _blob()
    places = np.indices(blob.shape, dtype=float)
    np.testing.assert_array_equal(warp_classes(blob.astype(np.uint8), places), blob)
    np.testing.assert_allclose(warp_image((blob * 200).astype(np.uint8), places), blob * 200, atol=1e-6)


def test_far_outside_is_background() -> None:
    places = np.full((2, 10, 10), 1e6)
    full = np.full((10, 10), 7, np.uint8)
    assert not warp_classes(full, places).any()
    assert not warp_classes(full, -places).any()
    assert not warp_image(full, places).any()


@pytest.mark.parametrize("seed", range(10))
def test_movement_is_bounded_and_never_folds(seed: int) -> None:
    shape = (192, 160)
    rng = np.random.default_rng(seed)
    places = random_places(shape, rng)
    down, right = np.gradient(places, axis=1), np.gradient(places, axis=2)
    area = down[0] * right[1] - down[1] * right[0]
    assert area.min() > 0.3
    assert area.max() < 2.5
    center = places[:, shape[0] // 2, shape[1] // 2]
    assert np.abs(center - [shape[0] / 2, shape[1] / 2]).max() < 15
    assert np.abs(smooth_field(shape, (5, 5), rng)).max() < 1.6


def test_air_stays_dark_and_tissue_keeps_its_order() -> None:
    image = np.zeros((80, 80))
    image[20:60, 20:40], image[20:60, 40:60] = 100, 200
    for seed in range(10):
        changed = change_intensity(image, np.random.default_rng(seed)).astype(float)
        assert changed[:15].mean() < 8
        assert changed[20:60, 20:40].mean() + 20 < changed[20:60, 40:60].mean()


def test_black_images_stay_valid() -> None:
    black = np.zeros((30, 40), np.uint8)
    image, classes = augment(black, black, np.random.default_rng(0), mirror=True)
    assert image.max() < 60
    assert not classes.any()


def test_same_state_gives_the_same_result() -> None:
    blob = _blob().astype(np.uint8)
    first, again, other = (
        augment(blob * 99, blob, np.random.default_rng(state), mirror=True) for state in ([5, 1], [5, 1], [5, 2])
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_only_mirrored_planes_are_flipped() -> None:
    left = np.zeros((100, 100), np.uint8)
    left[30:70, 20:40] = 1
    for mirror, least, most in ((False, 12, 12), (True, 2, 10)):
        moved = [augment(left, left, np.random.default_rng(seed), mirror=mirror)[1] for seed in range(12)]
        assert least <= sum(classes[:, :50].sum() > left.sum() / 2 for classes in moved) <= most
