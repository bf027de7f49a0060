"""byoc-publish, to a Hub and back; and what is refused on the way back."""

import json
import shutil
from pathlib import Path

import pytest

from diffusers_byoc.commands.publish import main


SAVED = Path(__file__).parents[1] / "pipelines" / "saved"
UNET = "unet/diffusion_pytorch_model.safetensors"

PUSH = """
import os
import torch
from diffusers_byoc import BYOCPipeline
from diffusers_byoc.commands.publish import main

torch.set_num_threads(1)
main(["--pretrained", "run", "--hub_model_id", "org/cells"])
pipeline = BYOCPipeline.from_pretrained("run")
pipeline.unet.conv_out.bias.data += 1
pipeline.save_pretrained("run")
main(["--pretrained", "run", "--hub_model_id", "org/cells", "--no-fp16", "--license", "cc-by-4.0"])
main(["--pretrained", "run", "--hub_model_id", "secret", "--private"])
pipeline.push_to_hub("org/plain")  # of diffusers
for arguments, token in ((["org/wrong", "--card", "none.md"], "hf_test"), (["org/wrong"], ""), (["wrong"], "")):
    os.environ["HF_TOKEN"] = token
    try:
        main(["--pretrained", "run", "--hub_model_id", *arguments])
    except SystemExit as error:
        print(error)
"""

PULL = """
import huggingface_hub.constants, huggingface_hub.file_download
import torch
from diffusers import DiffusionPipeline
from diffusers_byoc import BYOCPipeline, DualChannelUNet3D
from diffusers_byoc.commands.generate import main
from diffusers_byoc.pipelines.loading import hub_errors

torch.set_num_threads(1)
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 4096
huggingface_hub.file_download.time.sleep = lambda seconds: None

def refused(name, **options):
    try:
        with hub_errors(name):
            options.pop("cls", BYOCPipeline).from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    raise AssertionError(f"{name} was loaded")

# 1. what is there
assert "connection that broke off" in refused("org/cells")  # the first download ends after 9,000 bytes
pipe = BYOCPipeline.from_pretrained("org/cells")
cells = pipe(8, class_labels="nocodazole", num_inference_steps=2).volumes
assert cells.shape == (8, 2, 8, 8, 8) and cells.min() >= 0 and cells.max() <= 1
assert type(DiffusionPipeline.from_pretrained("org/plain")) is BYOCPipeline
first = BYOCPipeline.from_pretrained("org/cells", revision=FIRST)
torch.testing.assert_close(first.unet.conv_out.bias + 1, pipe.unet.conv_out.bias)
half = BYOCPipeline.from_pretrained("org/cells", revision=FIRST, variant="fp16", dtype=torch.float16)
assert half.unet.dtype == half.vqvae.dtype == torch.float16
assert BYOCPipeline.from_pretrained("me/secret").config.default_num_inference_steps == 5
offline = BYOCPipeline.from_pretrained("org/cells", local_files_only=True)
assert torch.equal(offline.unet.conv_out.bias, pipe.unet.conv_out.bias)

# 2. what is not, or is not what it should be
assert "variant=fp16" in refused("org/cells", variant="fp16")  # of the second version
assert "answers 404 (RevisionNotFoundError)" in refused("org/cells", revision="v9")
assert "answers 404 (RepositoryNotFoundError)" in refused("org/none")
message = refused("me/secret", token=False, cache_dir="other")
assert "answers 401" in message and "hf auth login" in message
assert "diffusion_pytorch_model.safetensors" in refused("org/pickle")  # by whichever network comes first
assert "RemoteEntryNotFoundError" in refused("org/pickle", cls=DualChannelUNet3D, subfolder="unet")
assert "Expected whole safetensors weights in" in refused("org/truncated")
assert "Consistency check failed" in refused("org/short")
for options in ({}, {"cls": DualChannelUNet3D, "subfolder": "unet"}):
    assert "Expected the SHA-256" in refused("org/spoiled", **options)
try:
    main(["--pretrained", "org/pickle", "--output_dir", "cells"])
except SystemExit as error:
    assert str(error).startswith("byoc-generate: error: Could not find the necessary `safetensors` weights"), error
print("done")
"""

# what unpickles it makes a file of this name
PICKLE = b"cos\nsystem\n(S'touch it_ran'\ntR."


def saved(name):
    folder = SAVED / name
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "volumes.safetensors"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_to_the_hub_and_back_and_nothing_that_is_not_what_it_should_be(hub):
    shutil.copytree(SAVED / "conditional", hub.home / "run")
    (hub.home / "run" / "split.json").write_text("{}")
    printed = hub.run(PUSH)
    assert "Published org/cells" in printed and 'is loaded by revision="' in printed
    errors = [line for line in printed.splitlines() if line.startswith("byoc-publish: error:")]
    assert len(errors) == 3 and all("hf auth login" in error for error in errors[1:])
    assert hub.repos["models/me/secret"]["private"] and not hub.repos["models/org/cells"]["private"]
    assert not [key for key in hub.repos if "wrong" in key]
    files = hub.files("org/cells")
    weights = {"unet/diffusion_pytorch_model.safetensors", "vqvae/diffusion_pytorch_model.safetensors"}
    configs = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vqvae/config.json"}
    assert set(files) - {".gitattributes"} == {"README.md"} | weights | configs  # those of fp16 are gone
    assert json.loads(files["model_index.json"])["unet"] == ["diffusers_byoc", "DualChannelUNet3D"]
    assert b"license: cc-by-4.0" in files["README.md"] and b'from_pretrained("org/cells")' in files["README.md"]
    assert ("PUT", f"/lfs/{hub.sha256(files[UNET])}") in hub.requests
    history = list(hub.repos["models/org/cells"]["commits"])
    (first,) = [sha for sha in history if any("fp16" in name for name in hub.files("org/cells", revision=sha))]
    assert len(history) == 3  # the empty one, and one for each time

    whole = saved("plain")
    pickled = {name: data for name, data in whole.items() if name != UNET}
    hub.put("org/pickle", pickled | {UNET.replace(".safetensors", ".bin"): PICKLE})
    hub.put("org/truncated", whole | {UNET: whole[UNET][:-100]})
    hub.put("org/short", whole)
    hub.put("org/spoiled", whole)
    hub.spoiled["org/short", UNET] = whole[UNET][:-100]
    hub.spoiled["org/spoiled", UNET] = whole[UNET][:-4] + b"\x00\x00\x80\x3f"
    hub.cut["org/cells", UNET] = [9000] + [0] * 6
    assert hub.run(f"FIRST = {first!r}\n{PULL}").strip() == "done"
    assert hub.ranges and set(hub.ranges) == {"bytes=8192-"}  # it went on where it had broken off
    assert not list(hub.home.rglob("it_ran")) and not (hub.home / "cells").exists()


def test_a_folder_to_look_at_first(tmp_path, capsys):
    arguments = [
        "--pretrained",
        str(SAVED / "plain"),
        "--hub_model_id",
        "org/name",
        "--output_dir",
        str(tmp_path / "a"),
    ]
    main(arguments)
    assert "Nothing was uploaded" in capsys.readouterr().out
    assert 'from_pretrained("org/name")' in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(SystemExit, match="byoc-publish: error: Expected an empty folder"):
        main(arguments)
    # its card is then a card of one's own
    own = [*arguments[:1], str(tmp_path / "a"), "--output_dir", str(tmp_path / "b")]
    with pytest.raises(SystemExit, match="Expected no --data_license beside the author's own card, got .*README.md"):
        main([*own, "--data_license", "mine"])
    (tmp_path / "a" / "README.md").write_text("# Mine\n")
    main(own)
    assert "# Mine" in (tmp_path / "b" / "README.md").read_text()


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(SystemExit, match="byoc-publish: error: Expected the folder of a saved pipeline") as stop:
        main(["--pretrained", str(tmp_path / "none"), "--output_dir", str(tmp_path / "out")])
    assert "\n" not in str(stop.value) and not (tmp_path / "out").exists()
