"""What is read aloud to make spoken questions: corpora of text questions, and a table of short ones.

Short questions have an answer that is a matter of course (sums, opposites, days, colours, animals): a
small model can learn to answer them from the voice alone, the paper's direct audio QA.
"""

import re

# ---------------------------------------------------------------------------------------------
# corpora of text questions


def first_text(*values):
    """The first of the values that is a text that says something."""
    for value in values:
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def alpaca(row):
    question = first_text(row["instruction"])
    if row.get("input"):
        question += " " + row["input"].strip()
    return question, first_text(row["output"])


def natural_questions(row):
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    return first_text(row["question"]), first_text(*answers)


def trivia_qa(row):
    question = first_text(row.get("Question"), row.get("question"))
    answers = (row.get("Answer") or {}).get("Value"), (row.get("answer") or {}).get("value")
    return question, first_text(*answers)


def web_questions(row):
    question = first_text(row.get("utterance"), row.get("question"))
    described = re.findall(r'\(description "?(.*?)"?\)', row.get("targetValue", ""))
    return question, first_text(*row.get("answers", ()), *described)


TEXTS = {  # name -> licence, row -> (question, answer)
    "alpaca": ("CC BY-NC 4.0", alpaca),
    "natural_questions": ("CC BY-SA 3.0", natural_questions),
    "trivia_qa": ("Apache-2.0", trivia_qa),
    "web_questions": ("CC BY 4.0", web_questions),
}
INSTRUCTIONS = {  # kind of answer -> how a spoken question is put to the model
    "simple": (
        "Answer the spoken question in a few words.",
        "Listen to the question and give the bare answer.",
        "Someone asks something: answer briefly.",
        "Give a short, exact answer to what is asked.",
        "Reply to the question in the audio with the fact alone.",
    ),
    "complex": (
        "Listen to the question and answer it at length.",
        "Explain thoroughly what the speaker asks about.",
        "Give a complete and detailed answer to the spoken request.",
        "Do what the speaker asks, step by step where that helps.",
        "Answer the question in the audio with reasons and background.",
    ),
    "empathetic": (
        "Respond to the speaker warmly, as a friend would.",
        "Listen to how the speaker feels and answer with understanding.",
        "Reply in a natural, kind tone to what is said.",
        "Answer as in a caring conversation.",
    ),
}
SIMPLE_WORDS = 12  # answers up to so many words are simple
SPOKEN_WORDS = 60  # longer questions are not spoken

# ---------------------------------------------------------------------------------------------
# short questions with short answers

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS += ["eleven", "twelve", "thirteen", "fourteen", "fifteen"]
NUMBERS += ["sixteen", "seventeen", "eighteen", "nineteen", "twenty"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def pairs_of(text):
    """[("hot", "cold"), ...] of "hot: cold, ..."."""
    return [tuple(pair.split(": ")) for pair in text.split(", ")]


OPPOSITES = pairs_of(
    "hot: cold, big: small, up: down, left: right, day: night, black: white, open: closed, happy: sad, "
    "fast: slow, old: young, high: low, long: short, rich: poor, full: empty, hard: soft, light: dark, "
    "early: late, strong: weak, wet: dry, near: far, good: bad, first: last, in: out, on: off, "
    "heavy: light"
)
COLOURS = pairs_of(
    "grass: green, snow: white, the sky: blue, blood: red, coal: black, a banana: yellow, "
    "a lemon: yellow, a carrot: orange, milk: white, a tomato: red, the sun: yellow, a leaf: green, "
    "night: black, chocolate: brown"
)
ANIMALS = pairs_of(
    "barks: dog, meows: cat, moos: cow, crows in the morning: rooster, gives milk: cow, "
    "gives wool: sheep, lays eggs: hen, swims in the sea: fish, makes honey: bee, spins a web: spider, "
    "has a trunk: elephant, has a long neck: giraffe, hops: rabbit, croaks: frog, neighs: horse, "
    "oinks: pig, roars: lion, quacks: duck"
)


def short_questions():
    """[(question, answer)] of the tables above, always in the same order."""
    pairs = []
    for a, first in enumerate(NUMBERS):
        for b, second in enumerate(NUMBERS):
            if a + b <= 20:
                pairs.append((f"What is {first} plus {second}?", NUMBERS[a + b]))
            if a >= b:
                pairs.append((f"What is {first} minus {second}?", NUMBERS[a - b]))
    for i, day in enumerate(DAYS):
        after, before = DAYS[(i + 1) % 7], DAYS[i - 1]
        pairs.append((f"Which day comes after {day}?", after))
        pairs.append((f"Which day comes before {day}?", before))
        pairs.append((f"What day follows {day}?", after))
    opposite = {}
    for one, other in OPPOSITES:
        opposite.setdefault(one, other)  # "light" has two: the first counts
        opposite.setdefault(other, one)
    for word, answer in opposite.items():
        pairs.append((f"What is the opposite of {word}?", answer))
        pairs.append((f"Tell me the opposite of {word}.", answer))
    for thing, colour in COLOURS:
        pairs.append((f"What colour is {thing}?", colour))
        pairs.append((f"Which colour has {thing}?", colour))
    for does, animal in ANIMALS:
        named = ("an " if animal[0] in "aeiou" else "a ") + animal
        pairs.append((f"Which animal {does}?", named))
        pairs.append((f"What animal {does}?", named))
    return [(question, answer[:1].upper() + answer[1:] + ".") for question, answer in pairs]
