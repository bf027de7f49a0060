"""Train BYOC: the multi-codebook autoencoder, then the joint latent diffusion, then a saved pipeline and a report.

accelerate launch examples/train_byoc.py                                            the demo, on phantom cells
accelerate launch examples/train_byoc.py --preset paper --train_data_dir my_cells   the paper's Tables 2 and 3

`byoc-train` is the same for one process; `accelerate launch -m diffusers_byoc.commands.train` needs no clone.
"""

from .train_arguments import parse_args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(__doc__, argv)
    from .train_run import train  # after `--help` and mistakes, which need not wait for torch

    train(args)


if __name__ == "__main__":
    main()
