"""Table 1 of the paper: BYOC, HA-GAN, W-GAN, α-GAN and MedicalDiffusion, for each of three drugs.

python examples/reproduce_table1.py --preset cpu --num_processes 2                                  on phantoms
python examples/reproduce_table1.py --preset paper --train_data_dir my_cells --med3d resnet_50.pth  on one's own cells

What is run stands in `src/diffusers_byoc/commands/presets/reproduction`; docs/reproduction.md tells more.
"""

import sys

from diffusers_byoc.commands.reproduce import main


if __name__ == "__main__":
    main(["table1", *sys.argv[1:]])
