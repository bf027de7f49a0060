import numpy as np
import pytest
import torch
import trimesh

from diffusers_byoc.visualization import surface_meshes, write_glb


def ball(center, radius, shape=(24, 24, 24), spacing=(1.0, 1.0, 1.0)):
    grid = np.meshgrid(*[np.arange(n) * step for n, step in zip(shape, spacing, strict=True)], indexing="ij")
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(grid, center, strict=True)))
    return np.clip(radius - distance + 0.5, 0, 1).astype(np.float32)


def cell():
    return np.stack([ball((12, 12, 12), 9), ball((12, 10, 14), 4)])


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 1.0, 0.5)])
def test_a_ball_has_its_size_and_place_in_um(spacing):
    shape = tuple(round(24 / step) for step in spacing)
    ((vertices, triangles),) = surface_meshes(ball((12, 11, 13), 7.0, shape, spacing)[None], spacing, [0.5])
    mesh = trimesh.Trimesh(vertices, triangles)
    assert mesh.is_watertight
    assert abs(mesh.volume) == pytest.approx(4 / 3 * np.pi * 7**3, rel=0.05)
    np.testing.assert_allclose(mesh.center_mass, (12, 11, 13), atol=0.1)


def test_a_cell_that_the_edge_cuts_is_closed_and_an_empty_channel_has_nothing():
    volume = torch.from_numpy(np.stack([ball((0, 12, 12), 8), np.zeros((24,) * 3, np.float32)]))
    (cell_mesh, nothing) = surface_meshes(volume)
    assert trimesh.Trimesh(*cell_mesh).is_watertight
    assert cell_mesh[0].min() >= -1
    assert nothing[0].shape == (0, 3) and nothing[1].shape == (0, 3)


def test_a_model_has_the_channels_by_name_seen_as_a_slice_from_the_front(tmp_path):
    path = write_glb(tmp_path / "new" / "cell.glb", cell(), voxel_size_um=2.0)
    scene = trimesh.load_scene(path)
    assert list(scene.geometry) == ["cell", "nucleus"]
    outer, inner = scene.geometry["cell"], scene.geometry["nucleus"]
    assert outer.volume > inner.volume > 0  # seen from outside
    # of the nucleus at z = 12, y = 10, x = 14, around 11.5, in voxels of 2 µm: x to the right, y down, z away
    np.testing.assert_allclose(inner.center_mass, (5, 3, -1), atol=0.2)
    assert outer.visual.material.alphaMode == "BLEND" and inner.visual.material.alphaMode == "OPAQUE"
    assert outer.visual.material.baseColorFactor[3] == 51
    green, magenta = (mesh.visual.material.baseColorFactor[:3] for mesh in (outer, inner))
    assert green.argmax() == 1 and magenta.argmax() == 0


def test_a_model_leaves_out_a_channel_without_surface(tmp_path):
    volume = cell()
    volume[1] = 0
    assert list(trimesh.load_scene(write_glb(tmp_path / "cell.glb", volume)).geometry) == ["cell"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"volume": np.zeros((2, 8, 8, 8))}, "a channel that has a surface"),
        ({"path": "cell.obj"}, "ends in .glb"),
        ({"channel_names": ("cell",)}, "a name for each of 2 channels"),
        ({"opacities": (0, 1)}, "opacities in"),
        ({"volume": np.zeros((1, 2, 8, 8, 8))}, r"\(M, D, H, W\)"),
    ],
)
def test_what_cannot_be_a_model_is_refused(tmp_path, arguments, message):
    arguments = {"path": "cell.glb", "volume": cell()} | arguments
    path = tmp_path / arguments.pop("path")
    with pytest.raises(ValueError, match=message):
        write_glb(path, **arguments)
    assert not path.exists()
