"""The held-out loss: of examples that are never trained on, at fixed t and under fixed masks.

The training loss jumps about: what is asked at t = 0.9 is far harder than at 0.1, and a mean over random t
says as much of the draw as of the model.  Held-out examples give a smooth curve instead, and tell learning
from remembering.
"""

import torch

from data import audio_tokens, generator_for, to_device
from diffusion import corrupt, masked_nll, next_token_loss
from runtime.loading import bucket, cost_of, size_of

HELD_OUT_T = (0.1, 0.3, 0.5, 0.7, 0.9)


@torch.no_grad()
def held_out_loss(model, stage, autocast, builder, examples, group, tokens):
    """Cross-entropy per masked token: the mean over HELD_OUT_T, and each t's.  Ranks share the examples.

    Without the weight 1/t, so that the numbers are nats of a guess and can be compared from t to t.
    """
    c, was_training = model.config, model.training
    model.eval()
    sums = torch.zeros(len(HELD_OUT_T), 2, dtype=torch.float64)  # nats, tokens
    mine = range(group.rank, len(examples), group.size)
    costs = {i: cost_of(size_of(examples[i]), c) for i in mine}
    for some in bucket(mine, costs, tokens):
        micro = builder([examples[i] for i in some], 0)
        if micro["batch"] is None:  # a rank may have none, or none that can be read
            continue
        batch = to_device(micro["batch"], group.device)
        text = batch["text"]
        ids, is_answer = text["ids"], text["is_answer"]
        with autocast():
            predict = model.predictor(text, *audio_tokens(model, batch, stage))
            if c.causal:  # one loss, whatever t
                n = is_answer.sum(1)
                nll = next_token_loss(predict, ids, is_answer) * n
                sums += torch.tensor([nll.sum().item(), n.sum().item()])
                continue
            for k, t in enumerate(HELD_OUT_T):
                generators = [generator_for(k, 0, i, stream=1) for i in micro["ids"]]
                every_t = torch.full((len(generators),), t)
                noisy, is_masked = corrupt(ids, is_answer, c.mask_id, every_t, generator=generators)
                nll = masked_nll(predict, ids, noisy, is_masked)
                sums[k] += torch.tensor([nll.sum().item(), is_masked.sum().item()])
    model.train(was_training)
    sums = torch.tensor(group.sum(sums.flatten().tolist())).view(-1, 2)
    per_t = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()  # divided last: ranks differ in tokens
    by_t = dict(zip(map(str, HELD_OUT_T), per_t, strict=True))
    return {"held_out": sum(per_t) / len(per_t), "held_out_t": by_t}
