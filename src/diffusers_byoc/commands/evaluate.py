"""Judge generated cells: the paper's metrics, and what a biologist asks, with real and obviously bad cells beside.

byoc-evaluate --pretrained DIR_OR_REPO --train_data_dir my_cells --output_dir results
byoc-evaluate --generated_dir their_cells --train_data_dir my_cells --features morphology

Writes metrics.json, metrics.md and figures. See docs/evaluation.md. Also under `accelerate launch` and `torchrun`, as
`-m diffusers_byoc.commands.evaluate`.
"""

import argparse

from .command_line import make_parser
from .data_arguments import add_source_arguments, add_split_arguments, positive


FEATURES = ["med3d", "morphology", "texture"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "byoc-evaluate")
    add = parser.add_argument
    add("--pretrained", help="pipeline to judge, any whose call returns volumes: a folder or a Hub repository")
    add("--pipeline_class", help="MODULE:CLASS of a pipeline that diffusers and this package do not know")
    add("--generated_dir", help="volumes made elsewhere, in place of --pretrained; any files that training reads")
    add("--output_dir", default="results", help="metrics, figures, and what need not be computed again")
    add("--cache_dir", help="of measurements; evaluations of the same cells may share it (default: in --output_dir)")
    add("--num_samples", type=positive, default=5000, help="cells to generate, or to take from --generated_dir")
    add("--features", nargs="+", choices=FEATURES, default=FEATURES, help="to compare cells by")
    add("--channel_names", nargs="+", help="of all volumes (default: the pipeline's; cell nucleus)")
    add("--seed", type=int, default=0)
    add("--num_cpu_threads", type=positive, help="per process, without a GPU (default: a fair share of all cores)")
    add_source_arguments(parser)
    add_split_arguments(parser)
    parser.set_defaults(num_folds=5)
    add("--num_inference_steps", type=positive, help="default: the pipeline's")
    add("--latent_range", help="of the pipeline's autoencoder, in place of its own; for ablations (docs/ablation.md)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="in which to generate")
    add("--batch_size", type=positive, default=16, help="cells generated at a time, in each process")
    add("--med3d", default="TencentMedicalNet/MedicalNet-Resnet50", help="weights: .pth, folder or Hub repository")
    help_text = "beside the real cells, judge what is made of them: decoded, textured, shuffled, blurred"
    add("--controls", action=argparse.BooleanOptionalAction, default=True, help=help_text)
    add("--cell_threshold", type=float, help="the cell is brighter than this (default: Otsu's; membrane dye: 0.05)")
    add("--neighbours", type=positive, default=5, help="that span a neighbourhood, for precision and the like")
    add("--volume_classifier", action=argparse.BooleanOptionalAction, default=True, help="train the 3D network")
    add("--classifier_cells", type=positive, default=100, help="most cells of each kind that it learns from")
    args = parser.parse_args(argv)
    if (args.pretrained is None) == (args.generated_dir is None):
        parser.error("expected either --pretrained or --generated_dir, got both or none; give one")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from .evaluate_run import evaluate  # after `--help` and mistakes, which need not wait for torch

    evaluate(args)


if __name__ == "__main__":
    main()
