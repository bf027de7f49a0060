"""The library of codebooks (BYOC section 3.1): one independent vector-quantiser per biological channel."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


_ROWS_PER_CHUNK = 2048  # rows of the distance matrix held at once: 8 MB at K = 1024, which stays in the cache


@torch.no_grad()
def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the closest code for every vector.

    Computed in float32 whatever the inputs' dtype: in half precision distances overflow or tie.

    Args:
        vectors: (N, n) encoder output, one row per latent position.
        codebook: (K, n) codes.

    Returns:
        (N,) int64, in [0, K).

    Raises:
        ValueError: if the code lengths differ.

    Source: BYOC, eq. 3-4.
    """
    if vectors.shape[-1] != codebook.shape[-1]:
        raise ValueError(
            f"Expected vectors of the codebook's code length {codebook.shape[-1]}, got {vectors.shape[-1]}. "
            f"Pass latents of {codebook.shape[-1]} features per biological channel."
        )
    device_type = vectors.device.type
    with torch.autocast(device_type, enabled=False):
        codes = codebook.float()
        # |v - e|² without |v|², which is the same for every code
        squared_norms = codes.square().sum(1)
        chunks = vectors.float().split(_ROWS_PER_CHUNK)
        return torch.cat([_argmin(torch.addmm(squared_norms, c, codes.t(), alpha=-2)) for c in chunks])


def _argmin(distances: Tensor) -> Tensor:
    """As `distances.min(1).indices` of (N, K), but faster on a CPU, which has vector instructions for `amin` alone.

    Finds the smallest of every 16 codes, the first of these, and which of its 16 it was. The whole search takes
    two thirds of the time so.
    """
    num_rows, num_codes = distances.shape
    if num_codes % 16:
        return distances.min(1).indices
    sixteens = distances.view(num_rows, 16, -1)  # codes k, k + K/16, ... side by side
    places = sixteens.amin(1).min(1).indices
    candidates = sixteens.gather(2, places[:, None, None].expand(-1, 16, 1))[..., 0]
    return candidates.min(1).indices * sixteens.shape[2] + places


class Codebook(nn.Module):
    """K codes of length n for one biological channel, with the running statistics that maintain them.

    Args:
        num_codes: K.
        code_length: n.
        use_ema: codes follow a moving average of the vectors assigned to them; otherwise they are learnt by gradient.

    Source: BYOC, eq. 2; the moving average is van den Oord et al. 2017, appendix A.1.
    """

    def __init__(self, num_codes: int, code_length: int, use_ema: bool = True):
        super().__init__()
        self.use_ema = use_ema
        codes = torch.empty(num_codes, code_length).uniform_(-1 / num_codes, 1 / num_codes)
        self.embedding = nn.Parameter(codes, requires_grad=not use_ema)
        self.register_buffer("ema_count", torch.ones(num_codes))
        self.register_buffer("ema_sum", codes.clone())
        # A buffer, so that a resumed run does not initialise its codes a second time.
        self.register_buffer("is_initialized", torch.tensor(False))

    def forward(self) -> Tensor:
        """The codes (K, n).

        Read the codes by this call: offloading hooks bring a module's weights to the device when it is called, and
        take them away afterwards, hence the copy.
        """
        return self.embedding.clone()

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest number in the codebook, two scalars (section 3.2, after Khader 2023)."""
        codes = self().detach().float()
        return codes.amin(), codes.amax()

    @torch.no_grad()
    def initialize(
        self, vectors: Tensor, generator: torch.Generator | None = None, kmeans_iterations: int = 0
    ) -> None:
        """Set the codes to rows of `vectors` (N, n), the unusual ones first; jittered repetitions if N < K.

        Args:
            vectors: (N, n), as many from every process.
            generator: CPU generator that draws the rows.
            kmeans_iterations: rounds of k-means (Lloyd 1982) that the drawn rows go through.
        """
        vectors = _gather_rows(vectors).float()
        codes = self.draw(vectors, vectors.mean(0, keepdim=True), len(self.embedding), generator)
        for _ in range(kmeans_iterations):
            count, total = _sum_per_code(vectors, nearest_code(vectors, codes), len(codes))
            codes = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], codes)
        if kmeans_iterations and _is_distributed():  # sums on a GPU are rounded in any order
            dist.broadcast(codes, src=0)
        self.embedding.copy_(codes)
        self.ema_sum.copy_(codes)
        self.ema_count.fill_(1.0)
        self.is_initialized.fill_(True)

    @torch.no_grad()
    def update(
        self, vectors: Tensor, indices: Tensor, decay: float, revival_threshold: float, generator=None
    ) -> tuple[Tensor, Tensor]:
        """Fold one batch's assignments into the running statistics, move the codes (EMA), revive the dead ones.

        Statistics are summed over all processes first, so every process holds the same codes afterwards.

        Args:
            vectors: (N, n) unquantised latents.
            indices: (N,) their codes.
            decay: of the moving average.
            revival_threshold: a code whose running share of the assignments falls below this fraction of an even
                share is replaced by a badly quantised vector of the batch, its statistics with it.
            generator: CPU generator that picks the replacing vectors.

        Returns:
            (K,) assignments in this batch, over all processes, and the number of revived codes.
        """
        vectors = vectors.float()
        num_codes = len(self.embedding)
        count, total = _sum_per_code(vectors, indices, num_codes)
        if _is_distributed():
            dist.all_reduce(count)
            dist.all_reduce(total)

        self.ema_count.mul_(decay).add_(count, alpha=1 - decay)
        self.ema_sum.mul_(decay).add_(total, alpha=1 - decay)
        if self.use_ema:
            self.embedding.copy_(self.ema_sum / self.ema_count.clamp(min=1e-5)[:, None])

        threshold = self.smallest_count(revival_threshold)
        dead = self.ema_count < threshold
        num_dead = int(dead.sum())
        if num_dead:
            candidates, approximations = _gather_rows(vectors), _gather_rows(self.embedding[indices].float())
            replacements = self.draw(candidates, approximations, num_dead, generator)
            # Enough of a count to survive a while unused, no more: what the batch did not need may die again.
            self.embedding[dead] = replacements.to(self.embedding.dtype)
            self.ema_count[dead] = 2 * threshold
            self.ema_sum[dead] = 2 * threshold * replacements
        return count, dead.sum()

    def smallest_count(self, revival_threshold: float) -> Tensor | float:
        """The running count below which a code is dead: a share of an even one."""
        return revival_threshold * self.ema_count.sum() / len(self.embedding)

    def draw(self, vectors: Tensor, approximations: Tensor, num_draws: int, generator=None) -> Tensor:
        """The vectors (num_draws, n) that codes start from, or are replaced by; see `draw_unusual`."""
        return draw_unusual(vectors, approximations, num_draws, generator)


def _sum_per_code(vectors: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """How many of `vectors` (N, n) have each of the codes `indices` (N,), (K,) float32, and their sums, (K, n)."""
    count = torch.bincount(indices, minlength=num_codes).float()
    return count, vectors.new_zeros(num_codes, vectors.shape[1]).index_add_(0, indices, vectors)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gather_rows(rows: Tensor) -> Tensor:
    """The rows (N, n) of all processes, the same number from each, in the order of their ranks."""
    if not _is_distributed():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def draw_unusual(vectors: Tensor, approximations: Tensor, num_draws: int, generator=None) -> Tensor:
    """Rows of `vectors` drawn in proportion to their squared distance from `approximations` (as k-means++ does).

    Most latents of a cell in its cube are background, all alike. Drawn evenly, they would fill the codebook with
    copies of one code, and the cell would be left with nothing.

    Args:
        vectors: (N, n).
        approximations: (N, n) or (1, n), what stands for them now.
        num_draws: k; beyond the number of vectors that differ from their approximation, rows repeat with a jitter.
        generator: CPU generator.

    Returns:
        (k, n) float32, the same in every process.
    """
    errors = (vectors.float() - approximations).square().sum(1)
    return draw_rows(vectors, errors, num_draws, generator)


def draw_rows(vectors: Tensor, weights: Tensor, num_draws: int, generator=None) -> Tensor:
    """Different rows of `vectors` (N, n), drawn in proportion to `weights` (N,), evenly if all of these are zero.

    Args:
        vectors: (N, n).
        weights: (N,), at least 0.
        num_draws: k; beyond the number of weights above 0, rows repeat with a jitter.
        generator: CPU generator.

    Returns:
        (k, n) float32, the same in every process.
    """
    vectors, weights = vectors.float(), weights.cpu()
    num_candidates = int((weights > 0).sum())
    if num_candidates == 0:
        weights, num_candidates = torch.ones_like(weights), len(weights)
    picks = torch.multinomial(weights, min(num_draws, num_candidates), generator=generator)
    drawn = vectors[picks.to(vectors.device)].repeat(-(-num_draws // len(picks)), 1)[:num_draws]
    if num_draws > len(picks):
        jitter = torch.randn(drawn.shape, generator=generator).to(drawn.device)
        drawn = drawn + 0.01 * vectors.std() * jitter
    if _is_distributed():
        dist.broadcast(drawn, src=0)
    return drawn


def usage_and_perplexity(count: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the codes in use and perplexity, two scalars, from `count` (K,) assignments per code."""
    probabilities = count.float() / count.sum().clamp(min=1)
    entropy = torch.special.entr(probabilities).sum()
    return (count > 0).float().mean(), entropy.exp()


def quantize_rows(vectors: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Closest codes (N, n), differentiable in the codes, and their indices (N,), for `vectors` (N, n)."""
    codes = codebook()
    indices = nearest_code(vectors, codes)
    return F.embedding(indices, codes), indices


def quantize_residually(vectors: Tensor, codebooks: Sequence[Codebook]) -> tuple[Tensor, Tensor]:
    """Each vector as a sum of codes: the closest of the first codebook, and of each further one to what is left.

    Args:
        vectors: (N, n).
        codebooks: one or more.

    Returns:
        The sums (N, n), differentiable in the codes, and the codes' indices (N, number of codebooks).

    Source: Zeghidour et al. 2021 (SoundStream), section III-C.
    """
    total, first = quantize_rows(vectors, codebooks[0])
    indices = [first]
    for codebook in codebooks[1:]:
        codes, code_indices = quantize_rows(vectors.detach().float() - total.detach(), codebook)
        total = total.float() + codes
        indices.append(code_indices)
    return total, torch.stack(indices, 1)
