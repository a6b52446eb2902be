"""A training step recorded once as a CUDA graph and replayed: the GPU no longer waits for Python."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dataset.loader import Draw, Loader
from errors import SpeedUpFailed

from .bank import EmbeddingBank
from .optim import capturable, groups_of
from .step import Step

# Steps before one is recorded: the first steps make buffers, choose algorithms and compile code.
_STEPS_BEFORE = 3


def build_step(
    graph: str,
    losses: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    loader: Loader,
    teacher: nn.Module | None = None,
) -> Step:
    """The step that ``--graph`` asks for.

    Whether images and bank fit on the GPU is known once they are loaded. A step that reads from the host is not
    recorded. A step with an encoder that encodes every batch would gain nothing and is not recorded either.

    Args:
        graph: 'on' or 'off', as ``helper.runtime.resolve`` gives it.
        losses, optimizers, scaler, loader: see ``Step``.
        teacher: None where the step uses none.
    """
    embed = getattr(teacher, "embed", None)
    on_device = embed is None or (isinstance(embed, EmbeddingBank) and embed.rows.is_cuda)
    if graph == "off":
        return Step(losses, optimizers, scaler, loader)
    if loader.reads_ahead or not on_device:
        print("steps are not captured, which makes them slower: images or embeddings do not fit on the GPU", flush=True)
        return Step(losses, optimizers, scaler, loader)
    return CapturedStep(losses, optimizers, scaler, loader)


class CapturedStep(Step):
    """A step that is recorded on a full batch and replayed on later ones; all else is as in ``Step``.

    A recording holds the whole step, from the numbers that the loader draws to the optimisers. A replay reads the
    learning rates and the weight b from tensors, so that one recording serves every epoch.

    Args:
        losses, optimizers, scaler, loader: see ``Step``.
        recorder: see ``CudaGraphs``.

    Raises:
        SpeedUpFailed: the step cannot be recorded.
    """

    def __init__(
        self,
        losses: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
        loader: Loader,
        recorder: "CudaGraphs | None" = None,
    ):
        super().__init__(losses, optimizers, scaler, loader)
        self.recorder: CudaGraphs | None = recorder or CudaGraphs()
        self._before = _STEPS_BEFORE
        self._replay: Callable[[], None] | None = None
        self._numbers: Tensor | None = None
        self._constants: list[float] = []
        self._held: list[Tensor] = []

    def __call__(self, draw: Draw, epoch: int) -> None:
        if self.recorder is None or sum(draw.shares) != self.loader.batch_size:
            super().__call__(draw, epoch)
        elif self._before:
            self._before -= 1
            self.recorder.run(lambda: Step.__call__(self, draw, epoch))
        else:
            self._hold_constants(epoch)
            if self._replay is None:
                self._record(draw, epoch)
            self._numbers.copy_(draw.numbers)
            self._replay()

    def _hold_constants(self, epoch: int) -> None:
        """Put the epoch's learning rates and its weight b, the last one, where a replay reads them."""
        constants = [group["lr"] for group in groups_of(self.optimizers)]
        constants.append(self.losses.objective.beta_in(epoch))
        if not self._held:
            self._held = [torch.zeros((), device=self.loader.device) for _ in constants]
        if constants != self._constants:
            self._constants = constants
            for held, value in zip(self._held, constants, strict=True):
                held.fill_(value)

    def _record(self, draw: Draw, epoch: int) -> None:
        self._numbers, objective = draw.numbers.clone(), self.losses.objective
        still = Draw(self._numbers, draw.shares)
        *rates, objective.captured_beta = self._held
        try:
            with capturable(self.optimizers, rates):
                self._replay = self.recorder.record(lambda: Step.__call__(self, still, epoch))
        except RuntimeError as error:
            # PyTorch's last error says only that the recording broke; the error before it says why. Nothing that was
            # recorded has run, but PyTorch's allocator may go on as if it were recorded, until the process ends.
            reason = str(error.__context__ or error).partition("\n")[0]
            raise SpeedUpFailed("graph", reason) from error
        finally:
            objective.captured_beta = None


class CudaGraphs:
    """Records kernels on a stream of its own; what comes before a recording has to run there too.

    A node that adds up gradients remembers the stream that it was made on, and so do workspaces of libraries.
    """

    def __init__(self):
        self.stream = torch.cuda.Stream()

    def run(self, function: Callable[[], None]) -> None:
        """Call a function on the stream, between what was launched before it and what will be."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            function()
        current.wait_stream(self.stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record the kernels that a function launches, without running them.

        Returns:
            A function that launches them all at once.

        Raises:
            RuntimeError: a kernel cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            function()
        return graph.replay
