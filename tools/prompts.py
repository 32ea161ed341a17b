"""The prompts of multiple-choice benchmarks, byte for byte, and the letters of their choices."""

LETTERS = "ABCDEFGHIJ"  # of multiple choice


def capital(text):
    return text[:1].upper() + text[1:]


def format_choices(choices):
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def mmsu_prompt(question, choices):
    """How MMSU asks, byte for byte."""
    return (
        "Choose the most suitable answer from options A, B, C, and D to respond the question in next line, "
        "**you should only choose A or B or C or D.** "
        f"Do not provide any additional explanations or content.\n\nQuestion: {question}\n\n"
        + format_choices(choices)
    )


def mmau_prompt(question, choices):
    """How the DIFFA authors' script asks MMAU's questions, byte for byte; here MMAR's too."""
    return (
        "You are given the audio and a multiple-choice question. "
        "Choose the best answer based only on the speech content and style.\n\n"
        f"Question: {question}\n\nChoices:\n{format_choices(choices)}\nAnswer:"
    )
