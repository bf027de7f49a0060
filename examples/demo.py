"""Cells of a pretrained pipeline beside phantoms, which it was trained on: pictures, surfaces, volumes, a report.

python examples/demo.py    eight cells of each phenotype: outputs/demo_cells/{cells,surfaces}.png, report.md, volumes/
"""

import argparse
from pathlib import Path

import torch

from diffusers_byoc import BYOCPipeline
from diffusers_byoc.data import PHENOTYPES, PhantomCells
from diffusers_byoc.training import fastest_precision, keep_freed_memory
from diffusers_byoc.training.report import write_report


REPOSITORY = Path(__file__).parents[1]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pretrained", default=str(REPOSITORY / "pretrained" / "byoc-phantom"), help="folder or name on the Hub")
    add("--output_dir", default="outputs/demo_cells")
    add("--num_samples", type=int, default=8, help="cells of each phenotype")
    add("--seed", type=int, default=0, help="of the generated cells and of the phantoms beside them")
    args = parser.parse_args()

    keep_freed_memory()
    pipeline = BYOCPipeline.from_pretrained(args.pretrained, dtype=DTYPES[fastest_precision()])
    pipeline.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    phenotypes = pipeline.config.label2id or [name for name in PHENOTYPES if name in Path(args.pretrained).name]
    num_samples = args.num_samples * len(phenotypes)
    # of a seed that no pretrained pipeline was trained on
    phantoms = PhantomCells(num_samples, pipeline.volume_processor, list(phenotypes), seed=10_000 + args.seed)
    opening = f"Cells of {args.pretrained}, whose README.md says how it was trained, beside new phantoms."
    write_report(pipeline, phantoms, args.output_dir, opening, num_samples, args.seed)


if __name__ == "__main__":
    main()
