import pytest
import torch

from diffusers_byoc.training.crops import crop_cells


def volumes_with_cell(box):
    volumes = torch.full((1, 2, 16, 16, 16), -1.0)
    volumes[(0, 1, *box)] = torch.rand(volumes[(0, 1, *box)].shape)
    return volumes


@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("box", [(slice(0, 3), slice(5, 9), slice(14, 16)), (slice(6, 8), slice(6, 8), slice(0, 16))])
def test_a_crop_holds_a_part_of_the_cell(place, box):
    crops = crop_cells(volumes_with_cell(box), 8, torch.tensor([place]))
    assert crops.shape == (1, 2, 8, 8, 8)
    assert (crops > -1).any()


def test_every_voxel_of_the_cell_is_in_some_crop():
    volumes = volumes_with_cell((slice(2, 14), slice(1, 15), slice(7, 9)))
    crops = crop_cells(volumes.expand(200, -1, -1, -1, -1), 8, torch.linspace(0, 0.999, 200))
    assert set(volumes[volumes > -1].tolist()) <= set(crops.flatten().tolist())


def test_a_volume_without_a_cell_is_cropped_anywhere():
    crops = crop_cells(torch.full((2, 1, 8, 8, 8), -1.0), 4, torch.tensor([0.0, 0.9]))
    assert crops.shape == (2, 1, 4, 4, 4)


def test_a_crop_must_fit():
    with pytest.raises(ValueError, match="Expected a crop_size of at most 8, the volumes' edge, got 12"):
        crop_cells(torch.zeros(1, 1, 8, 8, 8), 12, torch.zeros(1))


def test_what_belongs_to_a_cell_is_cropped_with_it():
    volumes = volumes_with_cell((slice(0, 3), slice(5, 9), slice(14, 16))).expand(3, -1, -1, -1, -1)
    crops, others = crop_cells(volumes, 8, torch.tensor([0.0, 0.5, 0.9]), volumes[:, :1] - 1)
    assert torch.equal(others, crops[:, :1] - 1)
