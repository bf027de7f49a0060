"""Put a saved pipeline on the Hub: weights in float32 and fp16, scheduler, a card filled from its run, its evaluation.

byoc-publish --pretrained outputs/my_cells --hub_model_id org/my-cells --license cc-by-4.0
byoc-publish --pretrained outputs/my_cells --hub_model_id org/my-cells --output_dir look_first

With --output_dir nothing is uploaded: look, correct README.md, and publish that folder.
"""

import argparse
from pathlib import Path

from .command_line import make_parser, one_line_errors
from .training_arguments import FLAG, add_license_arguments


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "byoc-publish")
    add = parser.add_argument
    add("--pretrained", required=True, help="folder of a saved pipeline; of a training, its record fills the card")
    add("--hub_model_id", help="NAME or ORGANISATION/NAME (default: the name of --pretrained)")
    add("--private", **FLAG, help="make the repository a private one, if it is new")
    add("--output_dir", help="write the folder here, and upload nothing")
    add("--evaluation_dir", help="results of byoc-evaluate for this pipeline, for the card and its metadata")
    add("--fp16", **(FLAG | {"default": True}), help='weights of variant="fp16", too')
    add("--card", help="a card of your own (default: README.md in --pretrained, or else the template, filled)")
    add_license_arguments(add, "--license")
    add("--data_description", help="which cells, from which microscope, in place of what the run's record says")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(name="byoc-publish"):
        publish(args)


def publish(args: argparse.Namespace) -> None:
    """What the command does, as `parse_args` understood it."""
    import tempfile

    from ..publishing import (
        create_repository,
        full_name,
        prepare_folder,
        upload_pipeline,
    )  # after `--help` and mistakes

    pretrained = Path(args.pretrained)
    name = args.hub_model_id or pretrained.resolve().name
    own_card = args.card or (pretrained / "README.md" if (pretrained / "README.md").is_file() else None)
    options = {"card_path": own_card, "evaluation_dir": args.evaluation_dir, "with_fp16": args.fp16}
    options |= {name: getattr(args, name) for name in ("license", "data_description", "data_license")}
    given = [f"--{name}" for name in ("data_description", "data_license") if options[name]]
    if own_card and given:
        raise ValueError(
            f"Expected no {' '.join(given)} beside the author's own card, got {own_card}. Write it there, or move that"
            " card away."
        )
    if args.output_dir:
        folder = Path(args.output_dir)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"Expected an empty folder, got {folder}, which is not. Choose another.")
        prepare_folder(pretrained, folder, name, **options)
        print(f"Wrote {folder}; the card is {folder / 'README.md'}. Nothing was uploaded.")
        return
    name = full_name(name)
    with tempfile.TemporaryDirectory() as folder:
        prepare_folder(pretrained, folder, name, **options)
        create_repository(name, args.private)  # when nothing more can be refused here
        commit = upload_pipeline(folder, name)
    print(f'Published {name}: {commit.commit_url}. This very one is loaded by revision="{commit.oid}".')


if __name__ == "__main__":
    main()
