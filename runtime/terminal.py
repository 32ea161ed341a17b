"""How `decode.py` prints answers: as text or JSON, with --show and --stream while they emerge."""

import json
import os
import shutil
import sys

from data import answer_text


class Screen:
    """Redraws an answer as it emerges, coloured by confidence; plain lines when the output is no terminal."""

    COLOURS = ((0.9, "32"), (0.5, "33"), (0.0, "31"))  # green above 0.9, yellow above 0.5, red below

    def __init__(self, tokenizer, config, out):
        self.tokenizer, self.config, self.out = tokenizer, config, out

    def show(self, response, confidence, call):
        """response, confidence (1, L), after network call `call`; `generate`'s on_step."""
        is_terminal, c = self.out.isatty(), self.config
        # a line that wraps cannot be drawn over: it ends where the terminal does
        room = columns(self.out) - 8 if is_terminal else sys.maxsize
        line = f"{call:3}  "
        for token, sure in zip(response[0].tolist(), confidence[0].tolist(), strict=True):
            if token in (c.eos_id, c.eot_id):
                continue
            is_mask = token == c.mask_id
            text = "_" if is_mask else self.tokenizer.decode([token]).replace("\n", " ")
            room -= len(text)
            if room < 0:
                break
            if is_terminal and not is_mask and "NO_COLOR" not in os.environ:
                colour = next(code for least, code in self.COLOURS if sure >= least)
                text = f"\033[{colour}m{text}\033[0m"
            line += text
        if is_terminal:
            line = f"\r\033[K{line}"  # back to the first column, and what stood there is erased
        is_drawn_over = is_terminal and (response == c.mask_id).any()  # by the next call
        self.out.write(line if is_drawn_over else line + "\n")
        self.out.flush()


def columns(terminal):
    """How wide it is; shutil alone would ask for standard output's."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns or 80
    except (OSError, ValueError):  # an object that only says that it is one
        return shutil.get_terminal_size().columns


class Stream:
    """Prints an answer's text as far as its blocks are final; what it has printed adds up to the answer.

    The answer about each piece of a clip beyond the window is a line of its own, without its time.
    """

    def __init__(self, tokenizer, config, out):
        self.tokenizer, self.config, self.out, self.printed = tokenizer, config, out, ""

    def show(self, response, end):
        """response (1, L): final before column `end`; `generate`'s on_block."""
        is_last = end == response.size(1)
        text = answer_text(self.tokenizer, response[0, :end].tolist(), self.config)
        if not is_last:
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")  # half of a letter: the rest is in the next block
        self.out.write(text[len(self.printed) :] + "\n" * is_last)
        self.out.flush()
        self.printed = "" if is_last else text  # the answer about the next piece of the clip begins anew


class Printer:
    """Prints each answer when it is there; `live` are the arguments of `ask` that print it as it emerges."""

    def __init__(self, args, tokenizer, config):
        self.is_json, self.is_one = args.json, len(args.words) == 2  # a clip and the question
        self.is_streamed = args.stream and not config.causal  # an autoregressive model has no blocks
        self.live = {}
        if args.show:
            self.live["on_step"] = Screen(tokenizer, config, sys.stderr if args.json else sys.stdout).show
        if self.is_streamed:
            self.live["on_block"] = Stream(tokenizer, config, sys.stdout).show

    def begin(self, path):
        if self.is_streamed and not self.is_one:
            print(f"{path}: ", end="")

    def end(self, path, question, answer):
        if self.is_json:
            line = {"audio": path, "question": question, "answer": answer.text, "calls": answer.calls}
            line |= {"seconds": round(answer.seconds, 4), "rtf": round(answer.rtf, 4)}
            if answer.pieces:
                line["pieces"] = [{"start": a, "end": b, "answer": text} for a, b, text in answer.pieces]
            print(json.dumps(line))
        elif not self.is_streamed:  # else it stands there already
            print(answer.text if self.is_one else f"{path}: {answer.text}")


def clock(start, end):
    """[minutes:seconds - minutes:seconds]."""
    return f"[{int(start) // 60}:{int(start) % 60:02} - {int(end) // 60}:{int(end) % 60:02}]"
