"""Train a generator that BYOC is compared with, on the same cells, to a saved pipeline and a report.

accelerate launch examples/train_baseline.py --baseline ha_gan                              on phantom cells
accelerate launch examples/train_baseline.py --baseline w_gan --train_data_dir my_cells --output_dir outputs/w_gan

`byoc-train-baseline` is the same for one process.
"""

from .train_baseline_arguments import parse_args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(__doc__, argv)
    from .train_baseline_run import train  # after `--help` and mistakes, which need not wait for torch

    train(args)


if __name__ == "__main__":
    main()
