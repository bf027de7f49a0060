"""The jobs of Table 1 and Figure 6, and the command lines that they are made of."""

import json

import pytest

from diffusers_byoc.commands.reproduction.plan import FIGURE, MODELS, TABLE, TUNING_SEED, Command, Plan, read_plan
from diffusers_byoc.commands.training_arguments import PRESETS


def of_kind(jobs, kind):
    return [job for job in jobs if job.kind == kind]


def parsed(job, index=0):
    command = job.commands[index]
    return command.parse(pretrained="run") if command.name == "byoc-evaluate" else command.parse()


def minutes(args):
    """Of all stages of a parsed training together."""
    stages = [name for name in vars(args) if name.endswith("_max_train_minutes")]
    return sum(getattr(args, name) or 0 for name in stages) if stages else args.max_train_minutes


def test_a_command_line_says_what_the_arguments_are():
    arguments = {"seed": 3, "label": ["a", "b"], "class_conditional": False, "use_ema": True, "fold": None}
    assert Command("byoc-train", arguments).argv(output_dir="x") == [
        *("--seed", "3", "--label", "a", "b", "--no-class_conditional", "--use_ema", "--output_dir", "x"),
    ]


def test_the_cpu_preset_trains_every_model_of_every_drug_for_the_same_time():
    plan = read_plan("cpu")
    jobs = plan.jobs(TABLE)
    assert [len(of_kind(jobs, kind)) for kind in ("tune", "train", "evaluate")] == [0, 15, 15]
    assert {job.model for job in jobs} == set(MODELS)
    for job in of_kind(jobs, "train"):
        args = parsed(job)
        assert minutes(args) == pytest.approx(plan.train_minutes), job.name
        assert args.label == [job.drug] and args.num_phantoms == plan.cells["num_phantoms"]
        assert not getattr(args, "class_conditional", False)


def test_a_label_is_one_folder_of_its_own():
    names = {job.name for job in read_plan("cpu", drugs=["a/b", "a%2Fb", "c d"]).jobs(TABLE)}
    assert {name.count("/") for name in names} == {3} and len(names) == 2 * 3 * len(MODELS)


def test_models_that_are_trained_once_are_judged_on_other_phantoms():
    jobs = read_plan("cpu", seed=3).jobs(TABLE)
    trained = {parsed(job).seed for job in of_kind(jobs, "train")}
    judged = [parsed(job) for job in of_kind(jobs, "evaluate")]
    assert trained == {3} and {args.seed for args in judged} == {10_003}
    assert all((args.num_folds, args.fold) == (3, None) for args in judged)
    assert not any(args.controls for args in judged)  # the table shows none


def test_the_papers_preset_holds_out_the_fold_that_it_judges():
    plan = read_plan("paper", cells={"train_data_dir": "my_cells"})
    jobs = plan.jobs(TABLE)
    assert [len(of_kind(jobs, kind)) for kind in ("tune", "train", "evaluate")] == [0, 75, 75]
    by_name = {job.name: job for job in jobs}
    for job in of_kind(jobs, "evaluate"):
        assert job.needs == (job.trained_by,)
        training = by_name[job.trained_by]
        args, trained = parsed(job), parsed(training)
        assert (training.drug, training.model, training.fold) == (job.drug, job.model, job.fold)
        for name in ("num_folds", "fold", "split_seed", "seed", "label", "train_data_dir", "sample_size"):
            assert getattr(args, name) == getattr(trained, name), name
        assert args.fold == job.fold and args.num_samples == 5000
    assert parsed(jobs[0]).max_train_minutes is None


def test_four_of_the_five_ablations_share_a_training():
    jobs = read_plan("cpu").jobs(FIGURE)
    trainings = [job for job in of_kind(jobs, "train") if job.drug == "nocodazole"]
    assert [job.model for job in trainings] == ["byoc_ablation", "unimodal"]
    trained = [parsed(job) for job in trainings]
    assert [args.vqvae.get("share_codebook", False) for args in trained] == [False, True]
    assert {args.vqvae["latent_scaling"] for args in trained} == {"codebook_range"}
    judged = {job.model: job for job in of_kind(jobs, "evaluate") if job.drug == "nocodazole"}
    assert list(judged) == ["unimodal", "absolute", "cell", "nucleus", "byoc_ablation"]
    assert {model for model, job in judged.items() if job.trained_by == trainings[0].name} == judged.keys() - {
        "unimodal"
    }
    ranges = {model: parsed(job).latent_range for model, job in judged.items()}
    assert ranges == {
        **{"unimodal": None, "byoc_ablation": None},
        **{"absolute": "absolute", "cell": "cell", "nucleus": "nucleus"},
    }


def test_the_papers_figure_takes_the_tables_training():
    plan = read_plan("paper")
    table, figure = ({job.name: job for job in plan.jobs(study)} for study in (TABLE, FIGURE))
    shared = set(table) & set(figure)
    assert {name.split("/")[2] for name in shared} == {"byoc"} and len(shared) == 30
    assert all(table[name] == figure[name] for name in shared)


def test_learning_rates_are_tried_where_none_is_settled():
    entries = json.loads((PRESETS / "reproduction" / "cpu.json").read_text())
    entries["models"] = {
        "ha_gan": {"arguments": {"preset": "cpu"}},
        "w_gan": {"arguments": {"preset": "cpu"}, "rate_factor": 0.5},
    }
    jobs = Plan(**entries, tune=True).jobs(TABLE)
    tried = of_kind(jobs, "tune")
    assert [job.name for job in tried] == ["tune/ha_gan/0.3", "tune/ha_gan/1", "tune/ha_gan/3"]
    rates = []
    for job in tried:
        training, evaluation = parsed(job), parsed(job, 1)
        rates.append((training.learning_rate, training.discriminator_learning_rate))
        assert training.max_train_minutes == entries["tuning"]["minutes"]
        assert not evaluation.volume_classifier and evaluation.seed == TUNING_SEED
        assert evaluation.num_samples == entries["tuning"]["num_samples"]
        assert evaluation.features == ["morphology"]  # what the criterion asks for
    assert rates == [(6e-5, 2.4e-4), (2e-4, 8e-4), (6e-4, 2.4e-3)]
    ours, settled = (job for job in jobs if job.kind == "train" and job.drug == "nocodazole")
    assert ours.needs == tuple(job.name for job in tried)
    assert ours.rates["tune/ha_gan/3"] == {"learning_rate": 6e-4, "discriminator_learning_rate": 2.4e-3}
    assert settled.needs == () and parsed(settled).learning_rate == pytest.approx(1e-4)
    assert not of_kind(Plan(**entries).jobs(TABLE), "tune")


def test_a_short_training_has_as_much_fewer_steps():
    """Its cosine schedule ends, too, and its adversaries join."""
    (job, *_) = (job for job in read_plan("cpu", tune=True).jobs(TABLE) if job.name == "tune/medical_diffusion/3")
    args = parsed(job)
    assert (args.autoencoder_max_train_steps, args.diffusion_max_train_steps) == (65, 175)  # 1.5 of 15 minutes
    assert args.discriminator_start == 57  # of 650: a rate is judged with its adversaries
    assert minutes(args) == pytest.approx(1.5)


def test_another_time_has_as_many_more_steps():
    """Or a training would end with the steps that fit into the preset's time."""
    jobs = {job.name: parsed(job) for job in read_plan("cpu", train_minutes=45).jobs(TABLE) if job.kind == "train"}
    args = jobs["train/nocodazole/medical_diffusion/all"]
    assert (args.autoencoder_max_train_steps, args.diffusion_max_train_steps) == (1950, 5250)
    assert args.discriminator_start == 1701 and minutes(args) == pytest.approx(45)
    args = jobs["train/nocodazole/byoc/all"]
    stages = ("autoencoder", "texture", "diffusion")
    assert [getattr(args, f"{stage}_max_train_steps") for stage in stages] == [1620, 12_000, 2250]


def test_figure_6_needs_byoc():
    plan = read_plan("cpu")
    plan = read_plan("cpu", models={"w_gan": plan.models["w_gan"]})
    with pytest.raises(ValueError, match="Expected byoc in the preset, got w_gan"):
        plan.jobs(FIGURE)


def test_every_stage_of_a_model_has_its_rate_multiplied():
    plan = read_plan("cpu", tune=True)
    rates = {job.model: job.rates["tune/" + job.model + "/3"] for job in plan.jobs(TABLE) if job.kind == "train"}
    assert rates["byoc"].keys() == {f"{stage}_learning_rate" for stage in ("autoencoder", "texture", "diffusion")}
    assert rates["byoc"]["diffusion_learning_rate"] == pytest.approx(3e-3)
    assert rates["medical_diffusion"]["autoencoder_learning_rate"] == pytest.approx(1.5e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {"d_gan": {}}}, "Expected models among ha_gan, .*, got .*d_gan"),
        ({"train_minutes": 0}, "train_minutes above 0, got 0"),
        ({"models": {"byoc": {"arguments": {}}}}, "Expected shares of byoc for train_minutes, got none"),
        ({"num_folds": 1}, "num_folds of at least 2, got 1"),
        ({"models": {"byoc": {"shares": {"diffusion": 0.4}}}}, "shares of byoc that add up to 1, got 0.4"),
        ({"models": {"byoc": {"argument": {}}}}, "Expected arguments, shares, rate_factor of byoc"),
        ({"cells": {"train_data_dir": "my_cells"}}, "Add --train_each_fold"),
    ],
)
def test_what_cannot_be_meant_is_refused(change, message):
    entries = json.loads((PRESETS / "reproduction" / "cpu.json").read_text())
    with pytest.raises(ValueError, match=message):
        Plan(**entries | change)


def test_a_preset_is_a_file_with_all_entries(tmp_path):
    path = tmp_path / "mine.json"
    with pytest.raises(ValueError, match="Expected --preset cpu, paper or a JSON file, got gpu"):
        read_plan("gpu")
    path.write_text("{")
    with pytest.raises(ValueError, match="Expected a preset in JSON"):
        read_plan(str(path))
    path.write_text('{"drugs": []}')
    with pytest.raises(ValueError, match="Expected ablation, cells, .*, got drugs"):
        read_plan(str(path))


def test_given_cells_take_the_place_of_phantoms():
    plan = read_plan("cpu", cells={"train_data_dir": "my_cells"}, train_each_fold=True)
    assert not plan.is_of_phantoms and "num_phantoms" not in plan.cells | plan.evaluation
    plan = read_plan("cpu", cells={"num_phantoms": 40}, evaluation={"num_phantoms": 40})
    assert {parsed(job).num_phantoms for job in of_kind(plan.jobs(TABLE), "evaluate")} == {40}
