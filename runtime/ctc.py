"""CTC of the transcript on the semantic tokens: helps a small model to learn sooner what is said."""

import torch.nn as nn


def ctc_loss(model, batch, audio, is_audio, stage):
    """CTC of the transcripts through the backbone's embeddings, nats a token (B,); 0 without a transcript.

    A semantic token is read as the word whose embedding it is most like, the end mark as CTC's blank.  CTC
    sums over all ways to place the transcript's tokens, in their order, on the semantic ones (Graves et al.,
    2006), so nobody has to mark when a word is spoken.  Not the paper's: with 11,000 hours it does without.
    """
    c = model.config
    n_first = c.n_soft_prompts if stage == 1 else c.n_queries
    semantic, n_semantic = audio[:, n_first:], is_audio[:, n_first:].sum(1)  # acoustic tokens carry no words
    logits = semantic.float() @ model.backbone.wte.weight.float().T * c.width**-0.5
    log_p = logits.log_softmax(-1).transpose(0, 1)  # (A, B, vocab), as torch wants it
    n_transcript = batch["transcript_length"]
    # a transcript longer than the clip has semantic tokens cannot be aligned: zero_infinity leaves it out
    how = {"blank": c.eos_id, "reduction": "none", "zero_infinity": True}
    loss = nn.functional.ctc_loss(log_p, batch["transcript"], n_semantic, n_transcript, **how)
    return loss / n_transcript.clamp(min=1) * (n_transcript > 0)
