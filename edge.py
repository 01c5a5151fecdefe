"""The edge of the program: processes, progress, a run and its folder, checkpoints, devices. What a
reader of the methods can do without.

Misuse and bad input are a ValueError or an OSError with one line; `dipddpm.main` prints it.
"""

import contextlib
import ctypes
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

import eval as measure

CHECKPOINT, PREVIOUS, LOCK = "checkpoint.pt", "checkpoint-previous.pt", ".lock"
CHECKPOINT_FORMAT = 1

# ------------------------------------------------------------------ processes


def processes():
    """(this process's number, how many run together): torchrun starts many, `join_processes` joins
    them. All do
    the same and agree on it, but each trains on its part of a batch, samples and fits its part of
    the images; the first alone writes and speaks."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(cfg):
    """Meet the other processes if torchrun started this one: by NCCL on CUDA, by gloo elsewhere."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if cfg.mode not in ("ddpm", "prior"):
        raise ValueError(f"--mode {cfg.mode} runs in one process, without torchrun")
    cuda = (cfg.device or "cuda").startswith("cuda") and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1))
    measure.WRITES = dist.get_rank() == 0


def total(x):
    """The sum over the processes of x, a tensor of one shape in all: in each. Where all but one are
    zero it is exact. x itself may be overwritten."""
    if processes()[1] > 1:
        x = x.contiguous()
        dist.all_reduce(x)
    return x


@contextlib.contextmanager
def first_alone():
    """The other processes wait until the first has been through what is inside."""
    rank, size = processes()
    if rank:
        dist.barrier()
    yield
    if size > 1 and rank == 0:
        dist.barrier()


def of_the_first(x):
    """The first process's tensor x, in each: on a GPU not every sum is the same twice."""
    return total(x if processes()[0] == 0 else torch.zeros_like(x))


def the_first_ones(value):
    """The first process's value, in each: two may read different clocks."""
    if processes()[1] > 1:
        box = [value]
        dist.broadcast_object_list(box)
        value = box[0]
    return value


def agreed(stop):
    """The largest `run.stop` of the processes: a signal's number, 0 for none."""
    if processes()[1] > 1:
        stop = torch.tensor(stop, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(stop, dist.ReduceOp.MAX)
    return int(stop)


def say(line):
    if processes()[0] == 0:
        print(line, flush=True)


# ------------------------------------------------------------------ progress and clocks


class Clock:
    """Seconds since it was made, plus what an earlier part of the run had already taken."""

    def __init__(self, before=0.0):
        self.start = time.time() - before

    def __call__(self):
        return time.time() - self.start


class Progress:
    """One line that rewrites itself on a terminal, a new line each half minute elsewhere: done of
    all steps, rate in images (or fits x iterations) a second, time left."""

    def __init__(self, label, steps, per_step, done=0):
        self.label, self.steps, self.per_step, self.first = label, steps, per_step, done
        self.start, self.live = time.time(), sys.stdout.isatty()
        self.shown = 0.0 if self.live else self.start

    def __call__(self, done, note=""):
        now, last = time.time(), done == self.steps
        if processes()[0] or not last and now - self.shown < (0.2 if self.live else 30):
            return
        self.shown = now
        rate = max(done - self.first, 1) / max(now - self.start, 1e-9)
        left = round((self.steps - done) / rate)
        line = (f"{self.label}: {done}/{self.steps}  {rate * self.per_step:.0f}/s  "
                f"{left // 60}:{left % 60:02d} left  {note}")
        print(f"\r{line:<78}" if self.live else line, end="\n" if last or not self.live else "",
              flush=True)


# ------------------------------------------------------------------ a run and its folder


class Run:
    """What surrounds the mathematics: a folder, a device, a precision, clocks, a wish to stop."""

    def __init__(self, cfg, argv):
        join_processes(cfg)
        self.device = pick_device(cfg.device)
        self.device_name = device_name(self.device)
        self.precision = pick_precision(cfg.precision, self.device)
        self.command = "python dipddpm.py " + shlex.join(argv)
        self.commit = commit()
        self.seconds = dict.fromkeys(("dip", "train", "sample", "eval", "total"), 0.0)
        self.stop = 0  # the number of the signal that asked for it
        self.state = {}  # what a checkpoint holds of each network's training
        self.about = {}  # its data's name, counts, checksum, and an image's shape
        self.config = asdict(cfg)
        self.lock, self.begun = None, False
        continued = cfg.resume and cfg.mode in ("ddpm", "prior")
        self.fresh = bool(cfg.out or not continued)  # writes to a folder of its own
        self.folder = the_first_ones(new_folder(cfg) if self.fresh else Path(cfg.resume))
        if not self.fresh and processes()[0] == 0:
            self.lock = lock(self.folder)  # before anything is read
        if continued and any((Path(cfg.resume) / name).exists() for name in (CHECKPOINT, PREVIOUS)):
            saved = load_checkpoint(cfg.resume, mend=not self.fresh)
            self.state = saved["networks"]
            self.about = {key: saved[key] for key in ("data", "shape")}
        self.clock = Clock(sum(saved["seconds"] for saved in self.state.values()))

    def begin(self):
        """Make the folder: not before the input is known to be good, so that misuse leaves none."""
        if processes()[0] == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.fresh:
                self.lock = lock(self.folder)
                overwrite = self.config["overwrite"]
                check_empty(self.folder, overwrite)  # again, now that nobody else can fill it
                if overwrite:
                    remove_run(self.folder)
        self.begun = True
        measure.write_json(self.config, self.folder / "config.json")
        if self.state and not (self.folder / CHECKPOINT).exists():
            save_checkpoint(self)

    def close(self):
        """Let go of the folder."""
        if self.lock is not None:
            self.lock.close()

    def autocast(self):
        """bf16 inside the networks where asked for; the mathematics around them stays float32."""
        return torch.autocast(self.device.type, torch.bfloat16, self.precision == "bf16")


def lock(folder):
    """Hold a run's folder until the file that is returned is closed, or this process ends, however
    it ends; ValueError where another run does. Where there is no flock (Windows), nobody holds
    anything."""
    try:
        import fcntl
    except ImportError:
        return None
    file = open(folder / LOCK, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{folder}: another run is writing there") from None
    except OSError:  # a file system without locks
        pass
    return file


def new_folder(cfg):
    """--out, or a new name in runs/. A folder that holds something is never written to, unless that
    is a run and --overwrite is given."""
    stem = Path(cfg.data).stem if cfg.data else "data"
    folder = Path(cfg.out) if cfg.out else Path("runs") / (
        f"{cfg.mode}-{stem}-{time.strftime('%Y%m%d-%H%M%S')}-seed{cfg.seed}")
    if cfg.resume and folder.exists() and folder.samefile(cfg.resume):
        raise ValueError(f"--out {folder} is the run that --resume takes its networks from")
    if processes()[0] == 0:
        check_empty(folder, cfg.overwrite)
    return folder


def check_empty(folder, overwrite):
    """ValueError if there is anything in the folder but, with `overwrite`, a run."""
    filled = folder.is_dir() and any(p.name[0] != "." for p in folder.iterdir())
    if filled and overwrite:
        saved_flags(run_folder(folder, "--overwrite"))  # else it is no run
    if filled and not overwrite or folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} exists and is not empty; continue it with --resume "
                         f"{folder}, empty it with --overwrite or name another")


def remove_run(folder):
    """Remove a run's files: what is hidden, and folders but its snapshots', are not its own. What
    tells that it is a run goes last, so that whoever is killed here can do it again."""
    files = [p for p in folder.iterdir() if p.name[0] != "." and (p.is_symlink() or p.is_file())]
    files.sort(key=lambda p: p.name == "config.json")
    if not (folder / "snapshots").is_symlink():
        files = [*(folder / "snapshots").glob("*.pt"), *files]
    for path in files:
        path.unlink()


def run_folder(path, flag="--resume"):
    """A flag's folder, given as itself or as its checkpoint.pt; ValueError if it is no run."""
    folder = Path(path).parent if Path(path).name == CHECKPOINT else Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{flag} {path}: no run there (no {folder / 'config.json'})")
    return folder


def saved_flags(folder):
    """config.json of a run's folder -> its dictionary, as it was written; ValueError if it is
    damaged."""
    path = folder / "config.json"
    try:
        flags = json.loads(path.read_text())
        if not {"mode", "data", "seed", "out"} <= flags.keys():
            raise ValueError("not the flags of a run")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error}") from error
    return flags


def newest_run():
    """The run in runs/ with the newest checkpoint."""
    found = sorted(Path("runs").glob(f"**/{CHECKPOINT}"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError("--mode sample needs a trained network: none in runs/; train one with "
                         "--mode ddpm or name a run with --resume")
    return found[-1].parent


# ------------------------------------------------------------------ checkpoints


def save(content, path, previous=None):
    """torch.save, written beside, synced, renamed: an old file stays until the new one is whole,
    and then, where `previous` is a path, moves there. The first process alone writes."""
    if processes()[0]:
        return
    path.parent.mkdir(exist_ok=True)
    beside = path.with_suffix(".pt.tmp")
    try:
        with open(beside, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def save_checkpoint(run):
    save({"format": CHECKPOINT_FORMAT, "networks": run.state} | run.about,
         run.folder / CHECKPOINT, run.folder / PREVIOUS)


def load_checkpoint(folder, mend=False):
    """The newest checkpoint's content, tensors and plain values only, or that of the one before
    where it cannot be read; then with `mend` the newest goes, lest it take the other's place.
    ValueError in one line if neither is one of ours."""
    newest, previous = Path(folder) / CHECKPOINT, Path(folder) / PREVIOUS
    try:
        saved = read_checkpoint(newest)
    except (ValueError, OSError) as error:
        if not previous.exists():
            raise
        saved = read_checkpoint(previous)
        say(f"{error}; going on from {PREVIOUS}")
        if mend and processes()[0] == 0:
            newest.unlink(missing_ok=True)
    if not isinstance(saved, dict) or saved.get("format") != CHECKPOINT_FORMAT:
        raise ValueError(f"{newest}: not a checkpoint of format {CHECKPOINT_FORMAT}")
    return saved


def read_checkpoint(path):
    """What torch.save wrote there; FileNotFoundError, or ValueError in one line."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no checkpoint there")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a broken file leads it into
        raise ValueError(f"{path}: not a readable checkpoint "
                         f"({type(error).__name__})") from error


def load_weights(module, state, where):
    """load_state_dict; ValueError, naming `where` they are from, for another architecture."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{where}: its network has another architecture: "
                         f"{str(error).splitlines()[-1].strip()}") from error


def continue_from(saved, net, ema, optimizer):
    """A training state from a checkpoint, or a beginning: -> step, seconds, rows, tally."""
    if saved is None:
        return 0, 0.0, [], torch.zeros(2)
    load_weights(net, saved["net"], "checkpoint")
    load_weights(ema, saved["ema"], "checkpoint")
    optimizer.load_state_dict(saved["optimizer"])
    return saved["step"], saved["seconds"], list(saved["rows"]), saved.get("tally", torch.zeros(2))


# ------------------------------------------------------------------ devices


def pick_device(name):
    """--device, or CUDA where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':')[1].strip()}, {threads}"
    return f"{platform.machine()} CPU, {threads}"


def pick_precision(name, device):
    """--precision, or bf16 where there are matrix units for it: elsewhere it is slowly emulated."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    with contextlib.suppress(OSError):
        return "bf16" if "amx_bf16" in Path("/proc/cpuinfo").read_text() else "fp32"
    return "fp32"


class Graphed:
    """`work`, a function of nothing that returns nothing, to be called again and again. On CUDA the
    first three calls run as they are and allocate what lasts; the fourth is recorded as one CUDA
    graph, which is replayed from then on: one launch for hundreds of kernels, and nothing that the
    host waits for. So what changes between calls must lie in tensors that `work` itself reads and
    writes in place. Elsewhere a call is a call."""

    def __init__(self, work, device):
        self.work, self.calls, self.graph = work, 0, None
        alone = processes()[1] == 1  # what processes tell each other is not recorded
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and alone else None

    def __call__(self):
        if self.stream is None:
            return self.work()
        self.calls += 1
        if self.calls <= 3:
            current = torch.cuda.current_stream(self.stream.device)
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                self.work()
            return current.wait_stream(self.stream)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.work()
        self.graph.replay()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory():
    """Ask glibc to keep freed blocks for the next step instead of returning them to the kernel,
    which would zero each page again."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def commit():
    """The commit that the code was at, with a + if changed since; None outside a checkout."""
    def git(*args):
        return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], check=True,
                              capture_output=True, text=True).stdout.strip()
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
