"""A training step recorded once as a CUDA graph and replayed: the GPU no longer waits for Python."""

from collections.abc import Callable

import torch
from torch import nn

from dataset.loader import Draw, Loader

from .bank import EmbeddingBank
from .optim import capturable
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

    A recording holds the whole step, from the numbers that the loader draws to the optimisers. The recorded kernels
    contain the learning rates and the weight b; the step is recorded again when one changes. Where recording fails,
    steps go on without it.

    Args:
        losses, optimizers, scaler, loader: see ``Step``.
        record: records what a function does, and returns a function that does it again.
    """

    def __init__(
        self,
        losses: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        scaler: torch.amp.GradScaler,
        loader: Loader,
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
    ):
        super().__init__(losses, optimizers, scaler, loader)
        self.record: Callable | None = record or cuda_graph
        self._before = _STEPS_BEFORE
        self._replay: Callable[[], None] | None = None
        self._constants = self._numbers = None

    def __call__(self, draw: Draw, epoch: int) -> None:
        if self.record is None or sum(draw.shares) != self.loader.batch_size:
            super().__call__(draw, epoch)
        elif self._before:
            self._before -= 1
            super().__call__(draw, epoch)
        elif self._recorded(draw, epoch):
            self._numbers.copy_(draw.numbers)
            self._replay()
        else:
            super().__call__(draw, epoch)

    def _recorded(self, draw: Draw, epoch: int) -> bool:
        """Whether a recording with the constants of this epoch exists or could be made."""
        constants = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        constants.append(self.losses.objective.beta_in(epoch))
        if constants == self._constants:
            return True
        self._numbers, self._replay = draw.numbers.clone(), None
        still = Draw(self._numbers, draw.shares)
        try:
            with capturable(self.optimizers):
                self._replay = self.record(lambda: Step.__call__(self, still, epoch))
        except RuntimeError as error:  # the driver or a library cannot record; nothing that was recorded has run
            # PyTorch's last error says only that the recording broke; the error before it says why.
            reason = str(error.__context__ or error).partition("\n")[0]
            print(f"steps are not captured, which makes them slower: {reason}", flush=True)
            self.record = None
            return False
        self._constants = constants
        return True


def cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels that a function launches, without running them.

    Returns:
        A function that launches them all at once.

    Raises:
        RuntimeError: a kernel cannot be recorded; PyTorch is then in the same state as before.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            function()
    except BaseException:
        # PyTorch stays on the recording's stream, and its generator believes that it is still being recorded.
        torch.cuda.set_stream(stream)
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph.replay
