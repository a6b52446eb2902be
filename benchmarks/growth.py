"""The cost of a step, the bank and a job as they grow: ``python -m benchmarks.growth``.

It measures a step of EGA at larger batches, and the bank at more views. It measures the same batches on more processes,
beside the student alone, with DDP's exchange of gradients and without. From the sizes of these steps' messages it
computes the traffic with many GPUs. A bank of random embeddings costs what a real one does.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from benchmarks.common import cores, machine, median_seconds, now, peak_memory, print_table, three_digits
from benchmarks.pipeline import Ours, load_images, time_encoding
from benchmarks.random_clip import SIZES, write_archive
from dataset import DATASETS, ImageDataset
from dataset.views import CIFAR_VIEWS
from distiller_zoo import EGA
from helper import distributed, launch
from helper.bank import EmbeddingBank
from helper.encoder import load_encoder
from helper.exits import exit_on_bad_input
from helper.objective import Objective
from helper.optim import sgd
from helper.options import parse_student_options
from helper.parser import positive_int
from helper.runtime import resolve_amp, resolve_compile, resolve_device
from helper.step import Distillation, Step
from models import create_student, model_dict


def student_options(args: argparse.Namespace, batch_size: int) -> argparse.Namespace:
    """train_student.py's options for a step on ``batch_size`` samples."""
    opt = parse_student_options(["--model_s", args.model_s, "--batch_size", str(batch_size)])
    opt.device, opt.teacher_views = resolve_device(args.device), 1
    opt.amp = resolve_amp(args.amp, opt.device)
    opt.compile = resolve_compile(args.compile, opt.device, 0)
    opt.graph = "on" if opt.device == "cuda" and distributed.count() == 1 else "off"
    return opt


def measure_step(dataset: ImageDataset, args: argparse.Namespace) -> list[float]:
    """A step on ``args.worker`` samples: its seconds, EGA's share of them, images per second, peak MiB of tensors."""
    opt = student_options(args, args.worker)
    ours = Ours(dataset, args.dim, opt, warm_up=1 if opt.device == "cpu" else 10)
    draw = next(ours.loader.draws(1))
    (seconds,) = median_seconds([lambda: ours.step(draw, 1)], args.seconds, opt.device)
    f_s, f_t = torch.randn(2, args.worker, opt.feature_dim, device=opt.device)
    f_s.requires_grad_()
    loss = EGA()
    (ega,) = median_seconds([lambda: torch.autograd.grad(loss(f_s, f_t), f_s)], args.seconds / 4, opt.device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # before the profiler takes memory
    with mock.patch.object(ours.step, "record", None, create=True):  # a replayed step allocates nothing
        peak = peak_memory(lambda: ours.step(draw, 1), opt.device) / 2**20
    return [seconds, ega, args.worker / seconds, peak, resident]


def step_row(args: argparse.Namespace, batch_size: int) -> list[str]:
    """One row: batch, ms of a step, EGA's ms, images per second, peak MiB."""
    seconds, ega, rate, peak, resident = start(args, batch_size, "step")
    times = [three_digits(1e3 * value) for value in (seconds, ega)]
    return [f"{batch_size}", *times, f"{rate:.0f}", three_digits(peak), three_digits(resident)]


def bank_row(dataset: ImageDataset, args: argparse.Namespace, views: int, encoding: float) -> list[str]:
    """One row: views, rows, MiB on disk, hours to encode, ms to look 64 samples up; a dash where it is not tried."""
    num_train, num_test = len(dataset.train), len(dataset.test)
    rows = num_test + views * num_train
    size = 2 * args.dim * rows / 2**20
    lookup = "-"
    if size < args.max_bank:
        device = torch.device(resolve_device(args.device))
        filled = torch.zeros(rows, args.dim, dtype=torch.float16, device=device).fill_(1)
        bank = EmbeddingBank(filled, num_train, num_test, views, device, dataset.views)
        index = torch.randint(num_train, (64,), device=device)
        view = torch.full_like(index, dataset.views.test)
        (seconds,) = median_seconds([lambda: bank("train", index, view)], 0.5, device.type)
        lookup = three_digits(1e3 * seconds)
    return [f"{views}", f"{rows}", f"{size:.0f}", f"{rows * encoding / 3600:.2f}", lookup]


def start(args: argparse.Namespace, batch_size: int, what: str, processes: int = 1) -> list[float]:
    """Measure in fresh processes, which share the cores; a process that has run before keeps its memory."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else [])]
    names = ("model_s", "dim", "dataset", "data_dir", "device", "amp", "compile", "steps", "seconds")
    words = [word for name in names for word in (f"--{name}", str(getattr(args, name)))]
    command += ["-m", "benchmarks.growth", "--worker", str(batch_size), "--measure", what, *words]
    threads = str(max(1, cores() // processes))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "TORCH_CPP_LOG_LEVEL": "ERROR"}
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def measure_job(dataset: ImageDataset, args: argparse.Namespace) -> list[float]:
    """Measure a step on ``args.worker`` samples of all processes.

    It gives seconds of the student alone without an exchange, of the student alone, and of EGA; then bytes of the
    gradients and of EGA's own messages.

    The three take turns, so that other work on the machine slows them alike; the seconds are medians. No step is
    captured, as steps of many processes never are.
    """
    ours = Ours(dataset, args.dim, student_options(args, args.worker), warm_up=1, captured=False)
    opt, classes = ours.opt, len(dataset.classes)
    student = create_student(opt.model_s, opt.feature_dim, classes).to(opt.device, memory_format=torch.channels_last)
    objective = Objective(None, (), gamma=1, alpha=0, beta=0, kd_T=1)
    losses = Distillation(student, None, objective, ours.loader, opt)
    scaler = torch.amp.GradScaler(opt.device, enabled=False)
    alone = Step(losses, [sgd(student.parameters(), opt.learning_rate, opt)], scaler, ours.loader)
    draw, times = next(ours.loader.draws(1)), []
    for _ in range(args.steps):
        clock = [now(opt.device)]
        with distributed.unsynchronised(alone.losses):
            alone(draw, 1)
        clock.append(now(opt.device))
        alone(draw, 1)
        clock.append(now(opt.device))
        ours.step(draw, 1)
        clock.append(now(opt.device))
        times.append([end - start for start, end in itertools.pairwise(clock)])
    gradients = sum(
        p.nbytes for optimizer in ours.optimizers for group in optimizer.param_groups for p in group["params"]
    )
    messages, all_reduce = [], torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda x, *args: messages.append(x.nbytes) or all_reduce(x, *args)
    ours.step(draw, 1)
    torch.distributed.all_reduce = all_reduce
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return [*distributed.from_first(medians), gradients, sum(messages)]


def wire_row(gpus: int, gradients: float, messages: list[float]) -> list[str]:
    """MiB that each GPU sends, and receives, in a step: a ring's all-reduce moves 2 (N - 1) / N times a message."""
    sent = [2 * (gpus - 1) / gpus * size / 2**20 for size in (gradients, *messages)]
    return [f"{gpus}", *map(three_digits, sent), *(f"{100 * size / sent[0]:.0f}%" for size in sent[1:])]


def work(args: argparse.Namespace) -> None:
    """The work of such a process."""
    dataset, _ = load_images(args.dataset, args.data_dir)
    print(json.dumps((measure_step if args.measure == "step" else measure_job)(dataset, args)))


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    numbers = {"type": positive_int, "nargs": "*"}  # no number leaves the table out
    parser.add_argument("--batches", default=[64, 128, 256, 512, 1024, 2048, 4096], help="sizes of a step", **numbers)
    parser.add_argument("--views", default=[1, 4, 16, 64, CIFAR_VIEWS.count], help="of the bank", **numbers)
    parser.add_argument("--processes", default=[1, 2, 4], help="of a job", **numbers)
    parser.add_argument("--job_batches", default=[64, 512], help="sizes of a job's step, of all processes", **numbers)
    parser.add_argument("--seconds", type=float, default=5, help="time to spend on each batch size")
    parser.add_argument("--steps", type=positive_int, default=60, help="steps of each job, of each kind")
    parser.add_argument("--chunks", type=positive_int, default=3, help="chunks of the bank to encode")
    parser.add_argument("--max_bank", type=float, default=4096, help="MiB of the largest bank that is looked up in")
    parser.add_argument(
        "--size", choices=tuple(SIZES), default="ViT-B/32", help="size of the teacher, with random weights"
    )
    parser.add_argument("--clip_mode", metavar="PATH", help="a CLIP's checkpoint to use instead")
    parser.add_argument("--dim", type=positive_int, default=512, help="of its embeddings")
    parser.add_argument("--model_s", choices=tuple(model_dict), default="resnet8x4", help="student's backbone")
    parser.add_argument("--dataset", choices=tuple(DATASETS), default="cifar100", help="data set")
    parser.add_argument(
        "--data_dir", default="./data", help="folder of the data sets; without the data, random images serve"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to compute on")
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="autocast")
    parser.add_argument("--compile", choices=("on", "off"), default="off", help="torch.compile the student")
    parser.add_argument("--worker", type=positive_int, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=("step", "job"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_options(argv)
    if args.worker is not None:
        with launch.processes():
            work(args)
        return
    with exit_on_bad_input("benchmarks.growth"), tempfile.TemporaryDirectory() as folder:
        opt = student_options(args, 64)
        dataset, data_name = load_images(args.dataset, args.data_dir)
        print(f"{machine(opt.device)}\n", flush=True)
        print(f"EGA from a bank of 1 view to {args.model_s}, {data_name}, amp {opt.amp}, compile {opt.compile}\n")
        if args.batches:
            header = ("batch", "ms per step", "of it EGA", "images/s", "tensors, peak MiB", "process, peak MiB")
            print_table(header, (step_row(args, batch) for batch in args.batches))
        if args.views:
            clip_mode = args.clip_mode
            if clip_mode is None:
                clip_mode = str(Path(folder) / "random.pt")
                write_archive(Path(clip_mode), SIZES[args.size])
            encoder = load_encoder(clip_mode, folder, opt.device, opt.amp)
            encoding = time_encoding(dataset, encoder, args.chunks, torch.device(opt.device))
            name = args.size if args.clip_mode is None else encoder.name
            print(f"{name}: {1e3 * encoding:.2f} ms to encode an image\n")
            header = ("views", "rows", "MiB", "hours to encode", "look-up of 64, ms")
            print_table(header, (bank_row(dataset, args, views, encoding) for views in args.views))

    sizes = {}

    def job_row(processes: int, batch: int) -> list[str]:
        *seconds, gradients, messages = start(args, batch, "job", processes)
        if processes > 1:
            sizes[batch] = (gradients, messages)
        alone, ddp, ega = (1e3 * value for value in seconds)
        times = map(three_digits, (alone, ddp - alone, ega - ddp, ega))
        return [f"{batch}", f"{processes}", f"{max(1, cores() // processes)}", *times, f"{1e3 * batch / ega:.0f}"]

    if opt.device == "cuda":  # each process needs a GPU
        args.processes = [processes for processes in args.processes if processes <= torch.cuda.device_count()]
    if not (args.processes and args.job_batches):
        return
    parts = ("the student alone, ms", "DDP's exchange", "EGA and its exchange", "a step, ms")
    header = ("batch", "processes", "threads each", *parts, "images/s")
    jobs = [(processes, batch) for batch in args.job_batches for processes in args.processes]
    print_table(header, itertools.starmap(job_row, jobs))
    if sizes:
        (gradients, *_), messages = zip(*sizes.values(), strict=True)
        names = [f"EGA, batch {batch}" for batch in sizes]
        header = ("GPUs", "gradients, MiB", *(f"{name}, MiB" for name in names), *(f"{name}, share" for name in names))
        print_table(header, (wire_row(gpus, gradients, messages) for gpus in (8, 64, 1024)))


if __name__ == "__main__":
    main()
