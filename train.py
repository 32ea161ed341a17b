"""Training: one table of stages, one loop, on a laptop or on many GPUs.

    python -m tools.prepare tour --audio DIR --text DIR --out data    # data/stage0.jsonl ... stage4.jsonl
    python train.py --model tiny --stage 0             # the small backbone, from text alone
    python train.py --model tiny --stage 1 --init out/tiny/stage0     # semantic adapter: transcripts
    python train.py --model tiny --stage 2             # both adapters: questions about clips
    python train.py --model tiny --stage 3             # both adapters and LoRA
    python train.py --model tiny --stage 4             # the same parts by preference (vrpo.py)
    python train.py --model tiny --stage 4 --resume    # goes on where a stopped run was
    torchrun --nproc_per_node=8 train.py --stage 1     # diffa2 on eight GPUs; add --nnodes for more

Stages 2 to 4 start from the folder that the one before wrote (out/MODEL/stageN), or from --init; stage 1
from LLaDA and Whisper as published, or from the small backbone and Whisper tiny.en that lie in assets.
Stage 0 makes that backbone, on text with word embeddings in the place of audio (runtime/variations.py).

Of n processes, process r takes every n-th example of a batch, from the r-th on.  What one is masked and
augmented with is seeded by (seed, epoch, example): n changes only the speed (and dropout and rounding).

Reading order: losses, table of stages, `train` (the loop), command line (options: runtime/command_line.py).
"""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import data
import weights
from diffusion import EPS, draw_counts, draw_t, elbo, next_token_loss, sft_loss
from model import DIFFA2, PRESETS
from runtime import checkpoints, command_line, loading, plan, start
from runtime.ctc import ctc_loss
from runtime.errors import UserError, exit_status
from runtime.files import fingerprint
from runtime.held_out import held_out_loss
from runtime.hub import RELEASES
from runtime.log import Log
from runtime.optimizers import make_optimizers
from runtime.processes import StopSignal, exit_process, locked, pick_precision, process_group
from vrpo import SAMPLES, backward_per_sample, margin, swapped, vrpo_loss

# ---------------------------------------------------------------------------------------------
# losses.  A loss takes a micro-batch of data.BatchBuilder, adds the gradient of the SUM over its examples to
# .grad, and returns the loss of every example (B,), detached.  The loop divides once, by the size of the
# global batch: in a mean of means an example would weigh the more the fewer others share its micro-batch.
# Two losses train all five stages.  `sft`, supervised fine-tuning, is Eq. 1 and 2: hide some of the answer's
# tokens, let the network guess them.  `vrpo` is Eq. 4 and 5: prefer a better answer to a worse one.


@dataclasses.dataclass(frozen=True)
class LossContext:
    """What a loss needs beside its micro-batch: a test or a notebook can call one without the loop."""

    model: nn.Module
    stage: int  # 0 to 4
    seed: int  # of the masks, with the epoch and the example's id
    settings: "Stage"  # its row of the table
    autocast: Callable  # () -> context manager
    parameters: tuple = ()  # those that train
    reference: tuple = ()  # their values before stage 4

    def generators(self, micro):
        """One generator for each example, on the stream that training draws t and masks from."""
        return [data.generator_for(self.seed, micro["epoch"], i, stream=1) for i in micro["ids"]]


def sft(context, micro):
    """Stages 0 to 3: Eq. 1 and 2, and CTC where the table has it.  Only the answer's tokens are hidden."""
    model, settings, batch = context.model, context.settings, micro["batch"]
    text = batch["text"]
    ids, is_answer = text["ids"], text["is_answer"]
    with context.autocast():
        audio, is_audio = data.audio_tokens(model, batch, context.stage)
        predict = model.predictor(text, audio, is_audio)
        if model.config.causal:  # --objective ar
            losses = next_token_loss(predict, ids, is_answer)
        else:
            # one t for each example.  Near t = 1 the answer must come from the audio alone, as in the first
            # call of decoding; near 0 a word is filled in from its neighbours: least_t leaves that out
            generators = context.generators(micro)
            t = draw_t(len(ids), generators, settings.least_t)
            losses = sft_loss(predict, ids, is_answer, model.config.mask_id, t, generator=generators)
    total = losses
    if settings.ctc:
        total = losses + settings.ctc * ctc_loss(model, batch, audio, is_audio, context.stage)
    if total.requires_grad:  # where a small t has hidden nothing in any example there is no gradient
        total.sum().backward()
    return losses.detach()


def vrpo(context, micro):
    """Stage 4: Eq. 4, 5.  A "sample" is one draw of masks (Eq. 3 has K of them)."""
    model, batch = context.model, micro["batch"]
    texts = {name: batch[name] for name in ("chosen", "rejected")}
    generators = context.generators(micro)  # the masks serve policy, reference and gradient
    masks = {name: draw_counts(text["is_answer"], SAMPLES, generators) for name, text in texts.items()}

    with context.autocast():
        encoded = model.encode(batch["mel"], batch["n_frames"])  # frozen: once for policy and reference

    # no cache: if the caller is in autocast already, its bf16 copies of the weights would outlive `swapped`
    def adapted():
        with context.autocast(cache_enabled=False):
            return model.adapt(*encoded, batch["n_frames"], context.stage)

    audio, is_audio = adapted()

    def elbo_of(name, audio, draws=slice(None)):  # (n, B), or fewer draws than n
        is_masked, weight = masks[name]
        with context.autocast(cache_enabled=False):
            predict = model.predictor(texts[name], audio, is_audio)
            return elbo(predict, texts[name]["ids"], is_masked[draws], weight[draws], model.config.mask_id)

    # first pass, without gradients: the margins of Eq. 5 under one set of masks.  The reference model is the
    # same network with its trained parameters as they were before the stage: swapped in, and back again.
    with torch.no_grad():
        policy = [elbo_of(name, audio) for name in texts]  # chosen, rejected: (n, B) each
        with swapped(context.parameters, context.reference):
            reference_audio, _ = adapted()
            reference = [elbo_of(name, reference_audio) for name in texts]
    margins = margin(*policy, *reference)
    # second pass, with gradients: d loss / d margin is known by now, so each sample is sent back on its
    # own and memory does not grow with their number
    leaf = audio.detach().requires_grad_()  # the samples' graphs end here and share what lies before it
    backward_per_sample(lambda name, j: elbo_of(name, leaf, slice(j, j + 1))[0], SAMPLES, margins)
    audio.backward(leaf.grad)  # through the adapters, once for all samples
    return vrpo_loss(margins)


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss and what it needs: a new one is a function and one of these."""

    backward: Callable  # (context, micro-batch) -> losses (B,)
    encode: Callable  # data.encode_...: the texts of an example
    # True: compares the model with a copy of what it was before the first step.  There is then no dropout, so
    # that the margins of Eq. 5 start at exactly 0, and no held-out loss, which is Eq. 2's
    has_reference: bool = False


SFT = Loss(sft, data.encode_question)
VRPO = Loss(vrpo, data.encode_pair, has_reference=True)


# ---------------------------------------------------------------------------------------------
# the table, and what a row of it decides: which parts train, at what rate


@dataclasses.dataclass(frozen=True)
class Stage:
    """A row of the table: what trains, how fast, by which loss.  The loop knows no more of a stage."""

    trains: tuple  # prefixes of the names of the parameters that train; all else is frozen
    lr: float
    batch: int  # examples in a step, whatever the number of GPUs: the rate above is right for this many
    warmup: int  # steps that the rate takes to rise from 0
    epochs: float = 0  # passes over the manifest
    steps: int = 0  # if not 0: this many steps instead, however long the manifest
    loss: Loss = SFT
    is_imitated: bool = False  # word embeddings in the place of audio (runtime/variations.py)
    least_t: float = EPS  # t is drawn from (least_t, 1]: a large one leaves out a part of Eq. 1's mean
    ctc: float = 0.0  # weight of CTC of the transcript on the semantic tokens
    weight_decay: float = 0.05  # the authors' script; the paper gives none
    beta2: float = 0.999  # AdamW's memory of squared gradients: some 1 / (1 - beta2) steps
    muon: bool = False  # Muon instead of AdamW for the matrices of a small model's blocks
    augment: bool = False  # other speeds and levels, noise, SpecAugment; off in every row, see --augment


# Stage 1 teaches the semantic adapter to say what is said, in embeddings that LLaDA reads as words; the
# acoustic adapter joins in stage 2, when there is something to attach "how it sounds" to; only then may
# LLaDA itself move, by LoRA (stage 3); and stage 4 polishes by comparison what stage 3 has learned.
ADAPTERS = ("semantic.", "acoustic.")
# Departures for a run of an hour on a few hours of recordings: no t below 0.3, for little is learned from
# answers that are nearly whole; AdamW forgets faster; Muon; with real audio, CTC beside the loss
TINY = {"least_t": 0.3, "beta2": 0.98, "muon": True}
TINY_AUDIO = TINY | {"ctc": 0.5}

STAGES = {
    # paper, Table B.2: no stage has a higher rate than the one before.  Stage 1 has soft prompts (the
    # authors' code): learned vectors hold the place where acoustic tokens will be
    "diffa2": {
        1: Stage(("semantic.", "soft_prompts"), lr=1e-4, batch=1280, warmup=1000, epochs=12),
        2: Stage(ADAPTERS, lr=5e-5, batch=196, warmup=1000, epochs=10),
        3: Stage((*ADAPTERS, "lora"), lr=5e-5, batch=196, warmup=1000, epochs=10),
        4: Stage((*ADAPTERS, "lora"), lr=5e-6, batch=4, warmup=200, epochs=1, loss=VRPO),
    },
    # the same stages in small, and a stage 0 for what the paper downloads: the backbone
    "tiny": {
        0: Stage(("backbone.",), lr=2e-3, batch=32, warmup=30, steps=1400, is_imitated=True, **TINY),
        1: Stage(("semantic.", "soft_prompts"), lr=1.5e-3, batch=32, warmup=20, steps=150, **TINY_AUDIO),
        2: Stage(ADAPTERS, lr=2e-3, batch=32, warmup=20, steps=850, **TINY_AUDIO),
        3: Stage((*ADAPTERS, "lora"), lr=1e-3, batch=32, warmup=10, steps=300, **TINY_AUDIO),
        4: Stage((*ADAPTERS, "lora"), lr=5e-5, batch=8, warmup=5, steps=50, loss=VRPO, beta2=0.98),
    },
}


def freeze_all_but(model, prefixes):
    """Freezes everything but the named parts; returns the parameters that train, by name.

    Gradients still pass through a frozen layer, to the adapters before it.  Why freeze?  Trained on
    little data, LLaDA would forget much of what it knows (paper, 3.3).  And memory: gradient and AdamW's
    two moments are 12 bytes a weight, 105 GB for 8.75 billion, 1.2 GB for the 99 million of Table B.3.
    """
    for name, p in model.named_parameters():
        part = "lora" if "lora_" in name else name  # LoRA's lie within: backbone.blocks.0.q_proj.lora_A
        p.requires_grad_(part.startswith(prefixes))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def frozen_to_bf16(model):
    """Frozen matrices in bf16, as LLaDA is published; in what trains, bf16 would lose steps of 1e-5."""
    for name, p in model.named_parameters():
        # no vectors: Whisper's norms want fp32, and weigh nothing.  No adapters: they are saved in fp32
        if name.startswith(("backbone.", "encoder.")) and not p.requires_grad and p.dim() > 1:
            p.data = p.data.to(torch.bfloat16)


def recompute(model):
    """Activation checkpointing: blocks run again in the backward pass; less memory, up to half more time."""
    for block in model.backbone.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def learning_rate(step, settings, steps):
    """Linear warm-up, then a cosine down to zero.  step counts from 0, steps is the length of the run.

    Warm-up (Table B.2), because AdamW's moments are means over nearly nothing at first: its steps have their
    full length before it knows a direction.  Down to zero (the authors' scripts of stages 2 to 4; the paper
    names no decay), because ever smaller steps average out the noise of the batches.
    """
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, steps - settings.warmup)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


# ---------------------------------------------------------------------------------------------
# the loop.  nanoGPT's with four things more: five stages share it, with most of the network frozen; gradients
# of several processes are summed where one can see it; a signal, a bad clip or a loss that is not a number
# ends in a saved checkpoint or a clear line; and a run cut in two equals the whole run, on a CPU to the bit.

MAX_BAD_STEPS = 10  # in a row: one may be a clip's fault, ten are the weights'


def train(group, model, tokenizer, examples, held_out, settings, steps, args, state=None):
    """Runs a stage of `steps` steps.  True when it is finished, False when it was stopped and has saved.

    examples: a Mixture.  held_out: a list of Examples.  state: a checkpoint of this stage, to go on from.
    """
    device, has_reference = group.device, settings.loss.has_reference
    is_bf16 = pick_precision(args.precision, device) == "bf16"
    # what must be the same in a run that goes on: another order or other masks would be another run
    this_run = {"stage": args.stage, "seed": args.seed, "batch": settings.batch}
    this_run["data"] = [list(share) for share in examples.shares]  # (examples, share) of each manifest
    this_run["objective"] = args.objective
    for part in ("encoder", "backbone"):  # what is frozen is in no checkpoint: it must be the same again
        if f"{part}." not in settings.trains:
            this_run[part] = fingerprint(getattr(model, part))
    checkpoints.check_same_run(state, this_run, args.out)
    summary = plan.summary(args.stage, settings, steps, examples, args.dropout)
    group.print(summary)
    if state is not None and state.get("summary", summary) != summary:  # on purpose, or an option forgotten
        group.print(f"the run began with another plan: {state['summary']}")

    # ---- what trains, and with what.  VRPO's reference is a copy of what trains, as it was: 1 % of diffa2
    trained = freeze_all_but(model, settings.trains)
    parameters = tuple(trained.values())
    group.broadcast(parameters)
    if is_bf16 and args.model in RELEASES:  # a small model's stay in fp32
        frozen_to_bf16(model)
    optimizers = make_optimizers(trained, settings)  # AdamW, perhaps Muon
    reference = tuple(p.detach().clone() for p in parameters) if has_reference else ()
    step, audio_hours, skipped_ids, bad_in_a_row = 0, 0.0, set(), 0
    torch.manual_seed(args.seed + group.rank)  # for dropout: all else has generators of its own
    if state is not None:  # the step fixes the place in the data: an epoch's order follows from the seed
        step, audio_hours, skipped_ids = state["step"], state["hours"], set(state["skipped"])
        reference = checkpoints.restore(state, trained, optimizers, group)

    # ---- how it computes.  Under autocast matrix products run in bf16, many times as fast on a GPU; long
    # sums stay in fp32: the loss, RMSNorm and, on a GPU, softmax and LayerNorm.
    if args.recompute:
        recompute(model)
    if args.compile:
        for block in model.backbone.blocks:
            block.compile()
    model.train(args.dropout and not has_reference)  # dropout is the only thing that this turns on
    autocast = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=is_bf16)
    context = LossContext(model, args.stage, args.seed, settings, autocast, parameters, reference)

    # ---- what feeds it.  Workers read clips and compute log-mels while the network is busy.  A micro-batch
    # is cut by positions, for they are what memory goes by: a clip may be 1 s long or 30.
    encode, is_imitated = settings.loss.encode, settings.is_imitated
    held_out_builder = data.BatchBuilder(tokenizer, model.config, encode, 0, is_imitated)
    builder = dataclasses.replace(held_out_builder, seed=args.seed, is_augmented=settings.augment)
    stop_step = min(steps, step + (args.stop_after or steps))  # the schedule ends at `steps` all the same
    place = {"rank": group.rank, "size": group.size, "budget": args.tokens, "seed": args.seed}
    loader = torch.utils.data.DataLoader(
        loading.MicroBatches(examples, builder, settings.batch, **place, start=step, stop=stop_step),
        batch_size=None,  # the data set makes whole micro-batches
        num_workers=args.workers,
        pin_memory=device.type == "cuda",  # memory that the GPU fetches by itself, beside its work
        generator=torch.Generator(),  # its own: a loader must not shift dropout's numbers
    )
    micro_batches = iter(loader)
    log = Log(args.out, f"stage {args.stage}", step, steps, args.tensorboard, group.rank)
    with StopSignal() as signals, checkpoints.StateWriter(args.out) as writer, log:
        n_stop = 0  # processes that were told to stop
        while step < stop_step and not n_stop:
            # ---- forward and backward of this process's share of the global batch, a micro-batch at a time.
            # Processes may have different numbers of micro-batches, or none; they meet when the step ends.
            losses, ids, skipped, audio_seconds = [torch.zeros(0, device=device)], [], [], 0.0
            for p in parameters:  # zeros, not None: a process without examples adds them to the sum
                p.grad = torch.zeros_like(p)
            for micro in micro_batches:
                skipped += micro["skipped"]
                if micro["batch"] is not None:
                    micro["batch"] = data.to_device(micro["batch"], device)
                    losses.append(settings.loss.backward(context, micro))
                    ids += micro["ids"]
                    audio_seconds += micro["seconds"]
                if micro["last"]:
                    break

            # ---- what every process has to say, in one reduction.  A loss that is not finite makes the sum
            # so for all; a signal to one process stops all, after the same step.
            loss_sum = torch.cat(losses).cpu().double().sum().item()
            local = [loss_sum, len(ids), audio_seconds, len(skipped), signals.received]
            loss_sum, n_examples, all_seconds, n_skipped, n_stop = group.sum(local)
            audio_hours += all_seconds / 3600
            if n_skipped:  # a few broken clips are no reason to stop a run of days, many mean a wrong path
                loading.record_skipped(group, args.out, skipped, skipped_ids, args.skip_limit, len(examples))

            # ---- the step: the mean gradient of the global batch, clipped, then the optimizers.  Every
            # process takes it with the same numbers, so the copies of the model stay equal.
            group.all_reduce_gradients(parameters)
            for p in parameters:  # by the examples that were used: skipped ones must not shrink the gradient
                p.grad.div_(max(n_examples, 1))
            # the weight 1/t makes a few gradients many times as long as the others.  Clipping to norm 1 (the
            # authors' script) keeps their direction and limits what they leave in AdamW's moments.
            norm = nn.utils.clip_grad_norm_(parameters, 1.0).item()
            lr = learning_rate(step, settings, steps)
            # a bad step is not taken: NaN would stay in AdamW's moments for ever; and where most clips cannot
            # be read (a disk's outage), the few that are left would take a step as long as all of them
            is_bad = not (math.isfinite(loss_sum) and math.isfinite(norm)) or n_skipped > n_examples
            if is_bad:
                bad_in_a_row += 1
            elif n_examples:
                bad_in_a_row = 0
                for optimizer in optimizers:
                    for param_group in optimizer.param_groups:
                        param_group["lr"] = lr
                    optimizer.step()
            step += 1

            # ---- what one sees of it, and now and then the held-out loss and a checkpoint
            loss = loss_sum / n_examples if n_examples else math.nan
            counts = {"n": int(n_examples), "hours": audio_hours, "bad": int(is_bad)}
            log.write_step(step=step, loss=loss, lr=lr, norm=norm, **counts, skipped=len(skipped_ids))
            if bad_in_a_row >= MAX_BAD_STEPS:
                ids += [entry["id"] for entry in skipped]
                places = ", ".join(map(examples.where, sorted(sum(group.gather(ids), []))[:20]))
                what = f"loss or gradient not finite {MAX_BAD_STEPS} steps in a row, or most clips unreadable"
                raise UserError(f"{what}; the last step's examples: {places}")
            if held_out and (step == steps or (step % args.held_out_every == 0 and not n_stop)):
                how = (model, args.stage, autocast, held_out_builder)
                log.write(step=step, **held_out_loss(*how, held_out, group, args.tokens))
            # also after the last step: writing the model may fail
            if step % args.save_every == 0 or step == stop_step or n_stop:
                # all that the next step depends on beside the command line and the frozen parts' files
                now = {"step": step, "run": this_run, "hours": audio_hours, "skipped": sorted(skipped_ids)}
                now |= {"summary": summary} | checkpoints.snapshot(trained, optimizers, reference, group)
                # in a thread: training waits for a copy in memory alone
                group.first_only(functools.partial(writer.write, now, step))
        group.first_only(writer.wait)

    if step < steps:
        return False
    model.stage = args.stage
    group.first_only(lambda: weights.save(model, tokenizer, args.out, dtype=torch.float32))
    group.first_only(lambda: checkpoints.mark_finished(args.out, step))
    return True


# ---------------------------------------------------------------------------------------------
# the command line


def dry_run(args, processes):
    """Says what the run would be; neither the weights nor a GPU are needed."""
    examples = loading.Mixture(args.data, args.stage)
    settings, steps = start.settings_of(STAGES[args.model][args.stage], args, examples)
    with torch.device("meta"):  # shapes without memory
        model = DIFFA2(PRESETS[args.model], lora="lora" in settings.trains)
    freeze_all_but(model, settings.trains)
    if args.model in RELEASES:
        frozen_to_bf16(model)
    plan.describe(args, model, settings, steps, examples, processes)


def run(args):
    """Trains one stage, or says what it would be."""
    args = start.complete(args, STAGES[args.model])
    if args.dry_run is not None:
        with process_group(args.device) as group:
            return group.first_only(lambda: dry_run(args, args.dry_run or group.size))
    # the lock first: a second run in the same folder would mix its checkpoints with the first one's
    with locked(args.out, args.wait), process_group(args.device) as group:
        return run_stage(group, args)


def run_stage(group, args):
    """`run`, in the processes of a group, with the folder locked."""
    stage, out = args.stage, args.out
    state = checkpoints.state_to_go_on_from(out, group, args.resume, args.restart)
    if state and state.get("finished"):
        group.print(f"{out}: finished already")
        return
    # the data first: a wrong manifest is found before 8 billion parameters are read
    examples = loading.Mixture(args.data, stage)  # a missing clip is reported when it is read
    settings, steps = start.settings_of(STAGES[args.model][stage], args, examples)
    held_out, beside = [], os.path.join(os.path.dirname(args.data[0]), "held_out.jsonl")
    if (args.held_out or os.path.exists(beside)) and not settings.loss.has_reference:
        held_out = data.read_manifest(args.held_out or beside, stage, check=False)
    model, tokenizer = start.start_from(args, group.device)
    torch.manual_seed(args.seed)  # for LoRA's fresh matrices
    if "lora" in settings.trains and not any("lora_" in n for n, _ in model.named_parameters()):
        model.add_lora()
    if args.restart:  # not before all that the new run needs was found good
        group.first_only(lambda: checkpoints.remove_run(out))
    is_finished = train(group, model, tokenizer, examples, held_out, settings, steps, args, state)
    group.print(f"{out}: " + ("written" if is_finished else "stopped and saved; --resume goes on"))


def parse(argv):
    return command_line.train(argv, __doc__, sorted(STAGES))


def main(argv=None):
    return exit_status("train.py", lambda: run(parse(argv)))


if __name__ == "__main__":
    from runtime import tutorials

    if len(sys.argv) > 1:
        exit_process(main())
    tutorials.train(STAGES, PRESETS, DIFFA2, freeze_all_but, plan.parts)
