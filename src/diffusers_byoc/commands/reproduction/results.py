"""What a reproduction found: Table 1 and Figure 6, beside the paper's numbers."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from ...evaluation import METRICS, Metric, summarize_folds
from ...evaluation.report import in_words, without_nan
from ...visualization import metric_bars, write_png
from ...whole_files import whole_or_absent
from .jobs import Jobs
from .plan import FIGURE, TABLE, Plan


TITLES = {
    "ha_gan": "HA-GAN",
    "w_gan": "W-GAN",
    "alpha_gan": "α-GAN",
    "medical_diffusion": "MedicalDiffusion",
    "byoc": "BYOC",
    "byoc_ablation": "BYOC",
    "unimodal": "unimodal",
    "absolute": "absolute",
    "cell": "cell",
    "nucleus": "nucleus",
}

#: Table 1 of the paper: model -> drug -> FID and MMD x 10⁴, mean and standard deviation over five folds, on 7,083
#: melanoma cells that are not public.
PAPER = {
    "ha_gan": {
        "nocodazole": ((6.44, 0.05), (30.54, 0.27)),
        "blebbistatin": ((3.76, 0.05), (16.11, 0.16)),
        "binimetinib": ((5.19, 0.05), (23.97, 0.21)),
    },
    "w_gan": {
        "nocodazole": ((2.75, 0.04), (12.74, 0.21)),
        "blebbistatin": ((1.29, 0.03), (3.96, 0.1)),
        "binimetinib": ((2.1, 0.03), (9.00, 0.15)),
    },
    "alpha_gan": {
        "nocodazole": ((2.73, 0.04), (12.62, 0.21)),
        "blebbistatin": ((1.3, 0.03), (4.00, 0.1)),
        "binimetinib": ((2.1, 0.03), (9.00, 0.15)),
    },
    "medical_diffusion": {
        "nocodazole": ((2.12, 0.03), (9.55, 0.17)),
        "blebbistatin": ((2.26, 0.69), (9.07, 3.5)),
        "binimetinib": ((1.62, 0.03), (6.63, 0.13)),
    },
    "byoc": {
        "nocodazole": ((1.91, 0.03), (8.34, 0.15)),
        "blebbistatin": ((0.99, 0.03), (2.82, 0.08)),
        "binimetinib": ((1.43, 0.02), (6.06, 0.1)),
    },
}

# the table's columns, as far as the evaluation had their features; those of the paper first
COLUMNS = {
    "med3d/frechet": "FID",
    "med3d/mmd_linear": "MMD x 10⁴",
    "morphology/frechet": "Fréchet, morphology",
    "texture/frechet": "Fréchet, texture",
    "morphology/classifier_accuracy": "trees, morphology",
    "texture/classifier_accuracy": "trees, texture",
    "volumes/classifier_accuracy": "3D network",
    "morphology/coverage": "coverage",
    "morphology/nucleus_inside_share": "nucleus inside",
    "morphology/one_nucleus_share": "one nucleus",
    "morphology/volume_correlation": "correlation of volumes",
}
# the figure's panels, likewise
PANELS = {
    "med3d/frechet": "FID",
    "med3d/mmd_linear": "MMD x 10⁴",
    "morphology/frechet": "Fréchet, morphology",
    "morphology/mmd_linear": "MMD x 10⁴, morphology",
    "texture/frechet": "Fréchet, texture",
    "texture/mmd_linear": "MMD x 10⁴, texture",
}
ARROWS = {"low": "↓", "high": "↑", "0.5": "→ 0.5", "1": "→ 1", "0": "→ 0", "as real": "as real"}


@dataclass
class Row:
    """What was found of one model and drug.

    Args:
        drug: the class of the cells.
        model: a key of `TITLES`.
        folds: metrics of each fold, key -> value; None for what is not defined.
        efforts: of each training, stage -> "steps", "samples", "seconds", "learning_rate".
        speed: "parameters", "seconds_per_cell" and "device"; of the first fold.
    """

    drug: str
    model: str
    folds: list[dict[str, float | None]] = field(default_factory=list)
    efforts: list[dict[str, dict[str, float]]] = field(default_factory=list)
    speed: dict[str, float | str] = field(default_factory=dict)


def write_results(study: str, plan: Plan, jobs: Jobs) -> None:
    """Write what is there so far: ``table1.md`` and ``.json``, or ``figure6.md``, ``.json`` and ``.png``.

    Args:
        study: `TABLE` or `FIGURE`.
        plan: of the jobs.
        jobs: some of which may not be done.
    """
    rows, floors = gather(jobs)
    record = {
        "plan": asdict(plan),
        "rows": [asdict(row) | {"summary": summarize_folds(row.folds)} for row in rows],
        "floor": {drug: summarize_folds(folds) for drug, folds in floors.items()},
        "learning_rates": tuning_scores(jobs),
        "not_done": [job.name for job in jobs.jobs if jobs.result(job) is None],
    }
    if study == TABLE:
        record["paper"] = {"on": "7,083 melanoma cells that are not public, not the cells of this table"} | PAPER
    page = page_of(study, plan, rows, floors, record["learning_rates"], record["not_done"])
    if study == FIGURE and any(row.folds for row in rows):
        write_png(metric_bars(scores_of(rows)), jobs.folder / f"{study}.png")
        page += ["", f"![A panel a metric, a dot a fold]({study}.png)"]
    with whole_or_absent(jobs.folder / f"{study}.json") as temporary:
        temporary.write_text(json.dumps(without_nan(record), indent=1, ensure_ascii=False), encoding="utf-8")
    with whole_or_absent(jobs.folder / f"{study}.md") as temporary:
        temporary.write_text("\n".join(page) + "\n", encoding="utf-8")
    print(f"Wrote {jobs.folder / study}.md")


def gather(jobs: Jobs) -> tuple[list[Row], dict[str, list[dict[str, float]]]]:
    """(a row for each drug and model, in their order, drug -> folds of real cells against real ones)."""
    rows: dict[tuple[str, str], Row] = {}
    floors: dict[str, dict[int | None, list[dict[str, float]]]] = {}
    by_name = {job.name: job for job in jobs.jobs}
    for job in (job for job in jobs.jobs if job.kind == "evaluate"):
        row = rows.setdefault((job.drug, job.model), Row(job.drug, job.model))
        found = jobs.result(job)
        if found is None:
            continue
        path = jobs.folder / job.name / "evaluation" / "metrics.json"
        folds = json.loads(path.read_text(encoding="utf-8"))["folds"]  # null for what is not defined
        row.folds += [fold["generated"] for fold in folds]
        row.efforts.append(jobs.result(by_name[job.trained_by])["effort"])
        row.speed = row.speed or found["speed"]
        floors.setdefault(job.drug, {}).setdefault(job.fold, [fold["real"] for fold in folds])
    return list(rows.values()), {drug: [f for part in parts.values() for f in part] for drug, parts in floors.items()}


def tuning_scores(jobs: Jobs) -> dict[str, dict[str, float | None]]:
    """Model -> factor of its preset's learning rates -> score, of the "tune" jobs that are done."""
    scores: dict[str, dict[str, float | None]] = {}
    for job in (job for job in jobs.jobs if job.kind == "tune"):
        if (found := jobs.result(job)) is not None:
            scores.setdefault(job.model, {})[job.name.rpartition("/")[2]] = found["score"]
    return scores


# ---------------------------------------------------------------------- the page


def page_of(
    study: str,
    plan: Plan,
    rows: Sequence[Row],
    floors: Mapping[str, Sequence[Mapping[str, float]]],
    scores: Mapping[str, Mapping[str, float | None]] = {},
    not_done: Sequence[str] = (),
) -> list[str]:
    """The lines of ``table1.md`` or ``figure6.md``."""
    what = "Table 1: BYOC and the models that it is compared with" if study == TABLE else "Figure 6: codebooks of BYOC"
    cells = "phantoms, shapes drawn by a formula, no microscopy" if plan.is_of_phantoms else "the given cells"
    if plan.train_each_fold:
        judged = f"Each model was trained {plan.num_folds} times, without one fold, and judged on that fold."
    else:
        judged = f"Each model was trained once, and judged on other phantoms, in {plan.num_folds} folds."
    lines = [
        f"# {what}",
        "",
        f"On {cells}. {judged} Mean ± standard deviation over the folds; bold: the best of a drug. *real*: other real"
        " cells, as many, against the same held-out ones: no generator can be expected to do better. Trees and 3D"
        " network: how often they tell a cell from a real one. Nucleus inside, one nucleus, correlation of volumes:"
        " whether the channels belong to one cell. docs/evaluation.md says what each column measures.",
        "",
    ]
    if floors and "med3d/frechet" not in _defined(COLUMNS, rows, floors):
        lines += ["FID and MMD, the paper's metrics, are missing: no weights of Med3D were given (`--med3d`).", ""]
    if not_done:
        lines += [f"> Not done, and missing here: {', '.join(not_done)}", ""]
    lines += [*overview_of(rows, floors), "", "With all measurements, and what each model costs:", ""]
    lines += table_of(rows, floors, with_paper=study == TABLE)
    if study == TABLE:
        lines += ["", "*paper*: Table 1 of the paper, on other data (7,083 melanoma cells that are not public)."]
    devices = sorted({row.speed["device"] for row in rows if row.speed})
    lines += ["", "Cells of each model beside real ones: `evaluate/DRUG/MODEL/FOLD/evaluation/cells.png`."]
    lines += [f"Seconds a cell: the faster of two batches, on {', '.join(devices) or 'nothing yet'}."]
    lines += ["Parameters: of all networks of the saved pipeline, of a GAN of its generator alone."]
    clock = "processor time of the training's threads" if plan.training.get("minutes_of") == "processor" else "time"
    lines += [f"Minutes: {clock} in steps, all stages together. Samples seen: cells or crops of them, by stage."]
    if plan.train_minutes is not None:
        lines += [f"Every training: at most {plan.train_minutes:g} minutes."]
    if scores:
        tried = f"{plan.tuning['criterion']} after {plan.tuning['minutes']:g} minutes, of {plan.drugs[0]}"
        lines += ["", f"Learning rates: {tried}, by the factor of the preset's rates; the lowest was taken.", ""]
        factors = list(dict.fromkeys(factor for by_factor in scores.values() for factor in by_factor))
        lines += ["| model | " + " | ".join(f"x {factor}" for factor in factors) + " |"]
        lines += ["| --- |" + " --- |" * len(factors)]
        for model, by_factor in scores.items():
            numbers = (by_factor.get(factor) for factor in factors)
            words = ["–" if number is None else f"{number:.4g}" for number in numbers]
            lines += [f"| {TITLES[model]} | " + " | ".join(words) + " |"]
    return lines


def table_of(
    rows: Sequence[Row], floors: Mapping[str, Sequence[Mapping[str, float]]], with_paper: bool = False
) -> list[str]:
    """A Markdown table: for each drug the models, then real cells."""
    keys = _defined(COLUMNS, rows, floors)
    metrics = {key: _metric(key) for key in keys}
    heads = [f"{COLUMNS[key]} {ARROWS[metrics[key].good]}" for key in keys]
    paper = ["FID, paper", "MMD x 10⁴, paper"] if with_paper else []
    costs = ["parameters", "s a cell", "minutes", "samples seen"]
    lines = ["| " + " | ".join(["drug", "model", *heads, *paper, *costs]) + " |"]
    lines += ["|" + " --- |" * (2 + len(heads) + len(paper) + len(costs))]
    for drug in dict.fromkeys(row.drug for row in rows):
        here = [row for row in rows if row.drug == drug]
        summaries = {row.model: summarize_folds(row.folds) for row in here}
        floor = summarize_folds(floors.get(drug, ()))
        best = {key: _best(metrics[key], key, summaries, floor) for key in keys}
        for row in here:
            words = [_in_words(summaries[row.model], key, metrics[key], row.model in best[key]) for key in keys]
            words += [f"{m:g} ± {s:g}" for m, s in PAPER.get(row.model, {}).get(drug, ())] if with_paper else []
            words += ["–"] * (len(keys) + len(paper) - len(words))
            lines.append("| " + " | ".join([drug, TITLES[row.model], *words, *_costs(row)]) + " |")
        words = [_in_words(floor, key, metrics[key]) for key in keys] + ["–"] * (len(paper) + len(costs))
        lines.append("| " + " | ".join([drug, "*real*", *words]) + " |")
    return lines


def overview_of(rows: Sequence[Row], floors: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    """A Markdown table in the paper's form: a row for each model, in it two distances for each drug.

    FID and MMD, or without features of Med3D those on morphology.
    """
    keys = _defined(PANELS, rows, floors)[:2]
    drugs = list(dict.fromkeys(row.drug for row in rows))
    summaries = {(row.model, row.drug): summarize_folds(row.folds) for row in rows}
    places = [(drug, key) for drug in drugs for key in keys]
    lines = ["| model | " + " | ".join(f"{drug}: {PANELS[key]} ↓" for drug, key in places) + " |"]
    lines += ["|" + " --- |" * (1 + len(places))]
    models = list(dict.fromkeys(row.model for row in rows))
    for model in models:
        words = []
        for drug, key in places:
            here = {other: summaries.get((other, drug), {}) for other in models}
            is_best = model in _best(_metric(key), key, here, {})
            words.append(_in_words(here[model], key, _metric(key), is_best))
        lines.append(f"| {TITLES[model]} | " + " | ".join(words) + " |")
    words = [_in_words(summarize_folds(floors.get(d, ())), key, _metric(key)) for d, key in places]
    return [*lines, "| *real* | " + " | ".join(words) + " |"]


def scores_of(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Panel -> model -> drug -> a value a fold, for `metric_bars`; without what is not defined."""
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    for key, title in PANELS.items():
        for row in rows:
            factor = _metric(key).factor
            values = [fold[key] * factor for fold in row.folds if _is_defined(fold.get(key))]
            if values:
                by_model = scores.setdefault(f"{title} ↓", {})
                by_model.setdefault(TITLES[row.model], {})[row.drug] = values
    return scores


def _defined(
    keys: Iterable[str], rows: Sequence[Row], floors: Mapping[str, Sequence[Mapping[str, float]]]
) -> list[str]:
    """Those of the keys that some fold has a value for."""
    folds = [fold for row in rows for fold in row.folds] + [fold for folds in floors.values() for fold in folds]
    return [key for key in keys if any(_is_defined(fold.get(key)) for fold in folds)]


def _metric(key: str) -> Metric:
    kind, name = key.split("/")
    return next(metric for metric in METRICS if metric.name == name and kind in metric.kinds)


def _is_defined(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _best(metric: Metric, key: str, summaries: Mapping[str, Mapping], floor: Mapping) -> set[str]:
    """The models nearest to what is good."""
    means = {model: summary[key]["mean"] for model, summary in summaries.items() if key in summary}
    means = {model: mean for model, mean in means.items() if math.isfinite(mean)}
    if metric.good in ("low", "high"):
        distances = {model: mean if metric.good == "low" else -mean for model, mean in means.items()}
    else:
        wanted = floor.get(key, {"mean": math.nan})["mean"] if metric.good == "as real" else float(metric.good)
        distances = {model: abs(mean - wanted) for model, mean in means.items() if math.isfinite(wanted)}
    best = {model for model, distance in distances.items() if distance == min(distances.values())}
    return set() if len(best) == len(means) > 1 else best  # where all are alike, none is


def _in_words(summary: Mapping[str, Mapping[str, float]], key: str, metric: Metric, is_best: bool = False) -> str:
    words = in_words(summary, key, metric.factor) if key in summary else "–"
    mean, *spread = words.split(" ", 1)
    return " ".join([f"**{mean}**", *spread]) if is_best else words


def _costs(row: Row) -> list[str]:
    if not row.speed:
        return ["–"] * 4
    minutes = np.mean([sum(stage["seconds"] for stage in effort.values()) / 60 for effort in row.efforts])
    samples = {stage: np.mean([effort[stage]["samples"] for effort in row.efforts]) for stage in row.efforts[0]}
    return [
        f"{row.speed['parameters']:,}",
        f"{row.speed['seconds_per_cell']:.3g}",
        f"{minutes:.1f}",
        " + ".join(f"{number:,.0f}" for number in samples.values()),
    ]
