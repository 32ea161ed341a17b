"""The preference loss: exact values on enumerable toys, gradients against the plain formula, memory."""

import functools
import math
import weakref

import pytest
import torch
import torch.nn as nn

from data import BatchBuilder, encode_pair, generator_for, read_manifest
from diffusion import draw_counts, elbo
from runtime.fresh import build
from runtime.tutorials import Toy
from train import VRPO, LossContext, Stage, freeze_all_but, vrpo
from vrpo import BETA, SAMPLES, backward_per_sample, margin, swapped, vrpo_loss


def draw_pair_masks(chosen, rejected, n, generator=None):
    return {"chosen": draw_counts(chosen, n, generator), "rejected": draw_counts(rejected, n, generator)}


class Net(nn.Module):
    """A predictor with weights: each token's logits from the visible ones around it."""

    def __init__(self, vocab=4, length=5, width=16, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocab + 1, width)
        self.hidden, self.out = nn.Linear(width * length, width * length), nn.Linear(width, vocab)
        self.mask_id = vocab

    def forward(self, noisy, where):
        x = self.embed(noisy)
        x = x + torch.tanh(self.hidden(x.flatten(1))).view_as(x)
        return self.out(x)[where]


def pair(B=3, L=5, vocab=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = {text: torch.randint(vocab, (B, L), generator=g) for text in ("chosen", "rejected")}
    return ids, torch.ones(B, L, dtype=torch.bool)


def one_draw(net, ids, masks, j):
    is_masked, weight = masks
    return elbo(net, ids, is_masked[j : j + 1], weight[j : j + 1], net.mask_id)[0]


def margins_of(net, other, ids, masks):
    def s(model, text):
        return elbo(model, ids[text], *masks[text], net.mask_id)

    return margin(s(net, "chosen"), s(net, "rejected"), s(other, "chosen"), s(other, "rejected"))


def test_loss_is_minus_log_sigmoid():
    m = torch.tensor([-2000.0, -3.0, 0.0, 5.0, 2000.0])
    loss = vrpo_loss(m, beta=0.2)
    assert loss[0] == 400 and loss[4] == 0 and math.isclose(loss[2].item(), math.log(2), rel_tol=1e-6)
    assert math.isclose(loss[1].item(), -math.log(1 / (1 + math.exp(0.6))), rel_tol=1e-6)


def test_margin_is_zero_when_policy_is_reference():
    net, (ids, is_answer) = Net(), pair()
    masks = draw_pair_masks(is_answer, is_answer, SAMPLES, torch.Generator().manual_seed(1))
    assert torch.equal(margins_of(net, net, ids, masks), torch.zeros(3))


@pytest.mark.parametrize("n", [1, 4])
def test_backward_per_sample_is_the_plain_gradient(n):
    policy, reference, (ids, is_answer) = Net(seed=0).double(), Net(seed=1).double(), pair()
    masks = draw_pair_masks(is_answer, is_answer, n, torch.Generator().manual_seed(2))
    plain = vrpo_loss(margins_of(policy, reference, ids, masks)).sum()
    plain.backward()
    expected = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    with torch.no_grad():
        m = margins_of(policy, reference, ids, masks)
    backward_per_sample(lambda text, j: one_draw(policy, ids[text], masks[text], j), n, m)
    for p, e in zip(policy.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, e, atol=1e-6), (p.grad - e).abs().max()  # cross-entropy is fp32
    assert max(e.abs().max() for e in expected) > 1e-3


def live_bytes_at_most(run):
    """The most bytes that autograd keeps for the backward pass at any moment while run() works."""
    now = most = 0

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        nonlocal now, most
        size = tensor.numel() * tensor.element_size()
        kept = Kept(tensor)
        now += size
        most = max(most, now)

        def drop():
            nonlocal now
            now -= size

        weakref.finalize(kept, drop)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        run()
    return most


def test_memory_does_not_grow_with_the_number_of_samples():
    net, (ids, is_answer) = Net(), pair()
    peaks, plain = [], []

    def one_by_one(n, masks):
        def sample(text, j):
            return one_draw(net, ids[text], masks[text], j)

        backward_per_sample(sample, n, torch.zeros(3))

    def all_at_once(masks):
        vrpo_loss(margins_of(net, net, ids, masks)).sum().backward()

    for n in (2, 8):
        masks = draw_pair_masks(is_answer, is_answer, n, torch.Generator().manual_seed(3))
        peaks.append(live_bytes_at_most(functools.partial(one_by_one, n, masks)))
        plain.append(live_bytes_at_most(functools.partial(all_at_once, masks)))
    # a sample with all tokens masked keeps a little more than one with few
    assert peaks[1] < 1.3 * peaks[0] and plain[1] > 3.5 * plain[0]


def test_swapped_gives_back_what_it_borrowed():
    net, other = Net(seed=0), Net(seed=1)
    before = [p.detach().clone() for p in net.parameters()]
    x = torch.zeros(1, 5, dtype=torch.long)
    with swapped(net.parameters(), [p.detach() for p in other.parameters()]):
        assert torch.equal(net(x, x == 0), other(x, x == 0))
    with pytest.raises(RuntimeError), swapped(net.parameters(), [p.detach() for p in other.parameters()]):
        raise RuntimeError
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    with pytest.raises(ValueError), swapped(net.parameters(), before[:1]):
        pass


def test_estimate_agrees_with_the_exact_likelihood():
    """Exact conditionals make the bound tight: the margin's mean is a difference of log-likelihood ratios."""
    policy, reference = Toy(seed=0), Toy(seed=5)
    good, bad = policy.all[7][None], policy.all[50][None]
    exact = (policy.log_prob(good[0]) - reference.log_prob(good[0])) - (
        policy.log_prob(bad[0]) - reference.log_prob(bad[0])
    )
    everything, g, found = torch.ones(1, 4, dtype=torch.bool), torch.Generator().manual_seed(0), []
    for _ in range(400):
        masks, scores = draw_pair_masks(everything, everything, SAMPLES, g), []
        for toy in (policy, reference):
            scores += [elbo(toy, good, *masks["chosen"], 3), elbo(toy, bad, *masks["rejected"], 3)]
        found.append(margin(*scores))
    found = torch.cat(found)
    assert abs(found.mean() - exact) < 4 * found.std() / 20


def test_shared_masks_cut_the_variance():
    """Policy and reference a small step apart, as in training: the same masks cancel, other masks do not."""
    policy, reference = Toy(seed=0), Toy(seed=0)
    g = torch.Generator().manual_seed(1)
    reference.p = (
        reference.p.log() + 0.1 * torch.randn(len(reference.p), generator=g, dtype=torch.float64)
    ).softmax(0)
    x, everything = policy.all[30][None], torch.ones(1, 4, dtype=torch.bool)

    def gain(shared):
        first = draw_counts(everything, SAMPLES, g)
        second = first if shared else draw_counts(everything, SAMPLES, g)
        return (elbo(policy, x, *first, 3) - elbo(reference, x, *second, 3)).mean()

    shared, other = (torch.stack([gain(s) for _ in range(150)]).var() for s in (True, False))
    assert shared < 0.2 * other


def test_chosen_gains_on_rejected():
    net, (ids, is_answer) = Net(), pair()
    reference = [p.detach().clone() for p in net.parameters()]
    optimizer, g = torch.optim.SGD(net.parameters(), lr=0.3), torch.Generator().manual_seed(4)
    for _ in range(40):
        masks = draw_pair_masks(is_answer, is_answer, SAMPLES, g)
        with torch.no_grad():
            mine = {text: elbo(net, ids[text], *masks[text], net.mask_id) for text in ids}
            with swapped(net.parameters(), reference):
                old = {text: elbo(net, ids[text], *masks[text], net.mask_id) for text in ids}
        m = margin(mine["chosen"], mine["rejected"], old["chosen"], old["rejected"])

        def sample(text, j, masks=masks):
            return one_draw(net, ids[text], masks[text], j)

        optimizer.zero_grad()
        backward_per_sample(sample, SAMPLES, m)
        optimizer.step()
    assert (m > 5).all()


@pytest.fixture
def pairs(toured, config, tokenizer):
    examples = read_manifest(f"{toured}/stage4.jsonl", 4)[:3]
    return BatchBuilder(tokenizer, config, encode_pair, 0, is_augmented=True)(examples, 0)


def test_scored_are_the_response_and_its_first_end_mark(pairs, config):
    text = pairs["batch"]["rejected"]
    for ids, is_answer, valid in zip(text["ids"], text["is_answer"], text["valid"], strict=True):
        scored = ids[is_answer].tolist()
        assert (
            scored[-1] == config.eos_id and scored[-2] == config.eot_id and config.eos_id not in scored[:-1]
        )
        assert is_answer.sum() + is_answer.nonzero()[0, 0] == valid.sum()  # nothing valid behind it


def test_whole_model_step_is_the_plain_formula(pairs, config):
    """train.vrpo against autograd on Eq. 4 and 5.

    It takes the samples into a detached leaf, then goes once through the adapters.
    """
    model = build(config, seed=0)
    model.add_lora()
    trained = freeze_all_but(model, ("semantic.", "acoustic.", "lora"))
    reference = tuple(p.detach().clone() for p in trained.values())
    model.eval()
    row = Stage((), 1.0, 3, 0, loss=VRPO)
    context = LossContext(
        model,
        4,
        0,
        row,
        functools.partial(torch.autocast, "cpu", enabled=False),
        tuple(trained.values()),
        reference,
    )
    start = vrpo(context, pairs)
    assert torch.equal(start, torch.full((3,), math.log(2)))  # margin exactly 0, in fp32
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained.values():
            p.grad = None
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    loss = vrpo(context, pairs)
    got = {n: p.grad.clone() for n, p in trained.items()}
    model.zero_grad()

    batch, texts = pairs["batch"], {name: pairs["batch"][name] for name in ("chosen", "rejected")}
    masks = draw_pair_masks(
        *(texts[n]["is_answer"] for n in texts),
        SAMPLES,
        [generator_for(0, 0, i, stream=1) for i in pairs["ids"]],
    )

    def both():
        audio, is_audio = model.adapt(*model.encode(batch["mel"], batch["n_frames"]), batch["n_frames"], 4)
        for n, s in texts.items():
            yield elbo(
                lambda noisy, where, s=s: model(noisy, s["valid"], where, audio, is_audio, s["audio_at"]),
                s["ids"],
                *masks[n],
                config.mask_id,
            )

    with torch.no_grad(), swapped(trained.values(), reference):
        old = list(both())
    plain = vrpo_loss(margin(*both(), *old), BETA)
    plain.sum().backward()
    assert torch.allclose(loss, plain, atol=1e-6) and not torch.allclose(loss, start, atol=1e-3)
    biggest = max(p.grad.abs().max() for p in trained.values())
    for n, p in trained.items():
        assert (p.grad - got[n]).abs().max() < 1e-5 * max(1, biggest), n


def test_the_reference_is_another_model_under_bf16(pairs, config):
    """Autocast remembers bf16 copies of weights; the reference must not be scored with the policy's.

    The policy has moved far from the reference.  With a cache that is not switched off both would
    have the same likelihoods and every margin would be 0; in fp32 the margins are the measure.
    """
    model = build(config, seed=0)
    model.add_lora()
    trained = freeze_all_but(model, ("semantic.", "acoustic.", "lora"))
    reference = tuple(p.detach().clone() for p in trained.values())
    model.eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.2 * torch.randn(p.shape, generator=g))
    losses = {}
    for enabled in (False, True):
        autocast = functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16, enabled=enabled)
        context = LossContext(
            model, 4, 0, Stage((), 1.0, 3, 0, loss=VRPO), autocast, tuple(trained.values()), reference
        )
        with autocast():  # a caller's own, which would keep the copies
            losses[enabled] = vrpo(context, pairs)
        for p in trained.values():
            p.grad = None
    start = math.log(2)
    from_zero_margins = (losses[False] - start).abs().mean()
    assert from_zero_margins > 0.005
    # with the policy's weights for the reference, bf16 would be at zero margins itself
    assert (losses[True] - losses[False]).abs().mean() < from_zero_margins / 3
