"""Clips -> questions about them: the lines of manifests.

A question is a row of TASKS, named after the fact it asks about: wordings, full answers.  Everything else is
shared: which questions a clip allows, multiple choice, preference pairs, writing.
All that is drawn is drawn from an `rng` that the caller gives: the same seed writes the same bytes.
"""

import difflib
import functools
import json
import os
import re
import tempfile
from array import array
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import soundfile

from runtime.errors import UserError
from runtime.files import check_out, write_file
from runtime.manifests import ASR_QUESTION
from runtime.recordings import MAX_SECONDS
from tools.corpora import DIGITS
from tools.prompts import LETTERS, capital, format_choices, mmau_prompt, mmsu_prompt

# ---------------------------------------------------------------------------------------------
# tasks.  {} is the fact, with its capital where it begins the answer.


@dataclass(frozen=True)
class Task:
    questions: tuple
    long: tuple = ()  # full-sentence answers; the short one is the fact itself
    labels: bool = True  # the answers form a set that multiple choice can draw from


def task_of(questions, long="", labels=True):
    """A Task of texts that hold several questions or full answers, each of which ends in "?" or "."."""

    def apart(text):
        return tuple(re.findall(r"[^?. ][^?.]*[?.]", text))

    return Task(apart(questions), apart(long), labels)


TASKS = {
    "asr": task_of(
        f"{ASR_QUESTION} Write down what is said. What is being said in this recording? "
        "Turn the speech into text. Give the exact words of the speaker. Which words can be heard? "
        "Write out the spoken words. What does the speaker say? What is said? "
        "Type what you hear being said. Transcribe the recording. Speech to text, please. "
        "Put the spoken words into writing. Note down every word you hear. "
        "What are the words in this clip? Please write a transcript. Listen and write what is spoken. "
        "Provide the transcription of the speech. Tell me word for word what was said. "
        "What did the person say? Render the speech as text. Take dictation from this recording. "
        "Spell out the words that are spoken. Give a transcript of the audio. "
        "What text does the voice speak?",
        labels=False,
    ),
    "digit": task_of(
        "Which digit is spoken? What digit is spoken? What number is said? Which number do you hear? "
        "What digit do you hear? Name the digit. Which digit is it? What number does the speaker say?",
        "The speaker says {}. The digit is {}.",
    ),
    "word": task_of(
        "Which word is spoken? What word is said? What word do you hear? Which word does the speaker say? "
        "What is the spoken word? Name the word. What single word is this?",
        "The speaker says {}. The word is {}.",
    ),
    "sound": task_of(
        "What sound is this? Which sound do you hear? What makes this sound? Name the sound. "
        "What can be heard in the recording? What is the source of the sound? Identify the sound. "
        "Which environmental sound is it? What is making the noise? What kind of sound is this?",
        "This is the sound of {}. I hear {}.",
    ),
    "instrument": task_of(
        "Which instrument or object is it? What instrument or object do you hear? "
        "What object makes this sound? What is being played or struck? Name the instrument or object. "
        "Which instrument do you hear? What makes this sound? What is the source of the sound?",
        "This is the sound of {}. I hear {}.",
    ),
    "emotion": task_of(
        "What emotion? How does the speaker feel? Which emotion does the voice express? "
        "What is the speaker's emotion? How does the voice sound? What mood is the speaker in? "
        "Describe the speaker's emotion. What feeling do you hear? In what emotional state is the speaker?",
        "The speaker sounds {}. The voice is {}.",
    ),
    "intensity": task_of(
        "How strong is the emotion? Is the emotion normal or strong? What is the emotional intensity? "
        "How intense is the feeling?",
        "The emotion is {}.",
    ),
    "sex": task_of(
        "Is the speaker male or female? Is this a man or a woman? What is the speaker's sex? "
        "Who speaks, a man or a woman? Is the voice male or female? What is the gender of the speaker?",
        "The speaker is {}. The voice is {}.",
    ),
    "age": task_of(
        "Is the speaker a child or an adult? Do you hear a child or an adult? "
        "Who speaks, a child or an adult? Is this the voice of a child or of an adult? Child or adult? "
        "How old does the speaker sound?",
        "The speaker is {}.",
    ),
    "speaker": task_of("Who is speaking? Which speaker is it? Name the speaker.", "The speaker is {}."),
    "accent": task_of(
        "What accent does the speaker have? Which accent do you hear? Where is the speaker's accent from?",
        "The accent is {}.",
    ),
    "nationality": task_of(
        "Which nationality is the speaker likely to have? Where does the speaker come from?",
        "The speaker comes from {}.",
    ),
    "genre": task_of(
        "What genre of music is this? Which genre is the music? Name the musical genre.", "The music is {}."
    ),
    "caption": task_of(
        "Describe the recording. Describe the audio in a sentence. What is going on in this clip? "
        "Summarise what can be heard.",
        labels=False,
    ),
    "description": task_of(
        "Describe the recording. Describe everything you hear. Describe the audio in a sentence. "
        "Say in one sentence who or what can be heard, and how. Summarise what can be heard. "
        "Give a full description of the recording.",
        labels=False,
    ),
    "background": task_of(
        "What sound is in the background? What do you hear behind the speech? "
        "What is the background noise? Which sound is under the voice? "
        "Beside the voice, what can be heard?",
        "In the background there is {}.",
    ),
    "louder": task_of(
        "Which is louder, the voice or the background? Is the voice or the background louder? "
        "What is louder, speech or background?"
    ),
    "speed": task_of(
        "Does the speaker talk slowly or fast? How fast is the speech? Is the speech slow or fast?",
        "The speech is {}.",
    ),
    "any": task_of(
        "What do you hear? What is in this recording? What is this? What can you hear? "
        "Describe what you hear. What is happening in the audio? Listen and answer: what is it?",
        labels=False,
    ),
    "first": task_of(
        "Which digit comes first? What is the first digit? Name the first digit you hear.",
        "The first digit is {}.",
    ),
    "last": task_of(
        "Which digit comes last? What is the last digit? Name the last digit you hear.",
        "The last digit is {}.",
    ),
    "count": task_of(
        "How many digits are spoken? How many digits do you hear? Count the digits.", "There are {} digits."
    ),
    "layer": task_of("Is this speech or a sound? Do you hear speech or a sound? Speech or sound?"),
}
IN_A_SENTENCE = (" Answer in a full sentence.", " Answer in a sentence.", " Say it in a full sentence.")
SELDOM = {"layer": 0.3, "speaker": 0.5, "any": 0.7, "description": 0.7}  # how often one is asked, others: 1
IN_FULL = ("asr", "caption", "description")  # tasks whose answer is the fact as it stands
CHOICE_TASKS = [name for name, row in TASKS.items() if row.labels and name not in ("speaker", "layer")]
A_OR_AN = {"child": "a child", "adult": "an adult"}  # how a label stands in a sentence


# ---------------------------------------------------------------------------------------------
# what follows from facts


def derived(facts):
    """A clip's facts and what follows from them: asr, digit, word, first, last, count, layer, any ..."""
    facts = dict(facts)
    words = facts.get("words", "").split()
    if "words" in facts:
        facts["asr"] = facts["words"]
    description = description_of(facts)
    if description:
        facts["description"] = description
    if facts.keys() & {"sound", "instrument"}:
        facts["layer"] = "a sound"
    elif words or "speaker" in facts:
        facts["layer"] = "speech"
    if len(words) == 1:
        facts["word"] = words[0]
    if words and all(word in DIGITS for word in words):
        if len(words) > 1:
            count = DIGITS[len(words)] if len(words) < len(DIGITS) else str(len(words))
            facts |= {"first": words[0], "last": words[-1], "count": count}
        else:
            facts["digit"] = words[0]
    fact = facts.get("words") or facts.get("sound") or facts.get("instrument")
    if fact:
        facts["any"] = fact
    if facts.get("background"):  # "what do you hear?" would have two answers
        facts.pop("layer", None)
        facts.pop("any", None)
    return facts


HAPPENS = {  # a sound as a clause; any other is "... in the background"
    "rain": "rain falls",
    "sea waves": "sea waves roll",
    "dog bark": "a dog barks",
    "rooster": "a rooster crows",
    "baby cry": "a baby cries",
    "clock tick": "a clock ticks",
    "person sneeze": "a person sneezes",
    "helicopter": "a helicopter flies by",
    "chainsaw": "a chainsaw runs",
    "fire crackling": "a fire crackles",
}
MANNER = {  # an emotion as an adverb
    "neutral": "in a neutral voice",
    "calm": "calmly",
    "happy": "happily",
    "sad": "sadly",
    "angry": "angrily",
    "fearful": "fearfully",
    "disgusted": "with disgust",
    "surprised": "with surprise",
    "excited": "excitedly",
    "frustrated": "with frustration",
    "amused": "with amusement",
}
PERSON = {  # (age, sex) -> who speaks
    ("child", "female"): "a girl",
    ("child", "male"): "a boy",
    ("child", None): "a child",
    ("adult", "female"): "a woman",
    ("adult", "male"): "a man",
    ("adult", None): "an adult",
    (None, "female"): "a woman",
    (None, "male"): "a man",
    (None, None): "someone",
}
OF_A_VOICE = ("words", "sex", "age", "accent", "nationality", "emotion", "intensity", "speed")
DOMAINS = ("sound", "music", "speech", "mixture")  # as Table A.1 has them


def domain_of(facts):
    """The domain of a clip of which such facts are known."""
    kinds = {"background": "mixture", "louder": "mixture", "sound": "sound", "instrument": "music"}
    for kind, domain in (kinds | {"genre": "music"}).items():
        if kind in facts:
            return domain
    return "speech"


def description_of(facts):
    """One sentence that tells everything known of a clip; None where that is a single fact, or a caption.

    "A woman says 'no more', calmly, while rain falls."
    """
    if "caption" in facts:
        return None
    person = PERSON.get((facts.get("age"), facts.get("sex")), "someone")
    if "sound" in facts or "instrument" in facts:
        fact = facts.get("sound") or facts["instrument"]
        if "sex" not in facts:
            return None
        return capital(f"{fact} from {person}.")
    told = [kind for kind in (*OF_A_VOICE, "background") if kind in facts and facts[kind] != "normal"]
    if len(told) < 2 or not set(told) & set(OF_A_VOICE):
        return None
    sentence = person
    if "nationality" in facts:
        sentence += f" from {facts['nationality']}"
    if "accent" in facts:
        article = "an" if facts["accent"][0].lower() in "aeiou" else "a"
        sentence += f" with {article} {facts['accent']} accent"
    sentence += f" says '{facts['words']}'" if "words" in facts else " speaks"
    manners = []
    if "speed" in facts:
        manners.append({"slow": "slowly"}.get(facts["speed"], facts["speed"]))
    if "emotion" in facts:
        manners.append(MANNER.get(facts["emotion"], f"in a voice that is {facts['emotion']}"))
    if facts.get("intensity") == "strong":
        manners.append("with strong feeling")
    comma = "," if "words" in facts else ""
    if manners:
        *before, last = manners
        sentence += f"{comma} {', '.join(before)} and {last}" if before else f"{comma} {last}"
    if "background" in facts:
        sound = facts["background"]
        sentence += (
            f"{comma} while {HAPPENS[sound]}"
            if sound in HAPPENS
            else f"{comma} with {sound} in the background"
        )
    return capital(sentence + ".")


# ---------------------------------------------------------------------------------------------
# questions


def askable(clip, tasks=None):
    """[(task, fact)] of all questions that a clip allows."""
    facts = derived(clip.facts)
    return [(task, facts[task]) for task in TASKS if task in facts and (tasks is None or task in tasks)]


def draw_question(clip, rng, tasks=None, sentences=0.12):
    """A question that the clip allows, worded at random; None if there is none.

    Returns task, question, fact and a function that words any fact of its kind as the answer.
    """
    allowed = askable(clip, tasks)
    if not allowed:
        return None
    task, fact = rng.choices(allowed, [SELDOM.get(name, 1) for name, _ in allowed])[0]
    question, long = rng.choice(TASKS[task].questions), TASKS[task].long
    if task in IN_FULL:
        return task, question, fact, str
    if long and rng.random() < sentences:
        sentence = rng.choice(long)

        def in_a_sentence(other):
            return sentence.format(A_OR_AN.get(other, other))

        return task, question + rng.choice(IN_A_SENTENCE), fact, in_a_sentence
    return task, question, fact, in_short


def in_short(fact):
    return capital(fact) + "."


def question_line(clip, rng, out, tasks=None, sentences=0.12):
    """A manifest line that asks about the clip; None if none of `tasks` can."""
    drawn = draw_question(clip, rng, tasks, sentences)
    if drawn is None:
        return None
    task, question, fact, word = drawn
    return line_of(clip, task, question, word(fact), out)


def question_lines(clips, rng, out, tasks=None):
    """What each clip's corpus itself asks, and a question of `tasks` that the clip allows."""
    for clip in clips:
        for question, answer in clip.qa:
            yield line_of(clip, "qa", question, answer, out)
        if line := question_line(clip, rng, out, tasks):
            yield line


def preference_line(clip, rng, out, pools, tasks=None):
    """A stage-4 line: the right answer, and the same with one fact put for one easily confused with it."""
    can = [name for name in tasks or TASKS if name in pools or name in ("asr", "any")]
    drawn = draw_question(clip, rng, can, sentences=0.4)
    if drawn is None:
        return None
    task, question, fact, word = drawn
    if task in ("asr", "any") and "words" in clip.facts:
        wrong = with_a_wrong_word(fact, pools.get("word", ()), rng)
    else:
        kind = task
        if task == "any":
            kind = "sound" if "sound" in clip.facts else "instrument"
        others = distractors(fact, pools.get(kind, ()), 1, rng)
        wrong = others[0] if others else None
    if wrong is None:
        return None
    return line_of(clip, task, question, word(fact), out) | {"rejected_response": word(wrong)}


def with_a_wrong_word(text, pool, rng):
    """The text with one word put for another of the pool, a digit for a digit; None where there is none."""
    words = text.split()
    place = rng.randrange(len(words))
    others = distractors(words[place], DIGITS if words[place] in DIGITS else pool, 1, rng)
    if not others:
        return None
    words[place] = others[0]
    return " ".join(words)


# ---------------------------------------------------------------------------------------------
# multiple choice


# sounds, feelings and words that are easily taken for each other
CONFUSABLE = (
    "rain, sea waves, fire crackling, water; helicopter, chainsaw; clock tick, camera, shaker, hi-hat; "
    "dog bark, rooster, baby cry, person sneeze; happy, surprised, angry, fearful; neutral, calm, sad; "
    "disgusted, angry, fearful; five, nine, four; one, nine; six, seven, eight; two, three, zero; "
    "three, tree; bed, bird, dog; no, go; on, off; up, off; house, down, wow; yes, left; "
    "guitar, bass, piano; bell, gong, glass, metal; bass drum, drum, snare drum, tabla, percussion; "
    "female voice, female voices, male voice, male voices; synthesizer, theremin, electronic sound; "
    "plastic, squeak, balloon, door; one, two, three, four, five"
)
CHOICE_STYLES = ("mmsu", "mmsu", "mmau", "mmau", "letter", "both", "both", "text", "text")  # drawn evenly
CHOICE_COUNTS = (2, 3, 4, 4, 4, 4, 5, 6, 8)


def labels_of(clips):
    """task -> the facts of all these clips that may stand among its choices."""
    labels = defaultdict(set)
    for clip in clips:
        for task, fact in askable(clip, CHOICE_TASKS):
            labels[task].add(fact)
    return labels


def distractors(label, pool, n, rng):
    """n wrong labels out of `pool`, half of them those most like the right one, first."""
    near = set()
    for group in CONFUSABLE.split("; "):
        labels = group.split(", ")
        if label in labels:
            near.update(labels)
    others = sorted(set(pool) - {label})
    rng.shuffle(others)

    def distance(other):
        alike = round(difflib.SequenceMatcher(None, other, label).ratio(), 1)
        return other not in near, -alike

    others.sort(key=distance)
    take = min(n, len(others))
    hard = others[: (take + 1) // 2]
    return hard + rng.sample(others[len(hard) :], take - len(hard))


def multiple_choice(task, fact, pool, n, rng):
    """-> question without its prompt, choices (capitalised), index of the right one (drawn evenly)."""
    choices = distractors(fact, pool, n - 1, rng)
    right = rng.randrange(len(choices) + 1)
    choices.insert(right, fact)
    return rng.choice(TASKS[task].questions), [capital(choice) for choice in choices], right


def choice_line(clip, rng, out, pools, tasks=None):
    """A manifest line that asks by multiple choice, in our wording or a benchmark's, if there is one."""
    can = [task for task in CHOICE_TASKS if len(pools[task]) > 1 and (tasks is None or task in tasks)]
    allowed = askable(clip, can)
    if not allowed:
        return None
    task, fact = rng.choice(allowed)
    style, n = rng.choice(CHOICE_STYLES), rng.choice(CHOICE_COUNTS)
    question, choices, right = multiple_choice(task, fact, pools[task], 4 if style == "mmsu" else n, rng)
    letter, text, listed = LETTERS[right] + ".", choices[right] + ".", format_choices(choices)
    # a letter where the benchmark reads one, and the text with it: a masked-diffusion model can fill in the
    # text first and its letter after it.  MMAU compares texts, so the text alone is the safer answer.
    if style == "mmsu":
        question, answer = mmsu_prompt(question, choices), f"{letter} {text}"
    elif style == "mmau":
        question, answer = mmau_prompt(question, choices), text
    elif style == "letter":
        question, answer = f"{question}\n{listed}\nAnswer with the letter.", letter
    elif style == "both":
        question, answer = f"{question}\n{listed}\nAnswer with the letter and its text.", f"{letter} {text}"
    else:
        question, answer = f"{question}\n{listed}", text
    return line_of(clip, task + "_choice", question, answer, out)


def choices_in(question):
    """The options that a question lists, letter -> text; {} when it lists none."""
    found = re.findall(r"^([A-H])\. (.+)$", question, re.MULTILINE)
    letters = [letter for letter, _ in found]
    return dict(found) if letters == list(LETTERS[: len(found)]) and len(found) > 1 else {}


# ---------------------------------------------------------------------------------------------
# writing


@functools.lru_cache(maxsize=100_000)
def seconds_of(path):
    """Length by the file's header; None where there is none that can be read (check tells of it)."""
    if not os.path.isfile(path):  # a pipe would be waited for
        return None
    try:
        info = soundfile.info(path)
        seconds = round(info.frames / info.samplerate, 4)
        return seconds if seconds < MAX_SECONDS else None  # a FLAC that was streamed to a pipe: 2^63 samples
    except (soundfile.LibsndfileError, OSError, TypeError):  # TypeError: .raw has no header
        return None


def path_from(folder, path):
    """A clip's path from the folder of a manifest, right also where either lies behind a symbolic link."""
    plain = os.path.relpath(path, folder)
    if os.path.realpath(os.path.join(folder, plain)) == os.path.realpath(path):
        return plain
    where, name = os.path.split(os.path.abspath(path))
    return os.path.relpath(os.path.join(os.path.realpath(where), name), os.path.realpath(folder))


def line_of(clip, task, question, answer, out):
    """A manifest line (a dict) in ms-swift's form, which read_manifest describes; paths relative to `out`."""
    messages = [{"role": "user", "content": "<audio>" + question}, {"role": "assistant", "content": answer}]
    duration = clip.duration
    if not duration and clip.path and (whole := seconds_of(clip.path)):
        duration = round(whole - clip.offset, 4)
    line = {
        "messages": messages,
        "audios": [path_from(os.path.dirname(os.path.abspath(out)), clip.path)] if clip.path else [],
        "duration": duration,
        "dataset": clip.dataset,
        "task": task,
        "facts": clip.facts,
    }
    if clip.offset:
        line["offset"] = clip.offset
    return line


def check_text(entry, where):
    r"""Refuses half of a surrogate pair: JSON can spell it, "\ud800", but no file can hold it."""
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):  # the latter of lists in lists without end
        raise UserError(f"{where}: holds half a character, or too many lists in lists") from None


def append_lines(lines, path):
    with open(path, "a", encoding="utf-8") as f:
        f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def write_lines(lines, out, rng=None):
    """Writes a manifest, whole or not at all.  Returns the number of lines.

    rng: shuffles the lines on the disk; only their places are held in memory.
    """
    check_out(out)
    folder, starts = os.path.dirname(os.path.abspath(out)), array("Q")
    make_folder(folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as drawn:  # without a name: nothing is left after a kill
            for line in lines:  # what goes wrong in here is no fault of the disk
                starts.append(drawn.tell())
                drawn.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            if rng is not None:
                rng.shuffle(starts)
            write_file(out, functools.partial(copy_lines, drawn, starts))
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror})") from None
    return len(starts)


def copy_lines(source, starts, path):
    with open(path, "wb") as f:
        for start in starts:
            source.seek(start)
            f.write(source.readline())


def write_text(text, out):
    raw = text.encode()
    write_file(out, lambda path: Path(path).write_bytes(raw))


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror})") from None


# ---------------------------------------------------------------------------------------------
# drawing


def by_fact(clips, kind):
    """fact -> clips of which it is known or follows: rare classes can be drawn as often as common ones."""
    groups = defaultdict(list)
    for clip in clips:
        facts = derived(clip.facts)
        if kind in facts:
            groups[facts[kind]].append(clip)
    return groups


def draw_balanced(clips, kind, n, rng):
    """n clips, every value of the fact equally often (one short of that where n does not divide)."""
    groups = by_fact(clips, kind)
    names = sorted(groups)
    return [rng.choice(groups[names[i % len(names)]]) for i in range(n)] if names else []
