import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline

from diffusers_byoc import BYOCPipeline, DualChannelUNet3D, MultiCodebookVQModel, VolumeProcessor


def make_pipeline(num_channels=2, num_class_embeds=None, norm_num_groups=None, num_quantizers=1, **config):
    torch.manual_seed(0)
    vqvae = MultiCodebookVQModel(
        num_channels=num_channels,
        latent_channels=4,
        num_vq_embeddings=16,
        num_quantizers=num_quantizers,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=norm_num_groups,
        sample_size=8,
    )
    vqvae.initialize_codebooks(torch.randn(4, 4 * num_channels, 4, 4, 4))
    unet = DualChannelUNet3D(
        num_channels=num_channels,
        latent_channels=4,
        sample_size=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=norm_num_groups,
        attention_head_dim=4,
        num_class_embeds=num_class_embeds,
    )
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    pipeline = BYOCPipeline(vqvae.eval(), unet.eval(), scheduler, default_num_inference_steps=3, **config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline():
    return make_pipeline()


@pytest.fixture
def labelled():
    return make_pipeline(num_class_embeds=3, label2id={"binimetinib": 0, "blebbistatin": 1, "nocodazole": 2})


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("num_channels", [1, 2, 3])
@pytest.mark.parametrize("norm_num_groups", [None, 4])
def test_volumes_have_all_channels_and_lie_in_the_unit_interval(num_channels, norm_num_groups):
    pipeline = make_pipeline(num_channels, norm_num_groups=norm_num_groups)
    volumes = pipeline(num_samples=2, generator=seeded()).volumes
    assert isinstance(volumes, np.ndarray)
    assert volumes.shape == (2, num_channels, 8, 8, 8)
    assert volumes.dtype == np.float32
    assert volumes.min() >= 0
    assert volumes.max() <= 1
    assert volumes.std() > 0


def test_output_types_agree(pipeline):
    volumes = pipeline(generator=seeded()).volumes
    tensor = pipeline(generator=seeded(), output_type="pt").volumes
    latents = pipeline(generator=seeded(), output_type="latent").volumes
    (first,) = pipeline(generator=seeded(), return_dict=False)
    assert np.array_equal(volumes, tensor.numpy())
    assert np.array_equal(volumes, first)
    assert latents.shape == (1, 8, 4, 4, 4)
    decoded = pipeline.vqvae.decode(pipeline.vqvae.denormalize_latents(latents)).sample.detach()
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), tensor)


def test_the_seed_decides(pipeline):
    first, again, other = (pipeline(generator=seeded(seed)).volumes for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_voxel_size_is_saved_with_the_pipeline(tmp_path):
    # a config with a value changed since its processor was made: the change must not be lost
    config = dict(VolumeProcessor(8, oversize="crop").config) | {"voxel_size_um": (0.65, 0.65, 0.65)}
    make_pipeline(volume_processor_config=config).save_pretrained(tmp_path)
    processor = BYOCPipeline.from_pretrained(tmp_path).volume_processor
    assert processor.voxel_size_um == (0.65, 0.65, 0.65)
    assert processor.config.sample_size == 8 and processor.config.oversize == "crop"


def test_a_pipeline_that_knows_no_processor_has_that_of_its_autoencoder():
    processor = make_pipeline(num_channels=3).volume_processor
    assert processor.voxel_size_um is None and processor.config.sample_size == 8
    assert list(processor.config.channel_names) == ["channel_0", "channel_1", "channel_2"]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_a_samples_own_generator_gives_it_alone_or_in_a_batch(pipeline, scheduler):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    together = pipeline(num_samples=3, generator=[seeded(k) for k in range(3)], output_type="latent").volumes
    for k in range(3):
        alone = pipeline(generator=seeded(k), output_type="latent").volumes[0]
        torch.testing.assert_close(together[k], alone, atol=1e-4, rtol=1e-4)


def test_given_latents_replace_the_noise(pipeline):
    noise = torch.randn(2, 8, 4, 4, 4)
    untouched = noise.clone()
    first, again = (pipeline(num_samples=2, latents=noise).volumes for _ in range(2))
    assert np.array_equal(first, again)
    assert torch.equal(noise, untouched)
    drawn = pipeline(num_samples=2, generator=seeded(5)).volumes
    given = pipeline(num_samples=2, latents=torch.randn(2, 8, 4, 4, 4, generator=seeded(5))).volumes
    assert np.array_equal(drawn, given)


def test_whole_numbers_of_numpy_are_whole_numbers(pipeline):
    expected = pipeline(num_samples=2, num_inference_steps=2, generator=seeded()).volumes
    arguments = {"num_samples": np.int64(2), "num_inference_steps": np.int32(2)}
    assert np.array_equal(pipeline(**arguments, generator=seeded()).volumes, expected)


def test_the_number_of_samples_is_that_of_what_is_given_for_each(pipeline):
    assert len(pipeline().volumes) == 1
    assert len(pipeline(latents=torch.randn(3, 8, 4, 4, 4)).volumes) == 3
    assert len(pipeline(generator=[seeded(), seeded()]).volumes) == 2


def test_what_predict_returns_is_what_is_denoised_with(pipeline):
    noise = torch.randn(1, 8, 4, 4, 4)
    asked = []

    class Guided(BYOCPipeline):
        def predict(self, latents, timestep, class_labels=None):
            asked.append((int(timestep), latents.dtype, class_labels))
            return 2 * super().predict(latents, timestep, class_labels)

    guided = Guided.from_pipe(pipeline)
    guided.set_progress_bar_config(disable=True)
    latents = guided(latents=noise, output_type="latent").volumes
    assert asked == [(int(timestep), torch.float32, None) for timestep in pipeline.scheduler.timesteps]
    expected = noise
    for timestep in pipeline.scheduler.timesteps:
        with torch.no_grad():
            prediction = 2 * pipeline.unet(expected, timestep).sample
        expected = pipeline.scheduler.step(prediction, timestep, expected).prev_sample
    torch.testing.assert_close(latents, expected)


def test_the_default_number_of_steps_is_the_pipelines(pipeline):
    pipeline()
    assert pipeline.num_timesteps == 3
    pipeline(num_inference_steps=5)
    assert pipeline.num_timesteps == 5


def test_callbacks_see_and_replace_the_latents(pipeline):
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else tensors

    latents = pipeline(num_samples=2, callback_on_step_end=callback, output_type="latent").volumes
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [timestep for _, timestep, _ in seen] == pipeline.scheduler.timesteps.tolist()
    assert {shape for _, _, shape in seen} == {(2, 8, 4, 4, 4)}
    assert latents.abs().sum() == 0


def test_class_labels_by_name_and_index(labelled):
    def sample(labels, num_samples=2):
        return labelled(num_samples, class_labels=labels, generator=[seeded(3), seeded(3)]).volumes

    by_name = sample(["blebbistatin", "nocodazole"])
    assert np.array_equal(by_name, sample([1, 2]))
    assert np.array_equal(by_name, sample(torch.tensor([1, 2])))
    assert np.array_equal(by_name, sample(np.array([1, 2])))
    assert np.array_equal(by_name, sample([np.int64(1), "nocodazole"]))
    assert np.array_equal(by_name, sample(["blebbistatin", 2], num_samples=None))  # a label per cell says how many
    assert not np.array_equal(by_name[0], by_name[1])
    same = sample("nocodazole")
    np.testing.assert_allclose(same[0], same[1], atol=1e-5)
    np.testing.assert_allclose(same[0], by_name[1], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples of at least 1, got 0"),
        ({"num_samples": -3}, "num_samples of at least 1, got -3"),
        ({"num_samples": 1.5}, "num_samples of at least 1, got 1.5"),
        ({"num_inference_steps": 0}, "num_inference_steps of at least 1, got 0"),
        ({"output_type": "pil"}, "got 'pil'"),
        ({"latents": torch.zeros(1, 8, 5, 4, 4)}, r"\(1, 8, 4, 4, 4\).*got \(1, 8, 5, 4, 4\)"),
        ({"num_samples": 2, "latents": torch.zeros(1, 8, 4, 4, 4)}, r"\(2, 8, 4, 4, 4\).*got \(1, 8, 4, 4, 4\)"),
        ({"num_samples": 3, "generator": [seeded(), seeded()]}, r"one per sample \(3\), got 2"),
        ({"class_labels": 1}, "Expected no class_labels, got 1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"among \['latents'\], got \['noise'\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Expected class_labels .*3 classes.*got None.*nocodazole"),
        ({"class_labels": "taxol"}, r"one of \['binimetinib', 'blebbistatin', 'nocodazole'\], got 'taxol'"),
        ({"class_labels": 3}, r"\[0, 3\).*got 3"),
        ({"class_labels": -1}, r"\[0, 3\).*got -1"),
        ({"class_labels": [0, 1], "num_samples": 3}, r"one per sample \(3\), got 2"),
        ({"class_labels": [0, 1], "num_samples": 1}, r"one per sample \(1\), got 2"),
        ({"class_labels": [0, 1.5]}, r"\[0, 3\).*got 1.5"),
        ({"class_labels": []}, "num_samples of at least 1, got 0"),
    ],
)
def test_class_labels_that_do_not_fit_are_refused(labelled, arguments, message):
    with pytest.raises(ValueError, match=message):
        labelled(**arguments)


def test_save_and_load_are_identical(labelled, tmp_path):
    expected = labelled(class_labels="nocodazole", generator=seeded()).volumes
    labelled.save_pretrained(tmp_path)
    loaded = BYOCPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert np.array_equal(loaded(class_labels="nocodazole", generator=seeded()).volumes, expected)
    assert loaded.config.default_num_inference_steps == 3
    assert dict(loaded.config.label2id) == {"binimetinib": 0, "blebbistatin": 1, "nocodazole": 2}
    index = BYOCPipeline.load_config(tmp_path)
    assert index["unet"] == ["diffusers_byoc", "DualChannelUNet3D"]
    assert index["vqvae"] == ["diffusers_byoc", "MultiCodebookVQModel"]


def test_residual_codebooks_are_part_of_the_pipeline(tmp_path):
    pipeline = make_pipeline(num_quantizers=2)
    pipeline.save_pretrained(tmp_path)
    loaded = BYOCPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    volumes = pipeline(generator=seeded()).volumes
    assert np.array_equal(loaded(generator=seeded()).volumes, volumes)
    latents = pipeline(generator=seeded(), output_type="latent").volumes
    quantized = pipeline.vqvae.quantize(pipeline.vqvae.denormalize_latents(latents)).latents
    decoded = pipeline.vqvae.decode(quantized, force_not_quantize=True).sample.detach()
    np.testing.assert_allclose((decoded / 2 + 0.5).clamp(0, 1).numpy(), volumes, atol=1e-5)


def test_the_generic_class_loads_it_in_a_fresh_process(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "saved")
    script = f"""
import numpy, torch, diffusers, diffusers_byoc
pipeline = diffusers.DiffusionPipeline.from_pretrained({str(tmp_path / "saved")!r})
assert type(pipeline) is diffusers_byoc.BYOCPipeline, type(pipeline)
pipeline.set_progress_bar_config(disable=True)
numpy.save({str(tmp_path / "volumes.npy")!r}, pipeline(generator=torch.Generator().manual_seed(0)).volumes)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    np.testing.assert_allclose(np.load(tmp_path / "volumes.npy"), pipeline(generator=seeded()).volumes, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipeline, dtype, tmp_path):
    expected = pipeline(generator=seeded(), output_type="latent").volumes
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert {path.suffix for path in tmp_path.rglob("diffusion_pytorch_model*")} == {".safetensors"}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16", dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.unet.dtype == loaded.vqvae.dtype == dtype
    latents = loaded(generator=seeded(), output_type="latent").volumes
    assert latents.dtype == torch.float32
    assert (latents - expected).abs().max() < 0.1 * expected.abs().max()
    volumes = loaded(generator=seeded()).volumes
    assert volumes.dtype == np.float32
    assert np.isfinite(volumes).all()


def test_from_pipe_shares_the_components(pipeline):
    assert set(pipeline.components) == {"vqvae", "unet", "scheduler"}
    other = BYOCPipeline.from_pipe(pipeline)
    assert other.unet is pipeline.unet
    assert other.config.default_num_inference_steps == 3
    other.set_progress_bar_config(disable=True)
    assert np.array_equal(other(generator=seeded()).volumes, pipeline(generator=seeded()).volumes)


def test_slices_and_tiles_leave_the_volumes_alone(pipeline):
    arguments = {"num_samples": 2, "output_type": "pt"}
    expected = pipeline(**arguments, generator=seeded()).volumes
    pipeline.vqvae.enable_slicing()
    pipeline.vqvae.enable_tiling()
    torch.testing.assert_close(pipeline(**arguments, generator=seeded()).volumes, expected)


def test_models_can_wait_off_the_device(pipeline):
    expected = pipeline(generator=seeded()).volumes
    offloaded = copy.deepcopy(pipeline)
    offloaded.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert np.array_equal(offloaded(generator=seeded()).volumes, expected)


def test_group_offloading(pipeline, tmp_path):
    expected = pipeline(generator=seeded()).volumes
    for offload_type in ("leaf_level", "block_level"):
        offloaded = copy.deepcopy(pipeline)
        for name in ("unet", "vqvae"):
            getattr(offloaded, name).enable_group_offload(
                torch.device("cpu"),
                offload_type=offload_type,
                num_blocks_per_group=1,
                offload_to_disk_path=str(tmp_path / offload_type / name),
            )
        # Offloaded to files, the weights in memory are not the weights: nothing may be read outside a forward pass.
        for parameter in [*offloaded.unet.parameters(), *offloaded.vqvae.parameters()]:
            parameter.data.fill_(torch.nan)
        np.testing.assert_allclose(offloaded(generator=seeded()).volumes, expected, atol=1e-5)


def test_the_progress_bar_can_be_configured(pipeline, capsys):
    pipeline(num_inference_steps=2)
    assert capsys.readouterr().err == ""
    pipeline.set_progress_bar_config(disable=False, desc="cells")
    pipeline(num_inference_steps=2)
    assert "cells: 100%" in capsys.readouterr().err


def test_the_ablations_of_one_training_differ_in_the_range_of_the_latents_alone(pipeline, tmp_path):
    """Figure 6: BYOC, absolute, cell and nucleus (`docs/ablation.md`)."""
    with torch.no_grad():
        pipeline.vqvae.codebooks[1].embedding.mul_(3.0).add_(10.0)  # neither range holds the other
    n = pipeline.vqvae.config.latent_channels
    (normalized,) = pipeline(1, generator=seeded(), output_type="latent", return_dict=False)
    ranges = [codebook.range for codebook in pipeline.vqvae.codebooks]
    lows, highs = zip(*ranges, strict=True)
    volumes = {}
    for latent_range, (cell, nucleus) in {
        "per_channel": ranges,
        "absolute": [(min(lows), max(highs))] * 2,
        "cell": [ranges[0]] * 2,
        "nucleus": [ranges[1]] * 2,
    }.items():
        pipeline.vqvae.register_to_config(latent_range=latent_range)
        pipeline.save_pretrained(tmp_path / latent_range)
        loaded = BYOCPipeline.from_pretrained(tmp_path / latent_range)
        loaded.set_progress_bar_config(disable=True)
        volumes[latent_range] = loaded(1, generator=seeded()).volumes
        (same,) = loaded(1, generator=seeded(), output_type="latent", return_dict=False)
        torch.testing.assert_close(same, normalized)  # the diffusion is that of the one training
        low, high = (
            torch.stack(ends).repeat_interleave(n).view(-1, 1, 1, 1) for ends in zip(cell, nucleus, strict=True)
        )
        decoded = loaded.vqvae.decode((same + 1) / 2 * (high - low) + low).sample
        np.testing.assert_allclose(volumes[latent_range], (decoded.detach() / 2 + 0.5).clamp(0, 1), atol=1e-5)
    assert len({volume.tobytes() for volume in volumes.values()}) == 4


def test_one_codebook_for_all_channels_makes_cells():
    pipeline = make_pipeline()
    config = dict(pipeline.vqvae.config) | {"share_codebook": True}
    vqvae = MultiCodebookVQModel.from_config(config).eval()
    vqvae.initialize_codebooks(torch.randn(4, 8, 4, 4, 4))
    unimodal = BYOCPipeline(vqvae, pipeline.unet, pipeline.scheduler, default_num_inference_steps=3)
    unimodal.set_progress_bar_config(disable=True)
    assert unimodal(2, generator=seeded()).volumes.shape == (2, 2, 8, 8, 8)
