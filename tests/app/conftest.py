from pathlib import Path

import pytest

from diffusers_byoc.commands.app import parse_args, serve


SAVED = Path(__file__).parents[1] / "pipelines" / "saved"


@pytest.fixture(scope="module")
def page_url(tmp_path_factory):
    """The page of two tiny pipelines, served on this machine with small limits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        pretrained = [str(SAVED / name) for name in ("conditional", "plain")]
        limits = ["--max_cells", "6", "--max_evaluations", "30"]
        page = serve(parse_args(["--pretrained", *pretrained, *limits]), block=False)
        yield page.local_url
        page.close()
