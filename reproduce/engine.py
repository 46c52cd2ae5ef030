"""A way through the stages: a list of steps, each one command line of one stage. What is finished is kept.

experiments.py and paper.py describe what they want as steps. Here they are run, timed, and estimated beforehand. A kill
loses the step that ran, no more: a training stage goes on from its last checkpoint.
"""
import contextlib
import datetime
import fcntl
import importlib
import io
import json
import re
import statistics
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from table import markdown

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # whoever imports this module can import the stages


@dataclass
class Step:
    """One command line of one stage."""

    stage: str
    model: str
    folder: Path  # --out; of fid.py, where the samples are
    flags: str

    @property
    def note(self):
        """Written when the step has ended: how long it took, and whether the loss became infinite or not a number."""
        return self.folder / f"{self.stage}.done"

    @property
    def command(self):
        out = f"--out {self.folder}"
        if self.stage == "fid":
            out = f"{self.folder}/samples.npz --json {self.folder}/fid.json"
        return f"{out} {self.flags}".split()

    @property
    def kind(self):
        """Steps of one kind take as long for each unit."""
        return f"{self.stage} {self.model}"

    @property
    def units(self):
        """How much work it is: steps of a recovery, images to draw, or one."""
        asked = re.search(r"--steps (\d+)" if self.stage == "distill" else r"--num-images (\d+)", self.flags)
        return int(asked[1]) if asked else 1


def slug(text):
    """A name for a folder, of no more than 120 letters."""
    name = re.sub(r"[^\w.,:=]+", "-", text).strip("-")
    return name if len(name) <= 120 else f"{name[:110]}-{zlib.crc32(name.encode()):x}"


def way(model, folder, source, cut, recovery, samplings, more):
    """The steps of a cut, its recovery, and sets of samples, each in a folder below the one before, named after its
    flags. An empty text leaves a step out. more: {stage: flags that are not in the names}."""
    steps = []
    if cut:
        folder /= slug(f"cut {cut}")
        steps.append(Step("prune", model, folder, f"{source} {cut} {more['prune']}"))
        source = f"--ckpt {folder}/shallow.pt"
    if recovery:
        flags = f"--student {folder}/shallow.pt {recovery} {more['distill']}"
        folder /= slug(recovery)
        steps.append(Step("distill", model, folder, flags))
        source = f"--ckpt {folder}/student.pt"
    for sampling in samplings:
        samples = folder / slug(f"samples {sampling}")
        flags = f"{source} {sampling} {more['sample']}".replace("STUDENT", str(folder))
        steps.append(Step("sample", model, samples, flags))
        if more["fid"]:
            steps.append(Step("fid", model, samples, more["fid"]))
    return steps


def run(steps, gpus=0):
    """Runs what is not finished, in this order. -> {stage: its note}.

    A recovery may diverge, as two of the paper's table 5 do; that is a result too, and the steps after it are left out.
    gpus: how many, or 0: on the CPU, in this process and silently, as loading torch takes longer than many a step."""
    notes = {}
    for step in steps:
        step.folder.mkdir(parents=True, exist_ok=True)
        with open(step.folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may need the same step; a kill lets go of the lock
            if not step.note.exists():
                run_step(step, gpus)
        notes[step.stage] = json.loads(step.note.read_text())
        if notes[step.stage]["diverged"]:
            break
    return notes


def run_step(step, gpus):
    started = time.time()
    diverged = False
    try:
        call(step.stage, step.command, gpus)
    except Exception:
        diverged = loss_is_nan(step.folder)
        if not diverged:
            raise
    seconds = round(time.time() - started, 1)
    note = dict(kind=step.kind, units=step.units, seconds=seconds, diverged=diverged)
    step.note.write_text(json.dumps(note))


def call(stage, arguments, gpus):
    if gpus == 0:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                importlib.import_module(stage).main(arguments)
        except BaseException:
            print(said.getvalue()[-2000:], file=sys.stderr)
            raise
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
        print("---", stage, *arguments, flush=True)
        subprocess.run([*torchrun, f"{stage}.py", *arguments], check=True)


def loss_is_nan(folder):
    log = folder / "log.jsonl"
    return log.exists() and re.search("NaN|Infinity", log.read_text()[-500:]) is not None


def timings(folder):
    """{kind: [seconds a unit, ...]} of all steps that were run below a folder."""
    found = {}
    for file in folder.rglob("*.done"):
        note = json.loads(file.read_text())
        found.setdefault(note["kind"], []).append(note["seconds"] / note["units"])
    return found


def estimate(steps, measured, assumed):
    """A table of what is not finished, and how long it may take.

    measured: as `timings` says. assumed: {stage: seconds a unit} where nothing was measured."""
    units = {}
    for step in {step.note: step for step in steps}.values():  # cells share steps
        if not step.note.exists():
            units.setdefault(step.kind, []).append(step.units)
    lines = []
    total = 0
    for kind, counts in sorted(units.items()):
        each = statistics.median(measured.get(kind, [assumed[kind.split()[0]]]))
        seconds = round(each * sum(counts))
        total += seconds
        lines.append([kind, len(counts), f"{sum(counts):,}", f"{each:.3g}", datetime.timedelta(seconds=seconds)])
    together = datetime.timedelta(seconds=total)
    return markdown(["step", "how many", "units", "seconds a unit", f"in all {together}"], lines)
