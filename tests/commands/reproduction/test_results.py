"""Table 1 and Figure 6 from numbers that are known."""

import json
import math
from pathlib import Path

import pytest

from diffusers_byoc.commands.reproduction import running
from diffusers_byoc.commands.reproduction.jobs import Jobs
from diffusers_byoc.commands.reproduction.plan import FIGURE, TABLE, read_plan
from diffusers_byoc.commands.reproduction.results import (
    COLUMNS,
    PANELS,
    PAPER,
    Row,
    _metric,
    gather,
    overview_of,
    page_of,
    scores_of,
    table_of,
    write_results,
)


EFFORT = {"autoencoder": {"steps": 10, "samples": 40, "seconds": 60.0, "learning_rate": 1e-3}}
EFFORT |= {"diffusion": {"steps": 20, "samples": 160, "seconds": 120.0, "learning_rate": 1e-3}}
SPEED = {"parameters": 1234567, "seconds_per_cell": 0.25, "batch_size": 8, "device": "one CPU"}


def row(model, *folds, drug="nocodazole"):
    return Row(drug, model, list(folds), [EFFORT], SPEED)


def fold(frechet=None, trees=None, inside=None, mmd=None):
    values = {"morphology/frechet": frechet, "morphology/classifier_accuracy": trees}
    return values | {"morphology/nucleus_inside_share": inside, "med3d/mmd_linear": mmd, "texture/frechet": math.nan}


def columns(lines):
    """Model -> heading -> entry."""
    heads, _, *body = ([entry.strip() for entry in line.strip("|").split("|")] for line in lines)
    return {(entries[0], entries[1]): dict(zip(heads, entries, strict=True)) for entries in body}


def test_the_best_is_what_is_nearest_to_what_is_good():
    rows = [
        row("w_gan", fold(10, 0.9, 1.0), fold(14, 0.7, 1.0)),
        row("byoc", fold(11, 0.30, 0.8), fold(11, 0.30, 0.8)),
        row("ha_gan", fold(15, 0.50, 0.9), fold(15, 0.54, 0.9)),
    ]
    rows[-1].folds.append(fold())  # a fold that has nothing changes nothing
    table = columns(table_of(rows, {"nocodazole": [fold(5, 0.5, 0.81)]}))
    assert table["nocodazole", "W-GAN"]["Fréchet, morphology ↓"] == "12 ± 2.83"
    assert table["nocodazole", "BYOC"]["Fréchet, morphology ↓"] == "**11** ± 0"
    assert table["nocodazole", "HA-GAN"]["trees, morphology → 0.5"] == "**0.52** ± 0.0283"
    assert table["nocodazole", "BYOC"]["nucleus inside as real"] == "**0.8** ± 0"  # not the highest
    assert table["nocodazole", "*real*"]["Fréchet, morphology ↓"] == "5"
    assert "Fréchet, texture ↓" not in table["nocodazole", "BYOC"]  # nan everywhere
    assert sum("**" in entry for entries in table.values() for entry in entries.values()) == 3


def test_where_all_are_alike_none_is_best():
    table = columns(table_of([row("w_gan", fold(10, 1.0)), row("byoc", fold(9, 1.0))], {}))
    assert table["nocodazole", "BYOC"]["Fréchet, morphology ↓"] == "**9**"
    assert table["nocodazole", "BYOC"]["trees, morphology → 0.5"] == "1"


def test_the_overview_has_the_papers_form():
    rows = [
        row("w_gan", fold(3, mmd=2e-4), drug="a"),
        row("byoc", fold(2, mmd=1e-4), drug="a"),
        row("w_gan", fold(1, mmd=1e-4), drug="b"),
        Row("b", "byoc"),
    ]
    lines = overview_of(rows, {"a": [fold(0.5)]})
    assert (
        lines[0] == "| model | a: MMD x 10⁴ ↓ | a: Fréchet, morphology ↓ | b: MMD x 10⁴ ↓ | b: Fréchet, morphology ↓ |"
    )
    assert lines[2:] == [
        "| W-GAN | 2 | 3 | **1** | **1** |",
        "| BYOC | **1** | **2** | – | – |",
        "| *real* | – | 0.5 | – | – |",
    ]


def test_the_papers_numbers_stand_beside_and_the_costs():
    table = columns(table_of([row("ha_gan", fold(mmd=0.002))], {}, with_paper=True))
    entries = table["nocodazole", "HA-GAN"]
    assert entries["MMD x 10⁴ ↓"] == "**20**"
    assert entries["FID, paper"] == "6.44 ± 0.05" and entries["MMD x 10⁴, paper"] == "30.54 ± 0.27"
    assert entries["parameters"] == "1,234,567" and entries["s a cell"] == "0.25"
    assert entries["minutes"] == "3.0" and entries["samples seen"] == "40 + 160"
    assert table["nocodazole", "*real*"]["parameters"] == "–"


def test_what_is_not_there_yet_is_a_dash():
    table = columns(table_of([row("w_gan", fold(10)), Row("nocodazole", "byoc")], {}, with_paper=True))
    entries = table["nocodazole", "BYOC"]
    assert entries["Fréchet, morphology ↓"] == entries["parameters"] == entries["samples seen"] == "–"
    assert entries["FID, paper"] == "1.91 ± 0.03"


def test_drugs_are_compared_each_by_itself():
    rows = [row("w_gan", fold(3), drug="a"), row("byoc", fold(2), drug="a")]
    rows += [row("w_gan", fold(1), drug="b"), row("byoc", fold(4), drug="b")]
    table = columns(table_of(rows, {}, with_paper=True))
    assert [key for key, entries in table.items() if "**" in entries["Fréchet, morphology ↓"]] == [
        ("a", "BYOC"),
        ("b", "W-GAN"),
    ]
    assert table["a", "BYOC"]["FID, paper"] == "–"  # the paper has no such drug


def test_every_column_is_a_metric_of_the_evaluation():
    for key in (*COLUMNS, *PANELS):
        assert _metric(key).good in ("low", "high", "0.5", "as real")


def test_the_papers_fid_is_its_mmd_times_the_features_and_a_little_more():
    """As docs and design say: FID - 2048 MMD is 0.1 to 0.5; a slip of the pen would show."""
    for by_drug in PAPER.values():
        for (fid, _), (mmd, _) in by_drug.values():
            assert 0 < fid - 2048 * mmd * 1e-4 < 0.65


def test_the_figures_panels_hold_a_value_a_fold():
    scores = scores_of([row("cell", fold(10, mmd=1e-4), fold(12, mmd=2e-4)), row("byoc_ablation", fold(3, mmd=1e-4))])
    assert scores["Fréchet, morphology ↓"] == {"cell": {"nocodazole": [10, 12]}, "BYOC": {"nocodazole": [3]}}
    assert scores["MMD x 10⁴ ↓"]["cell"]["nocodazole"] == pytest.approx([1, 2])
    assert "Fréchet, texture ↓" not in scores


def test_the_page_says_what_the_numbers_rest_on():
    plan = read_plan("cpu")
    page = "\n".join(page_of(TABLE, plan, [row("byoc", fold(10))], {}, {"byoc": {"0.3": 5.0, "1": None}}, ["train/x"]))
    for text in ("phantoms, shapes drawn by a formula", "judged on other phantoms, in 3 folds", "on other data"):
        assert text in page
    assert "> Not done, and missing here: train/x" in page and "at most 15 minutes" in page
    assert "Minutes: processor time" in page
    assert "| BYOC | 5 | – |" in page and "morphology/frechet after 1.5 minutes, of nocodazole" in page
    given = read_plan("paper", cells={"train_data_dir": "x"})
    page = "\n".join(page_of(FIGURE, given, [row("cell", fold(10))], {}))
    assert "the given cells" in page and "trained 5 times, without one fold" in page and "FID, paper" not in page


def test_the_page_says_that_fid_is_missing_once_something_was_judged_without_it():
    said = "no weights of Med3D were given (`--med3d`)"
    for values, is_missing in ((fold(10), True), (fold(10) | {"med3d/frechet": 2.0}, False)):
        page = "\n".join(page_of(TABLE, read_plan("cpu"), [row("byoc", values)], {"nocodazole": [values]}))
        assert (said in page) == is_missing and ("| FID ↓ |" in page) != is_missing
    assert said not in "\n".join(page_of(TABLE, read_plan("cpu"), [Row("nocodazole", "byoc")], {}))


@pytest.mark.parametrize("study", [TABLE, FIGURE])
def test_results_are_gathered_over_the_folds_and_written(study, tmp_path, monkeypatch):
    def run_commands(job, commands):
        for _, more in commands:
            folder = Path(more["output_dir"])
            folder.mkdir(parents=True)
            (folder / "model_index.json").write_text("{}")
            rows = {"generated": fold(10 + job.fold), "real": fold(2.0)} if job.kind == "evaluate" else {}
            (folder / "metrics.json").write_text(json.dumps({"folds": [rows]}).replace("NaN", "null"))
        return {"speed": SPEED, "effort": EFFORT}

    monkeypatch.setattr(running, "run_commands", run_commands)
    plan = read_plan("paper", drugs=["nocodazole"], num_folds=2)
    jobs = Jobs(plan.jobs(study), tmp_path)
    write_results(study, plan, jobs)  # of nothing yet
    assert "missing here: train/nocodazole/" in (tmp_path / f"{study}.md").read_text()
    for number in range(len(jobs.jobs) - 1):  # the last evaluation is missing
        jobs.run(number)
    rows, floors = gather(jobs)
    assert [len(row.folds) for row in rows] == [2] * (len(rows) - 1) + [1]
    assert [f["morphology/frechet"] for f in rows[0].folds] == [10, 11] and len(rows[0].efforts) == 2
    assert [f["morphology/frechet"] for f in floors["nocodazole"]] == [2, 2]
    write_results(study, plan, jobs)
    record = json.loads((tmp_path / f"{study}.json").read_text())
    assert record["rows"][0]["summary"]["morphology/frechet"]["mean"] == 10.5
    assert record["floor"]["nocodazole"]["morphology/frechet"]["mean"] == 2
    assert record["not_done"] == [jobs.jobs[-1].name]
    assert ("paper" in record) == (study == TABLE)
    page = (tmp_path / f"{study}.md").read_text()
    assert f"missing here: {jobs.jobs[-1].name}" in page and "10.5 ± 0.707" in page
    assert (tmp_path / "figure6.png").is_file() == ("(figure6.png)" in page) == (study == FIGURE)
