"""What a run will be, in a line; for `train.py --dry-run` in full, with the memory that it would take."""

import dataclasses
import os

import torch

import weights
from data import BatchBuilder
from runtime import start
from runtime.errors import UserError
from runtime.loading import MicroBatches, epoch_length


def parts(settings):
    """The parts that train, as text: "semantic, acoustic, lora"."""
    return ", ".join(settings.trains).replace(".", "")


def summary(stage, settings, steps, examples, dropout=True):
    """What a run begins with on the screen: all that decides what it learns."""
    what = f"stage {stage}: trains {parts(settings)} on {epoch_length(examples.shares)} examples"
    rate = f"learning rate {settings.lr:g} after {settings.warmup} steps"
    rest = f"weight decay {settings.weight_decay:g}" + ", augmented" * settings.augment
    return f"{what}, {steps} steps of {settings.batch}, {rate}, {rest}" + ", no dropout" * (not dropout)


def describe(args, model, settings, steps, examples, processes):
    """Says what the run would be, and reads one batch; neither the weights nor a GPU are needed.

    model: on the meta device, its parts frozen as they will be.
    """
    n_examples = epoch_length(examples.shares)
    try:
        _, folder = start.origin(args)
    except UserError as e:
        if args.init:  # a wrong name; the stage before may well come later than the plan
            raise
        print(f"cannot start yet: {e}")
        folder = args.llada or weights.ASSETS.get(args.model)  # the tokenizer will be this one
    tokenizer, config = None, dataclasses.replace(model.config, causal=args.objective == "ar")
    if folder and os.path.exists(os.path.join(folder, "tokenizer.json")):
        tokenizer = weights.load_tokenizer(folder)
        config = config.with_tokenizer(tokenizer)
    builder = BatchBuilder(
        tokenizer, config, settings.loss.encode, args.seed, settings.is_imitated, settings.augment
    )
    place = {"rank": 0, "size": processes, "budget": args.tokens, "seed": args.seed}
    batches = MicroBatches(examples, builder, settings.batch, **place, start=0, stop=1)
    sizes = [len(ids) for _, _, ids, _ in batches.plan()]  # of rank 0 in the first step
    epochs = steps * settings.batch / n_examples
    print(f"{args.model}, stage {args.stage}, {processes} processes")
    print(f"  examples            {len(examples):,} in {len(args.data)} manifests")
    print(f"  examples an epoch   {n_examples:,}")
    print(f"  steps               {steps:,} of {settings.batch}: {epochs:.2f} epochs")
    print(f"  learning rate       {settings.lr:g} after {settings.warmup:,} steps")
    print(f"  weight decay        {settings.weight_decay:g}")
    print(f"  a process, a step   {sum(sizes)} examples, {len(sizes)} micro-batches, --tokens {args.tokens}")
    print("memory of a process in GB, without the encoder's passing states, logits and CUDA itself:")
    for what, size in memory_of(model, settings, args, max(1, *sizes), processes).items():
        print(f"  {size / 1e9:8.2f}  {what}")
    if tokenizer is None:
        print("no batch was read: the tokenizer is not here (LLaDA's: --llada FOLDER)")
        return
    micro = next(iter(batches))
    for entry in micro["skipped"]:
        print(f"skipped: {entry['where']}: {entry['why']}")
    print(f"read {len(micro['ids'])} examples, {micro['seconds']:.0f} s of audio:")
    for name, value in (micro["batch"] or {}).items():
        tensors = {f"{name}.{k}": x for k, x in value.items()} if isinstance(value, dict) else {name: value}
        for what, tensor in tensors.items():
            print(f"  {what:20}{tuple(tensor.shape)}")


def memory_of(model, settings, args, n_rows, processes):
    """{what: bytes} of a process in bf16.  model: on the meta device, its parts frozen already."""
    c, length, meta = model.config, args.tokens // n_rows, {"device": "meta", "dtype": torch.bfloat16}
    # saved_bytes finds attention's scores by their last size, so no other tensor may have that size
    length += length in (c.width, c.ffn, c.width // c.heads)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # in fp32: weights, gradients, AdamW's two moments, a buffer to sum gradients in, VRPO's reference
    copies = 4 + (processes > 1) + settings.loss.has_reference
    # activations are what the forward pass leaves for the backward pass: nothing where no gradient goes
    model.to(torch.bfloat16)
    x = torch.empty(n_rows, length, c.width, **meta, requires_grad=True)
    backbone = saved_bytes(lambda: model.backbone(x, None), model.parameters(), length)
    if args.recompute:  # each block's input, and the inside of one of them
        backbone = c.layers * x.nbytes + backbone // c.layers
    taps = torch.empty(n_rows, len(c.taps), c.n_frames, c.audio_width, **meta)
    acoustic = saved_bytes(lambda: model.acoustic(taps), model.parameters(), c.n_frames)
    return {
        "frozen weights": frozen,
        f"{n_trained:,} trained: weights, gradients, moments, copies": 4 * n_trained * copies,
        "activations of the backbone" + ", --recompute" * args.recompute: backbone,
        "activations of the acoustic adapter": acoustic,
        "in all": frozen + 4 * n_trained * copies + backbone + acoustic,
    }


def saved_bytes(run, parameters, n_keys):
    """Bytes that autograd keeps of run() until its backward pass, beside the parameters themselves.

    On the meta device nothing is computed or allocated, so this works for a model of any size.  Scores of
    attention (.., queries, keys), which are formed there, are left out: a GPU's fused attention keeps none.
    """
    ours, kept = {p.untyped_storage()._cdata for p in parameters}, {}

    def keep(x):
        if x.dim() < 3 or x.size(-1) != n_keys:
            kept[x.untyped_storage()._cdata] = x  # the tensor too: an address that is free is used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run()
    return sum(x.untyped_storage().nbytes() for place, x in kept.items() if place not in ours)
