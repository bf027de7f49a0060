import numpy as np
import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    LayerSkipConfig,
    PerturbedAttentionGuidance,
)

from conditional import DOSES, latents_of, make_pipeline
from diffusers_byoc import BYOCPipeline


LABEL = {"class_labels": "nocodazole"}
SKIP = LayerSkipConfig(indices=[0], fqn="mid_blocks", skip_ff=False, skip_attention=True)
SCORES = LayerSkipConfig(
    indices=[0], fqn="mid_blocks", skip_ff=False, skip_attention=False, skip_attention_scores=True
)


@torch.no_grad()
def test_the_scale_moves_the_prediction_away_from_the_one_without_conditions():
    pipeline = make_pipeline(DOSES)
    latents, labels, vectors = torch.randn(2, 8, 4, 4, 4), torch.tensor([0, 2]), torch.tensor([[-1.0], [1.0]])
    with_all = pipeline.unet(latents, 500, labels, conditions=vectors).sample
    without = pipeline.unet(latents, 500).sample
    for scale in (0.0, 1.0, 3.5):
        pipeline._guidance_scale = scale
        prediction = pipeline.predict(latents, torch.tensor(500), labels, vectors)
        torch.testing.assert_close(prediction, without + scale * (with_all - without))


def test_a_scale_of_one_asks_once_and_another_twice():
    pipeline, calls = make_pipeline(None), []
    pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    for scale, expected in ((None, 3), (1.0, 3), (2.0, 6)):
        calls.clear()
        pipeline(**LABEL, guidance_scale=scale)
        assert len(calls) == expected


def test_the_pipelines_own_scale_is_saved_and_serves_calls_with_conditions(tmp_path):
    expected = latents_of(make_pipeline(None), **LABEL, guidance_scale=3.0)
    make_pipeline(None, default_guidance_scale=3.0).save_pretrained(tmp_path)
    loaded = BYOCPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(latents_of(loaded, **LABEL), expected)
    assert loaded.guidance_scale == 3.0
    loaded(2)
    assert loaded.guidance_scale == 1.0


def test_callbacks_can_change_the_scale():
    def raise_scale(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    pipeline = make_pipeline(None)
    constant = latents_of(pipeline, **LABEL, guidance_scale=2.0)
    raised = latents_of(pipeline, **LABEL, guidance_scale=2.0, callback_on_step_end=raise_scale)
    assert pipeline.guidance_scale == 2.0 + pipeline.num_timesteps
    assert not torch.allclose(raised, constant)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_diffusers_guider_of_the_same_scale_gives_the_same_cells(dropout, tmp_path):
    pipeline = make_pipeline(DOSES, conditioning_dropout_prob=dropout)
    given = LABEL | {"conditions": {"dose_um": 1.0}}
    if not dropout:
        pipeline.guider = ClassifierFreeGuidance(guidance_scale=3.0)
        with pytest.raises(ValueError, match="trained with a conditioning_dropout_prob for ClassifierFreeGuidance"):
            pipeline(**given)
        return
    expected = latents_of(pipeline, **given, guidance_scale=3.0)
    assert "guider" not in pipeline.components
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=3.0)
    torch.testing.assert_close(latents_of(pipeline, **given), expected)
    guided = BYOCPipeline(**pipeline.components, **{n: pipeline.config[n] for n in ("label2id", "conditions")})
    guided.save_pretrained(tmp_path)
    loaded = BYOCPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.guider.guidance_scale == 3.0
    torch.testing.assert_close(latents_of(loaded, **given, num_inference_steps=3), expected)


@pytest.mark.parametrize(
    "guider",
    [
        AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=0.5),
        AutoGuidance(guidance_scale=3.0, auto_guidance_config=SKIP),
        ClassifierFreeGuidance(guidance_scale=3.0, stop=0.5),
    ],
    ids=lambda guider: type(guider).__name__,
)
def test_other_guiders_change_the_cells_and_leave_the_unet_as_it_was(guider):
    pipeline = make_pipeline(None)
    plain, whole = latents_of(pipeline, **LABEL), latents_of(pipeline, **LABEL, guidance_scale=3.0)
    pipeline.guider = guider
    guided = latents_of(pipeline, **LABEL)
    assert torch.isfinite(guided).all()
    assert not torch.allclose(guided, plain) and not torch.allclose(guided, whole)
    pipeline.guider = None
    assert torch.equal(latents_of(pipeline, **LABEL), plain)


def test_a_weaker_version_of_itself_guides_a_model_without_conditions():
    pipeline = make_pipeline(None, num_class_embeds=None, conditioning_dropout_prob=0.0)
    plain = latents_of(pipeline)
    pipeline.guider = AutoGuidance(guidance_scale=3.0, auto_guidance_config=SKIP)
    assert not torch.allclose(latents_of(pipeline), plain)


def test_perturbed_attention_needs_diffusers_attention():
    pipeline = make_pipeline(None)
    ranges = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
    pipeline.guider = PerturbedAttentionGuidance(
        guidance_scale=1.0, perturbed_guidance_scale=3.0, perturbed_guidance_config=SCORES, **ranges
    )
    with pytest.raises(ValueError, match='set_attention_backend\\("native"\\)'):
        pipeline(**LABEL)
    for attention in pipeline.unet.attn_processors.values():
        attention._attention_backend = "native"
    guided = latents_of(pipeline, **LABEL)
    pipeline.guider = None
    assert not torch.allclose(guided, latents_of(pipeline, **LABEL), atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": 2.0}, "got neither class_labels nor conditions"),
        (LABEL | {"guidance_scale": np.inf}, "finite guidance_scale, got inf"),
        (LABEL | {"guidance_scale": "high"}, "finite guidance_scale, got 'high'"),
    ],
)
def test_scales_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline(None)(**arguments)


def test_guidance_needs_a_model_that_can_do_without_conditions():
    with pytest.raises(ValueError, match="a model that cannot do without its conditions"):
        make_pipeline(None, conditioning_dropout_prob=0.0)(**LABEL, guidance_scale=2.0)


def test_a_guider_and_a_scale_contradict_each_other():
    pipeline = make_pipeline(None, guider=ClassifierFreeGuidance(guidance_scale=3.0))
    with pytest.raises(ValueError, match="guidance_scale or a guider, got 2.0 and ClassifierFreeGuidance"):
        pipeline(**LABEL, guidance_scale=2.0)
