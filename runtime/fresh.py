"""Fresh weights: a whole network at random, or new adapters beside a backbone that is kept."""

import torch
import torch.nn as nn

from model import DIFFA2


def build(config, device="cpu", seed=None):
    """A model with fresh random weights: what stage 0 and the tests start from."""
    if seed is not None:
        torch.manual_seed(seed)
    model = DIFFA2(config)
    for conv in (model.encoder.conv1, model.encoder.conv2):
        # with PyTorch's default the sound would be a tenth as large as the positions added to it
        nn.init.kaiming_normal_(conv.weight)
        nn.init.zeros_(conv.bias)
    for name, p in model.backbone.named_parameters():
        if p.dim() == 2:
            # embeddings have root mean square 1, and matrices keep it; the head's logits are small
            std = {"wte.weight": 1.0, "ff_out.weight": 0.02}.get(name, p.size(1) ** -0.5)
            if name.endswith((".attn_out.weight", ".ff_out.weight")):
                # the 2 * layers residual branches together add about as much as was there (GPT-2)
                std *= (2 * config.layers) ** -0.5
            nn.init.normal_(p, std=std)
    return model.to(device)


def with_fresh_adapters(model, seed):
    """A second model that shares encoder and backbone with the first; adapters untrained, no LoRA."""
    weight = model.backbone.wte.weight
    with torch.device("meta"):  # shapes without memory: all that is kept is put in their place
        fresh = DIFFA2(model.config)
    fresh.encoder, fresh.base = model.encoder, model.base
    frozen = {k: v for k, v in model.backbone.state_dict().items() if "lora_" not in k}
    fresh.backbone.load_state_dict(frozen, assign=True)
    torch.manual_seed(seed)
    with torch.device(weight.device):
        fresh.add_adapters()
    # as large as word embeddings: what is ten times smaller drowns in what the first layer adds
    nn.init.normal_(fresh.soft_prompts, std=weight.float().pow(2).mean().sqrt().item())
    return fresh
