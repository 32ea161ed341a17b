"""What every program here needs and no paper speaks of: errors, files, processes, signals, logs, memory.

    a wrong input        one line and exit status 2 (UserError, Parser, exit_status)
    a file               whole or not there (write_file)
    torchrun             one process a GPU, all of which leave together (process_group, ProcessGroup)
    SIGTERM, Ctrl-C      are remembered until the step is done (StopSignal)
    a run's folder       belongs to one run (locked), and holds its log (Log, which draws the progress bar)
    memory               what a training step keeps until its backward pass (saved_bytes), what nobody needs

A reader of the method can skip this file: each name says what the others rely on.
"""

import argparse
import contextlib
import ctypes
import errno
import fcntl
import json
import os
import platform
import signal
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

# ---------------------------------------------------------------------------------------------
# programs.  A traceback tells the author of a program where it broke; its user wants to know which file or
# option is wrong.  So what the user can put right is one line, and all else stays a traceback: a mistake of
# ours must not look like one of theirs.


class UserError(Exception):
    """Something the user can put right: shown as one line, exit status 2."""


def first_line(error):
    """The first line of a library's error, or its type where it says nothing.

    Some of torch's errors bring a stack of C++ calls along, which would bury the line that matters.
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other wrong input: one line, exit status 2."""

    def error(self, message):
        raise UserError(message)


def exit_status(program, run):
    """run() as a program: its status (None is 0); 2 and one line for a UserError, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that is not UTF-8 shows "?" for what it cannot
            stream.reconfigure(errors="replace")
    try:
        status = run() or 0
        sys.stdout.flush()  # here, where it can be told that this fails
        return status
    except UserError as e:
        why = e
    except KeyboardInterrupt:
        return 130
    except UnicodeEncodeError as e:  # a name or a question that came as bytes
        why = f"not UTF-8: {e.object!r}"
    except OSError as e:
        if e.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # nothing may be left for Python to flush at its end, which would fail once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if e.errno == errno.EPIPE:  # `| head` has seen enough
            return 0
        why = "the output cannot be written: no space left"
    print(f"{program}: {why}", file=sys.stderr)
    return 2


def pick_device(name=None):
    """A torch.device; by default a GPU of NVIDIA's, else of Apple's (not tested), else the CPU."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name or found)
        torch.empty(0, device=device)  # a name may be well formed and its device not there: "cuda:9"
        if device.type == "meta":
            raise ValueError("it holds no numbers")
    except (RuntimeError, AssertionError, ValueError, ImportError) as e:  # NotImplementedError is one of them
        raise UserError(f"device {name!r} cannot be used: {first_line(e)}") from None
    return device


# ---------------------------------------------------------------------------------------------
# files


def check_out(path):
    """Refuses the name of a folder, a pipe or a device: a finished file is renamed, and would replace it."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: cannot be written (it is there, and no regular file)")


def write_file(path, write):
    """write(temporary name), then syncs and renames: a reader finds the old file or the new, no half one.

    The order matters.  A rename is atomic, but a file system may do it before the data are on the disk: after
    a power cut the name would stand on an empty file.  Hence the sync before it.  The temporary name lies in
    the same folder, for nothing can be renamed from one disk to another, and begins with a dot, so that no
    pattern for finished files finds it after a kill.

    Raises UserError when it cannot be written, with what was there before still there.
    """
    check_out(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.tmp")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
        sync(folder or ".")  # the new name itself, which is an entry of the folder
    except (OSError, SafetensorError, RuntimeError, ValueError) as e:  # torch's RuntimeError: a full disk
        why = getattr(e, "strerror", None) or first_line(e)
        raise UserError(f"{folder or '.'}: cannot be written ({why})") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def sync(path):
    """Waits until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------------------------------------
# processes.  torchrun starts one a GPU and tells each its rank in the environment (RANK, LOCAL_RANK,
# WORLD_SIZE).  All of them hold the whole model (the trained 1 % makes gradients small: 400 MB in fp32 for
# diffa2), read their own share of every global batch, and take the same optimizer step on the same summed
# gradient.  Each of the calls below is made by all processes or by none: one that came alone would wait for
# ever.


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train together; a single process is a group of one."""

    rank: int
    size: int
    device: torch.device

    def print(self, text):
        """Once, not once a process."""
        if self.rank == 0:
            print(text)

    def sum(self, values):
        """Sums a list of numbers over the processes, in fp64: counts stay whole numbers, however large."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, thing):
        """Every process's `thing`, in order of ranks."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def first_only(self, work):
        """work() on rank 0, its result on every rank.  A UserError there is raised on every rank.

        Were it raised on rank 0 alone, the others would wait in their next all-reduce until its time is up.
        """
        result, error = None, None
        if self.rank == 0:
            try:
                result = work()
            except UserError as e:
                error = str(e)
        (result, error), *_ = self.gather((result, error))
        if error is not None:
            raise UserError(error)
        return result

    def all_reduce_gradients(self, parameters):
        """Sums .grad over the processes, once a step.

        DistributedDataParallel would do it from hooks in the backward pass of its own forward; here a
        step has many backward passes that do not go through one forward (VRPO's samples, micro-batches
        of any number), so the sum is taken where it can be seen.
        """
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters]
        # one large vector: hundreds of small messages would each wait for the network
        flat = parameters_to_vector(gradients)
        dist.all_reduce(flat)
        vector_to_parameters(flat, gradients)


@contextlib.contextmanager
def process_group(device=None):
    """Joins the processes that torchrun started: NCCL on GPUs, gloo on CPUs; a group of one without it."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{local}"
    device = pick_device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL takes the current one, and that is GPU 0 in every process
    if size == 1:
        yield ProcessGroup(0, 1, device)
        return
    is_ours = not dist.is_initialized()  # whoever has joined already leaves by itself
    if is_ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    group = ProcessGroup(dist.get_rank(), size, device)
    try:
        yield group
        # rank 0 leaves last: a process that goes while another still waits for it takes that one down.  A
        # barrier would not do: some come out of it while others are still inside.
        goodbye = torch.zeros(1, device=device)
        if group.rank:
            dist.send(goodbye, 0)
        else:
            for rank in range(1, size):
                dist.recv(goodbye, rank)
    finally:
        if is_ours:
            dist.destroy_process_group()


def exit_process(code):
    """sys.exit; a process of torchrun's goes at once, without the interpreter's winding up.

    A thread of gloo that then asks for Python once more aborts the process: status 134 after all is written,
    and torchrun would take a finished run for a failed one.
    """
    if "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    # os._exit drops what Python has buffered
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


class StopSignal:
    """Remembers SIGTERM and Ctrl-C until the step is done; a second Ctrl-C is not waited for.

    A handler that saved at once could be called in the middle of an optimizer step, with half of the weights
    from before it and half from after.  So it only takes a note, and the loop asks for it between steps.
    torchrun killed outright can send no signal to its workers: they find that their parent is another.
    """

    def __enter__(self):
        self.caught, self.parent = False, os.getppid()
        self.before = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, _):
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = True

    @property
    def received(self):
        is_orphan = "WORLD_SIZE" in os.environ and os.getppid() != self.parent
        return self.caught or is_orphan

    def __exit__(self, *error):
        for n, handler in self.before.items():
            signal.signal(n, handler)


@contextlib.contextmanager
def locked(out, wait):
    """The folder belongs to one run: a lock that dies with its holder, however that dies.  Rank 0 takes it.

    Two runs in one folder would go on from each other's checkpoints.  A file that merely exists would be left
    behind by SIGKILL and keep everybody out; the kernel gives flock back with the process.  Between machines
    it holds where the shared disk has flock (NFS from version 4 on).  wait: until the other run is gone; else
    a UserError names it.
    """
    path = os.path.join(out, ".lock")
    if int(os.environ.get("RANK", 0)):
        yield
        return
    while True:
        try:
            os.makedirs(out, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT)
        except OSError as e:
            raise UserError(f"{out}: cannot be written ({e.strerror})") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace") or "another process"
            os.close(handle)
            raise UserError(f"{out}: {holder} is training here; --wait waits until it is gone") from None
        except OSError as e:
            why = f"this disk has no locks ({e.strerror})"
            print(f"{out}: {why}: let no other run write here", file=sys.stderr)
        if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
            break
        os.close(handle)  # it was removed while we waited: a lock that nobody else will find
    try:
        # for whoever is refused: which process of which machine to look for
        os.truncate(handle, 0)
        os.write(handle, f"process {os.getpid()} of {platform.node()}".encode())
        yield
    except UserError:
        if os.listdir(out) == [".lock"]:  # nothing came of the run: nothing stays of it
            os.remove(path)
        raise
    finally:
        os.close(handle)


def ignore_signals():
    """Loader workers leave the answer to SIGTERM and Ctrl-C to the process they work for.

    Ctrl-C reaches every process of a terminal: workers that died of it would leave the step unfinished.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------
# what is logged of a run


class Log:
    """What is seen of a run: out/log.jsonl, a line a step, a progress bar, TensorBoard if wanted.

    A run that goes on at `step` cuts the file back to it: steps after the checkpoint were lost and are taken
    again, and each is to stand there once.  Only rank 0 shows and writes anything.
    """

    def __init__(self, out, title, step, steps, tensorboard, rank):
        path, lines = os.path.join(out, "log.jsonl"), []
        self.file = self.board = self.smoothed = None
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
            self.file.flush()  # to be watched while the run goes on
        if self.board:
            for name, value in entry.items():
                if isinstance(value, (int, float)) and name != "step":
                    self.board.add_scalar(name, value, entry["step"])

    def write_step(self, **entry):
        """The line of a step; the bar shows the same, the loss as a running mean of some 50 steps.

        A single step's loss says more of the t that was drawn than of the model.
        """
        self.write(**entry)
        loss, norm = entry["loss"], entry["norm"]
        if loss is not None and norm is not None:  # else the step was left out
            before = loss if self.smoothed is None else self.smoothed
            self.smoothed = before + (loss - before) / min(entry["step"], 50)
        shown = {"loss": self.smoothed, "norm": norm, "lr": entry["lr"], "hours": entry["hours"]}
        self.bar.set_postfix(shown, skipped=entry["skipped"], refresh=False)
        self.bar.update()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for part in (self.bar, self.file, self.board):
            if part is not None:
                part.close()


# ---------------------------------------------------------------------------------------------
# memory


def return_memory():
    """Gives the system back what was freed: glibc keeps large pieces for later, a tenth of the size of an
    8-billion model by the time that it is read.  Does nothing beside another C library.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


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
