"""What is logged of a run: log.jsonl, the progress bar, TensorBoard."""

import contextlib
import json
import math
import os
import time

from tqdm import tqdm

from runtime.errors import tell
from runtime.files import write_file


class Log:
    """What is seen of a run: out/log.jsonl, a line a step, a progress bar, TensorBoard if wanted.

    A run that goes on at `step` cuts the file back to it: steps after the checkpoint were lost and are taken
    again, and each is to stand there once.  Only rank 0 shows and writes anything.
    """

    def __init__(self, out, title, step, steps, tensorboard, rank):
        path, lines = os.path.join(out, "log.jsonl"), []
        self.file = self.board = self.smoothed = None
        self.started = time.perf_counter()
        self.bar = tqdm(total=steps, initial=step, desc=title, unit=" steps", mininterval=1, disable=rank > 0)
        if rank:
            return
        if os.path.isfile(path) and step:
            with open(path, encoding="utf-8", errors="replace") as f:
                lines = [line for line in f if self.is_up_to(step, line)]

        def write(temporary):
            with open(temporary, "w", encoding="utf-8") as f:
                f.writelines(lines)

        write_file(path, write)
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        if tensorboard:
            # here, because the package is optional
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(out, purge_step=step + 1)

    @staticmethod
    def is_up_to(step, line):
        """Whether a line of the log is of this step or an earlier one; False where a kill cut it short."""
        try:
            return line.endswith("\n") and json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError):
            return False

    def write(self, **entry):
        if self.file:
            self.file.write(json.dumps(entry) + "\n")
            try:
                self.file.flush()  # to be watched while the run goes on
            except OSError as e:  # a full disk is no reason to stop
                tell(f"log.jsonl cannot be written ({e.strerror})")
        if self.board:
            for name, value in entry.items():
                if isinstance(value, (int, float)) and name != "step":
                    with contextlib.suppress(OSError):  # as above, and told there
                        self.board.add_scalar(name, value, entry["step"])

    def write_step(self, **entry):
        """The line of a step; the bar shows the same, the loss as a running mean of some 50 steps.

        A single step's loss says more of the t that was drawn than of the model.  What is not finite is
        null in the file: JSON has no NaN.
        """
        for name in ("loss", "norm"):
            if not math.isfinite(entry[name]):
                entry[name] = None
        self.write(**entry, seconds=time.perf_counter() - self.started)
        loss, norm = entry["loss"], entry["norm"]
        if loss is not None and norm is not None:
            before = loss if self.smoothed is None else self.smoothed
            self.smoothed = before + (loss - before) / min(entry["step"], 50)
        shown = {"loss": self.smoothed, "norm": norm, "lr": entry["lr"], "hours": entry["hours"]}
        # the terminal may be closed, or `| tee` have died of the same Ctrl-C: the step is to be saved first
        with contextlib.suppress(OSError):
            self.bar.set_postfix(shown, skipped=entry["skipped"], refresh=False)
            self.bar.update()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for part in (self.bar, self.file, self.board):
            if part is not None:
                with contextlib.suppress(OSError):  # a full disk: told of before, and not what ended the run
                    part.close()
