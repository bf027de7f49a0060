import numpy as np
import pytest
import pywt
from scipy.ndimage import gaussian_filter, gaussian_laplace
from skimage.feature import graycomatrix, graycoprops

from diffusers_byoc.metrics import texture_features, texture_names
from diffusers_byoc.metrics.texture import DIRECTIONS, pair_measures


def ball(size=32, radius=12):
    z, y, x = np.indices((size,) * 3) - (size - 1) / 2
    return z**2 + y**2 + x**2 <= radius**2


def grained(sigma=1.0, seed=0):
    grain = gaussian_filter(np.random.default_rng(seed).normal(size=(32, 32, 32)), sigma)
    return (0.5 + 0.1 * grain / grain.std()).clip(0, 1)


def column(features, name, names=None):
    return features[(names or texture_names(["cell"])).index(f"cell_{name}")]


def test_each_column_has_a_name_of_its_own():
    names = texture_names(["cell", "nucleus"])
    features = texture_features(np.stack([grained(), grained(2)]), [ball(), ball(radius=8)])
    assert features.shape == (len(names),) and len(set(names)) == len(names) and np.isfinite(features).all()


def test_pairs_in_a_plane_are_those_of_scikit_image():
    levels = np.random.default_rng(0).integers(0, 16, (1, 9, 11))
    levels[0, 0, :2] = 0, 15  # the whole range
    contrast, homogeneity, correlation, energy, entropy = pair_measures(
        levels / 15.000001, np.ones_like(levels, dtype=bool)
    )
    # one plane has four of the thirteen directions; their pairs are pooled
    angles = (0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
    matrix = graycomatrix(levels[0].astype(np.uint8), [1], angles, 16, symmetric=True).sum(3, keepdims=True)
    for value, measure in ((contrast, "contrast"), (homogeneity, "homogeneity"), (energy, "energy")):
        assert value == pytest.approx(graycoprops(matrix, measure)[0, 0]), measure
    assert correlation == pytest.approx(graycoprops(matrix, "correlation")[0, 0])
    p = matrix[matrix > 0] / matrix.sum()
    assert entropy == pytest.approx(-(p * np.log2(p)).sum())


def test_pairs_are_counted_in_thirteen_directions_and_inside_the_mask_only():
    assert len(DIRECTIONS) == 13 and all(tuple(-np.array(d)) not in DIRECTIONS for d in DIRECTIONS)
    channel = np.zeros((4, 4, 4))
    channel[:2], channel[2:] = 0.25, 0.75
    mask = np.zeros((4, 4, 4), bool)
    mask[1:3, 1, 1] = True  # one pair, of the lowest and the highest level
    assert pair_measures(channel, mask)[0] == pytest.approx(15**2)
    # outside the mask anything may stand
    other = np.where(mask, channel, 0.9)
    np.testing.assert_array_equal(pair_measures(other, mask), pair_measures(channel, mask))
    alone = np.zeros((4, 4, 4), bool)
    alone[0, 0, 0] = True
    assert np.isnan(pair_measures(channel, alone)).all()


def test_mirrored_cells_have_the_same_pairs_and_spots():
    channel, mask = grained(), ball(radius=9)
    features = texture_features(channel[None], [mask])
    mirrored = texture_features(channel[None, ::-1].copy(), [mask])
    same = [i for i, name in enumerate(texture_names(["cell"])) if "wavelet" not in name]
    np.testing.assert_allclose(mirrored[same], features[same], rtol=1e-6, atol=1e-9)


def test_spots_answer_at_their_own_scale():
    by_scale = {}
    for sigma in (1.0, 3.0):
        features = texture_features(grained(sigma)[None], [ball()])
        by_scale[sigma] = [column(features, f"spots_{scale}_std") for scale in (1, 3)]
    assert by_scale[1.0][0] > by_scale[1.0][1] and by_scale[3.0][0] < by_scale[3.0][1]
    response = (gaussian_laplace(grained(), 1.0))[ball()]
    assert column(texture_features(grained()[None], [ball()]), "spots_1_std") == pytest.approx(response.std())


def test_wavelets_part_stripes_by_their_axis():
    x = np.indices((32, 32, 32))[2]
    features = texture_features((0.5 + 0.1 * (-1.0) ** x)[None], [ball()])
    bands = {band: column(features, f"wavelet_{band}_energy") for band in ("LLH", "LHL", "HLL", "HHH")}
    assert bands["LLH"] > max(bands["LHL"], bands["HLL"], bands["HHH"]) + 5
    # of white noise, each high band has the variance times the filter's energy in each axis
    noise = 0.5 + np.random.default_rng(0).normal(0, 0.1, (32, 32, 32))
    gain = np.sum(np.square(pywt.Wavelet("coif1").dec_hi)) ** 3
    energy = column(texture_features(noise[None], [ball()]), "wavelet_HHH_energy")
    assert 10**energy == pytest.approx(0.01 * gain, rel=0.1)


def test_an_empty_channel_is_nan_and_the_other_is_not():
    features = texture_features(np.stack([grained(), grained()]), [ball(), ball() & False])
    half = len(features) // 2
    assert np.isfinite(features[:half]).all() and np.isnan(features[half:]).all()


def test_a_flat_channel_is_finite_where_it_is_defined():
    features = texture_features(np.full((1, 32, 32, 32), 0.5), [ball()])
    assert column(features, "pairs_1_contrast") == 0 and column(features, "wavelet_HHH_energy") == -12
    assert not np.isinf(features).any()


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match=r"M masks, got \(2, 8, 8, 8\) and 1"):
        texture_features(np.zeros((2, 8, 8, 8)), [np.zeros((8, 8, 8), bool)])
