import math

import pytest
import torch

from diffusers_byoc.models.quantizer import Codebook, nearest_code, quantize_rows, usage_and_perplexity


def brute_force(vectors, codes):
    distances = (vectors.double()[:, None] - codes.double()[None]).square().sum(-1)
    return distances.argmin(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 100.0])  # at 100, squared distances overflow in float16
@pytest.mark.parametrize("num_codes", [1, 50, 64])  # 64 is a multiple of 16, which is searched in another way
def test_nearest_code_is_the_brute_force_minimum(dtype, scale, num_codes):
    vectors = (scale * torch.randn(3000, 4)).to(dtype)
    codes = (scale * torch.randn(num_codes, 4)).to(dtype)
    assert torch.equal(nearest_code(vectors, codes), brute_force(vectors, codes))


def test_nearest_code_does_not_depend_on_autocast():
    vectors, codes = torch.randn(500, 16), torch.randn(200, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        indices = nearest_code(vectors, codes)
    assert torch.equal(indices, brute_force(vectors, codes))


def test_nearest_code_refuses_other_code_lengths():
    with pytest.raises(ValueError, match=r"code length 8, got 4"):
        nearest_code(torch.randn(3, 4), torch.randn(5, 8))


def test_quantize_rows_returns_rows_of_the_codebook_and_their_gradient():
    codebook = Codebook(6, 3, use_ema=False)
    vectors = torch.randn(40, 3)
    codes, indices = quantize_rows(vectors, codebook)
    assert torch.equal(codes, codebook.embedding[indices])
    codes.sum().backward()
    count = torch.bincount(indices, minlength=6).float()
    assert torch.equal(codebook.embedding.grad, count[:, None].expand(-1, 3))


def test_ema_codes_take_no_gradient():
    assert not Codebook(4, 2, use_ema=True).embedding.requires_grad
    assert Codebook(4, 2, use_ema=False).embedding.requires_grad


def test_range_holds_the_extremes():
    codebook = Codebook(8, 3)
    with torch.no_grad():
        codebook.embedding[5, 1], codebook.embedding[2, 0] = -7.0, 11.0
    assert [end.item() for end in codebook.range] == [-7.0, 11.0]


def test_initialize_draws_distinct_vectors():
    vectors = torch.randn(100, 4)
    codebook = Codebook(16, 4)
    assert not codebook.is_initialized
    codebook.initialize(vectors, torch.Generator().manual_seed(1))
    assert codebook.is_initialized
    matches = (codebook.embedding[:, None] == vectors[None]).all(-1)
    assert matches.any(1).all()
    assert matches.any(0).sum() == 16
    assert torch.equal(codebook.ema_sum / codebook.ema_count[:, None], codebook.embedding)


def test_initialize_with_fewer_vectors_than_codes_gives_distinct_codes():
    codebook = Codebook(16, 4)
    codebook.initialize(torch.randn(5, 4), torch.Generator().manual_seed(1))
    assert len(torch.unique(codebook.embedding, dim=0)) == 16


def test_initialize_follows_its_generator():
    vectors = torch.randn(100, 4)
    first, again, other = Codebook(16, 4), Codebook(16, 4), Codebook(16, 4)
    for codebook, seed in ((first, 3), (again, 3), (other, 4)):
        codebook.initialize(vectors, torch.Generator().manual_seed(seed))
    assert torch.equal(first.embedding, again.embedding)
    assert not torch.equal(first.embedding, other.embedding)


def test_kmeans_ends_at_the_means_of_what_each_code_serves():
    vectors = torch.randn(300, 2)
    drawn, refined = Codebook(8, 2), Codebook(8, 2)
    drawn.initialize(vectors, torch.Generator().manual_seed(0))
    refined.initialize(vectors, torch.Generator().manual_seed(0), kmeans_iterations=100)
    indices = nearest_code(vectors, refined.embedding)
    for code, mean in enumerate(refined.embedding):
        torch.testing.assert_close(mean, vectors[indices == code].mean(0))
    errors = [(vectors - quantize_rows(vectors, codebook)[0]).square().mean() for codebook in (drawn, refined)]
    assert errors[1] < errors[0]
    assert torch.equal(refined.ema_sum / refined.ema_count[:, None], refined.embedding)


def test_kmeans_leaves_a_code_without_vectors_where_it_is():
    codebook = Codebook(6, 2)
    codebook.initialize(torch.zeros(10, 2), torch.Generator().manual_seed(0), kmeans_iterations=3)
    assert codebook.embedding.isfinite().all()


def test_update_is_the_moving_average_of_the_one_hot_sums():
    codebook = Codebook(5, 3)
    codebook.initialize(torch.randn(50, 3))
    count, total = codebook.ema_count.clone(), codebook.ema_sum.clone()
    for _ in range(3):
        vectors, indices = torch.randn(20, 3), torch.randint(5, (20,))
        batch_count, num_revived = codebook.update(vectors, indices, decay=0.9, revival_threshold=0.0)
        one_hot = torch.nn.functional.one_hot(indices, 5).float()
        count = 0.9 * count + 0.1 * one_hot.sum(0)
        total = 0.9 * total + 0.1 * one_hot.T @ vectors
        assert torch.equal(batch_count, one_hot.sum(0))
        assert num_revived == 0
    torch.testing.assert_close(codebook.ema_count, count)
    torch.testing.assert_close(codebook.embedding.data, total / count[:, None])


def test_repeated_updates_converge_to_the_cluster_means():
    codebook = Codebook(2, 2)
    codebook.initialize(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    vectors = torch.tensor([[2.0, 1.0], [4.0, 1.0], [-3.0, -2.0]])
    for _ in range(300):
        codebook.update(vectors, nearest_code(vectors, codebook.embedding), 0.9, 0.0)
    means = sorted(codebook.embedding.tolist())
    assert means == [pytest.approx([-3.0, -2.0], abs=1e-3), pytest.approx([3.0, 1.0], abs=1e-3)]


def test_update_leaves_gradient_codes_alone():
    codebook = Codebook(5, 3, use_ema=False)
    before = codebook.embedding.detach().clone()
    codebook.update(torch.randn(20, 3), torch.randint(5, (20,)), decay=0.9, revival_threshold=0.0)
    assert torch.equal(codebook.embedding, before)
    assert not torch.equal(codebook.ema_count, torch.ones(5))


@pytest.mark.parametrize("use_ema", [True, False])
def test_revival_replaces_dead_codes_and_their_running_averages(use_ema):
    codebook = Codebook(4, 3, use_ema)
    codebook.initialize(torch.randn(50, 3))
    vectors = torch.randn(30, 3)
    indices = torch.arange(30) % 2  # codes 2 and 3 are never used
    revived = 0
    for _ in range(200):
        before = codebook.embedding.detach().clone()
        _, revived = codebook.update(vectors, indices, decay=0.9, revival_threshold=0.1)
        if revived:
            break
    assert revived == 2
    for code in (2, 3):
        assert not torch.equal(codebook.embedding[code], before[code])
        assert (codebook.embedding[code] == vectors).all(-1).any()
        running_average = codebook.ema_sum[code] / codebook.ema_count[code]
        torch.testing.assert_close(running_average, codebook.embedding[code].detach())
    # Their statistics moved too: the next update neither revives them again nor drags the codes back.
    revived_codes = codebook.embedding[2:].detach().clone()
    _, revived = codebook.update(vectors, indices, decay=0.9, revival_threshold=0.1)
    assert revived == 0
    torch.testing.assert_close(codebook.embedding[2:].detach(), revived_codes)


def test_usage_and_perplexity():
    usage, perplexity = usage_and_perplexity(torch.tensor([5, 5, 0, 0]))
    assert usage.item() == 0.5
    assert perplexity.item() == pytest.approx(2.0)
    usage, perplexity = usage_and_perplexity(torch.tensor([6.0, 2.0]))
    assert usage.item() == 1.0
    assert perplexity.item() == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))
