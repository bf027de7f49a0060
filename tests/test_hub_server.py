import json
import urllib.error
import urllib.request

import pytest


def test_a_diffusers_pipeline_goes_to_the_hub_and_back(hub):
    printed = hub.run("""
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

unet = UNet2DModel(
    sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
    down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
)
pipe = DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10))
pipe.push_to_hub("org/cells")
pipe.push_to_hub("org/cells", variant="fp16")

again = DDPMPipeline.from_pretrained("org/cells")
offline = DDPMPipeline.from_pretrained("org/cells", local_files_only=True)
for name, weight in unet.state_dict().items():
    torch.testing.assert_close(again.unet.state_dict()[name], weight, rtol=0, atol=0)
    torch.testing.assert_close(offline.unet.state_dict()[name], weight, rtol=0, atol=0)
assert again.scheduler.config.num_train_timesteps == 10
DDPMPipeline.from_pretrained("org/cells", variant="fp16", cache_dir="fp16_cache")

for repo_id, variant in (("org/missing", None), ("org/cells", "bf16")):
    try:
        DDPMPipeline.from_pretrained(repo_id, variant=variant, cache_dir="other_cache")
    except (OSError, ValueError) as error:
        print(type(error).__name__)
""")
    assert len(printed.split()) == 2
    weights = {path for path in hub.files("org/cells") if path.startswith("unet/")}
    assert weights == {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    }
    assert json.loads(hub.files("org/cells")["model_index.json"])["_class_name"] == "DDPMPipeline"
    # the loads read from this server, the variant its own file
    fetched = [path for method, path in hub.requests if method == "GET" and path.endswith(".safetensors")]
    assert [path.endswith(".fp16.safetensors") for path in fetched] == [False, True]


def test_a_data_set_with_revisions_and_folders(hub):
    (hub.home / "upload" / "images").mkdir(parents=True)
    (hub.home / "upload" / "metadata.csv").write_text("file_name\nimages/a.npy\n")
    (hub.home / "upload" / "images" / "a.npy").write_bytes(bytes(range(256)))
    printed = hub.run("""
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

api = HfApi()
api.create_repo("org/cells", repo_type="dataset")
api.create_repo("org/cells", repo_type="dataset", exist_ok=True)
first = api.upload_folder(repo_id="org/cells", repo_type="dataset", folder_path="upload").oid
api.delete_file("metadata.csv", "org/cells", repo_type="dataset")

assert api.list_repo_files("org/cells", repo_type="dataset") == ["images/a.npy"]
assert api.list_repo_files("org/cells", repo_type="dataset", revision=first) == ["images/a.npy", "metadata.csv"]
assert [info.size for info in api.get_paths_info("org/cells", ["images/a.npy"], repo_type="dataset")] == [256]
folder = Path(snapshot_download("org/cells", repo_type="dataset", revision=first))
assert (folder / "images" / "a.npy").read_bytes() == bytes(range(256))
assert (folder / "metadata.csv").exists()
for arguments in (("org/none", "x"), ("org/cells", "x"), ("org/cells", "metadata.csv", "0" * 39 + "1")):
    try:
        repo_id, filename, *revision = arguments
        hf_hub_download(repo_id, filename, repo_type="dataset", revision=revision[0] if revision else None)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        print(type(error).__name__)
""")
    assert printed.split() == ["RepositoryNotFoundError", "RemoteEntryNotFoundError", "RevisionNotFoundError"]


def test_byte_ranges(hub):
    hub.create({"name": "cells", "organization": "org", "type": "dataset"})
    hub.repos["datasets/org/cells"]["commits"]["0" * 40]["a.npy"] = bytes(range(100))

    def get(byte_range: str) -> tuple[int, bytes, str]:
        url = f"{hub.url}/datasets/org/cells/resolve/main/a.npy"
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Range": byte_range})) as response:
            return response.status, response.read(), response.headers["Content-Range"]

    assert get("bytes=10-19") == (206, bytes(range(10, 20)), "bytes 10-19/100")
    assert get("bytes=95-") == (206, bytes(range(95, 100)), "bytes 95-99/100")
    assert get("bytes=-5") == (206, bytes(range(95, 100)), "bytes 95-99/100")
    assert get("bytes=90-500") == (206, bytes(range(90, 100)), "bytes 90-99/100")
    with pytest.raises(urllib.error.HTTPError, match="416"):
        get("bytes=100-")


def test_an_upload_that_is_not_what_it_announced_is_refused(hub):
    request = urllib.request.Request(f"{hub.url}/lfs/{'0' * 64}", data=b"content", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)


def test_a_failing_client_shows_its_error(hub):
    with pytest.raises(AssertionError, match="no such cell"):
        hub.run("raise RuntimeError('no such cell')")
