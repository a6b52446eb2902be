"""Images per second of EGA as the paper's release trains it, and as this project does with a bank.

``python -m benchmarks.pipeline`` measures both in one run, training steps alone, after a warm-up. A teacher with random
weights costs what a trained one does; so does a bank of random embeddings.
"""

import argparse
import contextlib
import io
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torchvision.datasets import CIFAR100

from benchmarks.common import cores, machine, now, print_table, three_digits
from benchmarks.random_clip import SIZES, write_archive
from benchmarks.release_recipe import release_loader, release_steps
from dataset import DATASETS, ImageDataset, Split, load_dataset
from dataset.loader import Loader, eval_batch_size
from distiller_zoo import EGA, METHODS
from errors import InputError
from helper import distributed
from helper.bank import CHUNK, LAUNCH, EmbeddingBank, chunks_of, encoded, launches_of
from helper.capture import CapturedStep, CudaGraphs, build_step
from helper.encoder import load_encoder
from helper.exits import exit_on_bad_input
from helper.objective import Objective
from helper.optim import sgd
from helper.options import parse_student_options
from helper.parser import positive_int
from helper.runtime import (
    autocast,
    keep_freed_memory,
    resolve_amp,
    resolve_compile,
    resolve_device,
    resolve_teacher_views,
)
from helper.step import Distillation
from helper.teacher import EncoderTeacher
from helper.training import Training
from helper.validation import validate
from models import create_student, model_dict
from models.heads import Outputs, TeacNet

# Both run so many steps before the clock starts: allocations, worker processes, torch.compile, CUDA graphs.
_WARM_UP = 2
_WARM_UP_OURS = 10

# Batches that each worker process makes ahead, by PyTorch's default.
_PREFETCHED = 2


def random_images(train: int = 50_000, test: int = 10_000) -> ImageDataset:
    """Random images of CIFAR-100's shape, in 100 classes."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> Split:
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return Split(images, torch.randint(100, (count,), generator=generator))

    return ImageDataset("random", [str(target) for target in range(100)], split(train), split(test))


def load_images(name: str, data_dir: str) -> tuple[ImageDataset, str]:
    """The data set and its name in the table; random images of CIFAR-100's shape where its files are missing."""
    if name != "cifar100" or (Path(data_dir) / CIFAR100.base_folder).exists():
        return load_dataset(name, data_dir), name
    return random_images(), "random images of CIFAR-100's shape"


def release_steps_of(device: str, workers: int) -> tuple[int, int]:
    """Steps of the release's recipe before the clock starts, and, unless they are given, after.

    On a GPU a step is short and may wait for its batch. The batches that the workers have made ahead are used up before
    the clock starts, and several times as many are measured.
    """
    return (_WARM_UP, 5) if device == "cpu" else (_WARM_UP + _PREFETCHED * workers, 4 * _PREFETCHED * workers)


def time_release(dataset: ImageDataset, encoder: nn.Module, opt, warm_up: int, steps: int, workers: int) -> float:
    """Seconds per image of the release's recipe; the teacher's encoder has the recipe's precision."""
    device = torch.device(opt.device)
    torch.manual_seed(0)
    student = create_student(opt.model_s, opt.feature_dim, len(dataset.classes)).to(device)
    head = TeacNet(encoder.dim, opt.feature_dim, len(dataset.classes)).to(device)
    optimizer_s, optimizer_t = (
        torch.optim.SGD(module.parameters(), lr, momentum=opt.momentum, weight_decay=opt.weight_decay)
        for module, lr in ((student, opt.learning_rate), (head, opt.learning_rate_t))
    )
    loader = release_loader(dataset.train, encoder.resolution, opt.batch_size, workers)
    training = release_steps(loader, encoder, student, head, optimizer_s, optimizer_t, device)
    for _ in range(warm_up):
        next(training)
    start = now(opt.device)
    for _ in range(steps):
        next(training)
    return (now(opt.device) - start) / (steps * opt.batch_size)


def time_encoding(dataset: ImageDataset, encoder: nn.Module, chunks: int, device: torch.device) -> float:
    """Seconds per image of building a bank, which crops, resizes and encodes; so many chunks or a few more."""
    views = 2
    launches = launches_of(chunks_of(dataset, views), dataset, device)
    launches = [launch for launch in launches if launch[0].start >= len(dataset.test) + len(dataset.train)]
    count = -(-chunks // LAUNCH[device.type])
    launches = list(itertools.islice(itertools.cycle(launches), count))
    for _ in encoded(launches[:1], dataset, encoder, views, device):
        pass
    start = now(device.type)
    rows = sum(len(embeddings) for _, embeddings in encoded(launches, dataset, encoder, views, device))
    return (now(device.type) - start) / rows


class Ours:
    """This project's training of EGA from a bank of random embeddings, with the parts that train_student.py uses.

    Args:
        dataset: the images.
        dim: width of the embeddings.
        opt: train_student.py's options, resolved.
        warm_up: steps before anything is measured.
        captured: whether steps may be captured.
        far: the bank stays on the host.
        prepare: changes the student before it is trained.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        dim: int,
        opt,
        warm_up: int = _WARM_UP_OURS,
        captured: bool = True,
        far: bool = False,
        prepare: Callable[[nn.Module], nn.Module] = lambda student: student,
    ):
        self.dataset, self.opt = dataset, opt
        self.device = torch.device(opt.device)
        keep_freed_memory()
        torch.manual_seed(opt.seed)
        rows = (
            torch.randn(len(dataset.test) + opt.teacher_views * len(dataset.train), dim)
            .half()
            .to("cpu" if far else self.device)
        )
        sizes = (len(dataset.train), len(dataset.test), opt.teacher_views)
        bank = EmbeddingBank(rows, *sizes, self.device, dataset.views)
        self.teacher = EncoderTeacher(bank, TeacNet(dim, opt.feature_dim, len(dataset.classes)).to(self.device))
        self.student = prepare(create_student(opt.model_s, opt.feature_dim, len(dataset.classes)))
        self.student.to(self.device, memory_format=torch.channels_last)
        criterion = EGA(opt.node_weight, opt.edge_weight)
        method, weights = METHODS["ega"], (opt.gamma, opt.alpha, opt.beta)
        objective = Objective(criterion, method.feeds, *weights, opt.kd_T, relational=method.relational)
        self.loader = self._loader(None)
        self.losses = Distillation(self.student, self.teacher, objective, self.loader, opt, trains_head=True)
        self.optimizers = [
            sgd(self.student.parameters(), opt.learning_rate, opt),
            sgd(self.teacher.head.parameters(), opt.learning_rate_t, opt),
        ]
        scaler = torch.amp.GradScaler(opt.device, enabled=opt.amp == "fp16")
        graph = opt.graph if captured else "off"
        self.step = build_step(graph, self.losses, self.optimizers, scaler, self.loader, self.teacher)
        self.training = Training(opt, self.step, self.student, {})
        if warm_up:
            self.train(warm_up)

    def _loader(self, steps: int | None) -> Loader:
        opt = self.opt
        return Loader(
            self.dataset.train,
            "train",
            opt.batch_size,
            self.device,
            training=True,
            seed=opt.seed,
            teacher_views=opt.teacher_views,
            max_steps=steps,
            views=self.dataset.views,
            rank=distributed.rank(),
            processes=distributed.count(),
        )

    def train(self, steps: int) -> float:
        """Seconds that ``steps`` steps take.

        Raises:
            RuntimeError: the steps should have been captured and were not, so that the time would mean something else.
        """
        self.loader.max_steps = steps
        with contextlib.redirect_stdout(io.StringIO()) as said:
            start = now(self.opt.device)
            self.training.epoch(1, save=None)
            seconds = now(self.opt.device) - start
        if "not captured" in said.getvalue():
            raise RuntimeError(said.getvalue())
        return seconds

    def time_test_pass(self) -> float:
        """Seconds of a test pass of the student and the teacher."""
        opt = self.opt
        views = self.dataset.views
        size = eval_batch_size(opt.device, views.size)
        loader = Loader(self.dataset.test, "test", size, self.device, views=views)
        validate(loader, self.student, self.teacher, opt)
        start = now(opt.device)
        validate(loader, self.student, self.teacher, opt)
        return now(opt.device) - start

    def time_bare_student(self, steps: int) -> float:
        """Seconds of the student's forward and backward pass alone, in the same mode, always on one batch."""
        opt = self.opt
        batch = next(self.loader.epoch(1))

        def step() -> None:
            with autocast(opt.device, opt.amp):
                out = self.losses.compiled(batch.image)
            loss = F.cross_entropy(out.logits.float(), batch.target)
            self.optimizers[0].zero_grad(set_to_none=True)
            loss.backward()

        run, graphs = step, CudaGraphs() if isinstance(self.step, CapturedStep) else None
        for _ in range(_WARM_UP):
            step() if graphs is None else graphs.run(step)
        if graphs is not None:
            run = graphs.record(step)
        start = now(opt.device)
        for _ in range(steps):
            run()
        return now(opt.device) - start


def time_parts(ours: Ours, steps: int) -> dict[str, float]:
    """Seconds of each part of a step, by name, from clocks around the functions that a step calls.

    On CUDA the step is then not replayed, and the clock waits for each part: their sum is more than a step takes.
    """
    clock = _Clock(ours.opt.device)
    step, losses = ours.step, ours.losses
    student = clock.around("student: forward", losses.compiled)

    def forward(image: Tensor) -> Outputs:
        out = student(image)
        # Here the backward pass leaves the loss and enters the student.
        out.embedding.register_hook(lambda grad: clock.switch("student: backward"))
        return out

    loss = "loss, forward and backward"
    timed = [
        (ours.loader, "batch", clock.around("views", ours.loader.batch)),
        (ours.teacher, "forward", clock.around("teacher: look-up and head", ours.teacher.forward)),
        (losses, "compiled", forward),
        (losses, "objective", clock.around(loss, losses.objective)),
        (Tensor, "backward", clock.around(loss, Tensor.backward)),
    ]
    if isinstance(step, CapturedStep):
        timed.append((step, "recorder", None))
    for optimizer in ours.optimizers:
        timed += [
            (optimizer, name, clock.around("optimisers", getattr(optimizer, name))) for name in ("step", "zero_grad")
        ]
    with contextlib.ExitStack() as stack:
        for where, name, function in timed:
            stack.enter_context(mock.patch.object(where, name, function))
        total = ours.train(steps)
    clock.seconds["metrics and the rest"] = total - sum(clock.seconds.values())
    return {name: seconds / steps for name, seconds in clock.seconds.items()}


def time_operations(ours: Ours, steps: int, most: int = 12, captured: bool = False) -> dict[str, float]:
    """Seconds per step inside each of PyTorch's operations, or of CUDA's kernels, the longest by name.

    The rest holds the time that Python adds, and on CUDA the gaps between kernels.

    Args:
        captured: steps are replayed, where they are captured.
    """
    cuda = ours.opt.device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    as_written = mock.patch.object(ours.step, "recorder", None, create=True)
    with (
        contextlib.nullcontext() if captured else as_written,
        profile(activities=activities, acc_events=True) as profiled,
    ):
        total = ours.train(steps)
    spent = {}
    for event in profiled.key_averages():
        if not cuda:
            spent[event.key] = event.self_cpu_time_total * 1e-6 / steps
        elif event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            # Only kernels count: the operations that launched them report the same time again.
            spent[event.key] = event.self_device_time_total * 1e-6 / steps
    longest = dict(sorted(spent.items(), key=lambda item: -item[1])[:most])
    return {name.removeprefix("aten::"): value for name, value in longest.items()} | {
        "all others": total / steps - sum(longest.values())
    }


class _Clock:
    """Adds up the time of named parts."""

    def __init__(self, device: str):
        self.device = device
        self.seconds: dict[str, float] = {}
        self._part, self._since = "", 0.0

    def switch(self, part: str) -> None:
        """End the part that runs, if one does, and begin another; '' begins none."""
        time_ = now(self.device)
        if self._part:
            self.seconds[self._part] = self.seconds.get(self._part, 0.0) + time_ - self._since
        self._part, self._since = part, time_

    def around(self, part: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            self.switch(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch("")

        return timed


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--release_steps",
        type=positive_int,
        metavar="N",
        help="steps of the release's recipe (default: 5 on a CPU, 8 for each worker on CUDA)",
    )
    parser.add_argument("--steps", type=positive_int, default=100, help="steps of this project")
    parser.add_argument("--chunks", type=positive_int, default=3, help=f"chunks of {CHUNK} images to encode")
    parser.add_argument("--workers", type=positive_int, default=cores(), help="the release's worker processes")
    parser.add_argument("--size", choices=tuple(SIZES), default="ViT-B/32", help="size of a CLIP with random weights")
    parser.add_argument("--clip_mode", metavar="PATH", help="a CLIP's checkpoint to use instead")
    parser.add_argument("--model_s", choices=tuple(model_dict), default="resnet8x4", help="student's backbone")
    parser.add_argument("--batch_size", type=positive_int, default=64, help="samples per step")
    parser.add_argument("--teacher_views", type=positive_int, default=1, help="views of each image in the bank")
    parser.add_argument("--dataset", choices=tuple(DATASETS), default="cifar100", help="data set")
    parser.add_argument("--data_dir", default="./data", help="folder of the data sets")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to compute on")
    parser.add_argument("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto", help="this project's")
    parser.add_argument("--compile", choices=("on", "off"), default="off", help="torch.compile this project's student")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_options(argv)
    with exit_on_bad_input("benchmarks.pipeline"), tempfile.TemporaryDirectory() as folder:
        opt = parse_student_options(["--model_s", args.model_s, "--batch_size", str(args.batch_size)])
        opt.device = resolve_device(args.device)
        opt.amp = resolve_amp(args.amp, opt.device)
        opt.compile = resolve_compile(args.compile, opt.device, 0)
        opt.graph = "on" if opt.device == "cuda" and distributed.count() == 1 else "off"
        dataset, data_name = load_images(args.dataset, args.data_dir)
        opt.teacher_views = resolve_teacher_views(args.teacher_views, opt.device, dataset.views)
        longest = len(dataset.train) // args.batch_size
        warm_up, release_steps = release_steps_of(opt.device, args.workers)
        release_steps = args.release_steps or release_steps
        if max(warm_up + release_steps, args.steps) > longest:
            raise InputError(
                f"--steps and --release_steps: an epoch of {data_name} has {longest} full batches of "
                f"{args.batch_size}, and the release's recipe warms up on {warm_up} of them; take fewer"
            )
        clip_mode = args.clip_mode
        if clip_mode is None:
            clip_mode = str(Path(folder) / "random.pt")
            write_archive(Path(clip_mode), SIZES[args.size])
        # The release's teacher computes in fp32 on a CPU, and in fp16 on CUDA, as every CLIP does.
        encoder_release = load_encoder(clip_mode, folder, opt.device, "off")
        encoder = load_encoder(clip_mode, folder, opt.device, opt.amp)

    teacher = args.size if args.clip_mode is None else encoder.name
    mode = f"amp {opt.amp}; compile {opt.compile}"
    print(f"{machine(opt.device)}\n\n{teacher} to {opt.model_s}, batch {opt.batch_size}, {data_name}\n", flush=True)

    release = time_release(dataset, encoder_release, opt, warm_up, release_steps, args.workers)
    ours = Ours(dataset, encoder.dim, opt)
    own = ours.train(args.steps) / (args.steps * opt.batch_size)
    bare = ours.time_bare_student(args.steps) / (args.steps * opt.batch_size)
    rows = [
        (f"the release's recipe (workers: {args.workers}; steps: {release_steps})", release),
        (f"this project, bank of {_views(opt.teacher_views)} ({mode}; steps: {args.steps})", own),
        ("forward and backward pass of the student alone, in the same mode", bare),
    ]
    print_table(
        ("training", "images/s", "ms per image", "times faster"),
        ((name, f"{1 / seconds:.1f}", f"{1e3 * seconds:.3f}", f"{release / seconds:.1f}") for name, seconds in rows),
    )

    training, testing = own * len(dataset.train), ours.time_test_pass()
    print_table(
        ("this project's epoch", "training, s", "test pass, s", f"{opt.epochs} epochs, hours"),
        [("", f"{training:.2f}", f"{testing:.2f}", three_digits(opt.epochs * (training + testing) / 3600))],
    )
    encoding = time_encoding(dataset, encoder, args.chunks, torch.device(opt.device))
    print_table(
        ("building the bank", "ms per image", "images to encode", "minutes", "paid back after epochs"),
        (
            _bank_row(encoding, views, len(dataset.train), len(dataset.test), saved=release - own)
            for views in sorted({1, 16, dataset.views.count or 16, opt.teacher_views})
        ),
    )

    parts = time_parts(ours, args.steps)
    total = sum(parts.values())
    operations = time_operations(ours, args.steps)
    parts |= {"sum, with the clocks": total, "a step, without them": own * opt.batch_size}
    print_table(
        ("part of this project's step", "ms", "share"),
        ((name, f"{1e3 * seconds:.3f}", f"{seconds / total:.1%}") for name, seconds in parts.items()),
    )
    total = sum(operations.values())
    print_table(
        ("operation", "ms per step", "share"),
        ((name, f"{1e3 * seconds:.3f}", f"{seconds / total:.1%}") for name, seconds in operations.items()),
    )


def _views(count: int) -> str:
    return "1 view" if count == 1 else f"{count} views"


def _bank_row(encoding: float, views: int, num_train: int, num_test: int, saved: float) -> list[str]:
    """The cost of a bank of so many views; ``saved`` is the time in seconds per image that it saves in every epoch."""
    images = views * num_train + num_test
    epochs = f"{images * encoding / (num_train * saved):.1f}" if saved > 0 else "-"
    return [_views(views), f"{1e3 * encoding:.2f}", f"{images}", f"{images * encoding / 60:.1f}", epochs]


if __name__ == "__main__":
    main()
