"""The command line of pretrain_clip.py."""

import argparse

from .data_options import add_data_options, check_data
from .options import add_run_options, add_training_speed_options
from .parser import Parser, number, positive, positive_int, weight


def vision_layers(text: str) -> int | tuple[int, ...]:
    """'3' to 3, the layers of a ViT; '1,2,2,1' to (1, 2, 2, 1), the blocks of a ModifiedResNet's four stages."""
    try:
        layers = tuple(int(part) for part in text.split(","))
    except ValueError:
        layers = ()
    if len(layers) not in (1, 4) or min(layers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of layers nor four numbers such as 3,4,6,3")
    return layers if len(layers) == 4 else layers[0]


def parse_clip_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("pretrain_clip.py", "Train a small CLIP from scratch on images and captions.")
    group = parser.add_argument_group("image encoder")
    group.add_argument(
        "--vision_layers",
        type=vision_layers,
        default="1,1,1,1",
        metavar="N|A,B,C,D",
        help="layers of a ViT, or of a ResNet",
    )
    group.add_argument("--vision_width", type=positive_int, default=32, help="width; a ViT's is a multiple of 64")
    group.add_argument("--vision_patch", type=positive_int, help="a ViT's patches in pixels; they divide --resolution")
    group.add_argument("--resolution", type=positive_int, default=32, help="input height and width in pixels")
    group.add_argument("--embed_dim", type=positive_int, default=128, help="dimension that images and texts share")
    group = parser.add_argument_group("text encoder")
    group.add_argument("--text_layers", type=positive_int, default=2, help="number of layers")
    group.add_argument("--text_width", type=positive_int, default=64, help="width, a multiple of 64")
    add_data_options(parser)
    group = parser.add_argument_group("optimisation (AdamW)")
    group.add_argument("--learning_rate", type=positive, default=2e-3, help="highest learning rate")
    group.add_argument("--warmup", type=number(float, 0, 1), default=0.1, help="share of all steps; a cosine follows")
    group.add_argument("--weight_decay", type=weight, default=0.1, help="that of matrices; gains and biases have none")
    group.add_argument("--micro_batch", type=positive_int, help="images that a process encodes at once")
    add_training_speed_options(add_run_options(parser, epochs=8, batch_size=128), "the image encoder", graph=False)
    opt = parser.parse_args(argv)

    check_data(parser, opt)
    if isinstance(opt.vision_layers, tuple):
        if opt.vision_patch is not None:
            parser.error("--vision_patch is for a ViT, but four --vision_layers make a ResNet; leave one of them out")
        if opt.vision_width % 2:
            parser.error(f"--vision_width {opt.vision_width}: a ResNet's width must be even")
        if opt.resolution % 32:
            parser.error(f"--resolution {opt.resolution}: a ResNet's must be a multiple of 32")
    else:
        if opt.vision_patch is None or opt.resolution % opt.vision_patch:
            parser.error(f"a ViT needs a --vision_patch that divides --resolution {opt.resolution}")
        if opt.vision_width % 64:
            parser.error(f"--vision_width {opt.vision_width}: a ViT's must be a multiple of 64, the width of a head")
    if opt.text_width % 64:
        parser.error(f"--text_width {opt.text_width}: it must be a multiple of 64, the width of a head")
    if opt.batch_size < 2:
        parser.error("--batch_size 1: a contrastive loss needs at least two images to tell apart")
    return opt
