"""Train a generator that BYOC is compared with, on the same cells, to a saved pipeline and a report.

accelerate launch examples/train_baseline.py --baseline ha_gan                              on phantom cells
accelerate launch examples/train_baseline.py --baseline w_gan --train_data_dir my_cells --output_dir outputs/w_gan

The networks and losses of each are in `src/diffusers_byoc/baselines`, the loops in
`src/diffusers_byoc/training/stages`.
"""

from diffusers_byoc.commands.train_baseline import main


if __name__ == "__main__":
    main()
