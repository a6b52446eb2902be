"""Any image classifier of timm or torchvision: a student's backbone, a CNN teacher, or a frozen encoder's network."""

import contextlib
import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from errors import InputError

from .heads import Linear
from .maps import Graph, Intermediates, take_maps
from .names import Name, check_file, library_errors, unknown
from .weights import load_weights, named_tensors, read_state

# A size in pixels that a network refuses if it is built for another size.
_ANY_SIZE = 256


def import_library(library: str, package: str) -> ModuleType:
    """Import a library, or raise an InputError that says how it is installed."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise InputError(f"{library} is not installed: pip install {package}") from error


def torchvision_models() -> ModuleType:
    """torchvision.models; its import takes as long as torch's, so it waits until one of its networks is needed."""
    return import_library("torchvision.models", "torchvision")


def check_library_model(name: Name) -> None:
    """Raise an InputError, with close names, unless timm or torchvision has a classifier of this name."""
    if name.library == "timm":
        timm = import_library("timm", "timm")
        if not name.name.startswith("hf") and not timm.is_model(name.name):
            raise unknown("network of timm", name.name, timm.list_models())
    else:
        known = torchvision_models().list_models(module=torchvision_models())
        if name.name not in known:
            raise unknown("classifier of torchvision", name.name, known)
    check_file(name)


def names_in_libraries(name: str, few: int = 3) -> list[str]:
    """The names that begin with a word among timm's and torchvision's, shortest first, as ``LIBRARY:NAME``."""
    found = []
    with contextlib.suppress(InputError):
        found += [("torchvision", other) for other in torchvision_models().list_models(module=torchvision_models())]
    with contextlib.suppress(InputError):
        found += [("timm", other) for other in import_library("timm", "timm").list_models()]
    found = sorted(((library, other) for library, other in found if other.startswith(name)), key=lambda x: len(x[1]))
    return [f"{library}:{other}" for library, other in found[:few]]


class Network(NamedTuple):
    """A library's network.

    net: the network without its classifier; it gives pooled features (B, D).
    classifier: the library's name for the classifier.
    size: a height and width of images, in pixels, that the network takes; None where nobody says.
    normalization: mean and std of each channel of the images that its published weights were trained on; None where it
        has none.
    width: the width of the pooled features; None where it has to be measured.
    """

    net: nn.Module
    classifier: str
    size: int | None
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None
    width: int | None = None


def library_network(name: Name, resolution: int | None = None, pretrained: bool = False) -> Network:
    """A library's network by its name.

    Args:
        name: a name of timm or torchvision; weights are loaded from its ``path``, if it has one.
        resolution: the input's height and width in pixels, for networks that are built for one size; None for the
            library's own.
        pretrained: load the library's published weights.

    Raises:
        InputError: the name is unknown, the weights are another network's, or the network has no pooled features.
        OSError: the weights cannot be downloaded.
    """
    check_library_model(name)
    with library_errors(name, resolution, loads=pretrained or name.path is not None):
        return (_timm if name.library == "timm" else _torchvision)(name, resolution, pretrained)


def _timm(name: Name, resolution: int | None, pretrained: bool) -> Network:
    import timm

    config = timm.get_pretrained_cfg(name.name)
    classifier = config.classifier if config is not None and isinstance(config.classifier, str) else ""
    options = {"pretrained": pretrained or name.path is not None}
    if name.path is not None:
        # The network gets the file's number of classes: the library then loads strictly, and nothing may be missing.
        state = read_state(name.path)
        weight = state.get(f"{classifier}.weight")
        options["num_classes"] = 0 if weight is None else len(weight)
        options["pretrained_cfg_overlay"] = {"state_dict": state, "num_classes": options["num_classes"]}
    sized = library_options(name, resolution)
    net = timm.create_model(name.name, **options, **sized)
    net.reset_classifier(0)
    size = resolution if sized else net.pretrained_cfg.get("input_size", (3, 224))[1]
    seen = timm.data.resolve_model_data_config(net)
    return Network(net, classifier, size, (tuple(seen["mean"]), tuple(seen["std"])))


def library_options(name: Name, resolution: int | None, weighted: bool = False) -> dict:
    """The options that a library needs to build a network, besides its name and number of classes.

    Args:
        name: a name of timm or torchvision.
        resolution: see ``library_network``.
        weighted: whether the network starts from published weights.
    """
    if name.library == "timm":
        sized = resolution is not None and _is_sized(import_library("timm", "timm"), name.name)
        return {"img_size": resolution} if sized else {}
    if name.name.startswith("vit"):
        size = torchvision_models().get_model_weights(name.name).DEFAULT.transforms().crop_size[0]
        return {"image_size": resolution or size}
    if name.name in ("googlenet", "inception_v3"):  # their auxiliary heads are not distilled
        return {"aux_logits": False, "init_weights": not weighted, "transform_input": weighted}
    return {}


def _is_sized(timm: ModuleType, name: str) -> bool:
    """Whether a network of timm is built for one input size, as transformers are and convolutional networks are not."""
    try:
        with torch.device("meta"):
            timm.create_model(name, img_size=_ANY_SIZE)
    except TypeError:
        return False
    except (ValueError, AssertionError, RuntimeError, NotImplementedError):  # it knows the option, but not this size
        return True
    return True


def _torchvision(name: Name, resolution: int | None, pretrained: bool) -> Network:
    models = torchvision_models()
    builder = models.get_model_builder(name.name)
    weighted = pretrained or name.path is not None
    options = library_options(name, resolution, weighted)
    seen = models.get_model_weights(name.name).DEFAULT.transforms()
    net = builder(weights=None, **options)
    linear = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear or net.get_submodule(linear[-1]).out_features != 1000:
        raise InputError(f"torchvision:{name.name} has no linear classifier, and so no pooled features before it")
    classifier = linear[-1]
    net.set_submodule(classifier, nn.Identity())
    if weighted:
        state = read_state(name.path) if name.path is not None else named_tensors(_published(name.name), name.name)
        if isinstance(net, models.VisionTransformer):
            state = models.vision_transformer.interpolate_embeddings(net.image_size, net.patch_size, state)
        heads = (f"{classifier}.", "AuxLogits.", "aux1.", "aux2.")
        load_weights(net, {key: x for key, x in state.items() if not key.startswith(heads)})
    # Inceptions without their own input transform were trained on transformed images.
    half = ((0.5,) * 3,) * 2
    normalization = (tuple(seen.mean), tuple(seen.std)) if options.get("transform_input", True) else half
    return Network(net, classifier, options.get("image_size", seen.crop_size[0]), normalization)


def _published(name: str) -> dict[str, Tensor]:
    return torchvision_models().get_model_weights(name).DEFAULT.get_state_dict(check_hash=True)


def create_library_model(
    name: Name,
    num_classes: int,
    *,
    maps: bool = False,
    preact: bool = False,
    pretrained: bool = False,
    resolution: int | None = None,
) -> "LibraryModel":
    """A classifier of timm or torchvision with the interface of our own backbones.

    Args:
        name: the network's name; with a path, it starts from the weights in that file, but for their classifier.
        num_classes: 0 builds no classifier: the logits are then the pooled features.
        maps: whether the network must give its stages' maps; without them it gives the pooled features alone.
        preact: give the maps as they are before their last activation, where a stage ends in one.
        pretrained: start from the library's own weights.
        resolution: see ``library_network``.

    Raises:
        InputError: as ``library_network``; or the network has no maps, or activations that cannot be taken apart.
        OSError: as ``library_network``.
    """
    found = library_network(name, resolution, pretrained)
    label = f"{name.library}:{name.name}"
    return LibraryModel(label, found, num_classes, take_maps(label, found.net, preact) if maps else None)


class LibraryModel(nn.Module):
    """A library's network, or one's own, without its classifier, and a linear classifier.

    ``normalization`` is that of ``Network``. Its state dict is the library's under ``net.``, and the classifier's under
    ``classifier.``.

    Args:
        label: its name, for messages.
        network: the library's network.
        num_classes: 0 for none.
        taps: the maps of a forward pass; None for a network that is asked for the pooled features alone.
    """

    def __init__(self, label: str, network: Network, num_classes: int, taps: Intermediates | Graph | None = None):
        super().__init__()
        self.net, self.label, self.classifier_name, self.taps = network.net, label, network.classifier, taps
        self.normalization = network.normalization
        self.num_features = network.width or _width(label, network)
        self.classifier = Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def library_state(self) -> dict[str, Tensor]:
        """The state dict in the library's own naming."""
        state = {f"{self.classifier_name}.{name}": x for name, x in self.classifier.state_dict().items()}
        return self.net.state_dict() | state

    def get_feat_modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.net])

    def get_bn_before_relu(self) -> list[nn.BatchNorm2d]:
        """The batch norms that end the stages, without the stem's.

        Raises:
            InputError: the network was not built with ``preact``, or a stage ends in none.
        """
        norms = self.taps.norms[1:] if isinstance(self.taps, Graph) else [None]
        if any(norm is None for norm in norms):
            raise InputError(f"{self.label} has a stage that ends in no batch norm; OFD needs one for its margin")
        return [self.net.get_submodule(norm) for norm in norms]

    def forward(self, x: Tensor, is_feat: bool = False, preact: bool = False):
        """Logits, or with ``is_feat`` ([stem, stages ..., pooled], logits); without maps ([pooled], logits).

        Args:
            x: (B, 3, H, W).
            preact: not read: it is decided when the network is built.
        """
        maps, pooled = ([], self.net(x)) if self.taps is None or not is_feat else self.taps(self.net, x)
        logits = self.classifier(pooled)
        return ([*maps, pooled], logits) if is_feat else logits


@torch.no_grad()
def _width(label: str, network: Network) -> int:
    """The width of the pooled features."""
    mode = network.net.training
    pooled = network.net.eval()(torch.zeros(1, 3, network.size, network.size))
    network.net.train(mode)
    if not isinstance(pooled, Tensor) or pooled.dim() != 2:
        raise InputError(f"{label} gives no pooled features")
    return pooled.shape[1]


def synchronize_norms(model: nn.Module) -> nn.Module:
    """The model with batch norms that share their statistics among processes; timm's keep the activation in them."""
    if any(type(module).__module__.startswith("timm.") for module in model.modules()):
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(model)
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


def own_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's weights by its own names; weights of a library's network may have the library's names."""
    if not isinstance(model, LibraryModel) or any(name.startswith("net.") for name in state):
        return state
    old, new = f"{model.classifier_name}.", "classifier."
    return {new + name.removeprefix(old) if name.startswith(old) else f"net.{name}": x for name, x in state.items()}


def load_into(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Load weights into a backbone, of the house or of a library, but for their classifier.

    Args:
        model: the backbone.
        state: its weights; a library's network takes them in the library's naming too.

    Returns:
        The names that were left out: a classifier for another number of classes, and what the backbone does not have.

    Raises:
        InputError: a tensor of the backbone is missing or has another shape.
    """
    first = next(iter(state), "nothing")
    own, state = model.state_dict(), own_names(model, state)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    head = f"{linear[-1]}." if linear else "\0"
    fitting = {name: x for name, x in state.items() if name in own and own[name].shape == x.shape}
    for name, x in own.items():
        if name not in fitting and not name.startswith(head):
            found = f"is {tuple(state[name].shape)}" if name in state else f"is missing (the file begins with {first})"
            raise InputError(
                f"--init_s: {name} {found}, this backbone's is {tuple(x.shape)}; give weights of this network"
            )
    load_weights(model, own | fitting)
    return [name for name in state if name not in fitting]
