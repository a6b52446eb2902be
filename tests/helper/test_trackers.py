"""--log: trackers beside TensorBoard. Their packages are no requirement: where one is missing, a stand-in records."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
from runs import assert_refused, read_metrics


class Runs:
    """A server: what each run's identity has logged."""

    def __init__(self):
        self.logged: dict[str, list[tuple[int, dict]]] = {}
        self.config: dict[str, dict] = {}
        self.final: dict[str, dict] = {}
        self.ended: set[str] = set()
        self.broken = False


@pytest.fixture
def server(monkeypatch) -> Runs:
    """What the stand-ins for wandb and mlflow were told."""
    server = Runs()

    def init(*, id, config, **others):
        run = types.SimpleNamespace(step=max((step + 1 for step, _ in server.logged.get(id, ())), default=0))
        server.config.setdefault(id, dict(config))

        def log(values, step):
            if server.broken:
                raise ConnectionError("no network")
            server.logged.setdefault(id, []).append((step, values))

        run.log, run.finish = log, lambda: server.ended.add(id)
        run.summary = server.final.setdefault(id, {})
        return run

    wandb = types.ModuleType("wandb")
    wandb.init, wandb.Settings = init, lambda **options: options

    class Client:
        def __init__(self, uri):
            assert uri.startswith("sqlite:////") and uri.endswith("/mlflow.db")

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name, artifacts):
            assert name == "ega"
            return "7"

        def search_runs(self, experiments, query):
            found = [id for id in server.config if f"'{id}'" in query]
            return [types.SimpleNamespace(info=types.SimpleNamespace(run_id=id)) for id in found]

        def update_run(self, id, status):
            server.ended.discard(id)

        def create_run(self, experiment, tags, run_name):
            server.config[tags["ega_run"]] = {}
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=tags["ega_run"]))

        def log_batch(self, id, params=(), metrics=()):
            server.config[id] |= dict(params)
            for name, value, _, step in metrics:
                place = server.final.setdefault(id, {}) if name.startswith("best/") else None
                if place is None:
                    server.logged.setdefault(id, []).append((step, {name: value}))
                else:
                    place[name] = value

        def get_metric_history(self, id, name):
            steps = [step for step, values in server.logged.get(id, ()) if name in values]
            return [types.SimpleNamespace(step=step) for step in steps]

        def set_terminated(self, id):
            server.ended.add(id)

    mlflow = types.ModuleType("mlflow")
    mlflow.MlflowClient = Client
    mlflow.entities = types.ModuleType("mlflow.entities")
    mlflow.entities.Param = lambda key, value: (key, value)
    mlflow.entities.Metric = lambda *values: values
    for module in (wandb, mlflow, mlflow.entities):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, real=importlib.util.find_spec: name in ("wandb", "mlflow") or real(name),
    )
    return server


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_every_epoch_is_logged_once_though_the_run_is_resumed(train, server, tracker):
    folder = train("--log", tracker, "--epochs", 1, "--name", "run")
    ((identity, _),) = server.config.items()
    assert identity in server.ended and server.config[identity]["distill"] == "ega"
    assert train("--log", tracker, "--epochs", 3, "--name", "run") == folder
    assert list(server.config) == [identity]
    found = [(step, values["train_loss"]) for step, values in server.logged[identity] if "train_loss" in values]
    records = read_metrics(folder)
    assert found == [(record["epoch"], record["train_loss"]) for record in records]
    assert server.final[identity]["best/test_acc"] == max(record["test_acc"] for record in records)


def test_what_is_logged_changes_no_run_and_no_tracker_s_fault_ends_one(train, server, capsys):
    without = train("--epochs", 1)
    server.broken = True
    assert train("--epochs", 2, "--name", "broken", "--log", "wandb").name == "broken"
    said = capsys.readouterr().out
    assert said.count("--log wandb has stopped (no network); metrics.jsonl goes on") == 1
    train("--epochs", 1, "--log", "mlflow")
    said = capsys.readouterr().out
    assert "Epoch" not in said and f"in {without}\n" in said  # it was finished


def test_trackers_that_cannot_begin_are_refused_in_one_line(train, server, capsys, monkeypatch):
    def fail(**options):
        raise RuntimeError("No API key\nconfigured")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with pytest.raises(SystemExit):
        train("--epochs", 1, "--log", "wandb")
    assert_refused(capsys, 2, "No API key configured", "WANDB_MODE=offline")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, words in (("mlflow", "pip install mlflow"), ("tensorflow", "neither wandb nor mlflow")):
        with pytest.raises(SystemExit):
            train("--epochs", 1, "--log", name)
        assert_refused(capsys, 2, words)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")
def test_the_real_wandb_offline(train, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = train("--log", "wandb", "--epochs", 2)
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert b"best/test_acc" in file.read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="needs mlflow")
def test_the_real_mlflow(train, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for epochs in (1, 3):
        folder = train("--log", "mlflow", "--epochs", epochs, "--name", "run")
    client = mlflow.MlflowClient(f"sqlite:///{Path(folder).parents[1] / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("ega").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(x.step, x.value) for x in history] == [(x["epoch"], x["train_loss"]) for x in read_metrics(folder)]
    assert run.info.status == "FINISHED" and run.data.params["distill"] == "ega"
