"""The evaluation, from a parsed command line: generate, measure, compare, report."""

import argparse
import time
from datetime import timedelta
from pathlib import Path
from pkgutil import resolve_name

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from ..data import CellDataset
from ..data.sets.folder import find_volumes
from ..evaluation import (
    FEATURES,
    MIN_CELLS,
    CellSet,
    EvaluationSettings,
    Results,
    autoencoder_of,
    channel_names_of,
    compare_rows,
    extract_features,
    folder_cells,
    has_classes,
    judge_reconstruction,
    make_folds,
    real_cells,
    suspicions,
    write_report,
)
from ..pipelines.generation import generate_cells
from ..pipelines.loading import hub_errors
from ..training import fair_num_threads, is_cpu_training, keep_freed_memory
from .cells import read_cells
from .command_line import one_line_errors


ALWAYS = ("grid", "voxels")  # kinds of features that need no naming


def evaluate(args: argparse.Namespace) -> None:
    """Judge what `evaluate.parse_args` understood the command line to name; mistakes end in one line."""
    # hours may pass between the processes' meetings: one may have to generate what others find done
    state = PartialState(cpu=is_cpu_training(), timeout=timedelta(days=2))
    if is_cpu_training():
        keep_freed_memory()
        torch.set_num_threads(args.num_cpu_threads or fair_num_threads())
    with one_line_errors(name="byoc-evaluate"):
        run(args, state)
    state.wait_for_everyone()
    state.destroy_process_group()


def run(args: argparse.Namespace, state: PartialState) -> None:
    seconds, started = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        seconds[name], started = time.perf_counter() - started, time.perf_counter()

    # 1. cells, and what measures them: all that can be wrong, before hours of generating
    if args.num_samples < MIN_CELLS:
        raise ValueError(f"Expected --num_samples of at least {MIN_CELLS}, got {args.num_samples}. Raise it.")
    pipeline = load_pipeline(args, state.device) if args.pretrained else None
    channel_names = tuple(args.channel_names or (pipeline and channel_names_of(pipeline)) or ("cell", "nucleus"))
    cells = read_cells(args, channel_names)
    folder = Path(args.output_dir)
    cache = Path(args.cache_dir or folder / "cache")
    folds = make_folds(
        cells,
        folder if state.is_main_process else None,
        args.num_folds,
        args.fold,
        args.split_seed,
        args.split_file,
        min_cells=max(MIN_CELLS, args.neighbours + 1),
    )
    voxel_size_um = cells.voxel_size_um or cells.processor.voxel_size_um
    notes = []
    if not voxel_size_um:
        notes.append("The files do not say how large a voxel is: µm mean voxels; or give --voxel_size_um.")
    settings = EvaluationSettings(
        channel_names=channel_names,
        voxel_size_um=voxel_size_um or (1.0, 1.0, 1.0),
        cell_threshold=args.cell_threshold,
        med3d=args.med3d,
        num_neighbours=args.neighbours,
        classifier_cells=args.classifier_cells if args.volume_classifier else 0,
        seed=args.seed,
        device=str(state.device),
    )
    extractors = {kind: FEATURES[kind](settings) for kind in (*args.features, *ALWAYS)}
    lap("reading cells")
    generated = generated_cells(args, cells, pipeline, settings)
    lap("generating")

    # 2. every set of cells, measured and compared
    autoencoder = pipeline and autoencoder_of(pipeline)
    textured = pipeline if getattr(pipeline, "texture_unet", None) else None
    real = real_cells(cells, autoencoder, textured, args.controls)
    sets, features = (generated, real), {}
    for cell_set in sets:
        features |= extract_features(cell_set, extractors, cache)
        lap(f"measuring {cell_set.name} cells")
    found = compare_rows(sets, features, extractors, folds, settings, cache)
    lap("metrics")

    # 3. the report
    if state.is_main_process:
        reconstruction = {}
        if autoencoder is not None:
            reconstruction = judge_reconstruction(autoencoder, real, folds[0][0][:64], settings.cell_threshold)
        notes += suspicions(features["generated"]["voxels"], features["real"]["voxels"], pipeline is None)
        results = Results(
            origin=args.pretrained or args.generated_dir,
            is_phantom=cells.is_phantom,
            sets=sets,
            features=features,
            names={kind: extractor.names for kind, extractor in extractors.items() if extractor.names},
            folds=found,
            channel_names=channel_names,
            voxel_size_um=settings.voxel_size_um,
            reconstruction=reconstruction,
            notes=notes,
            seconds=seconds,
            arguments=vars(args),
        )
        write_report(folder, results)


def load_pipeline(args: argparse.Namespace, device: torch.device) -> DiffusionPipeline:
    pipeline_class = DiffusionPipeline
    if args.pipeline_class is not None:
        try:
            pipeline_class = resolve_name(args.pipeline_class)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"Expected --pipeline_class MODULE:CLASS that can be imported, got {args.pipeline_class} ({error})."
                " Add its folder to PYTHONPATH, or correct the name."
            ) from error
    with hub_errors(args.pretrained):
        pipeline = pipeline_class.from_pretrained(args.pretrained, dtype=getattr(torch, args.dtype)).to(device)
    pipeline.set_progress_bar_config(disable=True)  # the series of cells has one
    if args.latent_range is not None:
        autoencoder = autoencoder_of(pipeline)
        if autoencoder is None:
            raise ValueError(
                f"Expected a pipeline with codebooks for --latent_range, got {type(pipeline).__name__}. Leave it out."
            )
        autoencoder.register_to_config(latent_range=args.latent_range)
        autoencoder.check_latent_range()
    return pipeline


def generated_cells(
    args: argparse.Namespace, cells: CellDataset, pipeline: DiffusionPipeline | None, settings: EvaluationSettings
) -> CellSet:
    """The cells to judge: generated, or found."""
    if pipeline is None:
        folder = Path(args.generated_dir)
        paths = find_volumes(folder)[: args.num_samples]
        if len(paths) < MIN_CELLS:
            raise ValueError(
                f"Expected at least {MIN_CELLS} volumes in {folder}, got {len(paths)}. Give the folder with them."
            )
        labels = [path.relative_to(folder).parts[0] for path in paths]
        return folder_cells(paths, cells.processor, labels if set(labels) <= set(cells.class_names) else None)
    class_names = [cells.class_names[label] for label in cells.labels] if has_classes(pipeline) else None
    state = PartialState()
    paths = generate_cells(
        pipeline,
        Path(args.output_dir) / "generated",
        args.num_samples,
        class_names,
        args.num_inference_steps,
        seed=args.seed,
        batch_size=args.batch_size,
        voxel_size_um=settings.voxel_size_um,
        share=(state.process_index, state.num_processes),
    )
    state.wait_for_everyone()
    labels = None if class_names is None else [class_names[i % len(class_names)] for i in range(len(paths))]
    return folder_cells(paths, cells.processor, labels)
