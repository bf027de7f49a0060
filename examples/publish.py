"""Put a saved pipeline on the Hub: the same as the command ``byoc-publish``, which pip installs.

python examples/publish.py --pretrained outputs/my_cells --hub_model_id org/my-cells --license cc-by-4.0

What is published, and how the card is filled, stands in `diffusers_byoc.publishing`.
"""

from diffusers_byoc.commands.publish import main


if __name__ == "__main__":
    main()
