"""Open cells in napari: side by side, a layer a channel, with names, colours and the scale in µm.

python examples/view_in_napari.py cells/*.ome.tif         files of any format that is read
python examples/view_in_napari.py --pretrained pretrained/byoc-phantom --class_label nocodazole

Needs `pip install "napari[all]"`.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from diffusers_byoc.data import Volume, read_volume


COLORMAPS = ("green", "magenta", "yellow", "blue", "red", "gray")  # cell, nucleus, further channels
GAP = 1.1  # from one cell to the next, in widths of the widest


def generate(pretrained: str, num_samples: int, class_label: str | None, seed: int) -> list[Volume]:
    """Cells of a pipeline."""
    from diffusers_byoc import BYOCPipeline
    from diffusers_byoc.pipelines.generation import cell_generator

    pipeline = BYOCPipeline.from_pretrained(pretrained)
    generators = [cell_generator(seed, index) for index in range(num_samples)]
    cells = pipeline(num_samples, class_labels=class_label, generator=generators).volumes
    processor = pipeline.volume_processor
    return [Volume(cell, processor.voxel_size_um, tuple(processor.config.channel_names)) for cell in cells]


def layers(cells: Sequence[Volume], names: Sequence[str]) -> Iterator[tuple[np.ndarray, dict]]:
    """Data (D, H, W) and the options of napari's `add_image`, for each channel of each cell."""
    sizes = [cell.voxel_size_um or (1.0, 1.0, 1.0) for cell in cells]
    width = max(cell.data.shape[-1] * size[-1] for cell, size in zip(cells, sizes, strict=True))
    for index, (cell, size, name) in enumerate(zip(cells, sizes, names, strict=True)):
        channel_names = cell.channel_names or [f"channel {number}" for number in range(len(cell.data))]
        for number, (channel, channel_name) in enumerate(zip(cell.data, channel_names, strict=True)):
            yield (
                channel,
                {
                    "name": f"{name}: {channel_name}",
                    "scale": size,
                    "units": ("µm",) * 3,
                    "translate": (0.0, 0.0, index * GAP * width),
                    "colormap": COLORMAPS[number % len(COLORMAPS)],
                    "blending": "additive",
                    "contrast_limits": (0, max(float(channel.max()), 1e-6)),
                },
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", help="volumes to open")
    add("--pretrained", help="generate cells of this pipeline, a folder or a name on the Hub")
    add("--class_label", help="their class")
    add("--num_samples", type=int, default=4, help="how many (default: 4)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    if bool(args.files) == bool(args.pretrained):
        parser.error("expected files or --pretrained, got both or neither")
    try:
        import napari
    except ImportError as error:
        raise SystemExit(f'Expected napari, got none ({error}). Run pip install "napari[all]".') from error

    if args.pretrained:
        cells = generate(args.pretrained, args.num_samples, args.class_label, args.seed)
        names = [f"cell {index + 1}" for index in range(len(cells))]
    else:
        cells, names = [read_volume(path) for path in args.files], [Path(path).name for path in args.files]
    viewer = napari.Viewer(title="Build Your Own Cell", ndisplay=3)
    for data, options in layers(cells, names):
        viewer.add_image(data, **options)
    viewer.reset_view()  # all of them, not the first alone
    viewer.scale_bar.visible = True
    napari.run()


if __name__ == "__main__":
    main()
