import numpy as np
import pytest
import torch
from monai.metrics import compute_dice
from monai.metrics.regression import compute_ssim_and_cs
from torchmetrics.functional.image import peak_signal_noise_ratio

from diffusers_byoc.metrics import codebook_usage, reconstruction_quality


@pytest.fixture
def pair():
    generator = np.random.default_rng(0)
    volumes = np.zeros((2, 2, 16, 16, 16), np.float32)
    volumes[:, :, 4:12, 4:12, 4:12] = 0.8
    volumes += 0.05 * generator.random(volumes.shape, np.float32)
    noisy = np.roll(volumes, 1, -1) * 0.9 + 0.05 * generator.random(volumes.shape, np.float32)
    return volumes, noisy.astype(np.float32)


def test_a_perfect_reconstruction_scores_perfectly(pair):
    found = reconstruction_quality(pair[0], pair[0])
    assert (found.mse == 0).all() and np.isinf(found.psnr).all() and (found.dice == 1).all()
    np.testing.assert_allclose(found.ssim, 1)


def test_the_measures_agree_with_torchmetrics_and_monai(pair):
    found = reconstruction_quality(*pair, thresholds=(0.3, 0.3))
    for index in np.ndindex(2, 2):
        a, b = (torch.from_numpy(x[index])[None, None].double() for x in pair)
        assert found.mse[index] == pytest.approx(torch.nn.functional.mse_loss(a, b).item())
        assert found.psnr[index] == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1.0).item(), rel=1e-5)
        theirs, _ = compute_ssim_and_cs(b, a, 3, (11,) * 3, (1.5,) * 3, data_range=1.0, kernel_type="gaussian")
        assert found.ssim[index] == pytest.approx(theirs.mean().item(), abs=1e-4)
        assert found.dice[index] == pytest.approx(compute_dice((b > 0.3).float(), (a > 0.3).float()).item())


def test_dice_of_a_shifted_box_is_its_overlap():
    volumes = np.zeros((1, 1, 12, 12, 12))
    volumes[..., 2:6, 2:6, 2:6] = 1
    assert reconstruction_quality(volumes, np.roll(volumes, 1, 2)).dice.item() == pytest.approx(0.75)
    assert np.isnan(reconstruction_quality(0 * volumes, 0 * volumes).dice.item())


def test_bad_input_is_refused(pair):
    volumes, noisy = pair
    for arguments, message in (
        ((volumes, noisy[:1]), "Expected reconstructions of shape"),
        ((volumes * 2 - 1, noisy), r"\(volumes \+ 1\) / 2"),
        ((volumes[..., :8], noisy[..., :8]), "at least 11 voxels"),
        ((volumes, noisy, (0.5,)), "a threshold for each of 2 channels"),
        ((volumes[0], noisy[0]), r"\(B, M, D, H, W\)"),
    ):
        with pytest.raises(ValueError, match=message):
            reconstruction_quality(*arguments)


def test_codebook_usage_is_that_of_the_frequencies():
    indices = torch.tensor([[[0, 1, 2, 3], [5, 5, 5, 5]], [[0, 1, 2, 3], [5, 5, 5, 5]]])
    found = codebook_usage(indices, num_codes=8)
    np.testing.assert_allclose(found.usage, [0.5, 0.125])
    np.testing.assert_allclose(found.perplexity, [4, 1])
    with pytest.raises(ValueError, match=r"\[0, 5\)"):
        codebook_usage(indices, num_codes=5)
