import pytest
import torch

from diffusers_byoc import MultiCodebookVQModel
from diffusers_byoc.training import validate_autoencoder


class Cells(torch.utils.data.Dataset):
    def __init__(self, num_cells):
        self.volumes = torch.rand(num_cells, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self):
        return len(self.volumes)

    def __getitem__(self, index):
        return {"volumes": self.volumes[index]}


@pytest.mark.parametrize("num_quantizers", [1, 2])
def test_losses_and_codes_of_the_first_cells(accelerator, num_quantizers):
    """Of five cells, in batches of four and one, as if they were one batch."""
    sizes = {"latent_channels": 4, "num_vq_embeddings": 8, "block_out_channels": (4, 8), "sample_size": 8}
    vqvae = MultiCodebookVQModel(**sizes, layers_per_block=1, num_quantizers=num_quantizers)
    cells = Cells(7)
    vqvae.initialize_codebooks(vqvae.encode(cells.volumes).latents)
    vqvae.train()
    losses = validate_autoencoder(accelerator, vqvae, cells, max_cells=5)
    assert vqvae.training

    names = ("cell", "nucleus", "cell_2", "nucleus_2")[: 2 * num_quantizers]
    output = vqvae(cells.volumes[:5])
    expected = (output.sample - cells.volumes[:5]).square().mean().item()
    assert losses["validation/reconstruction"] == pytest.approx(expected, rel=1e-5)
    for name, indices in zip(names, output.indices.unbind(1), strict=True):
        codes, counts = indices.unique(return_counts=True)
        shares = counts / counts.sum()
        assert losses[f"validation/usage/{name}"] == pytest.approx(len(codes) / 8)
        assert losses[f"validation/perplexity/{name}"] == pytest.approx((shares**-shares).prod().item(), rel=1e-4)
    assert len(losses) == 1 + 2 * len(names)
