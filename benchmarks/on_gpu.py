"""All that only a GPU can show, in the order of its worth: ``bash scripts/prove_gpu.sh``, or this module.

Each step is a process with a time limit of its own. It writes its results into OUT/STEP.json, part by part; a part that
fails is told, and the next one goes on. Parts that are done are passed over when the command is given again. The tables
are printed last, and once more by ``python -m report.gpu OUT``. ``--rehearse`` does all of it on a CPU, at toy length.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import dataset as datasets
from benchmarks.common import cores, machine, now
from benchmarks.ega_loss import compare
from benchmarks.encoders import write_random_weights
from benchmarks.pipeline import Ours, random_images, release_steps_of, time_encoding, time_operations, time_release
from benchmarks.random_clip import SIZES, write_archive
from dataset import ImageDataset
from distiller_zoo import EGA, METHODS
from errors import SpeedUpFailed
from helper import bank, distributed, training
from helper.acquaint import acquaint
from helper.capture import CapturedStep
from helper.checkpoint import write_bytes, write_json
from helper.data import build_loaders
from helper.encoder import load_encoder
from helper.exits import exit_on_bad_input
from helper.objective import build_objective
from helper.options import parse_student_options
from helper.parser import positive, positive_int
from helper.records import read_record
from helper.runtime import compiled, resolve, resolve_amp, resolve_device, why_no_gpu
from helper.student import build_student
from helper.teacher import build_teacher
from models import create_model
from models.library import synchronize_norms

ROOT = Path(__file__).parents[1]

# A CLIP of a rehearsal, see ``benchmarks.random_clip.SIZES``.
_TINY = (16, 32, 1, 64, 16, 77, 49408, 64, 1, 1)

_DIM = 512  # ViT-B/32's embeddings have it

# The runs of the table, the first seed of every method first.
_TABLE = [(method, seed) for seed in range(3) for method in ("none", "kd", "ega", "nce", "ccl")]

# A part that hung gets this error and is not tried again, nor is one that took so many seconds that its step had no
# time left.
_ENDLESS, _LONG = "it did not end", 45


def part(results: dict, args: argparse.Namespace, name: str, function: Callable[[], dict]) -> None:
    """Do a part of a step and save its result, unless it is there; one that failed is tried again."""
    path = args.out / f"{args.step}.json"
    if name in results and results[name].get("error") in (None, _ENDLESS):
        return
    results[name] = {"error": _ENDLESS}
    write_json(results, path)
    start = time.perf_counter()
    try:
        results[name] = function()
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        results[name] = {"error": f"{type(error).__name__}: {error}".partition("\n")[0][:300]}
    except KeyboardInterrupt:
        if time.perf_counter() - start < _LONG:
            del results[name]
            write_json(results, path)
        raise
    results[name]["seconds"] = round(time.perf_counter() - start, 2)
    write_json(results, path)
    print(f"{args.step}, {name}: {json.dumps(results[name])[:300]}", flush=True)


def start(arguments: list, log: Path, **environment: str) -> subprocess.Popen:
    """Start this interpreter on a script of the project; what it prints goes into a file."""
    with log.open("ab") as file:
        command = [sys.executable, "-u", *map(str, arguments)]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file)


def itself(args: argparse.Namespace, *arguments: object) -> list:
    """Arguments that start this module with the same options."""
    same = ["--out", args.out, "--work", args.work, "--data_dir", args.data_dir, "--weights", args.weights]
    same += ["--views", args.views] + ["--rehearse"] * args.rehearse
    same += ["--side_by_side", args.side_by_side] if args.side_by_side else []
    return ["-m", "benchmarks.on_gpu", *same, *arguments]


def images(args: argparse.Namespace) -> ImageDataset:
    """Random images of CIFAR-100's shape, and as many; they train at CIFAR-100's speed."""
    return _images(args.rehearse)


@functools.cache
def _images(few_: bool) -> ImageDataset:
    return random_images(80, 20) if few_ else random_images()


def options(args: argparse.Namespace, *argv: str, amp: str = "auto", compile_: str = "off", graph: bool = True):
    """train_student.py's options of a student on this device."""
    model = "resnet8" if args.rehearse else "resnet8x4"
    argv = ["--model_s", model, "--print_freq", "1000000", *argv] + ["--batch_size", "16"] * args.rehearse
    opt = parse_student_options(argv)
    opt.device = args.device
    opt.amp = resolve_amp(amp, args.device)
    opt.compile = compile_
    opt.graph = "on" if graph and args.device == "cuda" else "off"
    opt.teacher_views = 1
    return opt


def clip(args: argparse.Namespace) -> str:
    """The file of a CLIP with random weights."""
    path = args.work / "random_clip.pt"
    if not path.exists():
        write_archive(path.with_suffix(".part"), _TINY if args.rehearse else SIZES["ViT-B/32"])
        os.replace(path.with_suffix(".part"), path)
    return str(path)


def few(args: argparse.Namespace, count: int, rehearsed: int = 1) -> int:
    """A count, smaller in a rehearsal."""
    return rehearsed if args.rehearse else count


# 1. It runs.


def about_machine(args: argparse.Namespace) -> dict:
    """What this machine is, and whether a compiled layer computes on it."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    found = {"machine": machine(args.device), "cuda": torch.version.cuda, "Python.h": headers, "why no GPU": None}
    if args.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
        found["capability"] = torch.cuda.get_device_capability()
    else:
        found["why no GPU"] = why_no_gpu()
    return found


def compiled_layer(args: argparse.Namespace) -> dict:
    """The seconds until a compiled layer's first passes are done, and its error."""
    layer, x = nn.Linear(64, 64).to(args.device), torch.randn(8, 64, device=args.device)
    begin = now(args.device)
    found = (layer if args.rehearse else compiled(layer))(x)
    found.sum().backward()
    return {"first passes, s": now(args.device) - begin, "error of the result": (found - layer(x)).abs().max().item()}


def losses_of(ours: Ours, steps: int) -> dict:
    """The loss of each of the first steps, and whether they were captured."""
    found, before = [], 0.0
    for draw in itertools.islice(ours.loader.draws(1), steps):
        ours.step(draw, 1)
        totals = ours.step.totals
        place = totals.names.index("train_loss")
        value = totals.sums[place].item()
        found.append((value - before) / len(draw.numbers[0]))
        before = value
    return {"losses": found, "captured": isinstance(ours.step, CapturedStep) and ours.step._replay is not None}


def first_steps(args: argparse.Namespace, far: bool = False, **mode) -> dict:
    """``losses_of`` EGA, from weights, a bank and draws that are the same in every mode.

    Args:
        far: images and bank stay on the host, as they do where the GPU has no room.
        mode: see ``options``; ``device`` besides.
    """
    args = argparse.Namespace(**vars(args) | {"device": mode.pop("device", args.device)})
    room = mock.patch.object(torch.cuda, "mem_get_info", return_value=(0, 1)) if far else contextlib.nullcontext()
    with room:  # the images are copies, as the GPU has those that it has
        data = copy.deepcopy(images(args)) if far else images(args)
        ours = Ours(data, _DIM, options(args, **mode), warm_up=0, far=far)
        return losses_of(ours, few(args, 20, 5))


def runs(results: dict, args: argparse.Namespace) -> None:
    """Does it run, in every mode, and with a CPU's losses?"""
    part(results, args, "machine", lambda: about_machine(args))
    part(results, args, "a compiled layer", lambda: compiled_layer(args))
    part(results, args, "on the CPU", lambda: first_steps(args, device="cpu", amp="off"))
    fp16, on = ("off", "off") if args.device == "cpu" else ("fp16", "on")
    modes = {
        "off": {"amp": "off", "graph": False},
        "off, captured": {"amp": "off"},
        "bf16": {"amp": "bf16", "graph": False},
        "bf16, captured": {"amp": "bf16"},
        "fp16": {"amp": fp16, "graph": False},
        "fp16, captured": {"amp": fp16},
        "off, bank and images on the host": {"amp": "off", "graph": False, "far": True},
        "bf16, compiled": {"amp": "bf16", "graph": False, "compile_": on},
        "bf16, compiled and captured": {"amp": "bf16", "compile_": on},
    }
    for name, mode in modes.items():
        part(results, args, name, lambda mode=mode: first_steps(args, **mode))
    part(results, args, "a capture that fails", lambda: train(args, "train-uncapturable", epochs=1))


# A run's records, and the keys of metrics.jsonl.
_SHOWN = {"seconds_of_epochs": "seconds", "images_per_second": "images_per_second", "lr": "lr"}


def train(args: argparse.Namespace, how: str, epochs: int, *argv: str) -> dict:
    """The epochs of a run of train_student.py on random images, with its records.

    Args:
        how: 'train', or 'train-uncapturable' with a loss that cannot be captured.
    """
    name = "_".join([how, *argv]).replace("--", "")
    save, log = args.work / "save", args.out / f"{args.step}.{name}.log"
    given = ["--dataset", "random", "--name", name, "--save_dir", save, "--clip_mode", clip(args), *argv]
    given += ["--epochs", epochs, "--teacher_views", 1, "--model_s", "resnet8" if args.rehearse else "resnet8x4"]
    given += ["--max_steps", 3, "--batch_size", 16] * args.rehearse + ["--device", args.device, "--print_freq", 1000]
    shutil.rmtree(save / "student_model" / name, ignore_errors=True)
    log.unlink(missing_ok=True)
    job = start(itself(args, "--do", how, "--", *given), log)
    try:
        code = job.wait()
    finally:
        end([job])
    said = log.read_text()
    if code:
        raise RuntimeError(f"exit code {code}: {said.strip().splitlines()[-1]}")
    history = read_record(save / "student_model" / name)[1]
    facts = {key: [record.get(name) for record in history] for key, name in _SHOWN.items()}
    return facts | {"epochs": len(history), "started again": "starting again with --graph off" in said}


class Uncapturable(EGA):
    """EGA with a loss that waits for the GPU."""

    def terms(self, *args) -> dict:
        found = super().terms(*args)
        next(iter(found.values())).item()
        return found


def do_train(args: argparse.Namespace) -> None:
    """Be train_student.py, with random images; see ``train``."""
    import train_student

    datasets.DATASETS["random"] = lambda data_dir: images(args)
    if args.do == "train-uncapturable":
        METHODS["ega"] = dataclasses.replace(
            METHODS["ega"], build=lambda opt, net: Uncapturable(opt.node_weight, opt.edge_weight)
        )
    with mock.patch.object(sys, "argv", ["train_student.py", *args.rest]):
        train_student.main()


# 2. Its speed.


def release_speed(args: argparse.Namespace) -> dict:
    """Images per second of the release's recipe, which encodes every image with the teacher."""
    workers = few(args, cores(), 0)
    warm_up, steps = (1, 1) if args.rehearse else release_steps_of(args.device, workers)
    encoder = load_encoder(clip(args), "", args.device, "off")
    return {
        "images/s": 1 / time_release(images(args), encoder, options(args), warm_up, steps, workers),
        "workers": workers,
    }


def own_speed(args: argparse.Namespace, **mode) -> dict:
    """Images per second of this project's steps, and of the student's forward and backward passes alone."""
    steps = few(args, 600, 4)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ours = Ours(images(args), _DIM, options(args, **mode), warm_up=few(args, 30, 4))
    count = steps * ours.opt.batch_size
    seconds, bare = min(ours.train(steps) for _ in range(few(args, 3))), ours.time_bare_student(steps)
    found = {"images/s": count / seconds, "bare student, images/s": count / bare, "steps": steps, "amp": ours.opt.amp}
    if args.device == "cuda":
        found["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
    return found


def operations(args: argparse.Namespace, captured: bool) -> dict:
    """Milliseconds of a step in each kernel, the longest by name, and between them."""
    ours = Ours(images(args), _DIM, options(args), warm_up=few(args, 30, 4))
    steps = few(args, 20, 2)
    return {"ms": {name: 1e3 * value for name, value in time_operations(ours, steps, captured=captured).items()}}


def beside(args: argparse.Namespace, count: int) -> dict:
    """Images per second of so many processes that train at the same time, all together."""
    folder = args.work / f"beside{count}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if count == 1:
        (folder / "go").touch()
    log = args.out / f"{args.step}.beside.log"
    jobs = [start(itself(args, "--do", "beside", "--", folder, number), log) for number in range(count)]
    try:
        while len(list(folder.glob("ready*"))) < count:
            if any(job.poll() for job in jobs):
                raise RuntimeError(log.read_text().strip().splitlines()[-1])
            time.sleep(0.05)
        (folder / "go").touch()
        if max(job.wait() for job in jobs):
            raise RuntimeError(log.read_text().strip().splitlines()[-1])
    finally:
        end(jobs)
    return {"images/s": sum(json.loads(path.read_text()) for path in folder.glob("rate*"))}


def do_beside(args: argparse.Namespace) -> None:
    """Be one of the processes of ``beside``."""
    folder, number = Path(args.rest[0]), args.rest[1]
    ours = Ours(images(args), _DIM, options(args), warm_up=few(args, 30, 4))
    (folder / f"ready{number}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    steps, begin = 0, time.perf_counter()
    while not steps or time.perf_counter() - begin < few(args, 5, 0):
        ours.train(few(args, 100, 2))
        steps += few(args, 100, 2)
    rate = steps * ours.opt.batch_size / (time.perf_counter() - begin)
    write_json(rate, folder / f"rate{number}")


def speed(results: dict, args: argparse.Namespace) -> None:
    """How fast are steps and epochs, alone and side by side, and where does the time go?"""
    on = "off" if args.rehearse else "on"
    part(results, args, "captured", lambda: own_speed(args))
    part(results, args, "the release's recipe", lambda: release_speed(args))
    part(results, args, "neither", lambda: own_speed(args, graph=False))
    part(results, args, "two epochs", lambda: train(args, "train", 2))
    part(results, args, "compiled and captured", lambda: own_speed(args, compile_=on))
    for count in (1,) if args.rehearse else (1, 2, 4, 8):
        part(results, args, f"{count} side by side", lambda count=count: beside(args, count))
    part(results, args, "kernels of a replay", lambda: operations(args, captured=True))
    part(results, args, "three epochs of cosine", lambda: train(args, "train", 3, "--schedule", "cosine"))
    part(results, args, "kernels of a step", lambda: operations(args, captured=False))
    part(results, args, "compiled", lambda: own_speed(args, graph=False, compile_=on))


# 3. The bank.


def encoding(args: argparse.Namespace, name: str, resolution: int | None, at_once: int) -> dict:
    """Images per second of encoding a bank, so many chunks at once."""
    encoder = load_encoder(name, "", args.device, resolve_amp("auto", args.device), resolution)
    with mock.patch.dict(bank.LAUNCH, {args.device: at_once}):
        count = few(args, max(4 * at_once, 48), 1)
        return {"images/s": 1 / time_encoding(images(args), encoder, count, torch.device(args.device))}


def banks(results: dict, args: argparse.Namespace) -> None:
    """How long does a bank take?"""
    lite2 = None if args.rehearse else write_random_weights("timm:tf_efficientnet_lite2", args.work)
    for at_once in (1, 2) if args.rehearse else (8, 1, 16, 4, 2):
        part(results, args, f"ViT-B/32, {at_once}", lambda n=at_once: encoding(args, clip(args), None, n))
        if not args.rehearse:
            part(results, args, f"lite2, {at_once}", lambda n=at_once: encoding(args, lite2, 160, n))


# 4. The losses.


def method_step(args: argparse.Namespace, method: str) -> dict:
    """Milliseconds of a step of a method with a CNN teacher, and whether it is captured."""
    folder = args.work / ("resnet8_random" if args.rehearse else "resnet32x4_random")
    if not (folder / "ckpt.pth").exists():
        folder.mkdir(parents=True, exist_ok=True)
        arch = folder.name.partition("_")[0]
        torch.save({"model": create_model(arch, 100).state_dict()}, folder / "ckpt.pth")
    argv = ["--distill", method, "--model_s", "resnet8" if args.rehearse else "resnet8x4", "--device", args.device]
    argv += ["--compile", "off", "--print_freq", "1000000"] + ["--batch_size", "16", "--nce_k", "20"] * args.rehearse
    data = images(args)
    with contextlib.redirect_stdout(io.StringIO()):
        opt = resolve(parse_student_options([*argv, "--path_t", str(folder / "ckpt.pth")]), None, len(data.train))
    needs = METHODS[method].needs(clip=False)
    loaders = build_loaders(opt, data)
    teacher = build_teacher(opt, None, 100, needs)
    student = build_student(opt, 100, 32, needs, teacher)
    objective = build_objective(opt, student, teacher, loaders)
    acquaint(objective, teacher, loaders, opt)
    step = training.train_student(opt, student, teacher, objective, loaders).step
    draws = itertools.islice(loaders.train.draws(1), few(args, 40, 3))
    captured, times = "", []
    try:
        for draw in draws:
            begin = now(args.device)
            step(draw, 1)
            times.append(now(args.device) - begin)
    except SpeedUpFailed as error:
        captured = str(error)
    captured = captured or (
        "yes" if getattr(step, "_replay", None) else f"no: --graph {opt.graph}" + " (waits)" * METHODS[method].waits
    )
    return {"ms": 1e3 * min(times), "captured": captured}


def loss_alone(args: argparse.Namespace, batch: int) -> dict:
    """``benchmarks.ega_loss``'s row of a batch."""
    columns = ("batch", "direct, ms", "EGA, ms", "times faster", "direct, peak MiB", "EGA, peak MiB")
    return dict(zip(columns, compare(batch, 256, few(args, 2, 0), args.device), strict=True))


def losses(results: dict, args: argparse.Namespace) -> None:
    """What does each method's step cost, and EGA's loss against the direct formula?"""
    for batch in (8,) if args.rehearse else (64, 1024, 8192):
        part(results, args, f"EGA at {batch}", lambda batch=batch: loss_alone(args, batch))
    for method in ("ega", "crd") if args.rehearse else METHODS:
        if method != "none":
            part(results, args, method, lambda method=method: method_step(args, method))
            if "captured as" in str(results[method].get("captured")) and args.device == "cuda":
                os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # PyTorch needs a fresh process


# 5. The table.


def table(results: dict, args: argparse.Namespace) -> None:
    """Train the table's runs, several side by side, until all are done or it is time.

    Records go into table.json every minute, and each unfinished run's state into OUT/table_RUN.tar, from which a later
    call goes on, also on another machine.
    """
    save = args.work / "save"
    waiting = [f"{method}_seed{seed}" for method, seed in (_TABLE[:2] if args.rehearse else _TABLE)]
    unpack(args.out, save)
    waiting = [name for name in waiting if not results.get(name, {}).get("finished")]
    jobs: dict[str, subprocess.Popen] = {}
    told, first = time.monotonic(), True
    most, compile_ = (1, "off") if args.rehearse else fastest(args)
    # Processes share the cores, for compiling too.
    threads = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    try:
        while waiting or jobs:
            while waiting and len(jobs) < most:  # the first with a teacher makes the bank, and the others wait for it
                name = waiting.pop(0)
                jobs[name] = start(
                    [*table_run(args, name, save), "--compile", compile_], args.out / "runs.log", **threads
                )
            for name, job in list(jobs.items()):
                if job.poll() is not None:
                    del jobs[name]
                    keep(results, args, save, name, job.returncode)
            if first or time.monotonic() - told > 60:
                told, first = time.monotonic(), False
                for name in jobs:
                    keep(results, args, save, name, None)
            time.sleep(0.2)
    finally:
        end(jobs.values())
        for name in jobs:
            keep(results, args, save, name, None)


def unpack(out: Path, save: Path) -> None:
    """Put the states of unfinished runs in place, where they are not there."""
    for path in out.glob("table_*.tar"):
        if not (save / "student_model" / path.stem).exists():
            with tarfile.open(path) as archive:
                archive.extractall(save / "student_model", filter="data")


def fastest(args: argparse.Namespace) -> tuple[int, str]:
    """How many runs are fastest side by side, and whether compiled, as far as was measured."""
    found = {name: part.get("images/s", 0) for name, part in results_of(args.out / "speed.json").items()}
    rates = {int(name.split()[0]): rate for name, rate in found.items() if name.endswith("side by side")}
    count = args.side_by_side or max(rates, key=rates.get, default=8)
    return count, "on" if found.get("compiled and captured", 0) > 1.1 * found.get("captured", 0) > 0 else "off"


def table_run(args: argparse.Namespace, name: str, save: Path) -> list:
    """The command of a run."""
    method, _, seed = name.partition("_seed")
    command = ["train_student.py", "--distill", method, "--seed", seed, "--name", f"table_{name}", "--save_dir", save]
    command += ["--device", args.device, "--save_seconds", 20, "--print_freq", 100000]
    if args.rehearse:
        command = [*itself(args, "--do", "train", "--"), *command[1:], "--dataset", "random", "--model_s", "resnet8"]
        return [*command, "--clip_mode", clip(args), "--epochs", 1, "--batch_size", 16, "--teacher_views", 1]
    teacher = ["--clip_mode", f"timm:tf_efficientnet_lite2={args.weights}", "--teacher_resolution", 160]
    return [*command, "--data_dir", args.data_dir, *teacher, "--teacher_views", args.views, "--model_s", "resnet8x4"]


def keep(results: dict, args: argparse.Namespace, save: Path, name: str, code: int | None) -> None:
    """Keep a run's records, and its state while it is not finished; ``code`` is its exit code, None while it runs."""
    folder, state = save / "student_model" / f"table_{name}", args.out / f"table_{name}.tar"
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    history = [json.loads(line) for line in lines]
    shown = ("epoch", "test_acc", "teacher_acc", "seconds")
    history = [{key: record[key] for key in shown if record.get(key) is not None} for record in history]
    results[name] = {"history": history, "finished": code == 0, "exit code": code}
    if code:
        results[name]["error"] = (args.out / "runs.log").read_text().strip().splitlines()[-1][:300]
    write_json(results, args.out / "table.json")
    if code == 0:
        state.unlink(missing_ok=True)
        print(f"{name}: {history[-1]}", flush=True)
    elif (folder / "resume.pth").exists():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path in sorted(folder.glob("*")):
                if path.suffix in (".pth", ".json", ".jsonl") and "ckpt" not in path.name:
                    archive.add(path, f"{folder.name}/{path.name}")
        write_bytes(buffer.getvalue(), state)


def end(jobs: Iterable[subprocess.Popen], patience: float = 8) -> None:
    """Stop processes that still run, and wait so many seconds for each; a run of training then saves its last epoch."""
    for job in jobs:
        if job.poll() is None:
            job.terminate()
    for job in jobs:
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(patience)
        if job.poll() is None:
            job.kill()


# 6. Collectives.


def grouped_steps(args: argparse.Namespace, sync_bn: bool) -> dict:
    """The losses of EGA's first steps in a process group of one, with every message that many processes send."""
    found = Ours(images(args), _DIM, options(args, amp="off", graph=False), warm_up=0, prepare=_prepare(sync_bn))
    batch = found.loader.batch
    with mock.patch.object(found.loader, "batch", lambda draw: batch(draw)._replace(shares=draw.shares)):
        assert sync_bn is any(isinstance(x, nn.SyncBatchNorm) for x in found.student.modules())
        return losses_of(found, few(args, 5, 2)) | {"wrapped": type(found.step.losses).__name__}


def _prepare(sync_bn: bool) -> Callable[[nn.Module], nn.Module]:
    return synchronize_norms if sync_bn else lambda student: student


def collectives(results: dict, args: argparse.Namespace) -> None:
    """Do NCCL, its losses' gradients and batch norm over processes work?"""
    part(results, args, "alone", lambda: first_steps(args, amp="off", graph=False))
    backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        part(results, args, "a group of one", lambda: grouped_steps(args, sync_bn=False))
        if args.device == "cuda":  # there is none for a CPU
            part(results, args, "--sync_bn", lambda: grouped_steps(args, sync_bn=True))
        x = torch.randn(8, 3, device=args.device, requires_grad=True)
        joined = lambda: {"gathered": torch.equal(distributed.gather(x, [8]), x)}  # noqa: E731
        part(results, args, "rows of all processes", joined)
    finally:
        dist.destroy_process_group()


# The steps in the order of their worth, each with its seconds at most; the table has the rest.
STEPS: dict[str, tuple[Callable[[dict, argparse.Namespace], None], float]] = {
    "runs": (runs, 90),
    "speed": (speed, 150),
    "bank": (banks, 60),
    "losses": (losses, 90),
    "collectives": (collectives, 40),
    "table": (table, float("inf")),
}


def results_of(path: Path) -> dict:
    """What a step has written so far."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def do_step(args: argparse.Namespace) -> None:
    """Be one step."""
    function, _ = STEPS[args.step]
    results = results_of(args.out / f"{args.step}.json")
    function(results, args)
    failed = [name for name, found in results.items() if "error" in found]
    print(f"{args.step}: done" + f"; failed: {', '.join(failed)}" * bool(failed), flush=True)
    sys.exit(3 if failed else 0)


def run_steps(args: argparse.Namespace, steps: list[str], minutes: float) -> None:
    """Run each step in a process of its own, until it is time; say what each one came to."""
    deadline = time.monotonic() + 60 * minutes
    for step in steps:
        if (args.out / f"{step}.done").exists():
            print(f"{step}: done before", flush=True)
            continue
        left = deadline - time.monotonic()
        if left < 5:
            print(f"{step}: no time left", flush=True)
            continue
        begin, log = time.monotonic(), args.out / f"{step}.log"
        job = start(itself(args, "--step", step), log)
        try:
            code = job.wait(min(STEPS[step][1] * (1 if not args.rehearse else 3), left - min(20, left / 4)))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end([job], patience=18)
        took = f"{time.monotonic() - begin:.0f} s"
        last = (log.read_text(errors="replace").strip().splitlines() or ["it printed nothing"])[-1][:300]
        if code == 0:
            (args.out / f"{step}.done").touch()
        told = {0: "done", None: "its time is up"}.get(code, f"failed, exit code {code}")
        print(f"{step}: {told} after {took}" + f": {last}" * (code != 0), flush=True)
    print(flush=True)
    subprocess.run([sys.executable, "-m", "report.gpu", args.out], cwd=ROOT)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0].partition(":")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder of the results")
    parser.add_argument("--minutes", type=positive, default=9, help="time for all steps")
    parser.add_argument("--steps", nargs="+", choices=tuple(STEPS), default=tuple(STEPS), help="what to do, in order")
    parser.add_argument("--rehearse", action="store_true", help="all of it on a CPU, at toy length")
    parser.add_argument("--data_dir", default="./data", help="the table: folder of CIFAR-100")
    what = "the table: weights of the frozen EfficientNet-Lite2"
    parser.add_argument("--weights", default="CLIP/tf_efficientnet_lite2.pth", metavar="PATH", help=what)
    what = "the table: runs at a time; if unset, as many as were fastest"
    parser.add_argument("--side_by_side", type=positive_int, metavar="N", help=what)
    parser.add_argument(
        "--views", type=positive_int, default=16, metavar="N", help="the table: views in the teacher's bank"
    )
    default = Path(tempfile.gettempdir()) / "ega_on_gpu"
    parser.add_argument("--work", type=Path, default=default, help="folder of what need not be kept")
    parser.add_argument("--step", choices=tuple(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--do", choices=("train", "train-uncapturable", "beside"), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out, args.work = args.out.absolute(), args.work.absolute()
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    args.device = "cpu" if args.rehearse else "cuda"
    if argv is None and not args.do:  # who is ended ends what it has started
        signal.signal(signal.SIGTERM, interrupt)
    if args.do:
        (do_beside if args.do == "beside" else do_train)(args)
        return
    with exit_on_bad_input("benchmarks.on_gpu"):
        resolve_device(args.device)
    if args.step:
        do_step(args)
    else:
        run_steps(args, list(args.steps), args.minutes)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(143)
