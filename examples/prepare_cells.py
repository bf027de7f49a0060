"""From the microscope to a data set: the same as the command ``byoc-prepare``, which pip installs.

python examples/prepare_cells.py --images "plates/*.ome.tif" --labels "masks/*.tif" --metadata treatments.csv \
    --output_dir cells

How cells are cut stands in `diffusers_byoc.data.microscope`; docs/data.md tells more.
"""

import sys

from diffusers_byoc.commands.prepare import main


if __name__ == "__main__":
    sys.exit(main())
