"""VRPO: DPO with low-variance estimates of the likelihood (paper 3.5, Eq. 3-5).

DPO needs log p of a chosen answer y+ and a rejected answer y-, under the model that trains (the policy)
and under a frozen reference.  A diffusion model has no exact log p, only the Monte-Carlo ELBO of Eq. 3.
The noise of all four (two answers, two models) biases the loss, which is not linear in them, and scatters
its gradient.  VRPO (LLaDA 1.5) reduces the noise without more network calls:

  * policy and reference see the SAME masks ("antithetic sampling"): what both find hard cancels;
  * the n calls for an answer use n different mask ratios, one mask each ("optimal budget allocation").

    margin = (ELBO_policy(y+) - ELBO_ref(y+)) - (ELBO_policy(y-) - ELBO_ref(y-))
    loss   = -log sigmoid(beta * margin)

How it differs from the authors' script, and why (the paper leaves these points open):
  * both hide an exact number of tokens; here the n numbers are spread over the range instead of
    independent (diffusion.draw_counts), which cuts the variance further;
  * dropout is off in both models, so the margin starts at exactly 0;
  * scored are the answer, its end of turn and one end mark, neither the turn's header nor the padding;
  * logsigmoid instead of the log of a sigmoid, which underflows;
  * one backbone instead of two: for the reference, the parameters that train (1 % of diffa2) are replaced
    by a copy from before the training;
  * memory does not grow with n: the margin is computed first, without gradient.  It gives
    d loss / d margin, a number with which each sample is then backpropagated on its own.

`python vrpo.py` shows the margin's variance with and without shared masks and exact counts.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

BETA = 0.2  # the authors' script; the paper gives none
SAMPLES = 4  # K in Eq. 3, N in Section 3.5, n in this file


def margin(policy_chosen, policy_rejected, reference_chosen, reference_rejected):
    """s(y+) - s(y-) of Eq. 4 and 5: how much more than the reference the policy prefers the chosen answer.

    Each argument: (n, B) ELBO samples, policy and reference of one answer from the same masks.  Returns (B,).
    """
    return ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)).mean(0)


def vrpo_loss(margins, beta=BETA):
    """-log sigmoid(beta * margin) (Eq. 5), (B,) -> (B,)."""
    return -F.logsigmoid(beta * margins)


@contextmanager
def swapped(parameters, saved):
    """Within this context the parameters have the values `saved` (tensors in the same order and shapes).

    Tensors change places, nothing is copied; after an error inside, too, they change back.
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
    """Adds the gradient of vrpo_loss, summed over the batch, to .grad, one sample's graph at a time.

    sample(name, j) -> (B,): the policy's ELBO of draw j, with gradient; name: "chosen" or "rejected".
    margins (B,): computed before, without gradient, from the same masks.  By the chain rule
    d loss / d margin = -beta sigmoid(-beta margin), and the margin is a mean over n samples.
    """
    slope = -beta * torch.sigmoid(-beta * margins) / n  # (B,)
    for j in range(n):
        for name, sign in (("chosen", 1.0), ("rejected", -1.0)):
            (sign * slope * sample(name, j)).sum().backward()


if __name__ == "__main__":
    from diffusion import draw_counts, draw_t, elbo
    from runtime import tutorials

    tutorials.vrpo(margin, elbo, draw_t, draw_counts, SAMPLES)
