import numpy as np
import pytest
import torch

from conditional import BOTH, DOSES, latents_of, make_pipeline
from diffusers_byoc import BYOCPipeline
from diffusers_byoc.pipelines.conditions import (
    find_extrapolated,
    measure_conditions,
    read_conditions,
    standardize_conditions,
)


SCALARS = measure_conditions(BOTH)


def test_values_are_standardised_by_the_training_cells():
    values = read_conditions(SCALARS, {"dose_um": [0.0, 2.0, 4.0], "time_h": [24, 24, 48]})
    vectors = standardize_conditions(SCALARS, values).numpy()
    np.testing.assert_allclose(vectors.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(vectors.std(0), 1, atol=1e-6)
    assert vectors.dtype == np.float32


def test_one_value_serves_all_samples_and_embeddings_are_vectors():
    embeddings = {"smiles": np.random.default_rng(0).normal(size=(5, 3))}
    statistics = measure_conditions(DOSES | embeddings)
    values = read_conditions(statistics, {"dose_um": 2.5, "smiles": [1.0, 2.0, 3.0]}, 4)
    assert values["dose_um"].shape == (4, 1) and values["smiles"].shape == (4, 3)
    assert standardize_conditions(statistics, values).shape == (4, 4)
    each = read_conditions(statistics, {"dose_um": torch.tensor(2.5), "smiles": np.ones((2, 3))})
    assert each["dose_um"].tolist() == [[2.5], [2.5]]


def test_values_beyond_the_training_are_told_apart():
    values = read_conditions(SCALARS, {"dose_um": [-0.1, 0.0, 4.0, 4.1], "time_h": 30})
    assert find_extrapolated(SCALARS, values) == {"dose_um": [True, False, False, True], "time_h": [False] * 4}


@pytest.mark.parametrize(
    ("given", "num_samples", "message"),
    [
        ({"dose_um": 1.0}, None, r"names \['dose_um', 'time_h'\], got \['dose_um'\]"),
        ({"dose_um": 1, "time_h": 1, "ph": 7}, None, "got .*'ph'"),
        ([1.0, 2.0], None, r"got \[1.0, 2.0\]"),
        ({"dose_um": np.nan, "time_h": 1}, None, "1 finite number as dose_um"),
        ({"dose_um": "high", "time_h": 1}, None, "1 finite number as dose_um.*got 'high'"),
        ({"dose_um": [1, 2], "time_h": [1, 2, 3]}, None, r"one dose_um, or one per sample \(3\), got 2"),
        ({"dose_um": [1, 2], "time_h": 1}, 3, r"one dose_um, or one per sample \(3\), got 2"),
        ({"dose_um": [[1, 2]], "time_h": 1}, None, "1 finite number as dose_um"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(given, num_samples, message):
    with pytest.raises(ValueError, match=message):
        read_conditions(SCALARS, given, num_samples)


def test_conditions_that_teach_nothing_are_refused():
    with pytest.raises(ValueError, match="different dose_um, got .*2.0"):
        measure_conditions({"dose_um": np.full((4, 1), 2.0)})
    with pytest.raises(ValueError, match="finite numbers as dose_um"):
        measure_conditions({"dose_um": np.array([[1.0], [np.nan]])})


def test_a_call_takes_values_in_their_own_units(tmp_path):
    pipeline = make_pipeline()
    arguments = {"class_labels": "nocodazole", "conditions": {"dose_um": 2.5, "time_h": 30.0}}
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda *x: seen.append(x[2]["conditions"]), with_kwargs=True)
    expected = latents_of(pipeline, **arguments)
    dose, time = pipeline.config.conditions
    wanted = [(2.5 - dose["mean"][0]) / dose["std"][0], (30.0 - time["mean"][0]) / time["std"][0]]
    torch.testing.assert_close(seen[0], torch.tensor([wanted]))
    pipeline.save_pretrained(tmp_path)
    loaded = BYOCPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(latents_of(loaded, **arguments), expected)
    assert not torch.allclose(
        latents_of(pipeline, **arguments | {"conditions": {"dose_um": 0, "time_h": 30}}), expected
    )


def test_the_output_says_where_a_value_lies_beyond_the_training():
    pipeline = make_pipeline(DOSES)
    output = pipeline(class_labels="nocodazole", conditions={"dose_um": [1.0, 5.0]})
    assert len(output.volumes) == 2  # a dose per cell says how many
    assert output.extrapolated == {"dose_um": [False, True]}
    assert pipeline(class_labels="nocodazole").extrapolated is None


def test_a_model_trained_with_dropout_does_without_conditions():
    pipeline = make_pipeline(DOSES)
    both = latents_of(pipeline, class_labels=1, conditions={"dose_um": 4})
    others = (latents_of(pipeline, **given) for given in ({}, {"class_labels": 1}, {"conditions": {"dose_um": 4}}))
    for other in others:
        assert not torch.allclose(other, both)
    strict = make_pipeline(DOSES, conditioning_dropout_prob=0.0)
    with pytest.raises(ValueError, match="Expected class_labels .*3 classes"):
        strict(conditions={"dose_um": 4})
    with pytest.raises(ValueError, match=r"Expected conditions with the names \['dose_um'\], got None"):
        strict(class_labels=1)
    with pytest.raises(ValueError, match="Expected no conditions, got"):
        make_pipeline(None)(class_labels=1, conditions={"dose_um": 4})


def test_weights_are_a_mixture_of_drugs():
    pipeline = make_pipeline(None)
    expected = latents_of(pipeline, class_labels="blebbistatin")
    one_hot = np.array([[0.0, 1.0, 0.0]])
    torch.testing.assert_close(latents_of(pipeline, class_labels=one_hot), expected)
    assert not torch.allclose(latents_of(pipeline, class_labels=np.array([[0.5, 0.5, 0.0]])), expected)
    with pytest.raises(ValueError, match=r"\(1, 3\) finite weights .*got \(1, 2\)"):
        pipeline(class_labels=np.ones((1, 2)))


def test_conditions_must_be_those_of_the_unet():
    pipeline = make_pipeline(DOSES)
    with pytest.raises(ValueError, match="Expected conditions of 1 numbers in model_index.json.*got 2"):
        BYOCPipeline(pipeline.vqvae, pipeline.unet, pipeline.scheduler, conditions=SCALARS)
