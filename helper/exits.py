"""How a script ends: with one line that says why and how to go on, and with an exit code.

The codes are 2 bad input, 3 a loss that is not finite, 4 a file that cannot be written, 5 out of memory, 130 Ctrl-C,
143 SIGTERM, 1 another process of the job is gone. The same command goes on after what the run saved last. A step that
cannot be compiled or captured ends nothing where that was left at auto: the script starts again without it.
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
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from errors import InputError, NonFiniteLoss, SpeedUpFailed, WriteError

from . import launch

# Steps after which many processes agree on whether one of them was asked to save; each time costs messages.
_AGREE_EVERY = 10

# A scheduler may signal a process and its whole group: signals within so many seconds count as one.
_SAME_SIGNAL = 2.0

# A signal that came where Python can raise nothing is sent again after so many seconds.
_SENT_AGAIN = 0.05

# The environment variable that tells a script which was started again what to do without: 'compile', 'graph' or both.
_WITHOUT = "EGA_WITHOUT"

# A signal that ended another process of the job may take so many seconds to reach this one.
_GRACE = 1.0


class Stopped(BaseException):
    """Raised by Ctrl-C and SIGTERM; like KeyboardInterrupt it is no Exception, so nothing takes it for an error."""


class _Signals:
    """The signals since the script began, and what the same command would go on after."""

    def __init__(self):
        self.stop: int | None = None
        self.at = 0.0
        self.again: threading.Timer | None = None
        self.held = 0
        self.save = False
        self.next = "the same command begins anew"
        self.write: Callable[[], None] | None = None
        self.run: Callable[[], Any] | None = None
        self.spared: set[str] = set()

    def take(self) -> dict:
        """Handle the signals from now on; returns the handlers before."""
        if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
            return {}
        handlers = {signal.SIGINT: self.on_stop, signal.SIGTERM: self.on_stop, signal.SIGUSR1: self.on_save}
        before = {number: signal.getsignal(number) for number in handlers}
        for number, handler in handlers.items():
            if before[number] is not signal.SIG_IGN or number == signal.SIGUSR1:  # torchrun must ignore SIGUSR1
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
        """Send a signal again that came in a finaliser: Python drops what is raised there."""
        if not isinstance(dropped.exc_value, Stopped):
            sys.__unraisablehook__(dropped)
            return
        self.at = -math.inf
        self.again = threading.Timer(_SENT_AGAIN, os.kill, (os.getpid(), self.stop))
        self.again.daemon = True
        self.again.start()


_signals = _Signals()


def resumes(folder, where: str) -> None:
    """Note what the same command would go on after from now on: 'epoch 3', say, of the run in a folder."""
    _signals.next = f"the same command resumes {folder} after {where}"


def write_at_end(write: Callable[[], None] | None) -> None:
    """Have ``write`` called if the script ends early; it saves what a run has in memory alone. None calls nothing."""
    _signals.write = write


def spares(options: set[str]) -> None:
    """Note which of the options 'compile' and 'graph' are ``auto``: without these the script can start again."""
    _signals.spared = options


def without() -> set[str]:
    """What this script does without, since it was started again after that failed: 'compile', 'graph'."""
    return set(os.environ.get(_WITHOUT, "").split())


def release_at_end(run: Any) -> None:
    """Have ``run.release()`` called when the script ends, however it does: a program that called it goes on."""
    _signals.run = weakref.ref(run)


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """A context that runs to its end: Ctrl-C and SIGTERM wait for it."""
    _signals.held += 1
    try:
        yield
    finally:
        _signals.held -= 1
    if _signals.stop is not None and not _signals.held:
        raise Stopped


def save_asked(step: int) -> bool:
    """Whether any process got SIGUSR1 since the last call that said so; processes agree at every tenth step.

    Args:
        step: the epoch's step, the same on every process.

    Raises:
        Stopped: Ctrl-C or SIGTERM came, and the code that it interrupted swallowed it.
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
    """End with exit code 2 and one line where the user's input cannot be used.

    It wraps what happens before training. InputError and OSError then have a message that says what is wrong and
    what to do.
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

    SIGUSR1 asks for a checkpoint inside the epoch, see ``save_asked``. A signal that was ignored when the script was
    started, by nohup say, stays ignored.

    Args:
        program: the script's name in the line.
        memory: says how the script takes less memory.
    """

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def ending(*args, **kwargs) -> None:
            def end(error: BaseException) -> None:
                _end(program, memory, error, from_shell=not args and not kwargs)

            _handling(lambda: main(*args, **kwargs), end)

        return ending

    return decorate


def call(function: Callable[[], Any]) -> Any:
    """Call a function as ``exits`` calls a script's ``main``, for a Python program, which goes on: errors are raised.

    A run that an error ends saves first what it has in memory alone. Ctrl-C raises KeyboardInterrupt, and SIGTERM
    SystemExit with the code 143, once what must not be broken is done. The program's own handlers are then back.
    """
    return _handling(function, _raise)


def _raise(error: BaseException) -> None:
    if isinstance(error, Stopped):
        error = KeyboardInterrupt() if _signals.stop == signal.SIGINT else SystemExit(128 + _signals.stop)
    raise error


def _handling(function: Callable[[], Any], end: Callable[[BaseException], None]) -> Any:
    """Call a function with the handlers of ``_Signals``; ``end`` gets the error that ends it, and raises one."""
    global _signals
    _signals, result, error, hook = _Signals(), None, None, sys.unraisablehook
    before, sys.unraisablehook = _signals.take(), _signals.on_dropped
    # Python looks for signals where functions are called. Signals are held before the next call, so that none breaks in
    # after the catch.
    try:
        result = function()
    except BaseException as caught:
        _signals.held += 1
        error = caught
    else:
        _signals.held += 1
    if _signals.again is not None:
        _signals.again.cancel()
    try:
        if error is not None:
            end(_saved(error))
    finally:
        if _signals.run is not None and (run := _signals.run()) is not None:
            run.release()
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        _signals = _Signals()
    return result


def _saved(error: BaseException) -> BaseException:
    """Save what a run has in memory alone, before an error ends its script; returns the error to end it by."""
    write, _signals.write = _signals.write, None
    if write is None:
        return error
    try:
        write()
    except Exception as failed:
        return failed if isinstance(error, Stopped) else error
    return error


def _end(program: str, memory: str, error: BaseException, from_shell: bool) -> None:
    """Print the line and exit; raise the error where it is a mistake of the program, or is already reported.

    Args:
        from_shell: this process runs the script and nothing else, so that it can start again.
    """
    if launch.count() > 1 and isinstance(error, RuntimeError) and _is_of_messages(error):
        time.sleep(_GRACE)
        if _signals.stop is None:
            _exit(program, f"error: another process of this job is gone; {_signals.next}", 1, error)
        error = Stopped()
    if isinstance(error, Stopped):
        name = "Ctrl-C" if _signals.stop == signal.SIGINT else signal.Signals(_signals.stop).name
        _exit(program, f"stopped by {name}; {_signals.next}", 128 + _signals.stop, error)
    if isinstance(error, SpeedUpFailed):
        if from_shell and launch.count() == 1 and error.option in _signals.spared:
            _start_again(program, error)
        _exit(program, f"error: {error}: use --{error.option} off", 2, error)
    if isinstance(error, NonFiniteLoss):
        _exit(program, f"error: {error}", 3, error)
    if isinstance(error, WriteError):
        _exit(program, f"error: {error}; {_signals.next}", 4, error, everybody=True)
    if isinstance(error, (MemoryError, _torchs("OutOfMemoryError"))) or "DefaultCPUAllocator" in str(error):
        _exit(program, f"error: {_out_of_memory(error, memory)}; {_signals.next}", 5, error, everybody=True)
    raise error


def _start_again(program: str, error: SpeedUpFailed) -> None:
    """Replace this process by a fresh one with the same command, which does without what failed."""
    sys.stdout.flush()
    print(f"{program}: {error}: starting again with --{error.option} off", file=sys.stderr, flush=True)
    os.environ[_WITHOUT] = " ".join(sorted(without() | {error.option}))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _torchs(name: str) -> type | tuple:
    """A class of error by its name in torch; no class where torch was not imported and so raised nothing."""
    try:
        return operator.attrgetter(name)(sys.modules["torch"])
    except (KeyError, AttributeError):  # torch was not imported, or only in part
        return ()


def _is_of_messages(error: RuntimeError) -> bool:
    """Whether a message to another process failed."""
    return isinstance(error, _torchs("distributed.DistError")) or "gloo" in str(error) or "by peer" in str(error)


def _out_of_memory(error: BaseException, advice: str) -> str:
    asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
    more = f" ({asked[1]} more were asked for)" if asked else ""
    return f"out of memory{more}: {advice}"


def _exit(program: str, line: str, code: int, error: BaseException, everybody: bool = False) -> None:
    """Print the line and exit; only the first process prints, unless ``everybody`` has something of its own to say."""
    if everybody or launch.rank() == 0:
        sys.stdout.flush()
        print(f"{program}: {' '.join(line.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code) from error
