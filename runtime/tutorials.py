"""What each file of the root prints when it is run alone: `python diffusion.py` and so on, in seconds.

A tutorial here is named after its file, and imports it when it is called.
"""

import os

import torch
import torch.nn as nn

from runtime.errors import exit_status

DEMO = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "assets", "demo")


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


def diffusion():
    """The forward process on a sentence, and both estimates of a toy's log p beside the exact one."""
    from diffusion import corrupt, draw_counts, elbo, sft_loss

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
    print(f"\nReverse process: a toy of {len(toy.all)} sentences with exact predictions; the bound is tight.")
    print(f"\n  exact          log p = {toy.log_prob(x):.4f}")
    draws, is_answer = 2000, torch.ones(1, len(x), dtype=torch.bool)  # draws: for either estimate
    estimates = {
        "1/t loss (Eq. 1)": [
            -sft_loss(toy, x[None], is_answer, toy.mask_id, generator=generator, per_token=False)
            for _ in range(draws)
        ],
        "ELBO, n=4 (Eq. 3)": [
            elbo(toy, x[None], *draw_counts(is_answer, 4, generator), toy.mask_id).mean(0)
            for _ in range(draws // 4)
        ],
    }
    for name, values in estimates.items():
        values = torch.cat(values)
        mean, deviation = values.mean(), values.std()
        error = deviation / len(values) ** 0.5
        print(f"  {name:18} {mean:.4f} +- {error:.4f}   one estimate's standard deviation {deviation:.3f}")


def adapters():
    """The paper's Table B.3 beside the counts of the classes, without allocating any of the weights."""
    from adapters import AcousticAdapter, SemanticAdapter, add_lora, count

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
    print(f"{'module':40}{'Table B.3':>10}{'this code':>14}")
    for name, paper, ours in rows:
        print(f"{name:40}{paper:>10}{ours:>14,}")


def model():
    """The parameters of each preset, part by part."""
    from adapters import count
    from model import DIFFA2, PRESETS

    with torch.device("meta"):
        for name, config in PRESETS.items():
            network = DIFFA2(config, lora=True)
            print(f"\n{name}: {count(network):,} parameters")
            for part in ("encoder", "semantic", "acoustic", "backbone"):
                print(f"  {part:10}{count(getattr(network, part)):>16,}")


def weights():
    """What lies in the small model's checkpoint, and what does not; one name of each other format."""
    from runtime.files import open_safetensors
    from runtime.names import released_name, whisper_name
    from weights import ASSETS, HERE, load

    path = os.path.join(ASSETS["tiny"], "model.safetensors")
    with open_safetensors(path) as f:
        header = f.metadata()
        sizes = {key: f.get_tensor(key).numel() for key in f.keys()}
    print(f"{os.path.relpath(path, HERE)}: {len(sizes)} tensors, trained up to stage {header['stage']}\n")
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


def data(argv):
    """What the model is given for a clip.  argv: CLIP [QUESTION], or nothing.  -> exit status"""
    return exit_status("data.py", lambda: prompt_of(*argv or [os.path.join(DEMO, "seven.wav")]))


def prompt_of(clip, *question):
    from data import SAMPLE_RATE, build_prompt, load_audio, log_mel, window_seconds
    from weights import load

    network, tokenizer = load("tiny")
    config = network.config
    audio, notes = load_audio(clip, limit=window_seconds(config))
    mel, n_frames = log_mel(audio, config)
    ids, audio_at = build_prompt(tokenizer, " ".join(question) or "What do you hear?")
    seconds = f"{len(audio) / SAMPLE_RATE:.2f} s at 16 kHz"
    print(*notes, f"{seconds} -> mel {tuple(mel.shape)} -> {n_frames} encoder frames", sep="\n")
    n_semantic = max(n_frames // 4, 1)
    print(f"-> {config.n_queries} acoustic + {n_semantic} semantic tokens before token {audio_at}:\n")
    # a byte-level tokenizer writes a space as Ġ and a line feed as Ċ
    tokens = [tokenizer.id_to_token(i).replace("Ġ", "_").replace("Ċ", "\\n") for i in ids]
    print(" ".join(tokens[:audio_at]), "[ audio ]", " ".join(tokens[audio_at:]), sep="\n")


def decode():
    """How many of six guesses each rule keeps, then a real answer.  -> exit status"""
    from decode import Options, count_to_keep, main

    confidence = torch.tensor([[0.99, 0.97, 0.93, 0.85, 0.6, 0.3]])
    print("Six [MASK]s were guessed with these confidences:", *(f"{c:.2f}" for c in confidence[0]))
    print("Each rule says how many of them stay; the others are masked again.\n")
    for name, value in (("steps", 3), ("factor", 0.5), ("factor", 1.0), ("factor", 2.0), ("threshold", 0.9)):
        options = Options(6, 6, **{name: value})
        print(f"  --{name} {value}".ljust(20), f"keeps {int(count_to_keep(confidence, options, step=0))}")
    print("\nThe small model, digits.wav, call by call (_ is a [MASK]):\n", flush=True)
    return main([os.path.join(DEMO, "digits.wav"), "What is said?", "--model", "tiny", "--show"])


def vrpo():
    """The variance of the margin with and without shared masks, with and without exact counts."""
    from diffusion import corrupt, draw_counts, draw_t, elbo, masked_nll
    from vrpo import SAMPLES, margin

    # policy and reference: two toys a small step apart, as in the first steps of training
    policy, reference = Toy(length=4, vocab=3), Toy(length=4, vocab=3)
    nudge = torch.randn(len(reference.p), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference.p = (reference.p.log() + 0.1 * nudge).softmax(0)
    order = policy.p.argsort(descending=True)  # the chosen answer is the third likeliest, the other the 21st
    good, bad = policy.all[order[2]][None], policy.all[order[20]][None]
    exact = sum(s * (policy.log_prob(x[0]) - reference.log_prob(x[0])) for s, x in ((1, good), (-1, bad)))
    everything, g, n = torch.ones(1, 4, dtype=torch.bool), torch.Generator().manual_seed(0), SAMPLES

    def iid(predict, x, t, is_masked):
        """The 1/t estimate with independent coin flips, which stratified exact counts replace."""
        samples = []
        for s, mask in zip(t, is_masked, strict=True):
            noisy, _ = corrupt(x, everything, policy.mask_id, is_masked=mask)
            samples.append(-masked_nll(predict, x, noisy, mask) / s)
        return torch.stack(samples)

    def draw_iid():
        t = [draw_t(1, g) for _ in range(n)]
        return t, [torch.rand(1, 4, generator=g) < s for s in t]

    def draw_stratified():
        return draw_counts(everything, n, g)

    def stratified_samples(predict, x, is_masked, weight):
        return elbo(predict, x, is_masked, weight, policy.mask_id)

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


def train():
    """The table of stages, and what each of them trains."""
    from adapters import count
    from model import DIFFA2, PRESETS
    from runtime.plan import parts
    from train import STAGES, freeze_all_but

    for name, stages in STAGES.items():
        with torch.device("meta"):
            network = DIFFA2(PRESETS[name], lora=True)
        print(f"{name}: {count(network):,} parameters, of which train")
        for stage, settings in stages.items():
            n = sum(p.numel() for p in freeze_all_but(network, settings.trains).values())
            numbers = f"{n:>11,} ({n / count(network):5.1%}), rate {settings.lr:<7g}batch {settings.batch:<6}"
            print(f"  stage {stage}  {parts(settings):26}{numbers}{settings.loss.backward.__name__}")
    print("python train.py --stage N --model tiny   trains one of them; --help lists the options")
