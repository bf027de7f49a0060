from itertools import chain, combinations

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.utils import is_torchsde_available

from conditional import DOSES, latents_of, make_pipeline
from diffusers_byoc import USABLE_SCHEDULERS, BYOCPipeline, TextureUNet3D
from diffusers_byoc.pipelines.schedulers import make_texture_scheduler


pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
THREE = ("cell", "nucleus", "mitochondria")


def make_completing(channel_names=("cell", "nucleus"), **config):
    """A tiny pipeline without classes, with a timestep for each channel."""
    return make_pipeline(None, None, 0.0, channel_names, 0.25, **config)


def draw(num_samples=2, seed=0):
    return torch.rand(num_samples, 8, 8, 8, generator=torch.Generator().manual_seed(seed))


def encoded(pipeline, volumes, channel):
    """Normalised latents of one channel, each encoded alone."""
    whole = torch.zeros(len(volumes), pipeline.vqvae.config.num_channels, 8, 8, 8)
    whole[:, channel] = volumes
    latents = pipeline.vqvae.normalize_latents(pipeline.vqvae.encode(whole * 2 - 1).latents)
    return latents.unflatten(1, (-1, 4))[:, channel]


SUBSETS = list(chain.from_iterable(combinations(range(3), size) for size in (1, 2)))


@torch.no_grad()
@pytest.mark.parametrize("subset", SUBSETS)
def test_any_channels_are_generated_from_any_others(subset):
    pipeline, seen = make_completing(THREE), []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    given = {THREE[channel]: draw(seed=channel) for channel in subset}
    latents = latents_of(pipeline, given_channels=given).unflatten(1, (3, 4))
    timesteps = pipeline.scheduler.timesteps.tolist()
    assert len(seen) == len(timesteps)
    for (sample, times), timestep in zip(seen, timesteps, strict=True):
        for channel in range(3):
            is_given = channel in subset
            assert times[:, channel].tolist() == 2 * [-1 if is_given else timestep]
            if is_given:
                expected = encoded(pipeline, draw(seed=channel), channel)
                torch.testing.assert_close(sample.unflatten(1, (3, 4))[:, channel], expected)
    other = latents_of(pipeline, given_channels=given | {THREE[subset[0]]: draw(seed=9)}).unflatten(1, (3, 4))
    for channel in range(3):
        if channel in subset:
            torch.testing.assert_close(latents[:, channel], encoded(pipeline, draw(seed=channel), channel))
        else:
            assert (latents[:, channel] - other[:, channel]).abs().max() > 1e-3


def test_one_volume_serves_all_samples_and_each_has_its_own_noise():
    pipeline = make_completing()
    one = draw(1)
    each = latents_of(pipeline, given_channels={"nucleus": one.expand(3, -1, -1, -1)})
    for volumes in (one[0], one, one[0].numpy()):
        assert torch.equal(latents_of(pipeline, num_samples=3, given_channels={"nucleus": volumes}), each)
    assert (each[0, :4] - each[1, :4]).abs().max() > 1e-3 and torch.equal(each[0, 4:], each[1, 4:])


def with_texture(pipeline):
    texture_unet = TextureUNet3D(2, block_out_channels=(8, 8), layers_per_block=(1, 1), texture_scale=0.3).eval()
    torch.nn.init.zeros_(pipeline.vqvae.decoder.conv_out.bias)  # not all background
    pipeline.register_modules(texture_unet=texture_unet, texture_scheduler=make_texture_scheduler())
    return pipeline


@pytest.mark.parametrize("textured", [False, True])
@pytest.mark.parametrize("output_type", ["np", "pt"])
def test_what_is_given_comes_back_encoded_or_as_it_was(textured, output_type):
    pipeline = with_texture(make_completing()) if textured else make_completing()
    call = {"given_channels": {"nucleus": draw()}, "num_texture_steps": 2, "output_type": output_type}
    kept, decoded = (
        torch.as_tensor(pipeline(**call, keep_given=keep, generator=torch.Generator().manual_seed(0)).volumes)
        for keep in (True, False)
    )
    assert torch.equal(kept[:, 1], draw())
    assert torch.equal(kept[:, 0], decoded[:, 0])
    latents = latents_of(pipeline, given_channels={"nucleus": draw()})
    expected = pipeline.vqvae.decode(pipeline.vqvae.denormalize_latents(latents)).sample.clamp(-1, 1) / 2 + 0.5
    assert ((decoded - expected).abs().max() > 1e-2) == textured
    if not textured:
        torch.testing.assert_close(decoded, expected)


def test_each_cell_of_a_batch_is_the_cell_alone():
    pipeline = make_completing()

    def generate(rows):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return latents_of(pipeline, given_channels={"cell": draw(3)[rows]}, generator=generators)

    torch.testing.assert_close(generate([0, 1, 2]), torch.cat([generate([row]) for row in range(3)]))


class OneCell(torch.nn.Module):
    """The exact noise prediction where all data are one cell's latents (1, M*n, d, h, w), at any timesteps."""

    def __init__(self, unet, scheduler, latents):
        super().__init__()
        self.config, self.latents, self.dtype, self.device = unet.config, latents, torch.float32, torch.device("cpu")
        self.levels = torch.cat([torch.ones(1), scheduler.alphas_cumprod])

    def forward(self, sample, timestep, return_dict=False):
        times = torch.as_tensor(timestep).double() + 1
        times = times.view(-1, 2 if times.ndim == 2 else 1).expand(len(sample), 2)
        low = times.floor().long()
        level = torch.lerp(self.levels[low].double(), self.levels[times.ceil().long()].double(), times - low).float()
        level = level.repeat_interleave(4, 1)[:, :, None, None, None].clamp(max=1 - 1e-6)
        return ((sample - level.sqrt() * self.latents) / (1 - level).sqrt(),)


def one_cell(name):
    """A pipeline whose only cell is the one returned with it, sampled by a scheduler of that name."""
    if name == "DPMSolverSDEScheduler" and not is_torchsde_available():
        pytest.skip("DPMSolverSDEScheduler needs torchsde")
    pipeline = make_completing()
    leading = {"timestep_spacing": "leading"}
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **leading)
    volumes = {channel: draw(1, seed) for seed, channel in enumerate(("cell", "nucleus"))}
    latents = torch.cat([encoded(pipeline, volume, row) for row, volume in enumerate(volumes.values())], 1)
    pipeline.unet = OneCell(pipeline.unet, diffusers.DDPMScheduler.from_config(pipeline.scheduler.config), latents)
    return pipeline, volumes, latents


@pytest.mark.parametrize("name", USABLE_SCHEDULERS)
@pytest.mark.parametrize("strength", [None, 0.2, 0.6])
def test_every_scheduler_finds_the_only_cell_there_is(name, strength):
    """From its nucleus, and from the cell on part of the way: with the latents in wrong units it would not."""
    pipeline, volumes, latents = one_cell(name)
    given = volumes if strength else {"nucleus": volumes["nucleus"]}
    if strength and name == "PNDMScheduler":
        with pytest.raises(ValueError, match="that can begin on the way for strength, got PNDMScheduler"):
            pipeline(given_channels=given, strength=strength, num_inference_steps=20)
        return
    found = latents_of(pipeline, given_channels=given, strength=strength, num_inference_steps=20)
    torch.testing.assert_close(found, latents, atol=0.1, rtol=0)


def test_strength_says_how_much_is_left():
    pipeline = make_pipeline(None, None, 0.0)  # any model can
    given = {"cell": draw(seed=0), "nucleus": draw(seed=1)}
    start = torch.cat([encoded(pipeline, volume, row) for row, volume in enumerate(given.values())], 1)
    changes, steps = [], []
    for strength in (0.1, 0.5, 1.0):
        changed = latents_of(pipeline, given_channels=given, strength=strength, num_inference_steps=10)
        changes.append((changed - start).abs().mean().item())
        steps.append(pipeline.num_timesteps)
    assert steps == [1, 5, 10] and changes == sorted(changes)
    assert changes[0] < 0.3 < changes[2]


@torch.no_grad()
def test_the_scale_moves_away_from_the_prediction_without_the_given_channels():
    pipeline, predictions = make_completing(), []
    pipeline.unet.register_forward_hook(lambda _, inputs, output: predictions.append((*inputs, output[0])))
    given = {"given_channels": {"nucleus": draw()}, "num_inference_steps": 1}
    latents = latents_of(pipeline, **given, guidance_scale=3.0)
    (sample, times, conditional), (blind, blind_times, unconditional) = predictions
    assert times[0].tolist() == [0, -1] and blind_times[0].tolist() == [0, 999]
    noise = torch.randn(2, 8, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(blind[:, 4:], noise[:, 4:]) and torch.equal(blind[:, :4], sample[:, :4])
    guided = unconditional + 3 * (conditional - unconditional)
    expected = pipeline.scheduler.step(guided[:, :4], pipeline.scheduler.timesteps[0], noise[:, :4]).prev_sample
    torch.testing.assert_close(latents[:, :4], expected)
    pipeline.register_modules(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    torch.testing.assert_close(latents_of(pipeline, **given), latents)


@torch.no_grad()
def test_the_scale_is_that_of_class_and_conditions_where_there_are_some():
    pipeline, seen = make_pipeline(DOSES, channel_timesteps_prob=0.25), []
    pipeline.unet.register_forward_pre_hook(lambda _, inputs, given: seen.append((inputs[1], given)), with_kwargs=True)
    given = {"class_labels": "nocodazole", "conditions": {"dose_um": 1.0}, "given_channels": {"cell": draw()}}
    pipeline(**given, guidance_scale=2.0, num_inference_steps=1)
    (times, with_all), (blind_times, without) = seen
    assert torch.equal(times, blind_times) and times[0, 0] == -1
    assert with_all["class_labels"] is not None and without["class_labels"] is without["conditions"] is None


def test_a_model_that_must_have_its_class_is_guided_by_channels():
    pipeline = make_pipeline(None, conditioning_dropout_prob=0.0, channel_timesteps_prob=0.25)
    given = {"class_labels": "nocodazole", "given_channels": {"cell": draw()}}
    by_scale = latents_of(pipeline, **given, guidance_scale=2.0)
    assert (by_scale - latents_of(pipeline, **given)).abs().max() > 1e-3
    pipeline.register_modules(guider=ClassifierFreeGuidance(guidance_scale=2.0))
    torch.testing.assert_close(latents_of(pipeline, **given), by_scale)


def test_it_is_saved_and_samples_jointly_as_any_other(tmp_path):
    pipeline = make_completing()
    pipeline.save_pretrained(tmp_path)
    loaded = BYOCPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    for given in ({}, {"given_channels": {"cell": draw(1)}}):
        torch.testing.assert_close(latents_of(loaded, **given), latents_of(pipeline, **given))


WHOLE = {"cell": np.zeros((1, 8, 8, 8)), "nucleus": np.zeros((1, 8, 8, 8))}
HALF = {"nucleus": np.zeros((1, 8, 8, 8))}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"given_channels": {"er": draw()}}, r"names among \['cell', 'nucleus'\], got \['er'\]"),
        ({"given_channels": {}}, r"got \[\]. Give some"),
        ({"given_channels": draw()}, "got Tensor. Give some"),
        ({"given_channels": {"cell": draw()[:, :4]}}, r"volumes of cell \(B, 8, 8, 8\).* got \(2, 4, 8, 8\)"),
        ({"given_channels": {"cell": draw() * 2 - 1}}, r"volumes of cell in \[0, 1\].*postprocess"),
        ({"given_channels": {"cell": draw() * torch.nan}}, r"in \[0, 1\].*got \[nan, nan\]"),
        ({"given_channels": {"cell": draw(2)}, "num_samples": 3}, r"or one per sample \(3\), got 2"),
        ({"given_channels": {"cell": draw(2), "nucleus": draw(3)}, "strength": 0.5}, r"per sample \(3\), got 2"),
        ({"given_channels": WHOLE}, "Expected a channel to generate, or a strength .* got all of"),
        ({"given_channels": HALF, "strength": 0.5}, r"all channels in given_channels for strength, .*got \['nucleus'"),
        ({"strength": 0.5}, r"all channels in given_channels for strength, .* got \[\]"),
        ({"given_channels": WHOLE, "strength": 1.5}, "a strength of at most 1 .*, got 1.5"),
        ({"given_channels": WHOLE, "strength": 0.1}, "at least one of 3 steps, got 0.1"),
        ({"given_channels": WHOLE, "strength": 0.5, "keep_given": True}, "got strength 0.5, which changes them"),
        ({"keep_given": True}, "for keep_given, got none"),
        ({"given_channels": HALF, "keep_given": True, "output_type": "latent"}, "got output_type 'latent'"),
    ],
)
def test_what_contradicts_each_other_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_completing()(**arguments)


def test_a_model_of_one_timestep_is_refused():
    pipeline = make_pipeline(None, None, 0.0)
    with pytest.raises(ValueError, match=r"give it \['nucleus'\], got one that has one for all.*channel_timesteps_p"):
        pipeline(given_channels=HALF)
    with pytest.raises(ValueError, match="Expected conditions to guide with guidance_scale 2"):
        pipeline(given_channels=WHOLE, strength=0.5, guidance_scale=2.0)
