"""What Table 1 and Figure 6 consist of: a preset, and the jobs that it asks for. Nothing heavy."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from .. import evaluate, train_arguments, train_baseline_arguments
from ..training_arguments import PRESETS


TABLE, FIGURE = "table1", "figure6"
MODELS = ("ha_gan", "w_gan", "alpha_gan", "medical_diffusion", "byoc")  # the rows of Table 1
# the ablations of Figure 6, and whose codebook's range they are sampled with; None for that of the training
ABLATIONS = {"unimodal": None, "absolute": "absolute", "cell": "cell", "nucleus": "nucleus", "byoc": None}

PARSERS = {
    "byoc-train": partial(train_arguments.parse_args, ""),
    "byoc-train-baseline": partial(train_baseline_arguments.parse_args, ""),
    "byoc-evaluate": evaluate.parse_args,
}
OF_STAGES = ("medical_diffusion", "byoc")  # an autoencoder, then others
UNSEEN_SEED, TUNING_SEED = 10_000, 20_000  # added to the seed: phantoms that no model was trained, or tuned, on
OF_THE_TIME = ("max_train_steps", "discriminator_start")  # a preset's numbers of steps that another time multiplies


@dataclass(frozen=True)
class Command:
    """One call of a command that pip brings.

    Args:
        name: a key of `PARSERS`.
        arguments: name -> value, as in a preset.
    """

    name: str
    arguments: Mapping[str, Any]

    def argv(self, **more: Any) -> list[str]:
        """Its command line, with further arguments at the end."""
        words = []
        for name, value in (*self.arguments.items(), *more.items()):
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            elif value is not None:
                words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
        return words

    def parse(self, **more: Any):
        """All its arguments, those of its preset and its defaults too, as the command understands them."""
        return PARSERS[self.name](self.argv(**more))


@dataclass(frozen=True)
class Job:
    """One training, one evaluation, or a short one of each to try learning rates.

    Args:
        kind: "tune", "train" or "evaluate".
        name: also its folder, below that of the reproduction.
        drug: the class of its cells.
        model: the row of the table that it belongs to.
        commands: one after the other.
        fold: of the held-out cells; None where a model is trained once for all folds.
        needs: names of jobs that come first.
        trained_by: of an evaluation, the job that trained the pipeline; None for the job itself.
        rates: name of a "tune" job among `needs` -> the learning rates that it tried; the best are added to the
            arguments.
        criterion: of a "tune" job, the key of ``metrics.json`` that is its score.
    """

    kind: str
    name: str
    drug: str
    model: str
    commands: tuple[Command, ...]
    fold: int | None = None
    needs: tuple[str, ...] = ()
    trained_by: str | None = None
    rates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    criterion: str | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A reproduction: the entries of a preset, and what the command line adds to them.

    Args:
        drugs: the classes of the cells, a model each.
        num_folds: of the held-out cells.
        train_each_fold: train a model without each fold, and judge it on that fold; otherwise one model, which is
            judged on phantoms that it was not trained on, in folds.
        train_minutes: of every training, the same for every model; None where the steps alone decide.
        cells: where cells come from, arguments of all commands.
        training: arguments of every training.
        models: name -> "arguments" of its training; "shares" of the minutes that its stages have, if it has several;
            "rate_factor", by which its preset's learning rates are multiplied, if that is settled.
        ablation: arguments of the trainings of Figure 6, beside those of `models["byoc"]`.
        tuning: "factors" of the learning rates to try, for "minutes", judged by "num_samples" cells; the lowest
            "criterion", a key of ``metrics.json``, wins.
        evaluation: arguments of every evaluation.
        seed: of phantoms, trainings and generated cells.
        tune: try the learning rates of models that have no "rate_factor".

    Raises:
        ValueError: for entries that cannot be meant.
    """

    drugs: Sequence[str]
    num_folds: int
    train_each_fold: bool
    train_minutes: float | None
    cells: Mapping[str, Any]
    training: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]
    ablation: Mapping[str, Any]
    tuning: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    seed: int = 0
    tune: bool = False

    def __post_init__(self):
        if unknown := set(self.models) - set(MODELS):
            raise ValueError(f"Expected models among {', '.join(MODELS)}, got {sorted(unknown)}. Correct the name.")
        if self.num_folds < 2:
            raise ValueError(f"Expected num_folds of at least 2, got {self.num_folds}. Raise it.")
        if self.train_minutes is not None and not self.train_minutes > 0:
            raise ValueError(f"Expected train_minutes above 0, got {self.train_minutes:g}. Raise it.")
        for model, entry in self.models.items():
            if unknown := set(entry) - {"arguments", "shares", "rate_factor"}:
                raise ValueError(
                    f"Expected arguments, shares, rate_factor of {model}, got {sorted(unknown)}. Correct it."
                )
            if self.train_minutes is not None and model in OF_STAGES and "shares" not in entry:
                raise ValueError(
                    f"Expected shares of {model} for train_minutes, got none: each of its stages would have them all."
                    " Add shares, that add up to 1, to the preset."
                )
            total = sum(entry.get("shares", {"": 1}).values())
            if abs(total - 1) > 1e-6:
                raise ValueError(f"Expected shares of {model} that add up to 1, got {total:g}. Correct them.")
        if not (self.train_each_fold or self.is_of_phantoms):
            raise ValueError(
                "Expected a training for each fold of given cells, got one for all, which would be judged on cells of"
                " its own training. Add --train_each_fold."
            )

    @property
    def is_of_phantoms(self) -> bool:
        return not (self.cells.get("train_data_dir") or self.cells.get("dataset_name"))

    @property
    def folds(self) -> tuple[int | None, ...]:
        """Of the trainings."""
        return tuple(range(self.num_folds)) if self.train_each_fold else (None,)

    # ------------------------------------------------------------------ jobs

    def jobs(self, study: str) -> list[Job]:
        """All jobs of a study, each after those that it needs."""
        if study == FIGURE:
            if "byoc" not in self.models:
                raise ValueError(f"Expected byoc in the preset, got {', '.join(self.models)}. Add it for Figure 6.")
            trainings = {"byoc_ablation" if self.ablation else "byoc": dict(self.ablation)}
            trainings["unimodal"] = self.ablation | {"share_codebook": True}
            found = [("byoc", name, extra) for name, extra in trainings.items()]
            separate = next(iter(trainings))
            rows = [
                (separate if name == "byoc" else name, "unimodal" if name == "unimodal" else separate, latent_range)
                for name, latent_range in ABLATIONS.items()
            ]
        else:
            found = [(model, model, {}) for model in self.models]
            rows = [(model, model, None) for model in self.models]
        tuned = {model: list(self._tuning_jobs(model)) for model in dict.fromkeys(model for model, *_ in found)}
        places = [(drug, fold) for drug in self.drugs for fold in self.folds]
        trainings = [
            self._training_job(model, row, drug, fold, extra, tuned[model])
            for drug, fold in places
            for model, row, extra in found
        ]
        evaluations = [
            self._evaluation_job(row, training, drug, fold, latent_range)
            for drug, fold in places
            for row, training, latent_range in rows
        ]
        return [job for jobs in tuned.values() for job in jobs] + trainings + evaluations

    def _tuning_jobs(self, model: str) -> Iterator[Job]:
        if not self.tune or "rate_factor" in self.models[model]:
            return
        drug, fold, minutes = self.drugs[0], self.folds[0], self.tuning["minutes"]
        for factor in self.tuning["factors"]:
            extra = self._rates(model, factor) | self._fewer_steps(model, minutes)
            training = self._train(model, drug, fold, minutes, extra)
            name, criterion = f"tune/{model}/{factor:g}", self.tuning["criterion"]
            judged = {"num_samples": self.tuning["num_samples"], "features": [criterion.partition("/")[0]]}
            evaluation = self._evaluate(drug, fold, TUNING_SEED, volume_classifier=False, **judged)
            yield Job("tune", name, drug, model, (training, evaluation), fold, criterion=criterion)

    def _training_job(self, model, row, drug, fold, extra: Mapping, tuned: Sequence[Job]) -> Job:
        rates = dict(zip((job.name for job in tuned), self._all_rates(model), strict=False)) if tuned else {}
        if not tuned:
            extra = extra | self._rates(model, self.models[model].get("rate_factor", 1.0))
        command = self._train(model, drug, fold, self.train_minutes, extra)
        name = _name("train", drug, row, fold)
        return Job("train", name, drug, row, (command,), fold, tuple(rates), rates=rates)

    def _evaluation_job(self, row, training, drug, fold, latent_range) -> Job:
        trained_by = _name("train", drug, training, fold)
        command = self._evaluate(drug, fold, UNSEEN_SEED, latent_range=latent_range)
        name = _name("evaluate", drug, row, fold)
        return Job("evaluate", name, drug, row, (command,), fold, (trained_by,), trained_by)

    # ------------------------------------------------------------------ commands

    def _train(self, model, drug, fold, minutes, extra: Mapping = {}) -> Command:
        entry = self.models[model]
        which = {"baseline": model} if model != "byoc" else {}
        limits = {}
        if minutes is not None:
            shares = entry.get("shares")
            limits = {f"{stage}_max_train_minutes": share * minutes for stage, share in (shares or {}).items()}
            limits = limits or {"max_train_minutes": minutes}
        arguments = which | self.cells | self.training | entry["arguments"] | {"label": [drug], "seed": self.seed}
        command = "byoc-train-baseline" if which else "byoc-train"
        return Command(command, arguments | self._fold_arguments(fold) | limits | extra)

    def _evaluate(self, drug, fold, seed_offset: int, **more) -> Command:
        """On the fold that was not trained on, or, of phantoms alone, on others, in folds."""
        seed = self.seed + (seed_offset if fold is None else 0)
        folds = {"num_folds": self.num_folds} if fold is None else self._fold_arguments(fold)
        rows = {"controls": False}  # the table shows generated and real cells alone
        arguments = rows | self.cells | self.evaluation | {"label": [drug], "seed": seed} | folds | more
        return Command("byoc-evaluate", {name: value for name, value in arguments.items() if value is not None})

    def _fold_arguments(self, fold: int | None) -> dict[str, int]:
        return {} if fold is None else {"num_folds": self.num_folds, "fold": fold}

    def _rates(self, model: str, factor: float) -> dict[str, float]:
        """All learning rates of a model's preset, multiplied; none for 1, as the preset has them."""
        if factor == 1:
            return {}
        rates = self._stage_arguments(model, "learning_rate")
        return {name: float(f"{value * factor:.6g}") for name, value in rates.items()}

    def _fewer_steps(self, model: str, minutes: float) -> dict[str, int]:
        """Steps of a shorter training, so that its schedules end, and its adversaries join, as in a whole one."""
        if self.train_minutes is None:
            return {}
        given = self.models[model]["arguments"]
        steps = self._stage_arguments(model, "max_train_steps")
        steps |= {name: value for name, value in given.items() if name.endswith(OF_THE_TIME)}
        return {name: max(1, round(value * minutes / self.train_minutes)) for name, value in steps.items()}

    def _stage_arguments(self, model: str, name: str) -> dict[str, Any]:
        """An argument that each stage has of its own, as a model's preset gives it, by name."""
        args = vars(self._train(model, self.drugs[0], self.folds[0], None).parse())
        stages = self.models[model].get("shares")
        names = [f"{stage}_{name}" for stage in stages] if stages else [key for key in args if key.endswith(name)]
        return {key: args[key] for key in names if args[key] is not None}

    def _all_rates(self, model: str) -> list[dict[str, float]]:
        return [self._rates(model, factor) for factor in self.tuning["factors"]]


def read_plan(preset: str, cells: Mapping[str, Any] = {}, evaluation: Mapping[str, Any] = {}, **more: Any) -> Plan:
    """The plan of a preset.

    Args:
        preset: cpu, paper, or the path of a JSON file.
        cells: in place of the preset's: another source of cells replaces its own.
        evaluation: likewise, of its evaluations.
        more: fields of `Plan`, in place of the preset's; None leaves them. Other ``train_minutes`` multiply the steps
            that the preset gives its models, whose learning-rate schedules then end as before.

    Raises:
        ValueError: if there is no such preset, or it cannot be meant.
    """
    folder = PRESETS / "reproduction"
    path = folder / f"{preset}.json" if (folder / f"{preset}.json").is_file() else Path(preset)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.json")))
        raise ValueError(f"Expected --preset {known} or a JSON file, got {preset}. Give one of these.")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"Expected a preset in JSON, got {path} ({error}). Correct the file.") from error
    names = {entry.name for entry in fields(Plan)}
    required = names - {"seed", "tune"}
    if not required <= set(entries) <= names:
        expected = ", ".join(sorted(required))
        raise ValueError(f"Expected {expected} in {path}, got {', '.join(entries)}. Correct the file.")
    if cells.get("train_data_dir") or cells.get("dataset_name"):  # of which there are as many as there are
        entries["cells"].pop("num_phantoms", None)
        entries["evaluation"].pop("num_phantoms", None)
    entries["cells"] |= cells
    entries["evaluation"] |= evaluation
    if entries["train_minutes"] and more.get("train_minutes"):
        factor = more["train_minutes"] / entries["train_minutes"]
        for arguments in (entry["arguments"] for entry in entries["models"].values()):
            steps = {name: value for name, value in arguments.items() if name.endswith(OF_THE_TIME)}
            arguments |= {name: max(1, round(value * factor)) for name, value in steps.items()}
    return Plan(**entries | {name: value for name, value in more.items() if value is not None})


def _name(kind: str, drug: str, row: str, fold: int | None) -> str:
    """Of a job, which is its folder, too: a label is one folder, also with a slash in it."""
    folder = drug.replace("%", "%25").replace("/", "%2F")
    return f"{kind}/{folder}/{row}/{'all' if fold is None else f'fold_{fold}'}"
