"""A folder as the Hub shall have it, and its way there."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, HfApi, ModelCard

from ..baselines import BaselinePipeline
from ..pipelines import BYOCPipeline
from .card import make_card, read_run_record
from .evaluation_results import read_evaluation


CARD_NAME = "README.md"
NOT_YET = "No weights are published yet"  # in a card that waits for them
# what a repository may hold of an earlier version; files of others there are left alone
OURS = ["model_index.json", "*/*.json", "*/diffusion_pytorch_model*", "report.md", "*.png", "evaluation/*"]


def full_name(name: str) -> str:
    """ORGANISATION/NAME of a repository; one without organisation is the user's own.

    Raises:
        OSError: if nobody is logged in, whose it could be.
    """
    if "/" in name:
        return name
    with _refusals(name):
        return f"{HfApi().whoami()['name']}/{name}"


def create_repository(name: str, private: bool = False) -> str:
    """The full name of the repository `name` (NAME or ORGANISATION/NAME); made if missing.

    Raises:
        OSError: if the Hub refuses, for want of a token for example.
    """
    with _refusals(name):  # None leaves it to the organisation's settings
        return HfApi().create_repo(name, private=private or None, exist_ok=True).repo_id


@contextmanager
def _refusals(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # huggingface_hub's errors are
        raise OSError(
            f"Expected to be able to push to {name}, got {error}. Log in with `hf auth login`, or set HF_TOKEN to a"
            " token that may write."
        ) from error


def prepare_folder(
    pretrained: str | os.PathLike,
    folder: str | os.PathLike,
    repo_id: str,
    card_path: str | os.PathLike | None = None,
    evaluation_dir: str | os.PathLike | None = None,
    with_fp16: bool = True,
    license: str | None = None,
    data_description: str | None = None,
    data_license: str | None = None,
) -> ModelCard:
    """Write all that is published of a pipeline: weights, in float32 and fp16, scheduler, card, report, evaluation.

    No checkpoint, no log, no cell, no split.

    Args:
        pretrained: folder of the saved pipeline, of a training run for example.
        folder: to write into.
        repo_id: ORGANISATION/NAME, for the card.
        card_path: a card of the author's own, which gets the metrics in its metadata, and `repo_id` in its first
            ``from_pretrained("...")``; None fills the template.
            Pictures and pages that it links to, beside it or in `pretrained`, go along.
        evaluation_dir: output folder of `byoc-evaluate` for this pipeline.
        with_fp16: write weights of ``variant="fp16"``, too.
        license, data_description, data_license: as for `make_card`.

    Returns:
        The card.

    Raises:
        ValueError: if the pipeline is refused as it is when it is loaded, if its weights are too large for fp16, or
            if the evaluation is another pipeline's, or the card says that there are no weights.
        OSError: if something of it is missing.
    """
    pretrained, folder = Path(pretrained), Path(folder)
    if not (pretrained / DiffusionPipeline.config_name).is_file():
        raise FileNotFoundError(
            f"Expected the folder of a saved pipeline, got {pretrained} without {DiffusionPipeline.config_name}. Save"
            " it there, by save_pretrained for example."
        )
    own_card = ModelCard.load(card_path, ignore_metadata_errors=False) if card_path else None
    if own_card and NOT_YET in own_card.text:
        raise ValueError(f'Expected a card for weights that are there, got {card_path}, with "{NOT_YET}". Fill it in.')
    evaluation = read_evaluation(evaluation_dir, pretrained) if evaluation_dir else None
    pipeline = DiffusionPipeline.from_pretrained(pretrained)
    if not isinstance(pipeline, (BYOCPipeline, BaselinePipeline)):
        raise ValueError(
            f"Expected a BYOCPipeline or BaselinePipeline in {pretrained}, got {type(pipeline).__name__}. Push it by"
            " its own push_to_hub."
        )
    pipeline.save_pretrained(folder)
    if with_fp16:
        try:
            half = DiffusionPipeline.from_pretrained(pretrained, dtype=torch.float16)
        except ValueError as error:  # the others have been loaded
            raise ValueError(
                f"Expected weights that fp16 can hold in {pretrained}, got others ({error}). Publish float32 alone"
                " (--no-fp16)."
            ) from error
        half.save_pretrained(folder, variant="fp16")

    if own_card is None:
        card = make_card(
            pipeline,
            repo_id,
            read_run_record(pretrained),
            evaluation,
            license,
            data_description,
            data_license,
            has_fp16=with_fp16,
            has_picture=(pretrained / "cells.png").is_file(),
            has_report=(pretrained / "report.md").is_file(),
        )
    else:
        card = own_card
        card.text = re.sub(r'(from_pretrained\(")[^"]*', lambda match: match[1] + repo_id, card.text, count=1)
        card.data.license = license or card.data.license
        if evaluation:
            card.data.model_name, card.data.eval_results = repo_id.split("/")[-1], evaluation.model_index()
    for source in filter(None, (card_path and Path(card_path).parent, pretrained)):
        copy_linked(card.text, source, folder)
    if evaluation:
        copy_linked("[](metrics.md)", evaluation.folder, folder / "evaluation")
    card.save(folder / CARD_NAME)
    return card


def copy_linked(page: str, source: Path, folder: Path) -> None:
    """Copy the pictures and pages that a Markdown page links to by their place beside it, and what those link to."""
    for name in re.findall(r"\]\(([^):]+\.(?:md|png))\)", page):
        path = source / name
        if path.is_file() and path.resolve().is_relative_to(source.resolve()) and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / name)
            if path.suffix == ".md":
                copy_linked(path.read_text(encoding="utf-8"), path.parent, (folder / name).parent)


def upload_pipeline(folder: str | os.PathLike, repo_id: str) -> CommitInfo:
    """Upload what `prepare_folder` wrote, in one commit, in place of what an earlier one brought.

    Args:
        folder: with nothing else in it.
        repo_id: of an existing repository.
    """
    return HfApi().upload_folder(
        repo_id=repo_id, folder_path=folder, delete_patterns=OURS, commit_message="Add the pipeline"
    )
