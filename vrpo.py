"""VRPO: preference optimization with a low-variance likelihood (paper 3.5, Eq. 3-5).

DPO needs log p of a chosen and a rejected answer under the model and under a frozen reference.
A diffusion model has no exact log p, only the Monte-Carlo ELBO of Eq. 3, and the noise of four
such estimates goes straight into the gradient.  VRPO (LLaDA 1.5) cuts the noise where it costs
nothing:

  * policy and reference see the SAME (t, masks): what both find hard cancels in their difference;
  * the budget goes to n different numbers of hidden tokens, with one mask each;
  * counts are exact and stratified (diffusion.draw_counts).

    margin = (ELBO_policy(y+) - ELBO_ref(y+)) - (ELBO_policy(y-) - ELBO_ref(y-))
    loss   = -log sigmoid(beta * margin)

How it differs from the authors' script, and why: masks are shared and dropout is off in both, so
the margin starts at exactly 0; response and first end mark alone are scored; logsigmoid, because
the log of a sigmoid underflows; one backbone, not two: the reference is the saved copy of the
trained 1 % swapped in.  And memory does not grow with n.  d loss / d margin needs the margin
alone, which needs no gradient; then every sample is pushed back on its own with that number.

`python vrpo.py` shows the variance with and without shared masks.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from diffusion import draw_counts, elbo

BETA = 0.2  # the authors' script; the paper gives none
SAMPLES = 4  # K of Eq. 3; n in this file, for every count of samples is


def margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected):
    """What the policy has gained on the reference in preferring chosen: the bracket of Eq. 5, s of Eq. 4.

    Four (n, B) ELBO samples from the same masks pairwise.  Returns (B,).
    """
    return ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)).mean(0)


def vrpo_loss(margins, beta=BETA):
    """-log sigmoid(beta * margin) (Eq. 5), (B,) -> (B,)."""
    return -F.logsigmoid(beta * margins)


@contextmanager
def swapped(parameters, saved):
    """Runs a block with `saved` (tensors, same order and shapes) in the parameters' place.

    Pointers change hands, nothing is copied; errors inside put them back as well.
    """
    parameters = list(parameters)
    if len(parameters) != len(saved):
        raise ValueError(f"{len(parameters)} parameters, {len(saved)} saved tensors")
    mine = [p.data for p in parameters]
    try:
        for p, q in zip(parameters, saved, strict=True):
            p.data = q
        yield
    finally:
        for p, q in zip(parameters, mine, strict=True):
            p.data = q


def backward_per_sample(sample, n, margins, beta=BETA):
    """Adds d(sum of losses)/d(parameters) to their .grad, one sample's graph at a time.

    sample(name, j) -> (B,): the policy's ELBO of draw j, with gradient, name "chosen" or
    "rejected".  margins (B,): known beforehand from the same masks.  The gradient is that of
    vrpo_loss: d loss / d margin = -beta sigmoid(-beta margin) is one number per pair, and the
    margin is a mean over samples.
    """
    slope = -beta * torch.sigmoid(-beta * margins) / n  # (B,)
    for j in range(n):
        for name, sign in (("chosen", 1.0), ("rejected", -1.0)):
            (sign * slope * sample(name, j)).sum().backward()


def draw_pair_masks(chosen, rejected, n, generator=None):
    """Masks for both answers of a batch of pairs: {"chosen": (is_masked, weight), "rejected": ...}.

    chosen, rejected: is_answer (B, T+), (B, T-).  Shared by policy, reference and gradient.
    """
    return {"chosen": draw_counts(chosen, n, generator), "rejected": draw_counts(rejected, n, generator)}


def score(predict, ids, masks, mask_id, j=None):
    """ELBO samples (n, B) of one answer under draw_pair_masks; j: that draw alone, (B,)."""
    is_masked, weight = masks
    if j is None:
        return elbo(predict, ids, is_masked, weight, mask_id)
    return elbo(predict, ids, is_masked[j : j + 1], weight[j : j + 1], mask_id)[0]


if __name__ == "__main__":
    from diffusion import Toy, corrupt, draw_t, masked_nll

    # policy and reference: two toys a small step apart, as in the first steps of training
    policy, reference = Toy(length=4, vocab=3), Toy(length=4, vocab=3)
    nudge = torch.randn(len(reference.p), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference.p = (reference.p.log() + 0.1 * nudge).softmax(0)
    order = policy.p.argsort(descending=True)
    good, bad = policy.all[order[2]][None], policy.all[order[20]][None]
    exact = sum(s * (policy.log_prob(x[0]) - reference.log_prob(x[0])) for s, x in ((1, good), (-1, bad)))
    everything, g, n = torch.ones(1, 4, dtype=torch.bool), torch.Generator().manual_seed(0), SAMPLES

    def iid(predict, x, t, is_masked):
        """The 1/t estimate with independent coin flips, what stratified exact counts replace."""
        samples = []
        for s, mask in zip(t, is_masked, strict=True):
            noisy, _ = corrupt(x, everything, 3, s, mask)
            samples.append(-masked_nll(predict, x, noisy, mask) / s)
        return torch.stack(samples)

    def draw_iid():
        t = [draw_t(1, g) for _ in range(n)]
        return t, [torch.rand(1, 4, generator=g) < s for s in t]

    def draw_stratified():
        return draw_counts(everything, n, g)

    def stratified_samples(predict, x, is_masked, weight):
        return elbo(predict, x, is_masked, weight, 3)

    def one(is_shared, draw, samples):
        """One estimate of the margin: masks from `draw`, ELBO samples of them from `samples`."""
        values = []
        for x in (good, bad):
            masks = draw()
            other_masks = masks if is_shared else draw()
            values += [samples(policy, x, *masks), samples(reference, x, *other_masks)]
        return margin(values[0], values[2], values[1], values[3])

    print(f"margin of a toy pair, {n} samples an estimate, 300 estimates; exact value {exact:.4f}\n")
    kinds = (
        ("independent t", draw_iid, iid),
        ("stratified exact counts", draw_stratified, stratified_samples),
    )
    for is_shared in (False, True):
        for kind, draw, samples in kinds:
            found = torch.cat([one(is_shared, draw, samples) for _ in range(300)])
            name = f"{'shared' if is_shared else 'independent'} masks, {kind}"
            error = found.std() / len(found) ** 0.5
            print(f"  {name:48} {found.mean():8.4f} +- {error:.4f}   variance {found.var():10.5f}")
