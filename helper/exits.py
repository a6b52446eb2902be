"""How a script ends: with one line that says why and how to go on, and with an exit code.

2 bad input, 3 a loss that is not finite, 4 a file that cannot be written, 5 out of memory, 130 Ctrl-C, 143 SIGTERM;
1 where another process of the job is gone. Whatever ends a run, the same command goes on after what it saved last.
"""

import contextlib
import functools
import math
import operator
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from errors import InputError, NonFiniteLoss, WriteError

from . import launch

# Many processes agree so seldom on whether one of them was asked to save: it costs a message to each.
_AGREE_EVERY = 10

# A scheduler may send a signal to a process and to all of its group: what comes within so many seconds is one.
_SAME_SIGNAL = 2.0

# One that came where Python can raise nothing is sent again after so many.
_SENT_AGAIN = 0.05

# What ended another process of the job, a signal say, may take so many seconds to reach this one.
_GRACE = 1.0


class Stopped(BaseException):
    """Ctrl-C, or SIGTERM; as KeyboardInterrupt, nothing takes it for an error."""


class _Signals:
    """What was asked for since the script began, and what the same command would go on after."""

    def __init__(self):
        self.stop: int | None = None
        self.at = 0.0
        self.again: threading.Timer | None = None
        self.held = 0
        self.save = False
        self.next = "the same command begins anew"
        self.write: Callable[[], None] | None = None

    def take(self) -> dict:
        """Handle the signals from now on; gives the handlers that they had."""
        if threading.current_thread() is not threading.main_thread():  # which alone may set them
            return {}
        handlers = {signal.SIGINT: self.on_stop, signal.SIGTERM: self.on_stop, signal.SIGUSR1: self.on_save}
        before = {number: signal.getsignal(number) for number in handlers}
        for number, handler in handlers.items():
            if before[number] is not signal.SIG_IGN or number == signal.SIGUSR1:  # torchrun has to ignore that itself
                signal.signal(number, handler)
        return before

    def on_stop(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.stop is not None and now - self.at < _SAME_SIGNAL:
            return
        self.stop, self.at = number, now
        if not self.held:
            raise Stopped

    def on_save(self, number: int, frame) -> None:
        self.save = True

    def on_dropped(self, dropped) -> None:
        """Python drops what is raised in a finaliser: of a signal that came in one, send it again after it."""
        if not isinstance(dropped.exc_value, Stopped):
            sys.__unraisablehook__(dropped)
            return
        self.at = -math.inf
        self.again = threading.Timer(_SENT_AGAIN, os.kill, (os.getpid(), self.stop))
        self.again.daemon = True
        self.again.start()


_signals = _Signals()


def resumes(folder, where: str) -> None:
    """Say what the same command would go on after, from now on: 'epoch 3' of the run in a folder."""
    _signals.next = f"the same command resumes {folder} after {where}"


def write_at_end(write: Callable[[], None] | None) -> None:
    """Call this where the script ends early, to save what a run has in memory alone; None where there is nothing."""
    _signals.write = write


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """What is done in it is done to its end: Ctrl-C and SIGTERM wait for it."""
    _signals.held += 1
    try:
        yield
    finally:
        _signals.held -= 1
    if _signals.stop is not None and not _signals.held:
        raise Stopped


def save_asked(step: int) -> bool:
    """Whether SIGUSR1 came since the last call that said so, to any process: they agree at every tenth step.

    Args:
        step: of the epoch, the same on every process.

    Raises:
        Stopped: Ctrl-C or SIGTERM came, and what was running then has swallowed it.
    """
    if _signals.stop is not None:
        raise Stopped
    if launch.count() > 1:
        if step % _AGREE_EVERY:
            return False
        from . import distributed  # here, so that a script which refuses its arguments imports no torch

        _signals.save = distributed.of_any(_signals.save)
    asked, _signals.save = _signals.save, False
    return asked


@contextlib.contextmanager
def exit_on_bad_input(program: str) -> Iterator[None]:
    """End with exit code 2 and one line where what the user gave cannot be worked with.

    Wraps what happens before training: the house raises InputError and OSError, with a message that says
    what is wrong and what to do.
    """
    try:
        yield
    except WriteError:  # no fault of the input: see ``exits``
        raise
    except (InputError, OSError) as error:
        print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error


def exits(program: str, memory: str) -> Callable[[Callable], Callable]:
    """Have a script's ``main`` end with one line and an exit code of this module's, where it cannot go on.

    SIGUSR1 asks for a checkpoint inside the epoch, see ``save_asked``. What ends a script and was ignored when it was
    started, by nohup say, stays so.

    Args:
        program: its name in the line.
        memory: what lowers what it takes of that.
    """

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def ending(*args, **kwargs) -> None:
            global _signals
            _signals, error, hook = _Signals(), None, sys.unraisablehook
            before, sys.unraisablehook = _signals.take(), _signals.on_dropped
            # Python looks for signals where functions are called. No call comes before they are held, so that none
            # breaks in after what is caught here.
            try:
                main(*args, **kwargs)
            except BaseException as caught:
                _signals.held += 1
                error = caught
            else:
                _signals.held += 1
            if _signals.again is not None:
                _signals.again.cancel()
            try:
                if error is not None:
                    _end(program, memory, _saved(error))
            finally:
                sys.unraisablehook = hook
                for number, handler in before.items():
                    signal.signal(number, handler)
                _signals = _Signals()

        return ending

    return decorate


def _saved(error: BaseException) -> BaseException:
    """Save what a run has in memory alone before its script ends by an error; the error to end it by."""
    write, _signals.write = _signals.write, None
    if write is None:
        return error
    try:
        write()
    except Exception as failed:
        return failed if isinstance(error, Stopped) else error
    return error


def _end(program: str, memory: str, error: BaseException) -> None:
    """Print the line and exit, or raise the error where it is a mistake of the program, or has been told."""
    if launch.count() > 1 and isinstance(error, RuntimeError) and _is_of_messages(error):
        time.sleep(_GRACE)
        if _signals.stop is None:
            _exit(program, f"error: another process of this job is gone; {_signals.next}", 1, error)
        error = Stopped()
    if isinstance(error, Stopped):
        name = "Ctrl-C" if _signals.stop == signal.SIGINT else signal.Signals(_signals.stop).name
        _exit(program, f"stopped by {name}; {_signals.next}", 128 + _signals.stop, error)
    if isinstance(error, NonFiniteLoss):
        _exit(program, f"error: {error}", 3, error)
    if isinstance(error, WriteError):
        _exit(program, f"error: {error}; {_signals.next}", 4, error, everybody=True)
    if isinstance(error, (MemoryError, _torchs("OutOfMemoryError"))) or "DefaultCPUAllocator" in str(error):
        _exit(program, f"error: {_out_of_memory(error, memory)}; {_signals.next}", 5, error, everybody=True)
    raise error


def _torchs(name: str) -> type | tuple:
    """A class of error by its name in torch; none where torch was not imported and so raised nothing."""
    try:
        return operator.attrgetter(name)(sys.modules["torch"])
    except (KeyError, AttributeError):  # or was imported in part
        return ()


def _is_of_messages(error: RuntimeError) -> bool:
    """Whether a message to another process failed."""
    return isinstance(error, _torchs("distributed.DistError")) or "gloo" in str(error) or "by peer" in str(error)


def _out_of_memory(error: BaseException, advice: str) -> str:
    asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
    more = f" ({asked[1]} more were asked for)" if asked else ""
    return f"out of memory{more}: {advice}"


def _exit(program: str, line: str, code: int, error: BaseException, everybody: bool = False) -> None:
    """Print the line, of many processes in the first unless ``everybody`` may have something of its own to say."""
    if everybody or launch.rank() == 0:
        sys.stdout.flush()
        print(f"{program}: {' '.join(line.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code) from error
