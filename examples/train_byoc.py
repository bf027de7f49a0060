"""Train BYOC: the multi-codebook autoencoder, then the joint latent diffusion, then a saved pipeline and a report.

accelerate launch examples/train_byoc.py                                            the demo, on phantom cells
accelerate launch examples/train_byoc.py --preset paper --train_data_dir my_cells   the paper's Tables 2 and 3

The losses and the loop of each stage are in `src/diffusers_byoc/training/stages`.
"""

from diffusers_byoc.commands.train import main


if __name__ == "__main__":
    main()
