"""Train a small CLIP from scratch on images and captions: ``python pretrain_clip.py --dataset shapes``.

The result, SAVE/clip/NAME/clip.pt, is a state dict in OpenAI's format and precision:
``train_student.py --clip_mode SAVE/clip/NAME/clip.pt`` takes it for a teacher like any published one.
"""

import argparse
import copy
import time

import torch
from clip.model import CLIP, convert_weights

from dataset.loader import Loader, deal
from helper import checkpoint, distributed, training
from helper.contrastive import Images, caption_tokens, zero_shot_accuracy
from helper.data import eval_batch_size, open_dataset
from helper.exits import exits
from helper.meters import print_record
from helper.names import data_name
from helper.options import (
    add_data_options,
    add_run_options,
    add_training_speed_options,
    check_data,
    recorded_options,
)
from helper.parser import Parser, number, positive, positive_int, weight
from helper.run import Run
from helper.runtime import resolve
from helper.util import exit_on_bad_input
from models.library import synchronize_norms

# CLIP's text encoder reads captions of up to 77 of these byte pairs.
CONTEXT_LENGTH, VOCABULARY = 77, 49408

# About the length of the published models' image embeddings.
EMBEDDING_NORM = 10


def vision_layers(text: str) -> int | tuple[int, ...]:
    """'3' to 3, the layers of a ViT; '1,2,2,1' to (1, 2, 2, 1), the blocks of a ModifiedResNet's four stages."""
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        layers = ()
    if len(layers) not in (1, 4) or min(layers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of layers nor four numbers such as 3,4,6,3")
    return layers if len(layers) == 4 else layers[0]


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("pretrain_clip.py", "Train a small CLIP from scratch on images and captions.")
    group = parser.add_argument_group("image encoder")
    group.add_argument(
        "--vision_layers", type=vision_layers, default="1,1,1,1", metavar="N|A,B,C,D", help="of a ViT | of a ResNet"
    )
    group.add_argument("--vision_width", type=positive_int, default=32, help="a ViT's: a multiple of 64")
    group.add_argument("--vision_patch", type=positive_int, help="of a ViT, in pixels; a divisor of --resolution")
    group.add_argument("--resolution", type=positive_int, default=32, help="input height and width in pixels")
    group.add_argument("--embed_dim", type=positive_int, default=128, help="dimension that images and texts share")
    group = parser.add_argument_group("text encoder")
    group.add_argument("--text_layers", type=positive_int, default=2, help="number of layers")
    group.add_argument("--text_width", type=positive_int, default=64, help="a multiple of 64")
    add_data_options(parser)
    group = parser.add_argument_group("optimisation (AdamW)")
    group.add_argument("--learning_rate", type=positive, default=2e-3, help="at its highest")
    group.add_argument("--warmup", type=number(float, 0, 1), default=0.1, help="share of all steps; a cosine follows")
    group.add_argument("--weight_decay", type=weight, default=0.1, help="of matrices; gains and biases have none")
    group.add_argument("--micro_batch", type=positive_int, help="a process encodes so many images at once")
    add_training_speed_options(add_run_options(parser, epochs=8, batch_size=128), "the image encoder")
    opt = parser.parse_args(argv)

    check_data(parser, opt)
    if isinstance(opt.vision_layers, tuple):
        if opt.vision_patch is not None:
            parser.error("--vision_patch is a ViT's, but four --vision_layers make a ResNet; leave one of them out")
        if opt.vision_width % 2:
            parser.error(f"--vision_width {opt.vision_width}: a ResNet's is even")
        if opt.resolution % 32:
            parser.error(f"--resolution {opt.resolution}: a ResNet's is a multiple of 32")
    else:
        if opt.vision_patch is None or opt.resolution % opt.vision_patch:
            parser.error(f"a ViT needs a --vision_patch that divides --resolution {opt.resolution}")
        if opt.vision_width % 64:
            parser.error(f"--vision_width {opt.vision_width}: a ViT's is a multiple of 64, the width of a head")
    if opt.text_width % 64:
        parser.error(f"--text_width {opt.text_width}: it is a multiple of 64, the width of a head")
    if opt.batch_size < 2:
        parser.error("--batch_size 1: a contrastive loss needs at least two images to tell apart")
    return opt


def run_name(opt: argparse.Namespace) -> str:
    if isinstance(opt.vision_layers, tuple):
        vision = f"rn{'-'.join(map(str, opt.vision_layers))}"
    else:
        vision = f"vit{opt.vision_layers}-{opt.vision_patch}"
    return (
        f"{vision}_w{opt.vision_width}_px{opt.resolution}_dim{opt.embed_dim}_text{opt.text_layers}-{opt.text_width}"
        f"_{data_name(opt)}_batchsize{opt.batch_size}_seed{opt.seed}_trial{opt.trial}"
    )


def create_clip(opt: argparse.Namespace) -> CLIP:
    """OpenAI's architecture with the weights that ``opt.seed`` gives."""
    torch.manual_seed(opt.seed)
    return CLIP(
        embed_dim=opt.embed_dim,
        image_resolution=opt.resolution,
        vision_layers=opt.vision_layers,
        vision_width=opt.vision_width,
        vision_patch_size=opt.vision_patch,
        context_length=CONTEXT_LENGTH,
        vocab_size=VOCABULARY,
        transformer_width=opt.text_width,
        transformer_heads=opt.text_width // 64,
        transformer_layers=opt.text_layers,
    )


def check_batch_norm(opt: argparse.Namespace, loader: Loader) -> None:
    """Raise a ValueError where a ResNet would have to normalise the last maps, of a pixel each, of a single image."""
    if opt.sync_bn or opt.resolution > 32 or not isinstance(opt.vision_layers, tuple):
        return
    last = loader.num_samples - (len(loader) - 1) * loader.batch_size
    for size in (min(loader.batch_size, loader.num_samples), last):
        shares = deal(size, opt.processes)
        chunk = opt.micro_batch if opt.micro_batch and max(shares) > opt.micro_batch else size
        if any(share and 1 in (chunk, share % chunk) for share in shares):
            raise ValueError(
                f"a batch of {size} images leaves a process one alone, which a ResNet's batch norm cannot take at "
                "--resolution 32: use another --batch_size, --micro_batch or number of processes"
            )


@torch.no_grad()
def published_state(model: CLIP, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state dict as OpenAI publishes one: on the CPU, in fp16 where ``clip.load`` wants it so.

    Training leaves the length of the image embeddings open, as the loss normalises them. The last linear map is
    scaled so that it is, on average, ``EMBEDDING_NORM``: heads take the embeddings as they come, and the
    learning rates for them were chosen on the published models.

    Args:
        image: (B, 3, H, W), the normalised images of the average.
    """
    model = copy.deepcopy(model).eval()
    scale = EMBEDDING_NORM / model.encode_image(image).norm(dim=1).mean()
    last = [model.visual.proj] if hasattr(model.visual, "proj") else model.visual.attnpool.c_proj.parameters()
    for parameter in last:
        parameter.mul_(scale)
    convert_weights(model)
    return model.cpu().state_dict()


@exits("pretrain_clip.py", memory="lower --micro_batch or --batch_size")
def main(argv: list[str] | None = None) -> None:
    opt = parse_options(argv)

    with exit_on_bad_input("pretrain_clip.py"):
        run = Run(opt, "clip", "clip_tensorboards", run_name(opt), "clip")
        path = run.folder / "clip.pt"
        if run.finished:
            print_result(run)
            return
        dataset = open_dataset(vars(opt))
        captioned = dataset.captioned()
        opt, views = resolve(opt, run.recorded, len(captioned)), dataset.views
        run.record(**recorded_options(opt), dataset_sha256=dataset.fingerprint())
        device = torch.device(opt.device)
        # The views for a teacher are the ones that are resized to its resolution.
        place = {"images": False, "views": views, "rank": distributed.rank(), "processes": distributed.count()}
        how = {"training": True, "seed": opt.seed, "max_steps": opt.max_steps}
        rows = (captioned.targets >= 0).nonzero().flatten()  # the others have no caption
        loader = Loader(captioned, "captioned", opt.batch_size, device, rows=rows, **how, **place)
        size = eval_batch_size(opt.device, opt.resolution)
        test_loader = Loader(dataset.test, "test", size, device, **place)
        check_batch_norm(opt, loader)
        run.start()

    pixels, test_pixels = (Images(split, opt.resolution, device, views) for split in (captioned, dataset.test))
    tokens = caption_tokens(dataset.classes).to(device)
    model = create_clip(opt)
    model = synchronize_norms(model) if opt.sync_bn else model
    model = model.to(device, memory_format=torch.channels_last)
    trained = training.train_clip(opt, model, pixels, tokens, loader)
    if run.state is not None:
        trained.load_state_dict(run.state)
    for epoch in range(run.first_epoch, opt.epochs + 1):
        start = time.perf_counter()
        record = trained.epoch(epoch, run.save_inside)
        if epoch % opt.eval_freq == 0 or epoch == opt.epochs:
            record["zero_shot_acc"] = zero_shot_accuracy(model, test_loader, test_pixels, tokens, opt)
        record["seconds"] = trained.earlier + time.perf_counter() - start
        print_record(record)
        run.end_epoch(record, trained.state_dict(), {"model": model.state_dict()}, opt.save_freq)

    if distributed.rank() == 0:
        sample = next(Loader(dataset.test, "test", size, device, images=False, views=views).epoch())
        checkpoint.save(published_state(model, test_pixels(sample)), path)
    run.finish({})
    print_result(run)


def print_result(run: Run) -> None:
    last = next(record for record in reversed(run.history) if "zero_shot_acc" in record)
    print(f"zero-shot accuracy: {last['zero_shot_acc']:.2f}, in {run.folder / 'clip.pt'}")


if __name__ == "__main__":
    with distributed.processes():
        main()
