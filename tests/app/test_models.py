import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import ClassifierFreeGuidance, DPMSolverMultistepScheduler

from conditional import DOSES, make_pipeline
from diffusers_byoc import BYOCPipeline
from diffusers_byoc.app import Limits, Model, Models, Request
from diffusers_byoc.app.models import check_request
from diffusers_byoc.pipelines.generation import cell_generator


SAVED = Path(__file__).parents[1] / "pipelines" / "saved"


def load(name="conditional"):
    pipeline = BYOCPipeline.from_pretrained(SAVED / name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_many():
    """Of a pipeline that can do all that the page asks for."""
    return Model("many", make_pipeline(DOSES, channel_timesteps_prob=0.25))


def test_what_a_pipeline_of_today_can_do():
    model = Model("x", load())
    assert model.labels == ["binimetinib", "blebbistatin", "nocodazole"]
    assert model.channel_names == ("cell", "nucleus") and model.voxel_size_um == (1.0, 0.5, 0.5)
    assert not model.can_lack_conditions and not model.can_guide and model.conditions == []
    assert model.schedulers[0] == type(model.pipeline.scheduler).__name__
    assert "HeunDiscreteScheduler" in model.schedulers and "FlowMatchEulerDiscreteScheduler" not in model.schedulers
    plain = Model("x", load("plain"))
    assert plain.labels == [] and plain.voxel_size_um == (1.0, 1.0, 1.0)


def test_what_a_pipeline_with_more_can_do():
    model = make_many()
    assert model.can_lack_conditions and model.can_guide and model.can_morph and model.can_complete
    assert [condition["name"] for condition in model.conditions] == ["dose_um"]
    model.pipeline.register_modules(guider=ClassifierFreeGuidance())
    assert not model.can_guide
    model.pipeline.register_to_config(num_distilled_steps=4)
    assert model.schedulers == ["DDIMScheduler"]
    vectors = {"embedding": np.eye(3)}
    assert Model("x", make_pipeline(vectors)).can_lack_conditions
    with pytest.raises(ValueError, match="conditions that are numbers, got vectors of {'embedding': 3} in many"):
        Model("many", make_pipeline(vectors, conditioning_dropout_prob=0.0))


def test_cells_are_those_of_the_series_and_leave_no_trace():
    pipeline = load()
    model = Model("x", pipeline)
    request = Request(2, "blebbistatin", steps=3, seed=5)
    first = model.generate(request)
    assert first.shape == (2, 2, 8, 8, 8)
    (alone,) = load()(class_labels="blebbistatin", num_inference_steps=3, generator=cell_generator(5, 1)).volumes
    np.testing.assert_allclose(first[1], alone, atol=1e-4)
    other = model.generate(Request(2, "blebbistatin", "DPMSolverMultistepScheduler", steps=3, seed=5))
    assert np.abs(other - first).max() > 1e-3
    np.testing.assert_array_equal(model.generate(request), first)


@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_a_scheduler_that_needs_leading_spacing_gets_it(scheduler):
    assert np.isfinite(Model("x", load()).generate(Request(1, "nocodazole", scheduler, steps=5))).all()


@pytest.mark.parametrize("scheduler", [None, "HeunDiscreteScheduler"])
def test_the_program_makes_the_same_cells(tmp_path, monkeypatch, scheduler):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SAVED / "conditional", "mine")
    model = Model("mine", load())
    request = Request(2, "nocodazole", scheduler, steps=4, use_texture=False, seed=9)
    names = {}
    exec(model.python(request), names)  # noqa: S102
    np.testing.assert_allclose(names["cells"], model.generate(request), atol=1e-5)


def test_everything_asked_for_reaches_the_pipeline():
    model, nucleus = make_many(), np.random.default_rng(0).random((8, 8, 8), np.float32)
    request = Request(3, "nocodazole", steps=3, guidance_scale=2.5, conditions={"dose_um": 4.0}, seed=6)
    call = {"class_labels": "nocodazole", "num_inference_steps": 3, "guidance_scale": 2.5}
    call |= {"conditions": {"dose_um": 4.0}}
    generators = [cell_generator(6, index) for index in range(3)]
    expected = model.pipeline(3, generator=generators, **call).volumes
    np.testing.assert_array_equal(model.generate(request), expected)

    generators = [cell_generator(6, index) for index in range(3)]
    expected = model.pipeline(3, generator=generators, given_channels={"nucleus": nucleus}, **call).volumes
    np.testing.assert_array_equal(model.complete(request, nucleus), expected)


@pytest.mark.parametrize(("ends", "end_label"), [((0, 3), None), ((1, 1), "binimetinib")])
def test_a_morph_goes_between_two_cells_or_two_classes(ends, end_label):
    model = make_many()
    request = Request(4, "nocodazole", steps=3, conditions={"dose_um": 1.0}, seed=2)
    frames = model.morph(request, *ends, end_label, 5)
    generators = [cell_generator(2, index) for index in ends]
    expected = model.pipeline.interpolate(
        5,
        class_labels=["nocodazole", end_label] if end_label else "nocodazole",
        conditions={"dose_um": 1.0},
        num_inference_steps=3,
        generator=generators if ends[0] != ends[1] else generators[0],
    ).volumes
    np.testing.assert_array_equal(frames, expected)
    assert np.abs(frames[0] - frames[-1]).max() > 1e-3


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(0, steps=1), "1 to 16 cells, got 0"),
        (Request(17, steps=1), "1 to 16 cells, got 17"),
        (Request(1, steps=0), "at least 1 step, got 0"),
        (Request(1), "at least 1 step, got None"),
        (Request(16, steps=101), r"at most 1600 cells x steps, got 16 x 101"),
        (Request(1, steps=1, seed=-1), "a seed from 0"),
        (Request(1, steps=1, seed=2**32), "a seed from 0"),
    ],
)
def test_too_much_is_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        check_request(request_, Limits())


def test_what_is_offered_is_loaded_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [shutil.copytree(SAVED / "conditional", name) for name in ("a", "b", "c")]
    models = Models(names[:2])
    first = models.load("a")
    assert models.load("a") is first
    models.load("b")
    assert models.load("a") is first  # two stay in memory
    for name in ("c", "org/name", "../a"):
        with pytest.raises(ValueError, match="one of the pipelines a, b, got"):
            models.load(name)
    open_models = Models(names, is_open=True)
    for name in ("./a", "/etc", "a/vqvae", "org/name/more"):
        with pytest.raises(ValueError, match="or the name of another one on the Hub"):
            open_models.load(name)
    one, _, _ = (open_models.load(name) for name in "abc")
    assert open_models.load("a") is not one  # the third took its place


def test_a_name_on_the_hub_is_loaded_where_that_is_allowed(hub):
    printed = hub.run(
        f"""
from diffusers_byoc import BYOCPipeline
from diffusers_byoc.app import Models

BYOCPipeline.from_pretrained({str(SAVED / "conditional")!r}).push_to_hub("org/cells")
print(Models(["org/other"], is_open=True).load("org/cells").labels)
""",
        timeout=280,
    )
    assert printed.splitlines()[-1] == "['binimetinib', 'blebbistatin', 'nocodazole']"


def test_the_pipeline_s_own_scheduler_keeps_its_settings():
    pipeline = load()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=1)
    model = Model("x", pipeline)
    model.generate(Request(1, "nocodazole", steps=2))
    assert pipeline.scheduler.config.solver_order == 1 and pipeline.scheduler is not model.own_scheduler
