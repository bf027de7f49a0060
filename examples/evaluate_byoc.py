"""Judge generated cells: the paper's metrics, and what a biologist asks, with real and obviously bad cells beside.

python examples/evaluate_byoc.py --pretrained DIR_OR_REPO --train_data_dir my_cells --output_dir results
python examples/evaluate_byoc.py --generated_dir their_cells --train_data_dir my_cells --features morphology

Writes metrics.json, metrics.md and figures. Also under `accelerate launch` and `torchrun`. See docs/evaluation.md.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from cell_sets import (
    CellSet,
    blurred_cells,
    extract_features,
    folder_cells,
    generate_cells,
    real_cells,
    shuffled_cells,
    write_whole,
)
from data_arguments import add_data_arguments, load_cells, positive
from diffusers_byoc import BYOCPipeline, __version__
from diffusers_byoc.data import CellDataset, read_split, split_cells, write_split
from diffusers_byoc.data.files import VOLUME_SUFFIXES, VolumeFileError
from diffusers_byoc.metrics import (
    MORPHOLOGY_NAMES,
    CellMorphology,
    channel_consistency,
    classifier_test,
    codebook_usage,
    compare_features,
    frechet_distance,
    load_med3d,
    measure_cells,
    median_distance,
    memorisation,
    mmd_linear,
    mmd_rbf,
    morphology_features,
    neighbour_metrics,
    reconstruction_quality,
    standardize_features,
    volume_classifier_test,
)
from diffusers_byoc.training import fair_num_threads, is_cpu_training, keep_freed_memory
from evaluation_report import write_evaluation


MIN_CELLS = 10  # generated, and on either side of a split
VOXEL_GRID = 16  # edge of the averaged volumes in which memorisation looks for copies


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained", help="pipeline to judge: a folder or a Hub repository")
    add("--generated_dir", help="volumes made elsewhere, in place of --pretrained; any files that training reads")
    add("--output_dir", default="results", help="metrics, figures, and what need not be computed again")
    add("--num_samples", type=positive, default=5000, help="cells to generate, or to take from --generated_dir")
    add("--features", nargs="+", choices=["med3d", "morphology"], default=["med3d", "morphology"])
    add("--seed", type=int, default=0)
    add("--num_cpu_threads", type=positive, help="per process, without a GPU (default: a fair share of all cores)")
    add_data_arguments(parser)
    parser.set_defaults(num_folds=5)
    add("--num_inference_steps", type=positive, help="default: the pipeline's")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="in which to generate")
    add("--batch_size", type=positive, default=16, help="cells generated at a time, in each process")
    add("--med3d", default="TencentMedicalNet/MedicalNet-Resnet50", help="weights: .pth, folder or Hub repository")
    add("--cell_threshold", type=float, help="the cell is brighter than this (default: Otsu's; membrane dye: 0.05)")
    add("--neighbours", type=positive, default=5, help="that span a neighbourhood, for precision and the like")
    add("--volume_classifier", action=argparse.BooleanOptionalAction, default=True, help="train the 3D network")
    add("--classifier_cells", type=positive, default=100, help="most cells of each kind that it learns from")
    args = parser.parse_args(argv)
    if (args.pretrained is None) == (args.generated_dir is None):
        parser.error("give either --pretrained or --generated_dir")
    if args.num_samples < MIN_CELLS:
        parser.error(f"--num_samples must be at least {MIN_CELLS}, got {args.num_samples}")
    return args


def find_generated(args, cells: CellDataset, pipeline: BYOCPipeline | None, voxel_size_um) -> CellSet:
    """Generate, or find, the cells to judge."""
    if pipeline is None:
        folder = Path(args.generated_dir)
        paths = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in VOLUME_SUFFIXES
            and not path.is_dir()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        if len(paths) < MIN_CELLS:
            raise ValueError(
                f"{folder}: expected at least {MIN_CELLS} volumes, files ending in {', '.join(VOLUME_SUFFIXES)}, got"
                f" {len(paths)}; give the folder that holds them"
            )
        return folder_cells(paths[: args.num_samples], cells)
    class_names = None
    if pipeline.unet.config.num_class_embeds is not None:
        class_names = [cells.class_names[label] for label in cells.labels]
    steps = args.num_inference_steps or pipeline.config.default_num_inference_steps
    settings = {"pretrained": args.pretrained, "num_inference_steps": steps, "seed": args.seed}
    folder = Path(args.output_dir) / "generated"
    paths = generate_cells(pipeline, args.num_samples, folder, settings, class_names, args.batch_size, voxel_size_um)
    return folder_cells(paths, cells)


def make_extractors(args, channel_names: tuple[str, ...], voxel_size_um, device) -> dict:
    """Name -> (name with all settings, function from volumes to features)."""
    thresholds = (args.cell_threshold, None)
    extractors = {"voxels": (f"voxels {VOXEL_GRID}", averaged_voxels)}
    if "morphology" in args.features:
        channels = cell_and_nucleus(channel_names)

        def measure(volumes):
            return morphology_features(measure_cells(volumes, voxel_size_um, thresholds, *channels))

        extractors["morphology"] = (f"morphology {MORPHOLOGY_NAMES} {voxel_size_um} {thresholds} {channels}", measure)
    if "med3d" in args.features:
        model = load_med3d(args.med3d)
        # summed on the CPU: not every device has float64, and each would round another way
        weights = torch.stack([weight.double().sum() for weight in model.state_dict().values()]).tolist()
        model.to(device, memory_format=torch.channels_last_3d)

        def features(volumes):
            with torch.no_grad():
                return torch.cat(
                    [model(v).features.cpu() for v in torch.from_numpy(volumes).to(device).split(8)]
                ).numpy()

        extractors["med3d"] = (f"med3d {model.config.to_json_string()} {weights}", features)
    return extractors


def cell_and_nucleus(channel_names: tuple[str, ...]) -> tuple[int, int]:
    """The channels that are measured: those of these names, or else the first and the second."""
    names = [name.lower() for name in channel_names]
    if "cell" in names and "nucleus" in names:
        return names.index("cell"), names.index("nucleus")
    if len(names) < 2:
        raise ValueError(
            f"morphology needs a cell and a nucleus channel, got {', '.join(names)} alone; give --features med3d"
        )
    return 0, 1


def averaged_voxels(volumes: np.ndarray) -> np.ndarray:
    """(B, M, D, H, W) -> (B, M * 16³): the volumes themselves, coarse enough to forgive small shifts."""
    return torch.nn.functional.adaptive_avg_pool3d(torch.from_numpy(volumes), VOXEL_GRID).flatten(1).numpy()


def suspicions(generated: np.ndarray, real: np.ndarray) -> list[str]:
    """What may be wrong with the generated volumes as such, by their averaged voxels: a line each."""
    found = []
    if num_blank := int((np.ptp(generated, axis=1) == 0).sum()):
        found.append(f"{num_blank} of the {len(generated)} generated volumes are blank.")
    if num_copies := len(generated) - len(np.unique(generated, axis=0)):
        found.append(f"{num_copies} of the {len(generated)} generated volumes are copies of another generated one.")
    if generated.max() < real.max() / 4:
        found.append(
            f"The generated volumes are dark: up to {generated.max():.2g}, where real ones reach {real.max():.2g}."
            " Integers are read over their type's range; rescale files that do not fill it."
        )
    return found


def compare(args, real: np.ndarray, candidate: np.ndarray, training: np.ndarray, kind: str) -> dict[str, float]:
    """All metrics of one set of cells against held-out ones, in one kind of features.

    Args:
        args: the command line's.
        real: (H, K) features of held-out cells.
        candidate: (N, K) features of the cells to judge.
        training: (T, K) features of the other real cells: the scale of everything.
        kind: "med3d" or "morphology".

    Returns:
        Metric -> value.
    """
    metrics = {}
    if kind == "morphology":
        rows = compare_features(real, candidate, MORPHOLOGY_NAMES)
        metrics["features_that_differ"] = np.mean([row.adjusted_p_value < 0.05 for row in rows])
        metrics["median_effect"] = np.nanmedian([row.effect for row in rows])
        test = classifier_test(real, candidate, seed=args.seed)
        metrics |= {"classifier_accuracy": test.accuracy, "classifier_low": test.interval[0]}
        metrics["classifier_high"] = test.interval[1]
        real, candidate, training = (standardize_features(x, training) for x in (real, candidate, training))
    metrics["frechet"] = frechet_distance(real, candidate)
    metrics["mmd_linear"] = mmd_linear(real, candidate)
    metrics["mmd_rbf"] = mmd_rbf(real, candidate, median_distance(training))
    metrics |= asdict(neighbour_metrics(real, candidate, args.neighbours))
    return {f"{kind}/{name}": float(value) for name, value in metrics.items()}


def evaluate_fold(args, features: dict, num_generated: int, held_out: np.ndarray, training: np.ndarray) -> dict:
    """Row -> metric -> value, every row with equally many cells against the same held-out ones."""
    num_cells = min(len(training), num_generated)
    generator = np.random.default_rng([args.seed, *held_out[:1]])
    subset_of = {
        name: generator.choice(num_generated if name == "generated" else training, num_cells, replace=False)
        for name in features
    }
    rows = {}
    for name, by_kind in features.items():
        metrics = {}
        for kind in args.features:
            real = features["real"][kind]
            metrics |= compare(args, real[held_out], by_kind[kind][subset_of[name]], real[training], kind)
        if "morphology" in by_kind:
            fit = channel_consistency(as_cells(by_kind["morphology"][subset_of[name]]))
            metrics |= {
                f"consistency/{key}": getattr(fit, key)
                for key in ("nucleus_inside_share", "one_nucleus_share", "volume_correlation")
            }
        voxels, real = by_kind["voxels"], features["real"]["voxels"]
        # of the real cells, one half of the held-out ones takes the samples' part against the other
        samples, others = (held_out[::2], held_out[1::2]) if name == "real" else (subset_of[name], held_out)
        copies = memorisation(voxels[samples], real[training], real[others])
        metrics |= {f"memorisation/{key}": getattr(copies, key) for key in ("distance_ratio", "near_share")}
        rows[name] = metrics
    return rows


def as_cells(table: np.ndarray) -> list[CellMorphology]:
    return [CellMorphology(*row) for row in table]


def classify_volumes(args, sets: dict[str, CellSet], folds: Sequence, device) -> list[tuple]:
    """(fold, row, accuracy) of the 3D network; the pairs are shared over the processes, and kept."""
    state, folder = PartialState(), Path(args.output_dir) / "cache"
    found = []
    pairs = [(fold, name) for fold in range(len(folds)) for name in sets]
    for fold, name in pairs[state.process_index :: state.num_processes]:
        held_out, training = folds[fold]
        generator = np.random.default_rng([args.seed, fold])
        num_cells = min(args.classifier_cells, len(held_out), len(training), sets[name].num_cells)
        pool = sets[name].num_cells if name == "generated" else training
        real = sets["real"].volumes(generator.choice(held_out, num_cells, replace=False))
        candidate = sets[name].volumes(generator.choice(pool, num_cells, replace=False))
        digest = hashlib.blake2b(f"3D network {__version__} {args.seed}".encode(), digest_size=16)
        for volumes in (real, candidate):
            digest.update(volumes)
        path = folder / f"{digest.hexdigest()}.json"
        if not path.is_file():
            test = volume_classifier_test(real, candidate, seed=args.seed, device=device)
            write_whole(path, json.dumps(asdict(test)).encode())
        found.append((fold, name, json.loads(path.read_text())["accuracy"]))
    return gather_object(found)


def judge_reconstruction(args, vqvae, real: CellSet, indices) -> dict[str, dict[str, float]]:
    """Channel -> measure -> mean over these real cells."""
    names = vqvae.config.channel_names
    cell_channel = cell_and_nucleus(names)[0] if len(names) > 1 else 0
    thresholds = [args.cell_threshold if channel == cell_channel else None for channel in range(len(names))]
    qualities, codes = [], []
    for start in range(0, len(indices), 8):
        volumes = torch.from_numpy(real.volumes(indices[start : start + 8]))
        with torch.no_grad():
            output = vqvae((volumes * 2 - 1).to(vqvae.device, vqvae.dtype))
        reconstruction = (output.sample.float() / 2 + 0.5).clamp(0, 1)
        qualities.append(reconstruction_quality(volumes, reconstruction, thresholds))
        codes.append(output.indices.cpu())
    usage = codebook_usage(torch.cat(codes), vqvae.config.num_vq_embeddings)
    table = {}
    for channel, name in enumerate(names):
        table[name] = {
            measure: float(np.nanmean(np.concatenate([getattr(q, measure)[:, channel] for q in qualities])))
            for measure in ("mse", "psnr", "ssim", "dice")
        }
        codebook = min(channel, len(usage.usage) - 1)
        table[name] |= {"codes_used": usage.usage[codebook], "perplexity": usage.perplexity[codebook]}
    return table


def main(args: argparse.Namespace) -> None:
    # hours may pass between the processes' meetings: one may have to generate what others find done
    state = PartialState(cpu=is_cpu_training(), timeout=timedelta(days=2))
    if is_cpu_training():
        keep_freed_memory()
        torch.set_num_threads(args.num_cpu_threads or fair_num_threads())
    seconds, started = {}, time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        seconds[name], started = time.perf_counter() - started, time.perf_counter()

    # 1. cells: real, generated, obviously bad
    try:
        pipeline = None
        if args.pretrained:
            dtype = getattr(torch, args.dtype)
            if dtype == torch.float16 and state.device.type == "cpu":
                raise ValueError("--dtype float16 needs a GPU; on a CPU give bfloat16 or float32")
            pipeline = BYOCPipeline.from_pretrained(args.pretrained, dtype=dtype).to(state.device)
        names = tuple(pipeline.vqvae.config.channel_names) if pipeline else ("cell", "nucleus")
        cells = all_cells(args, names)
        folds = make_folds(args, cells)
        voxel_size_um = cells.voxel_size_um or cells.processor.voxel_size_um or (1.0, 1.0, 1.0)
        notes = []
        if not (cells.voxel_size_um or cells.processor.voxel_size_um):
            notes.append("The files do not say how large a voxel is: µm mean voxels; or give --voxel_size_um.")
            print(notes[0])
        extractors = make_extractors(args, names, voxel_size_um, state.device)  # before hours of generating
        lap("reading cells")
        generated = find_generated(args, cells, pipeline, voxel_size_um)
    except (OSError, ValueError, ImportError) as error:  # the message says what to mend
        raise SystemExit(f"evaluate_byoc.py: error: {error}") from error
    lap("generating")
    real = real_cells(cells)
    sets = {s.name: s for s in (generated, real, shuffled_cells(real, args.seed), blurred_cells(real))}

    # 2. features
    cache, features = Path(args.output_dir) / "cache", {name: {} for name in sets}
    for kind, (identity, extract) in extractors.items():
        for name, cell_set in sets.items():
            try:
                features[name][kind] = extract_features(cell_set, identity, extract, cache)
            except (OSError, VolumeFileError) as error:  # in the first kind already, which reads every file
                raise SystemExit(f"evaluate_byoc.py: error: {error}") from error
        lap(f"features: {kind}")

    # 3. metrics, fold by fold
    accuracies = classify_volumes(args, sets, folds, state.device) if args.volume_classifier else []
    lap("3D classifier")
    if state.is_main_process:
        notes += suspicions(features["generated"]["voxels"], features["real"]["voxels"])
        try:
            rows = [evaluate_fold(args, features, generated.num_cells, *fold) for fold in folds]
        except ValueError as error:  # real cells that are copies of each other
            raise SystemExit(f"evaluate_byoc.py: error: {error}") from error
        for fold, name, accuracy in accuracies:
            rows[fold][name]["volumes/classifier_accuracy"] = accuracy
        reconstruction = judge_reconstruction(args, pipeline.vqvae, real, folds[0][0][:64]) if pipeline else {}
        lap("metrics")
        write_evaluation(args, rows, features, sets, reconstruction, seconds, notes, names, voxel_size_um)
    state.wait_for_everyone()
    state.destroy_process_group()


def all_cells(args, channel_names: tuple[str, ...]) -> CellDataset:
    """The real cells, before any split."""
    everything = {"held_out": 0.0, "num_folds": None, "fold": None, "split_file": None}
    return load_cells(argparse.Namespace(**vars(args) | everything), channel_names)[0]


def make_folds(args, cells: CellDataset) -> list[tuple[np.ndarray, np.ndarray]]:
    """(held-out, other) indices of each fold; the one fold of --split_file, or of --fold.

    Each is kept as OUTPUT_DIR/split_*.json, for `--split_file` of training or of another model's evaluation.
    """
    if args.split_file:
        splits = [read_split(args.split_file, cells.population)]
    else:
        numbers = range(args.num_folds) if args.fold is None else [args.fold]
        splits = [
            split_cells(cells.population, num_folds=args.num_folds, fold=fold, seed=args.split_seed)
            for fold in numbers
        ]
    folds = []
    for split in splits:
        is_held_out = np.isin(cells.ids, split.held_out)
        folds.append((np.flatnonzero(is_held_out), np.flatnonzero(~is_held_out)))
        smallest, needed = min(map(len, folds[-1])), max(MIN_CELLS, args.neighbours + 1)
        if smallest < needed:
            raise ValueError(
                f"expected at least {needed} real cells on each side of a split, got {smallest} of {len(cells)};"
                " give more cells, or fewer folds"
            )
    if PartialState().is_main_process:
        for number, split in enumerate(splits):
            write_split(Path(args.output_dir) / f"split_{number}.json", split)
    return folds


if __name__ == "__main__":
    main(parse_args())
