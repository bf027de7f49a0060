from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from conditional import DOSES, latents_of, make_pipeline
from diffusers_byoc.pipelines.interpolation import spherical_path


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_noise_on_the_way_is_as_long_as_noise():
    start, end = torch.randn(2, 8, 16, 16, 16)
    path = spherical_path(start, end, torch.linspace(0, 1, 5))
    torch.testing.assert_close(path[0], start)
    torch.testing.assert_close(path[-1], end, atol=1e-5, rtol=1e-4)
    assert path.std(dim=(1, 2, 3, 4)).numpy() == pytest.approx(1.0, abs=0.02)  # linear: 0.71 in the middle
    angles = [torch.acos(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in pairwise(path)]
    assert np.ptp(angles) < 0.02  # the ends are not quite of one length
    torch.testing.assert_close(spherical_path(start, start, torch.tensor([0.5]))[0], start)


@pytest.mark.parametrize("scheduler", [None, DDPMScheduler])
def test_the_ends_are_the_cells_of_calls(scheduler):
    pipeline = make_pipeline(DOSES)
    if scheduler:
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    frames = pipeline.interpolate(
        5,
        class_labels=["binimetinib", "nocodazole"],
        conditions={"dose_um": [0.0, 6.0]},
        generator=[seeded(1), seeded(2)],
        guidance_scale=2.0,
        output_type="latent",
        batch_size=2,
    )
    assert frames.volumes.shape == (5, 8, 4, 4, 4)
    assert frames.extrapolated == {"dose_um": [False, False, False, True, True]}
    if scheduler is None:  # nothing else is drawn
        for index, label, dose, seed in ((0, "binimetinib", 0.0, 1), (-1, "nocodazole", 6.0, 2)):
            given = {"class_labels": label, "conditions": {"dose_um": dose}, "guidance_scale": 2.0}
            expected = latents_of(pipeline, **given, generator=seeded(seed))[0]
            torch.testing.assert_close(frames.volumes[index], expected, atol=1e-3, rtol=1e-3)


def test_one_generator_is_one_cell_and_two_are_two():
    pipeline, seen = make_pipeline(None), []
    pipeline.unet.register_forward_pre_hook(lambda *x: seen.append(x[1][0]))
    pipeline.interpolate(3, class_labels=[0, 2], generator=seeded(), num_inference_steps=1)
    assert torch.equal(seen[0][0], seen[0][2])
    seen.clear()
    pipeline.interpolate(3, class_labels=1, generator=[seeded(0), seeded(1)], num_inference_steps=1)
    assert not torch.allclose(seen[0][0], seen[0][2])
    noise = torch.randn(2, 8, 4, 4, 4)
    seen.clear()
    pipeline.interpolate(3, class_labels=1, latents=noise, num_inference_steps=1)
    torch.testing.assert_close(seen[0][[0, 2]], noise)


def test_frames_are_volumes_and_the_finer_the_path_the_smaller_the_steps():
    pipeline = make_pipeline(DOSES)
    arguments = {"class_labels": 0, "conditions": {"dose_um": [0.0, 4.0]}, "generator": seeded()}
    volumes = pipeline.interpolate(3, **arguments).volumes
    assert volumes.shape == (3, 2, 8, 8, 8) and volumes.min() >= 0 and volumes.max() <= 1
    arguments |= {"output_type": "latent"}
    steps = []
    for num_frames in (3, 17):
        frames = pipeline.interpolate(num_frames, **arguments | {"generator": seeded()}).volumes
        steps.append(frames.diff(dim=0).flatten(1).norm(dim=1).max())
    assert 0 < steps[1] < 0.5 * steps[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": 1, "generator": seeded()}, "two ends that differ"),
        ({"class_labels": [1, 1], "generator": seeded()}, "two ends that differ"),
        ({"class_labels": 1, "generator": [seeded(), seeded()]}, "two ends that differ"),
        ({"num_frames": 1}, "num_frames of at least 2.*got 1"),
        ({"batch_size": 0}, "batch_size of at least 1.*0"),
        ({"class_labels": [0, 1, 2]}, r"one per sample \(2\), got 3"),
        ({"generator": [seeded()] * 3}, "one for each end, got 3"),
        ({"latents": torch.zeros(3, 8, 4, 4, 4)}, r"latents \(1 or 2, 8, 4, 4, 4\)"),
        ({"latents": torch.zeros(2, 8, 4, 4, 4), "generator": [seeded(), seeded()]}, "at most one generator"),
        (
            {"class_labels": 1, "latents": torch.tensor([1.0, -1]).view(2, 1, 1, 1, 1).expand(2, 8, 4, 4, 4)},
            "its opposite",
        ),
        ({"conditions": {"dose_um": [0, 1, 2]}}, r"one per sample \(2\), got 3"),
        ({"class_labels": [0, 1], "conditions": {"time_h": 3}}, "names .'dose_um'.*got .'time_h'"),
    ],
)
def test_paths_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(DOSES).interpolate(**arguments)
