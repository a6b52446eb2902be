import gc
import json
import os
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import snapshot
from errors import InputError, NonFiniteLoss
from helper import checkpoint
from helper.exits import exits
from helper.records import HASH, read_record, record_hash
from helper.run import Run

OPTIONS = {"learning_rate": 0.05, "seed": 0, "epochs": 3, "data_dir": "data", "print_freq": 100, "device": "cpu"}


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


def start(
    root: Path,
    resume: str = "auto",
    epochs: int = 3,
    name: str = "run",
    save_seconds: float = 0,
    hashes: dict | None = None,
    patience: int | None = None,
    **changed,
) -> Run:
    """A run as the scripts begin it."""
    opt = Namespace(save_dir=str(root), resume=resume, epochs=epochs, save_seconds=save_seconds, patience=patience)
    opt.log = None
    run = Run(opt, hashes or {}, "kind", "tb", name, "net")
    try:
        run.record(**(OPTIONS | {"epochs": epochs, "resume": resume} | changed))
        if not run.finished:
            run.start()
    except BaseException:
        close(run)
        raise
    return run


def close(run: Run) -> None:
    """Lets go of the folder, as the end of the process would."""
    run._lock.release()


def record(epoch: int, accuracy: float | None = None) -> dict:
    found = {"epoch": epoch, "lr": 0.05, "train_loss": 1 / epoch}
    return found if accuracy is None else found | {"test_acc": accuracy}


def weights(epoch: int) -> dict:
    return {"model": {"w": torch.full((2,), float(epoch))}}


def train(run: Run, until: int, accuracies=(10.0, 30.0, 20.0, 25.0)) -> None:
    for epoch in range(run.first_epoch, until + 1):
        run.end_epoch(record(epoch, accuracies[epoch - 1]), {"at": epoch}, weights(epoch))


def lines(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "kind" / "run" / "metrics.jsonl").read_text().splitlines()]


def events(root: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every scalar event, by name."""
    # As they are in the files: by itself it would hide events that a resumed run wrote twice.
    folder = EventAccumulator(str(root / "tb" / "run"), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    folder.Reload()
    tags = [tag for tag in folder.Tags()["scalars"] if not tag.startswith("best/")]  # written when the run ends
    return {tag: [(e.step, e.value) for e in folder.Scalars(tag)] for tag in tags}


def check_logs(root: Path, epochs: int) -> None:
    """Every epoch's line and event is there once, in order."""
    assert [line["epoch"] for line in lines(root)] == list(range(1, epochs + 1))
    found = events(root)
    assert set(found) == {"lr", "train_loss", "test_acc"}
    for name, series in found.items():
        assert [step for step, _ in series] == list(range(1, epochs + 1))
        assert [value for _, value in series] == pytest.approx([line[name] for line in lines(root)])


def test_a_run_leaves_its_files(tmp_path, capsys):
    run = start(tmp_path)
    assert (run.first_epoch, run.finished, run.state) == (1, False, None)
    train(run, 3)
    assert not run.finished
    run.finish(weights(3))
    assert run.finished
    run.print_result()
    told = capsys.readouterr().out
    assert f"best accuracy: 30.00 (epoch 2), last: 20.00, in {run.folder}" in told and "missing" not in told
    names = {path.name for path in run.folder.iterdir()} - {"lock"}
    assert names == {"options.json", "metrics.jsonl", "net_best.pth", "net_last.pth", "resume.pth"}
    assert json.loads((run.folder / "options.json").read_text())["learning_rate"] == 0.05
    for name, epoch in (("best", 2), ("last", 3)):
        saved = checkpoint.load(run.folder / f"net_{name}.pth")
        assert saved["epoch"] == epoch
        assert torch.equal(saved["model"]["w"], weights(epoch)["model"]["w"])
    check_logs(tmp_path, 3)


def test_the_best_is_the_first_of_equals_and_of_the_tested(tmp_path):
    run = start(tmp_path, epochs=4)
    for epoch, accuracy in enumerate([None, 30.0, 30.0, 20.0], start=1):
        run.end_epoch(record(epoch, accuracy), {}, weights(epoch))
    assert run.best["epoch"] == 2
    assert checkpoint.load(run.folder / "net_best.pth")["epoch"] == 2


def test_a_held_out_accuracy_chooses_the_best_in_the_tests_place(tmp_path):
    run = start(tmp_path)
    for epoch, (test, val) in enumerate([(50.0, 1.0), (10.0, 3.0), (30.0, 2.0)], start=1):
        run.end_epoch(record(epoch, test) | {"val_acc": val}, {}, weights(epoch))
    assert run.best["epoch"] == 2
    assert checkpoint.load(run.folder / "net_best.pth")["epoch"] == 2


def test_every_so_many_epochs_a_checkpoint_is_kept(tmp_path):
    run = start(tmp_path, epochs=4)
    for epoch in range(1, 5):
        run.end_epoch(record(epoch, 1.0), {}, weights(epoch), save_freq=2)
    kept = sorted(path.name for path in run.folder.glob("ckpt_*"))
    assert kept == ["ckpt_epoch_2.pth", "ckpt_epoch_4.pth"]
    assert checkpoint.load(run.folder / "ckpt_epoch_2.pth")["epoch"] == 2


def test_auto_goes_on_from_the_last_finished_epoch(tmp_path):
    run = start(tmp_path)
    train(run, 2)
    close(run)
    again = start(tmp_path)
    assert (again.first_epoch, again.state, again.finished) == (3, {"at": 2}, False)
    assert again.recorded == OPTIONS | {"resume": "auto"}
    train(again, 3)
    again.finish(weights(3))
    close(again)
    check_logs(tmp_path, 3)


def test_a_finished_run_is_finished_and_more_epochs_continue_it(tmp_path):
    run = start(tmp_path)
    train(run, 3)
    run.finish(weights(3))
    close(run)
    before = snapshot(tmp_path)
    again = start(tmp_path)
    assert again.finished
    close(again)
    assert snapshot(tmp_path) == before
    longer = start(tmp_path, epochs=4)
    assert (longer.finished, longer.first_epoch) == (False, 4)
    train(longer, 4)
    longer.finish(weights(4))
    check_logs(tmp_path, 4)


def test_a_run_killed_before_its_last_file_is_not_finished(tmp_path):
    run = start(tmp_path)
    train(run, 3)
    close(run)
    again = start(tmp_path)
    assert not again.finished
    assert again.first_epoch == 4  # no epoch is left, only the last file


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_without_a_run_there_auto_and_none_begin_one(tmp_path, resume):
    run = start(tmp_path, resume=resume)
    assert (run.first_epoch, run.recorded) == (1, None)


def test_none_does_not_overwrite_a_run(tmp_path):
    run = start(tmp_path)
    train(run, 1)
    close(run)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="holds a run already.*--name"):
        start(tmp_path, resume="none")
    assert snapshot(tmp_path) == before


def test_a_path_continues_another_folders_run_in_its_own(tmp_path):
    run = start(tmp_path / "a")
    train(run, 2)
    close(run)
    source = run.folder / "resume.pth"
    before = snapshot(tmp_path / "a")
    moved = start(tmp_path / "b", resume=str(source))
    assert (moved.first_epoch, moved.state) == (3, {"at": 2})
    train(moved, 3)
    close(moved)
    check_logs(tmp_path / "b", 3)
    assert snapshot(tmp_path / "a") == before
    with pytest.raises(ValueError, match="holds a run already"):
        start(tmp_path / "b", resume=str(source))
    own = start(tmp_path / "b", resume=str(moved.folder / "resume.pth"))
    assert own.first_epoch == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"rubbish", "corrupt"), ({"model": {}}, "not the resume.pth of a run")],
)
def test_a_path_to_something_else_is_refused(tmp_path, content, message):
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        checkpoint.save(content, path)
    with pytest.raises(ValueError, match=message):
        start(tmp_path / "save", resume=str(path))
    assert snapshot(tmp_path / "save") == {}


@pytest.mark.parametrize("content", [b"", b"rubbish"])
def test_a_corrupt_resume_file_is_refused_and_kept(tmp_path, content):
    run = start(tmp_path)
    train(run, 1)
    close(run)
    (run.folder / "resume.pth").write_bytes(content)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"resume.pth.*corrupt"):
        start(tmp_path)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("changed", [{"learning_rate": 0.1}, {"seed": 1}, {"device": "cuda"}, {"new_option": 3}])
def test_other_options_are_refused_with_both_values(tmp_path, changed):
    run = start(tmp_path)
    train(run, 1)
    close(run)
    before = snapshot(tmp_path)
    ((key, value),) = changed.items()
    with pytest.raises(ValueError, match=f"{key} {OPTIONS.get(key)}, not {value}.*--name"):
        start(tmp_path, **changed)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("word", ["auto", "all"])
def test_a_word_is_not_compared_before_it_has_become_a_number(tmp_path, word):
    run = start(tmp_path, teacher_views=162)
    train(run, 1)
    close(run)
    opt = Namespace(save_dir=str(tmp_path), resume="auto", epochs=3, save_seconds=0, log=None, teacher_views=word)
    again = Run(opt, {}, "kind", "tb", "run", "net")
    again.record(teacher_views=162)
    with pytest.raises(ValueError, match="teacher_views 162, not 16"):
        again.record(teacher_views=16)
    close(again)


def test_epochs_paths_and_printing_may_change(tmp_path):
    run = start(tmp_path)
    train(run, 1)
    close(run)
    changed = {"data_dir": "b", "clip_root": "b", "clip_mode": "b", "path_t": "b", "save_dir": "b", "print_freq": 1}
    again = start(tmp_path, epochs=9, **changed)
    assert again.first_epoch == 2
    assert json.loads((again.folder / "options.json").read_text()) == OPTIONS | changed | {
        "epochs": 9,
        "resume": "auto",
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [({}, {"init_sha256": "b"}), ({"init_sha256": "a"}, {"init_sha256": "b"}), ({"init_sha256": "a"}, {})],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_files_are_refused_by_their_hashes(tmp_path, first, second, finished):
    run = start(tmp_path, hashes=first)
    train(run, 3)
    if finished:
        run.finish(weights(3))
    close(run)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=f"init_sha256 {first.get('init_sha256')}, not {second.get('init_sha256')}"):
        start(tmp_path, hashes=second)
    assert snapshot(tmp_path) == before
    gc.collect()  # the refused run, which holds its folder's lock
    assert start(tmp_path, hashes=first).finished == finished


def test_killed_while_it_ends_a_run_is_unfinished_and_not_damaged(tmp_path, monkeypatch):
    def killed(*args):
        raise Killed

    for moment in ("write_json", "save"):  # before the hash, and between it and the last file
        run = start(tmp_path / moment)
        train(run, 3)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, moment, killed)
            with pytest.raises(Killed):
                run.finish(weights(3))
        close(run)
        if moment == "write_json":
            with pytest.raises(InputError, match="not finished: resume it"):
                read_record(run.folder)
        again = start(tmp_path / moment)
        assert not again.finished
        again.finish(weights(3))
        assert again.finished
        assert read_record(again.folder) == (
            again.options | {HASH: record_hash(again.options, again.history)},
            lines(tmp_path / moment),
        )
        close(again)


@pytest.mark.parametrize("name", ["options.json", "metrics.jsonl"])
def test_a_finished_run_with_a_damaged_record_writes_it_anew(tmp_path, name):
    run = start(tmp_path)
    train(run, 3)
    run.finish(weights(3))
    close(run)
    kept = {path: (run.folder / path).read_bytes() for path in ("options.json", "metrics.jsonl")}
    (run.folder / name).write_bytes(kept[name].replace(b"0.05", b"0.04"))
    with pytest.raises(InputError, match="corrupt: run its command again"):
        read_record(run.folder)
    again = start(tmp_path)
    assert not again.finished
    again.finish(weights(3))
    assert {path: (run.folder / path).read_bytes() for path in kept} == kept


def test_a_folder_in_use_is_refused(tmp_path):
    run = start(tmp_path)
    with pytest.raises(ValueError, match=f"another process is running in {run.folder}"):
        start(tmp_path)
    start(tmp_path, name="another")  # whose folder is free
    close(run)
    start(tmp_path)


def test_a_save_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write to .*file.*choose another --save_dir"):
        start(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_save_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="choose another --save_dir"):
        start(tmp_path / "save")


MOMENTS = ["before best", "before resume", "before best is in place", "after resume", "after metrics", "half a line"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_no_line_and_no_event_is_missing_or_there_twice(tmp_path, monkeypatch, moment):
    run = start(tmp_path)
    train(run, 1)
    save, append, events_of = checkpoint.save, run._logger.append, run._logger._write_events
    reached = []

    def killed(*args):
        reached.append(moment)
        raise Killed

    def killed_at(name: str):
        def saving(state, path):
            killed() if path.name == name else save(state, path)

        return saving

    with monkeypatch.context() as patch:
        if moment == "before best":
            patch.setattr(checkpoint, "save", killed_at("net_best.pth.next"))
        elif moment == "before resume":
            patch.setattr(checkpoint, "save", killed_at("resume.pth"))
        elif moment == "before best is in place":
            patch.setattr(run, "_place_best", killed)
        elif moment == "after resume":
            patch.setattr(run._logger, "append", killed)
        elif moment == "after metrics":
            patch.setattr(run._logger, "_write_events", killed)
        else:
            append(record(2, 30.0))
            events_of(record(2, 30.0))
            path = run.folder / "metrics.jsonl"
            path.write_bytes(path.read_bytes()[:-9])
            patch.setattr(checkpoint, "save", killed)
        with pytest.raises(Killed):
            train(run, 2)
    assert reached
    close(run)

    again = start(tmp_path)
    done = 2 if moment in ("before best is in place", "after resume", "after metrics") else 1
    assert again.first_epoch == done + 1
    check_logs(tmp_path, done)
    train(again, 3)
    again.finish(weights(3))
    close(again)
    check_logs(tmp_path, 3)
    whole = start(tmp_path / "whole")
    train(whole, 3)
    whole.finish(weights(3))
    assert lines(tmp_path) == lines(tmp_path / "whole")
    assert {path.name for path in again.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}
    for name in ("net_best.pth", "net_last.pth", "resume.pth"):
        assert repr(checkpoint.load(again.folder / name)) == repr(checkpoint.load(whole.folder / name))


@pytest.mark.parametrize("moment", ["between", *MOMENTS[:3]])
def test_killed_after_epochs_without_a_checkpoint_the_best_is_of_the_epochs_that_are_known(
    tmp_path, monkeypatch, moment
):
    """What is trained again may come out otherwise, as on a GPU: the epochs that were best then never are."""
    run = start(tmp_path, save_seconds=1e9, epochs=4)
    train(run, 3)  # a checkpoint after the first
    assert checkpoint.load(run.folder / "resume.pth")["history"] == [record(1, 10.0)]
    assert checkpoint.load(run.folder / "net_best.pth")["epoch"] == 1
    assert len(lines(tmp_path)) == 3

    def killed(*args):
        raise Killed

    save = checkpoint.save
    with monkeypatch.context() as patch:
        if moment == "before best is in place":
            patch.setattr(run, "_place_best", killed)
        elif moment != "between":
            name = {"before best": "net_best.pth.next", "before resume": "resume.pth"}[moment]
            patch.setattr(checkpoint, "save", lambda x, path: killed() if path.name == name else save(x, path))
        if moment != "between":
            with pytest.raises(Killed):
                run._write()
    close(run)

    again = start(tmp_path, epochs=4)
    done = 3 if moment == "before best is in place" else 1
    best = 2 if moment == "before best is in place" else 1
    assert again.first_epoch == done + 1
    check_logs(tmp_path, done)
    assert not (again.folder / "net_best.pth.next").exists()
    train(again, 4, accuracies=(10.0, 9.0, 8.0, 7.0))
    again.finish(weights(4))
    check_logs(tmp_path, 4)
    saved = checkpoint.load(again.folder / "net_best.pth")
    assert saved["epoch"] == again.best["epoch"] == best
    assert torch.equal(saved["model"]["w"], weights(best)["model"]["w"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, Killed, NonFiniteLoss, RuntimeError])
def test_what_ends_the_script_early_loses_no_finished_epoch(tmp_path, error):
    state = {"w": torch.zeros(2), "list": [{"at": torch.zeros(1)}, (1, 2)]}

    @exits("train.py", memory="")
    def main():
        run = start(tmp_path, save_seconds=1e9, epochs=9)
        for epoch in (1, 2, 3):
            run.end_epoch(record(epoch, (10.0, 30.0, 20.0)[epoch - 1]), state, {"model": state})
            state["w"] += 1  # the next epoch trains on
            state["list"][0]["at"] += 1
        assert checkpoint.load(run.folder / "resume.pth")["state"]["w"].tolist() == [0, 0]
        run._lock.release()
        raise error("at epoch 4")

    with pytest.raises((error, SystemExit)):
        main()
    again = start(tmp_path, epochs=9)
    assert again.first_epoch == 4
    assert again.state == {"w": pytest.approx([2, 2]), "list": [{"at": 2}, (1, 2)]}
    best = checkpoint.load(again.folder / "net_best.pth")
    assert (best["epoch"], best["model"]["w"].tolist()) == (2, [1, 1])
    check_logs(tmp_path, 3)


def test_a_checkpoint_is_due_after_the_first_epoch_and_the_last_and_every_so_many_seconds(tmp_path, monkeypatch):
    now, written = 100.0, []
    monkeypatch.setattr("time.monotonic", lambda: now)
    save = checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda state, path: (written.append(path.name), save(state, path)))
    run = start(tmp_path, save_seconds=30, epochs=7)
    found = []
    for epoch, now in enumerate((110, 125, 139, 140, 150, 160, 165), start=1):  # noqa: B007
        run.end_epoch(record(epoch, 50.0 - epoch), {"at": epoch}, weights(epoch), save_freq=5)
        found.append(" ".join(written))
        written.clear()
    first, kept = "net_best.pth.next resume.pth", "ckpt_epoch_5.pth resume.pth"
    assert found == [first, "", "", "resume.pth", kept, "", "resume.pth"]


def test_a_run_goes_on_inside_an_epoch(tmp_path, capsys):
    run = start(tmp_path)
    run.save_inside(3, {"at": "3 of 1"})
    close(run)
    again = start(tmp_path, save_steps=7)
    assert (again.first_epoch, again.steps, again.state, again.history) == (1, 3, {"at": "3 of 1"}, [])
    assert f"resuming {again.folder} after step 3 of epoch 1" in capsys.readouterr().out
    train(again, 2)
    again.save_inside(5, {"at": "5 of 3"})
    close(again)
    with pytest.raises(ValueError, match="inside epoch 3: use --epochs 3 or more"):
        start(tmp_path, epochs=2)
    gc.collect()  # the run, which holds its folder's lock
    last = start(tmp_path)
    assert (last.first_epoch, last.steps, last.state) == (3, 5, {"at": "5 of 3"})
    assert "after step 5 of epoch 3" in capsys.readouterr().out
    train(last, 3)
    close(last)
    check_logs(tmp_path, 3)
    assert start(tmp_path).steps == 0


def test_a_finished_run_without_its_best_weights_says_so(tmp_path, capsys):
    run = start(tmp_path)
    train(run, 3)
    run.finish(weights(3))
    (run.folder / "net_best.pth").unlink()
    run.print_result()
    assert "net_best.pth is missing: --checkpoint last takes the last epoch's weights" in capsys.readouterr().out


def without_labels(epoch: int, loss: float | None, near: float) -> dict:
    return record(epoch) | {"test_acc": None, "heldout_loss": loss, "heldout_knn": near}


@pytest.mark.parametrize(
    ("losses", "near", "best"),
    [
        ((3.0, 1.0, 2.0), (10.0, 20.0, 30.0), 2),
        ((1.0, 1.0, 2.0), (10.0, 20.0, 30.0), 1),
        ((None,) * 3, (10.0, 30.0, 20.0), 2),
    ],
)
def test_without_labels_the_pictures_held_out_choose_the_best(tmp_path, capsys, losses, near, best):
    run = start(tmp_path)
    for epoch in (1, 2, 3):
        run.end_epoch(without_labels(epoch, losses[epoch - 1], near[epoch - 1]), {}, weights(epoch))
    run.finish(weights(3))
    assert run.best["epoch"] == best
    assert checkpoint.load(run.folder / "net_best.pth")["epoch"] == best
    run.print_result()
    assert f"nearest neighbours as the teacher's (epoch {best}), in {run.folder}" in capsys.readouterr().out


def test_a_run_stops_when_the_best_epoch_is_long_ago_and_goes_on_with_more_patience(tmp_path, capsys):
    run = start(tmp_path, epochs=9, patience=2)
    train(run, 2)
    assert not run.over
    run.end_epoch(record(3), {"at": 3}, weights(3))  # not tested, so it does not count
    run.end_epoch(record(4, 25.0), {"at": 4}, weights(4))
    assert not run.over
    close(run)
    run = start(tmp_path, epochs=9, patience=2)
    run.end_epoch(record(5, 29.0), {"at": 5}, weights(5))
    assert run.over and not run.finished
    run.finish(weights(5))
    run.print_result()
    assert "--patience 2: stopped after epoch 5" in capsys.readouterr().out
    close(run)
    again = start(tmp_path, epochs=9, patience=2)
    assert again.finished and again.state == {"at": 5}
    close(again)
    longer = start(tmp_path, epochs=9, patience=3)
    assert (longer.over, longer.finished, longer.first_epoch) == (False, False, 6)


def test_only_after_a_new_start_without_them_may_graphs_be_off(tmp_path, monkeypatch):
    run = start(tmp_path, graph="on")
    train(run, 1)
    close(run)
    with pytest.raises(ValueError, match="graph on, not off"):
        start(tmp_path, graph="off")
    monkeypatch.setenv("EGA_WITHOUT", "graph")
    close(start(tmp_path, graph="off"))
