"""The CLIP that pretrain_clip.py trains: made from a seed, and published in OpenAI's format."""

import argparse
import copy

import torch
from clip.model import CLIP, convert_weights

from dataset.loader import Loader
from errors import InputError
from models.library import synchronize_norms

# CLIP's text encoder reads captions of up to 77 of these byte pairs.
CONTEXT_LENGTH, VOCABULARY = 77, 49408

# About the length of the published models' image embeddings.
EMBEDDING_NORM = 10


def create_clip(opt: argparse.Namespace) -> CLIP:
    """OpenAI's architecture with the weights that ``opt.seed`` gives, on the CPU."""
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


def build_clip(opt: argparse.Namespace) -> CLIP:
    """The CLIP that the options describe, on the device."""
    model = create_clip(opt)
    model = synchronize_norms(model) if opt.sync_bn else model
    return model.to(opt.device, memory_format=torch.channels_last)


def check_batch_norm(opt: argparse.Namespace, loader: Loader) -> None:
    """Raise an InputError where a ResNet's batch norm would see a single image with maps of one pixel.

    A loader and ``chunks`` join an image that would be left alone to others. Two cases remain: ``--micro_batch 1``
    and a data set of one image.
    """
    if opt.sync_bn or opt.resolution > 32 or not isinstance(opt.vision_layers, tuple):
        return
    if opt.micro_batch == 1 or loader.last == 1:
        alone = "--micro_batch 1" if opt.micro_batch == 1 else "a data set of one image"
        raise InputError(
            f"{alone}: a ResNet's batch norm cannot take one image alone at --resolution 32; use a larger number"
        )


@torch.no_grad()
def published_state(model: CLIP, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state dict as OpenAI publishes one: on the CPU, in fp16 where ``clip.load`` wants it so.

    Training leaves the length of the image embeddings open, as the loss normalises them. The last linear map is
    scaled so that their mean length is ``EMBEDDING_NORM``: heads take the embeddings as they are, and the heads'
    learning rates were chosen on the published models.

    Args:
        image: normalised images (B, 3, H, W) to take the mean over.
    """
    model = copy.deepcopy(model).eval()
    scale = EMBEDDING_NORM / model.encode_image(image).norm(dim=1).mean()
    last = [model.visual.proj] if hasattr(model.visual, "proj") else model.visual.attnpool.c_proj.parameters()
    for parameter in last:
        parameter.mul_(scale)
    convert_weights(model)
    return model.cpu().state_dict()
