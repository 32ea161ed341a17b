"""The loss and the likelihood against enumeration: toys small enough to sum over every mask."""

import itertools
import math

import numpy as np
import pytest
import torch

from diffusion import (
    EPS,
    corrupt,
    draw_counts,
    draw_t,
    elbo,
    next_token_loss,
    sft_loss,
    stratified_counts,
)
from runtime.tutorials import Toy

L, V = 5, 3
MASK = V
X = torch.tensor([0, 2, 1, 1, 0])
SUBSETS = [s for n in range(1, L + 1) for s in itertools.combinations(range(L), n)]


class Table:
    """An imperfect predictor: arbitrary logits for every (set of masked positions, position)."""

    def __init__(self, seed=0):
        self.logits = torch.randn(2**L, L, V, generator=torch.Generator().manual_seed(seed)) * 0.75

    def __call__(self, noisy, where):
        index = ((noisy[:, -L:] == MASK) * 2 ** torch.arange(L)).sum(1)
        rows, columns = where.nonzero().T
        return self.logits[index[rows], columns - (noisy.size(1) - L)]

    def nll(self, subset):
        """-log p(x_S | x without S) summed over S."""
        index = sum(2**i for i in subset)
        return -sum(self.logits[index, i].log_softmax(0)[X[i]].item() for i in subset)


def expected_loss(predictor, weight, power=1):
    """E over t (floor included) and masks of (weight(t) nll(S))^power, by Gauss-Legendre quadrature."""
    nodes, w = np.polynomial.legendre.leggauss(200)
    # in log t: 1/t^2 is steep near the floor
    span = -math.log(EPS)
    total = 0.0
    for node, wi in zip(nodes, w, strict=True):
        t = math.exp((node - 1) / 2 * span)
        density = wi / 2 * span * t / (1 - EPS)
        for s in SUBSETS:
            total += density * t ** len(s) * (1 - t) ** (L - len(s)) * (weight(t) * predictor.nll(s)) ** power
    return total


def moments_by_count(predictor):
    """For each count l: mean and variance of (L / l) nll(S) over the sets S of l positions."""
    values = {n: [L / n * predictor.nll(s) for s in SUBSETS if len(s) == n] for n in range(1, L + 1)}
    return {n: (np.mean(v), np.var(v)) for n, v in values.items()}


def rows(n):
    return X.expand(n, -1), torch.ones(n, L, dtype=torch.bool)


def within(values, truth, errors=4):
    return abs(values.mean().item() - truth) < errors * values.std().item() / len(values) ** 0.5


def test_loss_is_unbiased_and_wrong_weights_are_caught():
    table, n = Table(), 20000
    truth = expected_loss(table, lambda t: 1 / t)
    g = torch.Generator().manual_seed(0)
    t = draw_t(n, g)
    ids, is_answer = rows(n)
    loss = sft_loss(table, ids, is_answer, MASK, t=t, generator=g, per_token=False)
    assert within(loss, truth)
    # the same draws with another weight land elsewhere, and this test would notice
    assert not within(loss * t, truth)
    assert not within(loss * t / (1 - t).clamp(min=EPS), truth)
    assert within(loss * t, expected_loss(table, lambda t: 1.0))


def test_loss_per_token_is_the_sum_over_the_response_length():
    ids, is_answer = rows(50)

    def draw(per_token):
        g = torch.Generator().manual_seed(3)
        return sft_loss(Table(), ids, is_answer, MASK, generator=g, per_token=per_token)

    torch.testing.assert_close(draw(True) * L, draw(False))


def test_elbo_is_unbiased():
    table, n = Table(), 2000
    truth = -np.mean([m for m, _ in moments_by_count(table).values()])
    g = torch.Generator().manual_seed(0)
    ids, is_answer = rows(n)
    samples = elbo(table, ids, *draw_counts(is_answer, 4, g), MASK)  # (4, n)
    assert samples.shape == (4, n)
    assert within(samples.mean(0), truth)
    for j in range(4):  # each stratum alone is unbiased, not only their mean
        assert within(samples[j], truth)
    wrong = samples / draw_counts(is_answer, 4, torch.Generator().manual_seed(0))[1]
    assert not within(wrong.mean(0), truth)  # weight 1 instead of L / l


def test_elbo_is_the_loss_without_the_floor():
    """E over exact counts = the integral of the 1/t loss over (0, 1]; the floor takes away a little."""
    table = Table()
    by_count = np.mean([m for m, _ in moments_by_count(table).values()])
    by_t = expected_loss(table, lambda t: 1 / t)
    # below the floor exactly one token is masked, if any: the density there differs by O(eps)
    assert abs(by_count - by_t) < 2 * EPS * by_count


def test_bound_is_tight_for_exact_conditionals():
    """Averaged over counts and sets, exact conditionals give log p itself (any-order identity)."""
    toy = Toy(length=4, vocab=3)
    is_answer = torch.ones(1, 4, dtype=torch.bool)
    for x in toy.all[[0, 17, 80]]:
        total = 0.0
        for n in range(1, 5):
            sets = list(itertools.combinations(range(4), n))
            for s in sets:
                masks = torch.zeros(1, 1, 4, dtype=torch.bool)
                masks[0, 0, list(s)] = True
                total += (
                    elbo(toy, x[None], masks & is_answer, torch.tensor([[4 / n]]), toy.mask_id).item()
                    / len(sets)
                    / 4
                )
        assert total == pytest.approx(toy.log_prob(x).item(), abs=1e-5)


def test_every_count_is_equally_likely_in_every_stratum():
    for length in range(1, 41):
        for n in range(1, 9):
            table = [stratified_counts(length, n, k) for k in range(1, length + 1)]
            for j in range(n):
                assert sorted(row[j] for row in table) == list(range(1, length + 1)), (length, n, j)


def test_the_counts_of_a_start_are_spread_evenly():
    """On a circle of L counts n draws lie L / n apart, rounded up or down; more draws than counts repeat."""
    for length, n in itertools.product(range(1, 41), range(1, 9)):
        for k in range(1, length + 1):
            counts = sorted(stratified_counts(length, n, k))
            if n <= length:
                gaps = np.diff([*counts, counts[0] + length])
                assert {length // n, -(-length // n)} >= set(gaps), (length, n, k)
            else:
                times = np.bincount(counts, minlength=length + 1)[1:]
                assert {n // length, -(-n // length)} >= set(times), (length, n, k)


def test_draw_counts_masks_exactly_as_many_as_it_weighs():
    g = torch.Generator().manual_seed(0)
    is_answer = torch.zeros(300, 12, dtype=torch.bool)
    is_answer[:, 4:11] = True
    masks, weight = draw_counts(is_answer, 4, g)
    counts = masks.sum(2)
    assert (counts >= 1).all() and not masks[:, :, :4].any() and not masks[:, :, 11:].any()
    torch.testing.assert_close(weight, 7 / counts.float())
    # each position of a draw is equally likely: 300 rows x 4 draws, p = E[l] / L = 4/7
    frequency = masks.float().mean((0, 1))[4:11]
    assert ((frequency - 4 / 7).abs() < 4 * (4 / 7 * 3 / 7 / 1200) ** 0.5 * 1.2).all()
    first = torch.bincount(counts[0], minlength=8)[1:]
    assert ((first - 300 / 7).abs() < 4 * (300 / 7) ** 0.5).all()


def test_draw_counts_refuses_an_empty_answer():
    with pytest.raises(ValueError, match="row 1"):
        draw_counts(torch.tensor([[True], [False]]), 2)


def test_stratified_counts_have_a_tenth_of_the_variance_of_independent_t():
    table, K = Table(), 4
    by_count = moments_by_count(table)
    means = []
    inner = 0.0
    for k in range(1, L + 1):
        counts = stratified_counts(L, K, k)
        means.append(np.mean([by_count[c][0] for c in counts]))
        inner += sum(by_count[c][1] for c in counts) / K**2 / L
    stratified = np.var(means) + inner
    independent = (
        expected_loss(table, lambda t: 1 / t, power=2) - expected_loss(table, lambda t: 1 / t) ** 2
    ) / K
    assert independent / stratified > 10
    # and the code draws what was just computed
    n = 4000
    ids, is_answer = rows(n)
    drawn = elbo(table, ids, *draw_counts(is_answer, K, torch.Generator().manual_seed(1)), MASK)
    assert drawn.mean(0).var().item() == pytest.approx(stratified, rel=0.15)


def test_only_the_answer_is_masked_and_end_marks_are_learned():
    end = 1
    ids = torch.tensor([[5, 6, 7, 0, 2, end, end], [5, 6, 0, end, end, end, end]])
    is_answer = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0]]).bool()
    for seed in range(50):
        noisy, is_masked = corrupt(ids, is_answer, 9, generator=torch.Generator().manual_seed(seed))
        assert not (is_masked & ~is_answer).any()
        assert torch.equal(noisy, torch.where(is_masked, 9, ids))
    noisy, is_masked = corrupt(ids, is_answer, 9, t=torch.ones(2))
    assert torch.equal(is_masked, is_answer)
    # every masked token, the end marks among them, gets gradient
    logits = torch.zeros(7, 10, requires_grad=True)
    given = {"t": torch.ones(2), "is_masked": is_answer}
    sft_loss(lambda noisy, where: logits, ids, is_answer, 9, **given).sum().backward()
    assert (logits.grad[torch.arange(7), ids[is_answer]] < 0).all()
    # masks from elsewhere cannot reach outside the answer either
    noisy, is_masked = corrupt(ids, is_answer, 9, is_masked=torch.ones_like(is_answer))
    assert torch.equal(is_masked, is_answer)


def test_gradient_of_the_loss():
    """d loss / d logits = (softmax - onehot) / t at masked tokens, zero elsewhere."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, L, V, generator=g, requires_grad=True)
    ids, is_answer = rows(2)
    t = torch.tensor([0.3, 0.8])
    is_masked = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 1, 0]]).bool()
    sft_loss(
        lambda noisy, where: logits[where], ids, is_answer, MASK, t=t, is_masked=is_masked, per_token=False
    ).sum().backward()
    onehot = torch.nn.functional.one_hot(ids, V)
    expected = (logits.detach().softmax(-1) - onehot) / t[:, None, None] * is_masked[..., None]
    torch.testing.assert_close(logits.grad, expected)


def test_next_token_loss_and_its_gradient():
    """Each answer token is scored at the token before it.

    Against torch's own cross-entropy on shifted logits, row by row.
    """
    g = torch.Generator().manual_seed(1)
    ids, T = torch.randint(V, (2, 7), generator=g), 7
    is_answer = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1, 1]]).bool()
    logits = torch.randn(2, T, V, generator=g, requires_grad=True)
    loss = next_token_loss(lambda noisy, where: logits[where], ids, is_answer)
    spans = [(2, 5), (4, 7)]
    expected = torch.stack(
        [
            torch.nn.functional.cross_entropy(logits[i, a - 1 : b - 1], ids[i, a:b])
            for i, (a, b) in enumerate(spans)
        ]
    )
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError):  # no token stands before a row's first
        next_token_loss(lambda noisy, where: logits[where], ids, torch.ones_like(is_answer))


def test_noise_of_an_example_is_its_own():
    """Neither padding nor neighbours change which tokens of a row are hidden."""
    answer = torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()
    ids = torch.arange(6)[None]
    _, alone = corrupt(ids, answer, 99, generator=torch.Generator().manual_seed(7))
    wide = torch.nn.functional.pad(answer, (3, 20)).repeat(3, 1)
    others = [torch.Generator().manual_seed(s) for s in (1, 7, 2)]
    _, together = corrupt(torch.zeros(3, 29, dtype=torch.long), wide, 99, generator=others)
    assert torch.equal(together[1, 3:9], alone[0])
    assert not torch.equal(together[0], together[1]) or not torch.equal(together[1], together[2])


def test_t_is_uniform_above_its_floor():
    t = draw_t(20000, torch.Generator().manual_seed(0))
    assert t.min() >= EPS and t.max() <= 1
    assert abs(t.mean() - (1 + EPS) / 2) < 4 * (1 / 12 / 20000) ** 0.5
    with pytest.raises(ValueError, match="1/t"):
        sft_loss(None, *rows(1), MASK, is_masked=torch.ones(1, L, dtype=torch.bool))
