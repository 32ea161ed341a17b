"""Processes that train together, the signals that stop them, and the lock on a run's folder.

torchrun starts one process a GPU and tells each its rank in the environment (RANK, LOCAL_RANK, WORLD_SIZE).
All of them hold the whole model (the trained 1 % makes gradients small: 400 MB in fp32 for diffa2), read
their own share of every global batch, and take the same optimizer step on the same summed gradient.  Each
method of ProcessGroup is called by all processes or by none: one that came alone would wait for ever.
"""

import contextlib
import fcntl
import os
import platform
import signal
import sys
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from runtime.errors import UserError, first_line, tell


def pick_device(name=None):
    """A torch.device; by default a GPU of NVIDIA's, else of Apple's (not tested), else the CPU."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name or found)
        torch.empty(0, device=device)  # a name may be well formed and its device not there: "cuda:9"
        if device.type == "meta":
            raise ValueError("it holds no numbers")
    except (RuntimeError, AssertionError, ValueError, ImportError) as e:  # NotImplementedError among them
        raise UserError(f"device {name!r} cannot be used: {first_line(e)}") from None
    return device


def pick_precision(name, device):
    """bf16 or fp32, in which training multiplies matrices; by default bf16 on NVIDIA's GPUs alone."""
    return name or ("bf16" if device.type == "cuda" else "fp32")


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train together; a single process is a group of one."""

    rank: int
    size: int
    device: torch.device

    def print(self, text):
        """Once, not once a process."""
        if self.rank == 0:
            with contextlib.suppress(OSError):  # a terminal that was closed
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

    def broadcast(self, parameters):
        """Gives all processes rank 0's values: GPUs of two kinds draw other numbers from the same seed."""
        if self.size > 1:
            for p in parameters:
                dist.broadcast(p.data, 0)

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
def process_group(device=None, timeout=None):
    """Joins the processes that torchrun started: NCCL on GPUs, gloo on CPUs; a group of one without it.

    timeout: a timedelta, how long processes wait for each other; torch's 10 to 30 minutes by default.
    """
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
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    group = ProcessGroup(dist.get_rank(), size, device)
    # an error leaves from here, without goodbye: NCCL would wait for the others, and they for this process
    yield group
    # nobody goes while another still waits for it: that would take the other one down
    goodbye = torch.zeros(1, device=device)
    if device.type == "cuda":
        dist.all_reduce(goodbye)
        goodbye.item()  # NCCL's calls return before they are done
    elif group.rank:
        # with gloo rank 0 leaves last: some come out of a barrier while others are still inside
        dist.send(goodbye, 0)
    else:
        for rank in range(1, size):
            dist.recv(goodbye, rank)
    if is_ours:
        dist.destroy_process_group()


def exit_process(code):
    """sys.exit; a process of torchrun's goes at once, without the interpreter's winding up.

    A thread of gloo that then asks for Python once more aborts the process: status 134 after all is written,
    and torchrun would take a finished run for a failed one.
    """
    if "WORLD_SIZE" not in os.environ:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):  # os._exit drops what Python has buffered
        with contextlib.suppress(OSError):  # closed
            stream.flush()
    os._exit(code or 0)


# ---------------------------------------------------------------------------------------------
# signals and locks


PARENT = os.getppid()  # now: reading 8 billion parameters takes minutes, and torchrun may be gone by then
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopSignal:
    """Remembers SIGTERM, SIGHUP and Ctrl-C until the step is done; a second Ctrl-C is not waited for.

    A handler that saved at once could be called in the middle of an optimizer step, with half of the weights
    from before it and half from after.  So it only takes a note, and the loop asks for it between steps.
    torchrun killed outright can send no signal to its workers: they find that their parent is another.
    """

    def __enter__(self):
        self.caught = False
        # a closed terminal sends SIGHUP, unless nohup has switched it off; torchrun hands it on all the same.
        # A shell switches SIGINT off for what it starts in the background: whoever sends it there means it
        off = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        numbers = [n for n in STOP_SIGNALS if n != signal.SIGHUP or not off]
        self.before = {n: signal.signal(n, self.note) for n in numbers}
        return self

    def note(self, number, _):
        if self.caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.caught = True

    @property
    def received(self):
        is_orphan = "WORLD_SIZE" in os.environ and os.getppid() != PARENT
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
    # after torchrun's restart the dead process's loader workers may hold it for some seconds more
    is_restart = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    patient_until = time.monotonic() + 30 * is_restart
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
            if time.monotonic() < patient_until:
                time.sleep(0.5)
                continue
            raise UserError(f"{out}: {holder} is training here; --wait waits until it is gone") from None
        except OSError as e:
            why = f"this disk has no locks ({e.strerror})"
            tell(f"{out}: {why}: let no other run write here")
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
    """Loader workers leave the answer to these signals to the process they work for.

    Ctrl-C reaches every process of a terminal: workers that died of it would leave the step unfinished.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
