"""Frozen image encoders of timm, open_clip and torchvision, and what the house sees of any frozen encoder."""

from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from errors import InputError

from .heads import check_sees_all
from .library import check_library_model, import_library, library_network, torchvision_models
from .names import OWN, Name, check_file, library_errors, unknown
from .own import own_encoder, own_sha256
from .weights import read_state, sha256_of, sha256_of_state

# Images at a time for a convolutional network on a CPU: the maps of more do not fit into its caches.
CPU_BATCH = 16


class FrozenEncoder(nn.Module):
    """A frozen encoder: a function from normalised pixels to embeddings, and the facts about it.

    Attributes:
        name: its name in the names of runs.
        sha256: the SHA-256 of its weights.
        resolution: input height and width in pixels.
        normalization: (mean, std) per channel of pixels in [0, 1].
        interpolation: how pictures are brought to that resolution: 'bicubic', 'bilinear', ...
        antialias: whether shrinking them averages, as Pillow does.
        dim: width of the embedding.
        channels_last: whether its convolutions are faster in that memory format.
        published: whether its weights are in OpenAI's format, which on CUDA computes in fp16.
    """

    name: str
    sha256: str
    resolution: int
    normalization: tuple[tuple[float, ...], tuple[float, ...]]
    interpolation: str = "bicubic"
    antialias: bool = True
    dim: int
    channels_last: bool = False
    published: bool = False

    def train(self, mode: bool = True) -> "FrozenEncoder":
        return super().train(False)  # frozen: no call of train() may move its batch norms' statistics

    @property
    def facts(self) -> dict:
        """Everything but the precision that the embedding of an image depends on."""
        return {
            "clip_sha256": self.sha256,
            "resolution": self.resolution,
            "normalization": [list(values) for values in self.normalization],
            "dim": self.dim,
        }

    def embed(self, image: Tensor) -> Tensor:
        """Normalised images (B, 3, resolution, resolution) to embeddings (B, dim)."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """Normalised images (B, 3, resolution, resolution) to embeddings (B, dim), float32."""
        return self.embed(image).float()


class TextEncoder(NamedTuple):
    """The other half of a CLIP, on the CPU.

    tokenize: texts to tokens (N, length).
    encode_text: tokens to embeddings (N, dim), in the space of the image encoder's.
    dim: width of the embedding.
    """

    tokenize: Callable[[list[str]], Tensor]
    encode_text: Callable[[Tensor], Tensor]
    dim: int


class LibraryEncoder(FrozenEncoder):
    """An image encoder of timm, open_clip or torchvision, or one's own.

    Args:
        name: with one of these libraries; its ``path`` names a local file of weights, otherwise the library downloads.
            Or one's own, see ``own_encoder``.
        dtype: what it computes in, under autocast: its norms stay in float32.
        resolution: its own if None.

    Raises:
        InputError: an unknown name, weights of another network, a resolution that the network cannot take, or a
            library that is not installed.
        OSError: the weights are neither there nor to be downloaded.
    """

    def __init__(self, name: Name, dtype: torch.dtype = torch.float32, resolution: int | None = None):
        super().__init__()
        if name.library in ("timm", "torchvision"):
            check_library_model(name)
        check_file(name)
        self.name = name.short
        self.dtype = dtype
        with library_errors(name, resolution):
            self.net, fed = _MAKERS[name.library](name, resolution)
        self.resolution, mean, std, self.interpolation, self.antialias = fed
        self.normalization = (tuple(mean), tuple(std))
        self.net.eval().requires_grad_(False)
        if name.library in OWN:
            self.sha256 = own_sha256(name, self.net)
        else:
            self.sha256 = sha256_of_state(self.net.state_dict()) if name.path is None else sha256_of(name.path)
        # A transformer has one convolution, which cuts the picture into patches.
        self.channels_last = sum(isinstance(module, nn.Conv2d) for module in self.net.modules()) > 1
        if self.channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.dim = self._measure()

    @property
    def facts(self) -> dict:
        seen = {"interpolation": self.interpolation, "antialias": self.antialias}
        gelu = {"quick_gelu": True} if any(type(x).__name__ == "QuickGELU" for x in self.net.modules()) else {}
        return super().facts | {"network": self.name} | seen | gelu

    def _measure(self) -> int:
        """The width of the embedding; finds out whether the network takes the resolution."""
        try:
            embedding = self(torch.zeros(1, 3, self.resolution, self.resolution))
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise InputError(f"{self.name} cannot take images of {self.resolution} pixels ({reason})") from error
        if embedding.dim() != 2:
            raise InputError(f"{self.name} gives no pooled features, but {tuple(embedding.shape)}")
        check_sees_all(self.net, self._pooled, self.name, self.resolution, "--teacher_resolution")
        return embedding.shape[1]

    def embed(self, image: Tensor) -> Tensor:
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        parts = image.split(CPU_BATCH) if self.channels_last and image.device.type == "cpu" else [image]
        with torch.autocast(image.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return torch.cat([self._pooled(part) for part in parts])

    def _pooled(self, image: Tensor) -> Tensor:
        x = self.net(image)
        return x[0] if isinstance(x, tuple) else x  # open_clip's CoCa gives its tokens too


class _Input(NamedTuple):
    """How a library feeds a network: resolution in pixels, mean and std per channel, and how pictures are resized."""

    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    antialias: bool = True


def _make_timm(name: Name, resolution: int | None) -> tuple[nn.Module, _Input]:
    net = library_network(name, resolution, pretrained=True).net
    import timm

    config = timm.data.resolve_model_data_config(net)
    return net, _Input(resolution or config["input_size"][-1], config["mean"], config["std"], config["interpolation"])


# The keys in open_clip's table of published weights that say how pictures are fed.
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


def _open_clip_settings(name: Name) -> tuple[dict, bool]:
    """How pictures are fed to weights of open_clip, and whether they were trained with OpenAI's approximate GELU.

    The library knows both by the tag of published weights alone. A file without a tag gets what all tags of its
    architecture have in common; where they differ, the library's defaults are assumed, which is printed.

    Raises:
        InputError: open_clip does not know the architecture or the tag.
    """
    open_clip = import_library("open_clip", "open_clip_torch")
    arch, _, tag = name.name.partition("/")
    if arch not in open_clip.list_models():
        raise unknown("architecture of open_clip", arch, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if tag not in tags and (tag or name.path is None):
        raise InputError(
            f"open_clip:{name.name}: weights of {arch} are open_clip:{arch}/TAG with a TAG of {', '.join(tags)}, or "
            f"open_clip:{arch}=PATH"
        )
    table = [open_clip.get_pretrained_cfg(arch, each) for each in ([tag] if tag else tags)]
    found = [{key: cfg[key] for key in _PREPROCESS if key in cfg} for cfg in table]
    gelus = {bool(cfg.get("quick_gelu")) for cfg in table}
    alike, assumed = len({repr(each) for each in found}) == 1, []
    if not alike:
        assumed.append("OpenAI's mean, std and interpolation")
    if len(gelus) != 1:
        assumed.append("the architecture's own GELU")
    if assumed:
        why = "the tags of this architecture differ in it: name one" if tags else "open_clip publishes no weights of it"
        example = f", as open_clip:{arch}/{tags[0]}=PATH" if tags else ""
        print(f"open_clip:{arch}={name.path}: takes {' and '.join(assumed)}; {why}{example}")
    return found[0] if alike else {}, gelus == {True}


def _open_clip_model(name: Name, resolution: int | None = None) -> nn.Module:
    """Both halves of a model of open_clip, in evaluation mode."""
    preprocess, quick_gelu = _open_clip_settings(name)
    import open_clip

    arch, _, tag = name.name.partition("/")
    options = {"force_image_size": resolution, "force_quick_gelu": quick_gelu, "force_preprocess_cfg": preprocess}
    if name.path is None:
        return open_clip.create_model(arch, pretrained=tag, **options).eval()
    state = read_state(name.path)
    for fact in ("input_resolution", "context_length", "vocab_size"):  # of OpenAI's files
        state.pop(fact, None)
    # The library's own reader knows fewer kinds of files.
    with mock.patch.object(open_clip.factory, "load_state_dict", return_value=state):
        return open_clip.create_model(arch, pretrained=name.path, **options).eval()


def _make_open_clip(name: Name, resolution: int | None) -> tuple[nn.Module, _Input]:
    visual = _open_clip_model(name, resolution).visual
    config = visual.preprocess_cfg
    size = config["size"] if isinstance(config["size"], int) else config["size"][0]
    return visual, _Input(size, config["mean"], config["std"], config["interpolation"])


def open_clip_text_encoder(name: Name) -> TextEncoder:
    """The text encoder of a model of open_clip.

    Raises:
        InputError, OSError: as ``LibraryEncoder``.
    """
    check_file(name)
    with library_errors(name):
        model = _open_clip_model(name).requires_grad_(False)
        tokenizer = import_library("open_clip", "open_clip_torch").get_tokenizer(name.name.partition("/")[0])
    return TextEncoder(tokenizer, model.encode_text, model.encode_text(tokenizer(["a"])).shape[1])


def _make_torchvision(name: Name, resolution: int | None) -> tuple[nn.Module, _Input]:
    config = torchvision_models().get_model_weights(name.name).DEFAULT.transforms()
    size = resolution or config.crop_size[0]
    net = library_network(name, size, pretrained=True).net
    return net, _Input(size, config.mean, config.std, config.interpolation.value, bool(config.antialias))


def _make_own(name: Name, resolution: int | None) -> tuple[nn.Module, _Input]:
    own = own_encoder(name, resolution)
    return own.net, _Input(*own[1:])


_MAKERS = {"timm": _make_timm, "open_clip": _make_open_clip, "torchvision": _make_torchvision}
_MAKERS |= dict.fromkeys(OWN, _make_own)
