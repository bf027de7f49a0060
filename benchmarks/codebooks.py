"""Whether the codebooks stay alive, for each way to start and to maintain them: an autoencoder on phantoms.

    python benchmarks/codebooks.py                       eight times the demo's first stage
    python benchmarks/codebooks.py --sample_size 32      a few minutes

Each row is one run of `examples/train_byoc.py --stage autoencoder` with the preset `demo` and one codebook a
channel, but for what the row says, judged on phantoms that no run has seen: codes in use by all of them and by batches
of four, perplexity, and the mean squared error in [-1, 1].
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from timing import machine

from diffusers_byoc import MultiCodebookVQModel
from diffusers_byoc.commands.train_arguments import PRESETS
from diffusers_byoc.data import PhantomCells, VolumeProcessor
from diffusers_byoc.models.quantizer import usage_and_perplexity


ROOT = Path(__file__).parents[1]
# update, start, revival: overrides of the autoencoder's configuration
VARIANTS = {
    ("moving average", "data", "yes"): {},
    ("moving average", "data", "no"): {"revival_threshold": 0.0},
    ("moving average", "k-means", "yes"): {"kmeans_iterations": 10},
    ("moving average", "k-means", "no"): {"kmeans_iterations": 10, "revival_threshold": 0.0},
    ("gradient", "data", "yes"): {"use_ema_codebook": False},
    ("gradient", "data", "no"): {"use_ema_codebook": False, "revival_threshold": 0.0},
    ("gradient", "k-means", "yes"): {"use_ema_codebook": False, "kmeans_iterations": 10},
    ("gradient", "k-means", "no"): {"use_ema_codebook": False, "kmeans_iterations": 10, "revival_threshold": 0.0},
}
# In place of the demo's latents of an eighth and four residual codebooks a channel: one, as in the paper.
NETWORK = {"num_quantizers": 1, "block_out_channels": [32, 32, 64], "layers_per_block": [0, 2]}
CROP_SIZE = 32
BATCH_SIZE = 4  # judged together


def train(changes: dict, directory: Path, steps: int | None, sample_size: int) -> MultiCodebookVQModel:
    """The autoencoder of a run with these changes; one that is there already is not trained again."""
    if not (directory / "vqvae").is_dir():
        config = json.loads((PRESETS / "demo.json").read_text(encoding="utf-8"))
        config["vqvae"] |= NETWORK | changes
        config["arguments"]["autoencoder_crop_size"] = CROP_SIZE
        directory.mkdir(parents=True, exist_ok=True)
        preset = directory / "preset.json"
        preset.write_text(json.dumps(config), encoding="utf-8")
        command = [sys.executable, ROOT / "examples/train_byoc.py", "--stage", "autoencoder", "--preset", preset]
        command += ["--output_dir", directory, "--sample_size", str(sample_size)]
        if steps is not None:
            command += ["--autoencoder_max_train_steps", str(steps)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return MultiCodebookVQModel.from_pretrained(directory / "vqvae").eval()


@torch.no_grad()
def judge(vqvae: MultiCodebookVQModel, cells: PhantomCells) -> list[str]:
    """Per channel: codes used by all cells and by a batch, perplexity, mean squared error; as text, cell / nucleus."""
    num_codes, num_channels = vqvae.config.num_vq_embeddings, vqvae.config.num_channels
    counts, errors = [], []
    for first in range(0, len(cells), BATCH_SIZE):
        volumes = torch.stack([cells[index]["volumes"] for index in range(first, first + BATCH_SIZE)])
        output = vqvae(volumes)
        per_channel = output.indices.transpose(0, 1).flatten(1)  # (M, N)
        counts.append(torch.stack([torch.bincount(indices, minlength=num_codes) for indices in per_channel]))
        errors.append((output.sample - volumes).square().mean((0, 2, 3, 4)))
    counts, errors = torch.stack(counts), torch.stack(errors).mean(0)  # (batches, M, K), (M,)
    overall = [usage_and_perplexity(count) for count in counts.sum(0)]
    in_a_batch = (counts > 0).float().mean((0, 2))
    columns = [
        [f"{usage:.0%}" for usage, _ in overall],
        [f"{in_a_batch[m]:.0%}" for m in range(num_channels)],
        [f"{perplexity:.0f}" for _, perplexity in overall],
        [f"{error:.4f}" for error in errors],
    ]
    return [" / ".join(values) for values in columns]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="of each run (default: the demo's)")
    parser.add_argument("--sample_size", type=int, default=64, help="voxels; 32 takes an eighth of the time")
    parser.add_argument("--num_cells", type=int, default=64, help="unseen phantoms to judge by; a multiple of 4")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("outputs/codebooks"), help="runs in it are not repeated"
    )
    args = parser.parse_args()

    processor = VolumeProcessor(sample_size=args.sample_size)
    cells = PhantomCells(args.num_cells, processor, ["nocodazole"], seed=1)  # the demo's have seed 0
    print(f"{machine('cpu')}; {args.num_cells} unseen phantoms of {args.sample_size}³; cell / nucleus\n")
    print("| update | start | revival | codes in use | in a batch of 4 | perplexity | squared error |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for names, changes in VARIANTS.items():
        vqvae = train(changes, args.output_dir / "-".join(names).replace(" ", "_"), args.steps, args.sample_size)
        print(f"| {' | '.join((*names, *judge(vqvae, cells)))} |", flush=True)


if __name__ == "__main__":
    main()
