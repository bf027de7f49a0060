import numpy as np
import pytest
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_byoc import BYOCPipeline, DualChannelUNet3D, MultiCodebookVQModel, TextureUNet3D
from diffusers_byoc.data import CellFolder, PhantomCells, VolumeProcessor
from diffusers_byoc.evaluation import folder_cells, real_cells, suspicions


@pytest.fixture(scope="module")
def cells():
    return PhantomCells(5, VolumeProcessor(sample_size=32), ["nocodazole", "blebbistatin"], seed=7)


def test_rows_of_real_cells_are_made_of_the_same_cells(cells):
    real = real_cells(cells)
    assert real.rows == ("real", "shuffled channels", "blurred")
    assert len(real.labels) == 5 and set(real.labels) == {"blebbistatin", "nocodazole"}
    volumes, shuffled, blurred = (real.volumes([0, 1, 2], row) for row in real.rows)
    np.testing.assert_array_equal(volumes[1], (cells[1]["volumes"].numpy() + 1) / 2)
    np.testing.assert_array_equal(shuffled[:, 0], volumes[:, 0])
    for index in range(3):
        assert not np.array_equal(shuffled[index, 1], volumes[index, 1])
        assert any(np.array_equal(shuffled[index, 1], other) for other in volumes[:, 1])
    assert blurred.std() < volumes.std() and blurred.mean() == pytest.approx(volumes.mean(), rel=1e-3)


def test_real_cells_may_stand_alone(cells):
    alone, real = real_cells(cells, has_controls=False), real_cells(cells)
    assert alone.rows == ("real",) and alone.labels == real.labels
    np.testing.assert_array_equal(alone.volumes([2, 4], "real"), real.volumes([2, 4]))


def test_one_channel_cannot_be_shuffled(tmp_path):
    for index in range(3):
        np.save(tmp_path / f"{index}.npy", np.random.default_rng(index).random((1, 12, 12, 12), np.float32))
    processor = VolumeProcessor(sample_size=16, num_channels=1, channel_names=("cell",))
    assert real_cells(CellFolder(tmp_path, processor)).rows == ("real", "blurred")


def test_an_autoencoder_adds_what_it_makes_of_real_cells(cells):
    autoencoder = MultiCodebookVQModel(
        latent_channels=2, num_vq_embeddings=8, block_out_channels=(4, 8), sample_size=32
    ).eval()
    real = real_cells(cells, autoencoder)
    assert real.rows == ("real", "encoded and decoded", "shuffled channels", "blurred")
    decoded = real.volumes([3], "encoded and decoded")
    expected = autoencoder(cells[3]["volumes"][None]).sample.detach() / 2 + 0.5
    np.testing.assert_allclose(decoded, expected.clamp(0, 1).numpy(), atol=1e-6)
    other = real_cells(cells, MultiCodebookVQModel.from_config(autoencoder.config))
    assert real.variants["encoded and decoded"].identity != other.variants["encoded and decoded"].identity


def test_a_texture_network_adds_what_it_draws(cells):
    autoencoder = MultiCodebookVQModel(
        latent_channels=2, num_vq_embeddings=8, block_out_channels=(4, 8), sample_size=32
    ).eval()
    unet = DualChannelUNet3D(latent_channels=2, sample_size=16, block_out_channels=(8,), attention_head_dim=8)
    texture = TextureUNet3D(block_out_channels=(8,), layers_per_block=(1,)), FlowMatchEulerDiscreteScheduler()
    pipeline = BYOCPipeline(autoencoder, unet, DDPMScheduler(), *texture, default_num_texture_steps=2)
    real = real_cells(cells, autoencoder, pipeline)
    assert real.rows[:3] == ("real", "encoded and decoded", "with texture")
    both = real.volumes([3, 1], "with texture")
    assert both.shape == (2, 2, 32, 32, 32) and both.min() >= 0 and both.max() <= 1
    np.testing.assert_allclose(real.volumes([1], "with texture"), both[1:], atol=1e-6)  # whatever is beside it
    assert np.abs(both - real.volumes([3, 1], "encoded and decoded")).max() > 0.1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: (v * 2 - 1).astype(np.float32), r"Expected floats in \[0, 1\] in .*bad.npy, got \[-1"),
        (lambda v: ((v * 2 - 1) * 32767).astype(np.int16), "Expected integers from 0 in .*bad.npy, got -"),
        (lambda v: np.where(v > 0.5, np.nan, v), "Expected finite intensities in .*bad.npy"),
        (lambda v: v[:1], "bad.npy.*channel"),
    ],
)
def test_volumes_that_are_no_cells_are_an_error_with_the_file(cells, tmp_path, damage, message):
    np.save(tmp_path / "bad.npy", damage(((cells[0]["volumes"] + 1) / 2).numpy()))
    with pytest.raises(ValueError, match=message):
        folder_cells([tmp_path / "bad.npy"], cells.processor).volume(0)


def test_files_that_fill_the_cube_stay_as_they_are_and_crops_are_preprocessed(cells, tmp_path):
    volume = ((cells[0]["volumes"] + 1) / 2).numpy()
    np.save(tmp_path / "a.npy", (volume * 255).astype(np.uint8))
    np.save(tmp_path / "b.npy", volume[:, 2:-2])
    paths = [tmp_path / "a.npy", tmp_path / "b.npy"]
    whole, crop = (folder_cells(paths, cells.processor, ["x", "y"]).volume(index) for index in (0, 1))
    np.testing.assert_allclose(whole, volume, atol=1 / 255)
    np.testing.assert_allclose(crop, (cells.processor.preprocess(volume[:, 2:-2]).numpy() + 1) / 2)


def test_blank_copied_and_dark_volumes_are_named():
    real, generated = np.random.default_rng(0).random((2, 9, 20))
    assert suspicions(generated, real, are_files=True) == []
    generated[:3], generated[5] = 0, generated[4]
    blank, copies, dark = suspicions(generated / 16, real, are_files=True)
    assert blank.startswith("3 of the 9 generated volumes are blank")
    assert copies.startswith("3 of the 9 generated volumes are copies")
    assert dark.startswith("The generated volumes are dark") and "rescale files" in dark
    assert "files" not in suspicions(generated / 16, real, are_files=False)[2]
