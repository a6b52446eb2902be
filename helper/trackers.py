"""Trackers of experiments that a run may also log to: Weights & Biases, MLflow. Their packages are no requirement."""

import hashlib
import os
import time
from pathlib import Path

from errors import InputError

# The project, or experiment, that runs are put into, unless the tracker's own environment variable names another.
_PROJECT = "ega"


class NoTracker:
    """Logs nothing."""

    def append(self, record: dict) -> None:
        pass

    def finish(self, final: dict[str, float]) -> None:
        pass


class Wandb(NoTracker):
    """Logs to Weights & Biases; WANDB_MODE=offline needs no server and no account.

    Args:
        folder: the run's folder. Its path is the run's identity: a resumed run goes on in the same one.
        history: the records of the epochs that are done; the server ignores those that it has.
        options: the run's.
    """

    def __init__(self, folder: Path, history: list[dict], options: dict):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=_identity(folder),
            name=folder.name,
            dir=folder,
            config=options,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
        for record in history:
            if record["epoch"] >= self.run.step:
                self.append(record)

    def append(self, record: dict) -> None:
        self.run.log(_metrics(record), step=record["epoch"])

    def finish(self, final: dict[str, float]) -> None:
        self.run.summary.update(final)
        self.run.finish()


class MlFlow(NoTracker):
    """Logs to MLflow: to MLFLOW_TRACKING_URI, or into mlflow.db in the folder of all results.

    Args: see ``Wandb``.
    """

    def __init__(self, folder: Path, history: list[dict], options: dict):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # its own seven take minutes
        import mlflow

        root = folder.absolute().parents[1]
        local = os.environ.get("MLFLOW_TRACKING_URI") is None
        self.client = mlflow.MlflowClient(f"sqlite:///{root / 'mlflow.db'}" if local else None)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            number = self.client.create_experiment(name, (root / "mlartifacts").as_uri() if local else None)
        else:
            number = experiment.experiment_id
        identity = _identity(folder)
        known = self.client.search_runs([number], f"tags.ega_run = '{identity}'")
        if known:
            self.id = known[0].info.run_id
            self.client.update_run(self.id, "RUNNING")
        else:
            self.id = self.client.create_run(number, tags={"ega_run": identity}, run_name=folder.name).info.run_id
            params = [mlflow.entities.Param(key, str(value)[:500]) for key, value in options.items()]
            self.client.log_batch(self.id, params=params)
        self.logged = max((x.step for x in self.client.get_metric_history(self.id, "train_loss")), default=0)
        for record in history:
            self.append(record)

    def append(self, record: dict) -> None:
        if record["epoch"] > self.logged:
            self._log(_metrics(record), record["epoch"])
            self.logged = record["epoch"]

    def _log(self, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def finish(self, final: dict[str, float]) -> None:
        self._log(final, self.logged)
        self.client.set_terminated(self.id)


class _Guarded(NoTracker):
    """A tracker that ends with a line where it fails: no run is lost by it."""

    def __init__(self, name: str, tracker: NoTracker):
        self.name, self.tracker = name, tracker

    def _try(self, call: str, value: dict) -> None:
        try:
            getattr(self.tracker, call)(value)
        except Exception as error:  # a server, the network or a full disk
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            print(f"--log {self.name} has stopped ({reason}); metrics.jsonl goes on")
            self.tracker = NoTracker()

    def append(self, record: dict) -> None:
        self._try("append", record)

    def finish(self, final: dict[str, float]) -> None:
        self._try("finish", final)


def open_tracker(name: str | None, folder: Path, history: list[dict], options: dict) -> NoTracker:
    """The tracker of a run; None for none.

    Raises:
        InputError: it is not installed, its server cannot be reached, or it asks for an account.
    """
    if name is None:
        return NoTracker()
    try:
        return _Guarded(name, {"wandb": Wandb, "mlflow": MlFlow}[name](folder, history, options))
    except Exception as error:  # whatever a server, its client or the network raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        offline = "; WANDB_MODE=offline logs without a server" if name == "wandb" else ""
        raise InputError(f"--log {name} cannot begin ({reason}){offline}") from error


def _metrics(record: dict) -> dict[str, float]:
    return {name: float(value) for name, value in record.items() if name != "epoch" and value is not None}


def _identity(folder: Path) -> str:
    return hashlib.sha256(str(folder.absolute()).encode(errors="surrogateescape")).hexdigest()[:16]
