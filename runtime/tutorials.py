"""What each file of the root prints when it is run alone: `python diffusion.py` and so on, in seconds.

A tutorial is named after its file, and is given what that file defines: it imports nothing of the root.
"""

import functools
import os
import sys

import torch
import torch.nn as nn

from runtime.errors import exit_status
from runtime.files import ROOT, open_safetensors
from runtime.names import released_name, whisper_name

DEMO = os.path.join(ROOT, "assets", "demo")


def program(tutorial):
    """Makes a tutorial end as a program does: `python diffusion.py | head` is no error."""

    @functools.wraps(tutorial)
    def run(*args):
        sys.exit(exit_status(f"{tutorial.__name__}.py", lambda: tutorial(*args)))

    return run


def count(module):
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


class Toy:
    """A joint distribution over `length` tokens of `vocab` kinds, small enough to enumerate.

    Called as `predict` of diffusion.py, it answers with the exact conditionals p(token | visible tokens),
    which is what a perfectly trained network would say.  [MASK] is the id `vocab`.
    """

    def __init__(self, length=4, vocab=3, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.vocab, self.mask_id = vocab, vocab
        self.all = torch.cartesian_prod(*[torch.arange(vocab)] * length)  # (vocab ** length, length)
        # p[i]: the probability of all[i]
        self.p = torch.randn(len(self.all), generator=g, dtype=torch.float64).mul(2).softmax(0)

    def __call__(self, noisy, where):
        logits = []
        for row, pos in where.nonzero().tolist():
            seen = noisy[row] != self.mask_id  # (length,)
            agrees = (self.all[:, seen] == noisy[row][seen]).all(1)  # sequences with these visible tokens
            mass = [self.p[agrees & (self.all[:, pos] == v)].sum() for v in range(self.vocab)]
            logits.append(torch.stack(mass).log())  # not normalised; softmax will do that
        return torch.stack(logits)

    def log_prob(self, ids):
        """log p of one sequence (length,)."""
        return self.p[(self.all == ids).all(1)].log().sum()


@program
def diffusion(corrupt, sft_loss, draw_counts, elbo):
    """The forward process on a sentence, and both estimates of a toy's log p beside the exact one."""
    text = "the speaker sounds happy and a dog barks in the background"
    sentence = text.split()
    ids, is_answer = torch.arange(len(sentence))[None], torch.ones(1, len(sentence), dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    print("Forward process: every token is hidden with probability t.\n")
    for t in (0.1, 0.4, 0.7, 1.0):
        noisy, _ = corrupt(ids, is_answer, -1, torch.tensor([t]), generator=generator)
        shown = ["_" * len(word) if i < 0 else word for word, i in zip(sentence, noisy[0], strict=True)]
        print(f"  t = {t:.1f}  {' '.join(shown)}")

    toy = Toy()
    x = toy.all[(toy.p - toy.p.median()).abs().argmin()]  # neither a likely sentence nor an unlikely one
    print(f"\nLog-likelihood of a sentence, by a toy model of {len(toy.all)} sentences: exact and estimated.")
    print(f"\n  exact          log p = {toy.log_prob(x):.4f}")
    print("  each estimate is a mean of four draws of masks:")
    n, is_answer = 4, torch.ones(1, len(x), dtype=torch.bool)

    def by_loss():
        rows, answers = x.expand(n, -1), is_answer.expand(n, -1)
        return -sft_loss(toy, rows, answers, toy.mask_id, generator=generator, per_token=False).mean()

    def by_elbo():
        return elbo(toy, x[None], *draw_counts(is_answer, n, generator), toy.mask_id).mean()

    for name, estimate in (("1/t loss (Eq. 1)", by_loss), ("ELBO (Eq. 3)", by_elbo)):
        values = torch.stack([estimate() for _ in range(500)])
        mean, deviation = values.mean(), values.std()
        error = deviation / len(values) ** 0.5
        print(f"  {name:18} {mean:.4f} +- {error:.4f}   standard deviation of an estimate {deviation:.3f}")


@program
def adapters(SemanticAdapter, AcousticAdapter, add_lora):
    """The paper's Table B.3 beside the counts of the classes, without allocating any of the weights."""
    with torch.device("meta"):
        D, ffn = 4096, 12288
        outputs = {"q_proj": D, "k_proj": D, "v_proj": D, "ff_proj": ffn, "up_proj": ffn}
        backbone = nn.ModuleList()
        for _ in range(32):
            backbone.append(nn.ModuleDict({n: nn.Linear(D, o, bias=False) for n, o in outputs.items()}))
        frozen = count(backbone)
        semantic, acoustic = SemanticAdapter(1280, D), AcousticAdapter(1280, D, n_taps=8, n_heads=20)
        rows = [
            ("semantic adapter, 1280 -> 4096", "36.4M", count(semantic)),
            ("acoustic adapter, 8 taps, 64 queries", "47.9M", count(acoustic)),
            ("LoRA, rank 8, 5 matrices in 32 layers", "14.7M", count(add_lora(backbone)) - frozen),
        ]
    rows.append(("trained in stages 3 and 4", "99.0M", sum(n for *_, n in rows)))
    print("What trains (Sections 3.1 and 3.3), the paper's count beside that of the classes\n")
    print(f"{'module':40}{'Table B.3':>10}{'this code':>14}")
    for name, paper, ours in rows:
        print(f"{name:40}{paper:>10}{ours:>14,}")
    print("\nThe table's backbone, 8.03 billion, seems to count LoRA again: LLaDA alone has 8.016 billion.")


@program
def model(DIFFA2, presets, splice_order):
    """Where audio tokens stand in the prompt, who attends to whom, and the parameters of each preset."""
    text, audio = ["This", "is:", "<audio>.", "[M]", "[M]"], ["a1", "a2", "a3"]
    order = splice_order(len(text), len(audio), torch.tensor([2]))[0].tolist()
    print("The row that LLaDA reads: audio tokens in front of the literal <audio> (the authors' code).\n")
    print("  " + "  ".join((text + audio)[i] for i in order))
    print("\nEvery token attends to every other, also to later ones; only padding is hidden.")
    with torch.device("meta"):
        for name, config in presets.items():
            network = DIFFA2(config, lora=True)
            lora = sum(p.numel() for n, p in network.named_parameters() if "lora_" in n)
            sizes = {part: count(getattr(network, part)) for part in ("encoder", "semantic", "acoustic")}
            sizes |= {"backbone": count(network.backbone) - lora, "lora": lora}
            sizes["soft prompts"] = network.soft_prompts.numel()
            print(f"\n{name}: {sum(sizes.values()):,} parameters")
            for part, n in sizes.items():
                print(f"  {part:13}{n:>13,}")


@program
def weights(load, folder):
    """What lies in the small model's checkpoint, and what does not; one name of each other format."""
    path = os.path.join(folder, "model.safetensors")
    with open_safetensors(path) as f:
        header = f.metadata()
        sizes = {key: f.get_tensor(key).numel() for key in f.keys()}
    print(f"{os.path.relpath(path, ROOT)}: {len(sizes)} tensors, trained up to stage {header['stage']}\n")
    print(f"{'part':12}{'tensors':>9}{'parameters':>13}   the largest")
    for part in sorted({key.split(".")[0] for key in sizes}):
        mine = {key: n for key, n in sizes.items() if key.split(".")[0] == part}
        print(f"{part:12}{len(mine):>9}{sum(mine.values()):>13,}   {max(mine, key=mine.get)}")
    print(f"\nnot in it, because it was never trained here: {header['base']}")
    _, tokenizer = load("tiny", "cpu")
    print(f"\nload('tiny'): every tensor in its place; {tokenizer.get_vocab_size()} kinds of tokens")
    print("Names of other formats that `load` turns into ours, one of each:")
    for format, rename, key in (
        ("transformers' Whisper", whisper_name, "layers.0.fc1.weight"),
        ("CTranslate2's Whisper", whisper_name, "encoder/layer_0/ffn/linear_0/weight"),
        ("the authors' adapters", released_name, "acoustic_connector.proj.1.weight"),
    ):
        print(f"  {format:24}{key:38}-> {rename(key)}")


@program
def data(argv, load, load_audio, log_mel, build_prompt, window_seconds):
    """What the small model is given for a clip.  argv: CLIP [QUESTION], or nothing."""
    clip, *question = argv or [os.path.join(DEMO, "seven.wav")]
    network, tokenizer = load("tiny")
    config = network.config
    audio, notes = load_audio(clip, limit=window_seconds(config))
    mel, n_frames = log_mel(audio, config)
    ids, audio_at = build_prompt(tokenizer, " ".join(question) or "What do you hear?")
    seconds = f"{len(audio) / 16000:.2f} s at 16 kHz"
    print(*notes, f"{seconds} -> mel {tuple(mel.shape)} -> {n_frames} encoder frames", sep="\n")
    n_semantic = max(n_frames // 4, 1)
    print(f"-> {config.n_queries} acoustic + {n_semantic} semantic tokens before token {audio_at}:\n")
    # a byte-level tokenizer writes a space as Ġ and a line feed as Ċ
    tokens = [tokenizer.id_to_token(i).replace("Ġ", "_").replace("Ċ", "\\n") for i in ids]
    print(" ".join(tokens[:audio_at]), "[ audio ]", " ".join(tokens[audio_at:]), sep="\n")


@program
def decode(Options, count_to_keep, main):
    """How many of six guesses each rule keeps, then a real answer."""
    confidence = torch.tensor([[0.99, 0.97, 0.93, 0.85, 0.7, 0.3]])
    print("Six [MASK]s were guessed with these confidences:", *(f"{c:.2f}" for c in confidence[0]))
    print("Each rule says how many of them stay (--factor: Eq. 8); the others are masked again.\n")
    for name, value in (("steps", 3), ("factor", 0.5), ("factor", 1.0), ("factor", 2.0), ("threshold", 0.9)):
        options = Options(6, 6, **{name: value})
        print(f"  --{name} {value}".ljust(20), f"keeps {int(count_to_keep(confidence, options, step=0))}")
    print("\nThe small model, digits.wav, call by call (_ is a [MASK]):\n", flush=True)
    return main([os.path.join(DEMO, "digits.wav"), "What is said?", "--model", "tiny", "--show"])


@program
def vrpo(margin, elbo, draw_t, draw_counts, n):
    """The variance of the margin with and without shared masks, with and without exact counts."""
    # policy and reference: two toys a small step apart, as in the first steps of training
    policy, reference = Toy(length=4, vocab=3), Toy(length=4, vocab=3)
    nudge = torch.randn(len(reference.p), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference.p = (reference.p.log() + 0.1 * nudge).softmax(0)
    order = policy.p.argsort(descending=True)  # the chosen answer is the third likeliest, the other the 21st
    good, bad = policy.all[order[2]][None], policy.all[order[20]][None]
    exact = sum(s * (policy.log_prob(x[0]) - reference.log_prob(x[0])) for s, x in ((1, good), (-1, bad)))
    everything, g = torch.ones(1, 4, dtype=torch.bool), torch.Generator().manual_seed(0)

    def independent():
        """Coin flips at independent t, as in the 1/t loss."""
        t = draw_t(n, g)[:, None]  # (n, 1): each draw has a mask ratio of its own
        return torch.rand(n, 1, 4, generator=g) < t[..., None], 1 / t

    def stratified():
        return draw_counts(everything, n, g)

    def one(is_shared, draw):
        """One estimate of the margin."""
        ours, theirs = [], []
        for x in (good, bad):
            masks = draw()
            other_masks = masks if is_shared else draw()
            ours.append(elbo(policy, x, *masks, policy.mask_id))
            theirs.append(elbo(reference, x, *other_masks, policy.mask_id))
        return margin(*ours, *theirs)

    print("The margin of Eq. 5 is a difference of four estimates; its noise goes straight into the loss.\n")
    print(f"margin of a toy pair, {n} samples an estimate, 300 estimates; exact value {exact:.4f}\n")
    for is_shared in (False, True):
        for kind, draw in (("a coin flip a token", independent), ("stratified exact counts", stratified)):
            found = torch.cat([one(is_shared, draw) for _ in range(300)])
            name = f"{'shared' if is_shared else 'independent'} masks, {kind}"
            error = found.std() / len(found) ** 0.5
            print(f"  {name:48} {found.mean():8.4f} +- {error:.4f}   variance {found.var():10.5f}")


@program
def train(stages_of, presets, DIFFA2, freeze_all_but, parts):
    """The table of stages, and what each of them trains."""
    print("Stages (Section 3.3, Table B.2): what each trains, by which loss: sft (Eq. 2) or vrpo (Eq. 5)\n")
    for name, stages in stages_of.items():
        with torch.device("meta"):
            network = DIFFA2(presets[name], lora=True)
        print(f"{name}: {count(network):,} parameters, of which train")
        for stage, settings in stages.items():
            n = sum(p.numel() for p in freeze_all_but(network, settings.trains).values())
            numbers = f"{n:>11,} ({n / count(network):5.1%}), rate {settings.lr:<7g}batch {settings.batch:<6}"
            print(f"  stage {stage}  {parts(settings):26}{numbers}{settings.loss.backward.__name__}")
    print("python train.py --stage N --model tiny   trains one of them; --help lists the options")
