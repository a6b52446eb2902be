"""The frozen CLIP image encoder (Radford et al., ICML 2021), by published name or from a checkpoint."""

import os
import warnings

import clip
import torch
from clip.model import CLIP, build_model
from torch import Tensor

from errors import InputError

from .encoders import FrozenEncoder, TextEncoder
from .names import short_name
from .published import fetch_clip
from .weights import read_state

_NORMALIZE = clip.clip._transform(224).transforms[-1]


def load_clip(path: str | os.PathLike) -> CLIP:
    """A CLIP from a TorchScript archive or a file of weights, on the CPU, in ``eval()`` mode, without gradients.

    Weights that the published files hold in fp16 are fp16, as OpenAI's own loader leaves them; those of a CLIP that was
    fine-tuned in float32 stay so.

    Raises:
        InputError: not a CLIP, or a file that holds anything but plain data.
    """
    state = read_state(path)
    try:
        # Sizes are the file's: no memory is taken for them, and no numbers are drawn that it replaces.
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = build_model(dict(state))
    except (KeyError, AssertionError, RuntimeError, IndexError, ZeroDivisionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a CLIP in OpenAI's format ({reason})") from error
    if state["visual.conv1.weight"].dtype == torch.float32:
        model.float()  # build_model has made it fp16
    weights = {name: state[name].to(x.dtype).contiguous() for name, x in model.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    for block in model.transformer.resblocks:
        block.attn_mask = model.build_attention_mask()  # no weight: it was made without memory too
    return model.eval().requires_grad_(False)


def tokenize(texts: list[str]) -> Tensor:
    """Byte pairs of texts, (N, length) int, cut after the longest text's last token.

    CLIP's text encoder is causal and reads its result at the end-of-text token; the padding behind it never counts.

    Raises:
        InputError: a text is too long for CLIP.
    """
    try:
        tokens = clip.tokenize(texts)
    except RuntimeError as error:
        raise InputError(f"a text is too long for CLIP ({' '.join(str(error).split())[:200]})") from error
    return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]


def load_text_encoder(clip_mode: str, root: str) -> TextEncoder:
    """The text encoder of a published CLIP or of a checkpoint, in float32; see ``fetch_clip`` and ``load_clip``."""
    model = load_clip(fetch_clip(clip_mode, root)[0]).float()
    return TextEncoder(tokenize, model.encode_text, model.text_projection.shape[1])


class ImageEncoder(FrozenEncoder):
    """A CLIP's image encoder in OpenAI's format; its views are bicubic, as in OpenAI's own transform."""

    published = True
    normalization = (tuple(_NORMALIZE.mean), tuple(_NORMALIZE.std))

    def __init__(self, clip_mode: str, root: str, dtype: torch.dtype = torch.float32, resolution: int | None = None):
        """Load a published CLIP or a checkpoint; see ``fetch_clip`` and ``load_clip`` for what else is raised.

        Args:
            clip_mode: a published name or a path.
            root: the folder of the published weights.
            dtype: the type of the weights that the published files hold in fp16; the others stay float32.
            resolution: the encoder's own, or None.

        Raises:
            InputError: another resolution than its own.
        """
        super().__init__()
        path, self.sha256 = fetch_clip(clip_mode, root)
        self.name = short_name(clip_mode)
        self.visual = load_clip(path).visual
        for parameter in self.visual.parameters():
            if parameter.dtype == torch.float16:
                parameter.data = parameter.data.to(dtype)
        self.resolution: int = self.visual.input_resolution
        self.dim: int = self.visual.output_dim
        if resolution not in (None, self.resolution):
            raise InputError(
                f"--teacher_resolution {resolution}: {clip_mode} takes {self.resolution} pixels alone; "
                "open_clip:ARCH/openai has the same weights and takes others"
            )

    def embed(self, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, enabled=False):
            return self.visual(image.to(self.visual.conv1.weight.dtype))
