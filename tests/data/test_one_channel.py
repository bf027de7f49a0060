import numpy as np
import pytest

from diffusers_byoc.data import VolumeProcessor, prepare_channel, read_volume, write_volume


def cell(edge=12):
    volume = np.zeros((2, edge, edge, edge), np.float32)
    volume[0, 2:10, 2:10, 3:9], volume[1, 4:8, 4:8, 4:8] = 0.5, 1.0
    return volume


PROCESSOR = VolumeProcessor(16, voxel_size_um=1.0, percentiles=(0, 100))


@pytest.mark.parametrize("names", [("cell", "nucleus"), ("nucleus", "actin")])
def test_the_nucleus_is_found_by_name_and_laid_in_the_middle(tmp_path, names):
    volume = cell() if names[1] == "nucleus" else cell()[::-1]
    path = tmp_path / "cell.ome.tif"
    write_volume(path, volume, 1.0, names)
    nucleus = prepare_channel(read_volume(path), PROCESSOR, "nucleus")
    assert nucleus.shape == (16, 16, 16)
    assert (nucleus > 0.5).nonzero()[0].min() == 6 and (nucleus > 0.5).sum() == 4**3


def test_a_nucleus_alone_is_resampled_to_the_pipeline_s_voxels(tmp_path):
    path = tmp_path / "nucleus.ome.tif"
    write_volume(path, cell()[1:], 2.0, ("DAPI",))
    fixed = VolumeProcessor(
        16, voxel_size_um=1.0, normalization="fixed", intensity_range=((0, 100), (0, 65535)), oversize="crop"
    )
    nucleus = prepare_channel(read_volume(path), fixed, "nucleus")
    assert (nucleus > 0.5).sum() == pytest.approx(8**3, rel=0.2)


def test_what_has_no_nucleus_is_refused(tmp_path):
    path = tmp_path / "cell.npz"
    np.savez(path, volume=np.random.default_rng(0).random((3, 8, 8, 8)))
    with pytest.raises(ValueError, match="Expected the channel nucleus: alone, or named so, got 3 channels"):
        prepare_channel(read_volume(path), PROCESSOR, "nucleus")
    with pytest.raises(ValueError, match="Expected a channel among .*, got actin"):
        prepare_channel(read_volume(path), PROCESSOR, "actin")
