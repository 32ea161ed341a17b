"""A language model as the judge of answers for which VoiceBench has no rule.

As in VoiceBench's script each answer is rated three times: from 1 to 5, or, where the question file has a
reference answer (sd-qa), right or wrong.  The wording of the two prompts is this project's own.
"""

from tqdm import tqdm

from tools.questions import append_lines
from tools.writer import strict_object

TIMES = 3
RATE = (
    "You judge a voice assistant. You get what a user said and what the assistant replied. Rate the reply "
    "from 1 (useless: wrong, off the point, or unreadable) through 3 (addresses the request, with gaps or "
    "padding) to 5 (right, complete, to the point, as one would speak). "
    'Reply with one JSON object and nothing else: {"score": 1 to 5}'
)
CHECK = (
    "You check a voice assistant. You get a question, its reference answer and what the assistant replied. "
    "Is the reply right, by the question and the reference? "
    'Reply with one JSON object and nothing else: {"right": true or false}'
)


def read_score(text):
    """A judge's reply -> 1 to 5; ValueError for anything else."""
    score = strict_object(text, score=int)["score"]
    if not 1 <= score <= 5:
        raise ValueError(f"a score of {score}")
    return score


def read_right(text):
    """A judge's reply -> 1 for right, 0 for wrong; ValueError for anything else."""
    return int(strict_object(text, right=bool)["right"])


def have_references(questions):
    return all(q.entry.get("reference") for q in questions)


def judge(questions, lines, endpoint, times=1, journal=None):
    """Mean of `times` ratings of every answer by a language model; None where it gave no usable reply.

    journal: a file of answers, which has every rating at once.
    """
    by_reference = have_references(questions)
    prompt, read = (CHECK, read_right) if by_reference else (RATE, read_score)
    for q in tqdm(questions, desc="judging", unit=" answers"):
        line = lines[q.id]
        if line.get("judged") is None or line.get("judge") != endpoint.model:
            asked = f"User: {q.entry['prompt']}\n\nAssistant: {line['answer']}"
            if by_reference:
                asked += f"\n\nReference: {q.entry['reference']}"
            found = [endpoint.complete(prompt, asked, read) for _ in range(times)]
            found = [x for x in found if x is not None]
            line["judged"] = sum(found) / len(found) if found else None
            line["judge"] = endpoint.model
            if journal:
                append_lines([line], journal)
    return [lines[q.id]["judged"] for q in questions]


def report_judged(questions, ratings):
    """Prints the mean; returns what goes into the summary: "judged_right" (a share) or "rating" (1 to 5)."""
    given = [x for x in ratings if x is not None]
    if not given:
        print("the judge gave no usable reply")
        return {}
    mean, silent = sum(given) / len(given), f"{len(ratings) - len(given)} without a usable reply"
    if have_references(questions):
        print(f"judged right: {mean:.1%}, {silent}")
        return {"judged_right": mean}
    print(f"judged 1-5: mean {mean:.2f}, {silent}")
    return {"rating": mean}
