"""Masked diffusion on text: the corruption, the 1/t loss, and the Monte-Carlo likelihood.

A masked diffusion model learns to fill in blanks.  Forward process: hide each answer token with
probability t.  Reverse process: a bidirectional network predicts the hidden tokens.  The whole theory
fits in one sentence: the cross-entropy of the hidden tokens, summed, divided by t and averaged over
t ~ U(0, 1] and the masks, bounds -log p(answer) from above (paper, Eq. 1).

Only the answer is ever hidden.  Audio and prompt stay visible (Eq. 2, and L_sft-a in Section 3.4).  In
this file "answer" is the whole response: the words, <|eot_id|> (the end of the turn) and the <|endoftext|>
(end marks) that fill it up to its length (data.py).

The losses and the ELBO take `predict`, any callable (ids (B, T), where (B, T)) -> logits (N, vocab) of
the N tokens where `where` is True, row by row.  So the same few lines run on an 8-billion-parameter
network and on a toy whose likelihood can be enumerated: `python diffusion.py` shows the forward process
on a sentence and compares both estimates of log p with the toy's exact one.

How it differs from LLaDA's and the authors' code, and why:
  * logits are computed at masked positions only: with a vocabulary of 126,464 all others are costly;
  * an answer's loss is divided by its own number of tokens, as LLaDA's guidelines do; the authors divide a
    micro-batch's sum by its number of response tokens, and also hide the header of the answer's turn;
  * the n draws of the likelihood hide l of the L answer tokens each, the values of l spread over 1..L, each
    equally likely in each draw (LLaDA's rounding leaves out some, which biases the estimate);
  * random numbers come from a given generator, one for all rows or one for each, so that an
    example's masks need not depend on its batch or on the number of GPUs.
"""

import torch
import torch.nn.functional as F

EPS = 1e-3  # the least t: below it hardly any token is hidden, but one that is would weigh over 1000


def draw_uniform(n, generator=None, row=0):
    """n numbers from [0, 1) by `generator`, which may be None, one Generator, or one per row."""
    if isinstance(generator, (list, tuple)):
        generator = generator[row]
    return torch.rand(n, generator=generator)


def draw_t(batch, generator=None, eps=EPS):
    """Mask ratios (batch,): u ~ U(0, 1], moved to (eps, 1] as t = (1 - eps) u + eps."""
    u = torch.cat([1 - draw_uniform(1, generator, row) for row in range(batch)])  # in (0, 1]
    return (1 - eps) * u + eps


def corrupt(ids, is_answer, mask_id, t=None, is_masked=None, generator=None):
    """Forward process: each answer token becomes [MASK] with probability t (Eq. 1, 2).

    ids, is_answer: (B, T) long and bool.  t: (B,) in (0, 1]; drawn when neither t nor is_masked
    is given.  is_masked: (B, T) bool, to use masks drawn elsewhere.
    Returns noisy ids (B, T) and is_masked (B, T); nothing outside is_answer is ever masked.

    Random numbers are drawn for answer tokens alone, row by row: padding a batch to another
    length does not change which tokens are hidden.
    """
    if is_masked is None:
        if t is None:
            t = draw_t(len(ids), generator)
        is_masked = torch.zeros_like(is_answer)
        for row in range(len(ids)):
            at = is_answer[row].nonzero().squeeze(1)  # the answer's columns
            masked = draw_uniform(len(at), generator, row).to(at.device) < t[row].item()
            is_masked[row, at[masked]] = True
    is_masked = is_masked & is_answer
    return torch.where(is_masked, mask_id, ids), is_masked


def masked_nll(predict, ids, noisy, is_masked):
    """-log p(ids | noisy) summed over each row's masked tokens.  Returns (B,) in fp32."""
    total = torch.zeros(len(ids), device=ids.device)
    if not is_masked.any():  # a small t may hide no token: no loss, and no network call
        return total
    logits = predict(noisy, is_masked)  # (N, vocab)
    nll = F.cross_entropy(logits.float(), ids[is_masked], reduction="none")  # (N,)
    row = is_masked.nonzero()[:, 0]  # which row each of the N tokens belongs to
    return total.index_add(0, row, nll)


def sft_loss(predict, ids, is_answer, mask_id, t=None, is_masked=None, generator=None, per_token=True):
    """L_sft-a: cross-entropy of the masked answer tokens, weighted by 1/t (Eq. 1, 2).

    ids, is_answer: (B, T), the clean batch and where its answers stand, end marks included.
    t (B,) may be given, or t and is_masked (B, T) together; what is not given is drawn.
    per_token divides by each answer's number of tokens, as LLaDA's guidelines do; without it the value
    is the paper's plain sum, whose mean over t and masks is an upper bound on -log p(answer).
    Returns (B,): one loss per example.  Average it over the GLOBAL batch, not per process.
    """
    if t is None:
        if is_masked is not None:
            raise ValueError("is_masked without t: the weight 1/t would be unknown")
        t = draw_t(len(ids), generator)
    noisy, is_masked = corrupt(ids, is_answer, mask_id, t, is_masked, generator)
    loss = masked_nll(predict, ids, noisy, is_masked) / t.to(ids.device)
    if per_token:
        loss = loss / is_answer.sum(1)
    return loss


def next_token_loss(predict, ids, is_answer):
    """Cross-entropy of each answer token given all before it: for an autoregressive baseline, as in Table 5.

    `predict` must be causal: its logits at one token are read as the distribution of the next.
    Returns (B,), the mean over each answer.
    """
    before = is_answer.roll(-1, dims=1)  # the token before each answer token
    before[:, -1] = False  # `roll` has put the first column's value there
    # masked_nll's sum, with each token's logits read one column earlier
    return masked_nll(lambda ids, _: predict(ids, before), ids, ids, is_answer) / is_answer.sum(1)


def stratified_counts(length, n, k):
    """n mask counts in 1..L (L: length) from one start k in 1..L: l_j = (k-1 + floor(j L/n)) mod L + 1.

    Together the n counts spread evenly over the range, which cuts the variance.  Each one alone is
    uniform if k is, so there is no bias.
    """
    return [(k - 1 + j * length // n) % length + 1 for j in range(n)]


def draw_counts(is_answer, n, generator=None):
    """Masks for the Monte-Carlo ELBO: exact counts instead of coin flips, stratified over n draws.

    A draw masks exactly l of an answer's L tokens, chosen at random, l uniform on 1..L; its weight L / l
    takes the place of 1/t, and the bound is the same on average (Nie et al., 2025).
    is_answer: (B, T).  Returns is_masked (n, B, T) and weight (n, B).  Draw them once and use
    them for policy, reference and gradient alike: VRPO's antithetic sampling (paper 3.5), in statistics
    common random numbers.
    """
    B, T = is_answer.size()
    is_masked = torch.zeros(n, B, T, dtype=torch.bool, device=is_answer.device)
    weight = torch.zeros(n, B, device=is_answer.device)
    for row in range(B):
        at = is_answer[row].nonzero().squeeze(1)  # (L,): the answer's columns
        L = len(at)
        if L == 0:
            raise ValueError(f"row {row} has no answer token")
        k = int(draw_uniform(1, generator, row).item() * L) + 1  # uniform on 1..L
        for j, count in enumerate(stratified_counts(L, n, k)):
            order = draw_uniform(L, generator, row).argsort().to(at.device)  # a random permutation
            is_masked[j, row, at[order[:count]]] = True
            weight[j, row] = L / count
    return is_masked, weight


def elbo(predict, ids, is_masked, weight, mask_id):
    """Samples of the evidence lower bound (ELBO) on log p(answer | audio, prompt) (Eq. 3).

    is_masked (n, B, T) and weight (n, B) come from draw_counts.  Returns (n, B); the mean over
    n is the estimate of Eq. 3.  Not divided by the answer's length.
    """
    samples = []
    for masks, w in zip(is_masked, weight, strict=True):  # (B, T), (B,)
        noisy = torch.where(masks, mask_id, ids)
        samples.append(-w * masked_nll(predict, ids, noisy, masks))
    return torch.stack(samples)


if __name__ == "__main__":
    from runtime import tutorials

    tutorials.diffusion(corrupt, sft_loss, draw_counts, elbo)
