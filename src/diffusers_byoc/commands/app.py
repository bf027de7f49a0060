"""Serve a page that generates cells and shows them, on this machine alone unless a host is given.

byoc-app --pretrained pretrained/byoc-phantom
byoc-app --pretrained outputs/my_cells org/name --host 0.0.0.0 --port 80
"""

import argparse
import ipaddress
import os
from pathlib import Path

from .command_line import make_parser, one_line_errors
from .data_arguments import positive


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(__doc__, "byoc-app")
    add = parser.add_argument
    add(
        "--pretrained",
        nargs="+",
        metavar="PIPELINE",
        help="folders of saved pipelines, or names on the Hub, to choose from (default: those in pretrained/)",
    )
    # what Gradio itself asks, and a Space sets
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    add("--host", default=host, help="address to listen at; 0.0.0.0 is open to the network (default: %(default)s)")
    port = os.environ.get("GRADIO_SERVER_PORT")
    add("--port", type=int, default=port and int(port), help="(default: the first free one from 7860)")
    add("--max_cells", type=positive, default=16, help="of one click (default: 16)")
    add("--max_evaluations", type=positive, default=1600, help="cells times steps of one click (default: 1600)")
    args = parser.parse_args(argv)
    if args.pretrained is None:
        args.pretrained = [str(path.parent) for path in sorted(Path("pretrained").glob("*/model_index.json"))]
    if not args.pretrained:
        parser.error("argument --pretrained: expected a pipeline, got none, and no folder pretrained/ with one")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(name="byoc-app"):
        serve(args)


def serve(args: argparse.Namespace, block: bool = True):
    """What the command does, as `parse_args` understood it.

    Args:
        args: of `parse_args`.
        block: serve until interrupted; otherwise come back at once.

    Returns:
        The page, as Gradio serves it; its `local_url` says where.
    """
    import torch  # after `--help` and mistakes, which need not wait for it

    from ..app import Limits, Models, make_page
    from ..app.page import CSS
    from ..app.uploads import MAX_UPLOAD_BYTES
    from ..optional import optional
    from ..training.hardware import fastest_precision

    gradio = optional("gradio", "app")
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[fastest_precision()]
    # who alone reaches the page may load what they like
    models = Models(args.pretrained, is_open=is_loopback(args.host), dtype=dtype)
    models.load(args.pretrained[0])  # before anybody waits for it
    page = make_page(models, Limits(args.max_cells, args.max_evaluations))
    page.queue(max_size=32).launch(
        server_name=args.host,
        server_port=args.port,
        share=False,
        ssr_mode=False,
        prevent_thread_lock=not block,
        max_file_size=MAX_UPLOAD_BYTES,
        css=CSS,
        theme=gradio.themes.Default(
            primary_hue="teal", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
    )
    return page


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


if __name__ == "__main__":
    main()
