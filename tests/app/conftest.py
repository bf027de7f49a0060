from pathlib import Path

import pytest

from conditional import DOSES, make_pipeline
from diffusers_byoc.commands.app import parse_args, serve


SAVED = Path(__file__).parents[1] / "pipelines" / "saved"


@pytest.fixture(scope="module")
def page_url(tmp_path_factory):
    """The page of three tiny pipelines, served on this machine with small limits; the last one completes a nucleus."""
    channels = tmp_path_factory.mktemp("pipelines") / "channels"
    make_pipeline(DOSES, channel_timesteps_prob=0.25).save_pretrained(channels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        pretrained = [str(path) for path in (SAVED / "conditional", SAVED / "plain", channels)]
        limits = ["--max_cells", "6", "--max_evaluations", "30"]
        page = serve(parse_args(["--pretrained", *pretrained, *limits]), block=False)
        yield page.local_url
        page.close()
