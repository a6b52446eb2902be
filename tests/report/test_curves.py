import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from runs import change_options

import train_student
import train_teacher
from dataset.views import CIFAR100_NORMALIZATION, CLIP_NORMALIZATION, normalize
from evaluation import load_student
from helper.records import HASH, StoredRun, read_run
from models import create_student, model_dict
from models.clip_teacher import ImageEncoder
from models.heads import TeacNet
from report import class_plots, curves
from report.class_plots import class_rows
from report.curves import embedding_graphs, plot_runs
from report.table import run_table


@pytest.fixture
def from_a_cnn(tiny_dataset, tmp_path):
    """Runs from a resnet14, one in the joint space and one on maps: {method: folder}; and the teacher's file."""
    base = ["--dataset", "tiny", "--save_dir", str(tmp_path), "--device", "cpu", "--amp", "off", "--epochs", "1"]
    train_teacher.main([*base, "--model", "resnet14"])
    (path,) = tmp_path.glob("models/*/resnet14_last.pth")
    folders = {}
    for method in ("ega", "attention"):
        options = ["--distill", method, "--model_s", "resnet8", "--feature_dim", "8", "--path_t", str(path)]
        train_student.main([*base, *options])
        (folders[method],) = tmp_path.glob(f"student_model/*_{method}_*")
    return folders, path


def assert_is_picture(path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(np.unique(np.asarray(image))) > 10
        assert 800 < image.width < 4000
        return image.size


def test_rows_are_ordered_by_class():
    targets = torch.randint(20, (1000,), generator=torch.Generator().manual_seed(0))
    rows = class_rows(targets, num_classes=5, per_class=4)
    assert targets[rows].tolist() == [target for target in (0, 5, 10, 14, 19) for _ in range(4)]
    assert len(rows.unique()) == 20
    few = class_rows(torch.tensor([7, 3, 7]), num_classes=5, per_class=4)
    assert few.tolist() == [1, 0, 2]


def test_graphs_are_pearson_correlations_of_the_run_s_embeddings(finished, tiny_dataset, tiny_clip, monkeypatch):
    seen = []
    real = curves.edge_matrix
    monkeypatch.setattr(curves, "edge_matrix", lambda embedding: seen.append(embedding) or real(embedding))
    graphs = embedding_graphs(read_run(finished["ega"]), num_classes=4, per_class=3)

    assert graphs.targets.tolist() == sorted(graphs.targets.tolist())
    assert graphs.targets.tolist() == tiny_dataset.test.targets[graphs.rows].tolist()
    assert graphs.classes == [tiny_dataset.classes[target] for target in graphs.targets.unique()]
    for edges, embedding in zip((graphs.teacher, graphs.student), seen, strict=True):
        np.testing.assert_allclose(edges.numpy(), np.corrcoef(embedding.numpy()), atol=1e-6)

    # The embeddings are those of the stored weights, on unchanged test images.
    state = torch.load(finished["ega"] / "resnet8_best.pth", weights_only=True)
    image = normalize(tiny_dataset.test.images[graphs.rows], CLIP_NORMALIZATION)
    student, head = create_student("resnet8", 8, 5).eval(), TeacNet(16, 8, 5)
    student.backbone.load_state_dict(state["model"])
    student.head.load_state_dict(state["layer"])
    head.load_state_dict(state["teacher_layer"])
    with torch.no_grad():
        torch.testing.assert_close(seen[1], student(image).embedding, atol=1e-4, rtol=1e-4)
        x = ImageEncoder(str(tiny_clip), "")(image)  # its resolution is the images' own
        torch.testing.assert_close(seen[0], head(x)[0], atol=5e-3, rtol=5e-3)


def test_nothing_is_encoded_twice(finished, tiny_dataset, monkeypatch):
    def encode(*args):
        raise AssertionError("the bank holds it")

    monkeypatch.setattr("helper.bank.encode_view", encode)
    embedding_graphs(read_run(finished["kd"]))


def test_picture_of_several_runs(finished, tiny_dataset, capsys):
    curves.main([str(folder) for folder in finished.values()])
    path = finished["ega"].parents[1] / "plots" / f"{finished['ega'].name}.png"
    assert capsys.readouterr().out.strip() == str(path)
    assert_is_picture(path)


def test_picture_of_a_student_alone_has_curves_only(finished, tiny_dataset, tmp_path):
    alone = assert_is_picture(plot_runs([finished["none"]], tmp_path / "deep" / "alone.png"))
    other = assert_is_picture(
        plot_runs([finished["none"], finished["kd"]], tmp_path / "kd.png", graph_of=finished["kd"])
    )
    assert alone[1] < other[1]


@pytest.mark.parametrize(("count", "largest", "scale"), [(2, 20.0, "linear"), (2, 40.0, "log"), (9, -1.0, "linear")])
def test_curves_of_few_and_of_many_runs(tmp_path, count, largest, scale):
    """Few are named in each panel, many once, above them; losses of different size share a logarithmic axis."""
    losses = [1.0, largest] * 5
    runs = [
        StoredRun(
            tmp_path, {"distill": "kd", "beta": beta}, [{"epoch": 1, "test_acc": 50.0, "train_loss": losses[beta]}]
        )
        for beta in range(count)
    ]
    figure = curves._figure(runs, None, None)
    accuracy, loss = figure.axes
    legends = [axis.get_legend() for axis in figure.axes] if count < 7 else figure.legends
    assert len(legends) == (2 if count < 7 else 1)
    for legend in legends:
        assert [text.get_text() for text in legend.get_texts()] == [f"KD, beta {beta}" for beta in range(count)]
    assert count < 7 or not any(axis.get_legend() for axis in figure.axes)
    assert loss.get_yscale() == scale
    low, high = loss.get_ylim()
    assert low <= min(losses[:count])
    assert high >= max(losses[:count])
    assert accuracy.get_yscale() == "linear"


def test_a_run_is_read_from_its_two_small_files(finished, tiny_dataset, tmp_path, capsys):
    """As kept for the record, without weights: the same table, and the curves, of its terms too."""
    kept = []
    for folder in finished.values():
        kept.append(tmp_path / "runs" / folder.name)
        kept[-1].mkdir(parents=True)
        for name in ("options.json", "metrics.jsonl"):
            shutil.copy(folder / name, kept[-1])
    assert run_table([read_run(folder) for folder in kept]) == run_table(
        [read_run(folder) for folder in finished.values()]
    )
    whole = assert_is_picture(plot_runs(list(finished.values()), tmp_path / "whole.png"))
    size = assert_is_picture(plot_runs(kept, tmp_path / "curves.png"))
    assert size[0] == whole[0]
    assert size[1] < whole[1]
    assert_refused(capsys, "holds no weights", *kept, "--graph_of", kept[-1], "--out", tmp_path / "refused.png")


def test_picture_of_embeddings_of_both_students_and_the_teacher(finished, tiny_dataset, tmp_path, capsys, monkeypatch):
    seen = []
    real = class_plots.plane
    monkeypatch.setattr(class_plots, "plane", lambda embedding: seen.append(embedding) or real(embedding))
    out = tmp_path / "deep" / "embedding.png"
    curves.main(["--embedding", str(finished["none"]), str(finished["ega"]), "--out", str(out)])
    assert capsys.readouterr().out.strip() == str(out)
    assert_is_picture(out)

    order = tiny_dataset.test.targets.argsort(stable=True)
    image = normalize(tiny_dataset.test.images[order], CLIP_NORMALIZATION)
    with torch.no_grad():
        for embedding, method in zip(seen, ("none", "ega"), strict=False):
            torch.testing.assert_close(embedding, load_student(finished[method])[0].embed(image), atol=1e-4, rtol=1e-4)
    assert len(seen) == 3
    assert seen[2].shape == seen[1].shape


def test_the_legend_names_at_most_twenty_classes_outside_of_the_panels(finished, tiny_dataset):
    figure = class_plots.embedding_figure([read_run(finished["none"])])
    (axis,) = figure.axes
    assert axis.get_legend() is None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == tiny_dataset.classes
    assert len({(str(c.get_facecolor()), c.get_paths()[0].vertices.shape) for c in axis.collections}) == 5
    targets = torch.arange(300) % 100
    assert len(targets[class_rows(targets, class_plots._CLASSES, 3)].unique()) == 20


def test_gain_of_each_class_over_the_student_alone(finished, tiny_dataset, tmp_path):
    figure = class_plots.gain_figure([read_run(finished[method]) for method in ("kd", "none", "ega")])
    assert len(figure.axes) == 2
    targets = tiny_dataset.test.targets
    for axis, method in zip(figure.axes, ("kd", "ega"), strict=True):
        right = []
        for name in (method, "none"):
            with torch.no_grad():
                logits = load_student(finished[name])[0](normalize(tiny_dataset.test.images, CLIP_NORMALIZATION))
            right.append([100 * float((logits[targets == c].argmax(1) == c).float().mean()) for c in range(5)])
        gain = {name: a - b for name, a, b in zip(tiny_dataset.classes, *right, strict=True)}
        names = [text.get_text() for text in axis.get_xticklabels()]
        assert sorted(names) == tiny_dataset.classes
        heights = [bar.get_height() for bar in axis.patches]
        assert heights == pytest.approx([gain[name] for name in names])
        assert heights == sorted(heights, reverse=True)
    assert_is_picture(curves.plot_comparison([finished["none"], finished["kd"]], "per_class", tmp_path / "gain.png"))


def assert_refused(capsys, words: str, *argv):
    with pytest.raises(SystemExit) as exit_:
        curves.main([str(word) for word in argv])
    assert exit_.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_bad_input(finished, tiny_dataset, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert_refused(capsys, "not the folder of a run", tmp_path / "nowhere", "--out", out)

    broken = tmp_path / "save" / "student_model" / "run"
    shutil.copytree(finished["ega"], broken)
    metrics, options = (broken / "metrics.jsonl").read_text(), (broken / "options.json").read_text()
    first, second = metrics.splitlines(keepends=True)
    damaged = [(metrics.replace('"test_loss": ', '"test_loss": 1', 1), options), (first, options), (metrics, "{")]
    damaged += [(first + second[:20], options), (metrics, options.replace('"batch_size": ', '"batch_size": 3', 1))]
    damaged += [(metrics, options.replace(f'"{word}"', '"model_x"', 1)) for word in ("model_s", "model_t", "epochs")]
    for written in damaged:
        for name, text in zip(("metrics.jsonl", "options.json"), written, strict=True):
            (broken / name).write_text(text)
        assert_refused(capsys, "corrupt", broken, "--out", out)
    moved = options.replace('"data_dir": "./data"', '"data_dir": "elsewhere"')
    (broken / "metrics.jsonl").write_text(metrics)
    (broken / "options.json").write_text(moved)
    assert options != moved and read_run(broken).options["data_dir"] == "elsewhere"
    (broken / "options.json").write_text(options.replace(HASH, "another"))
    assert_refused(capsys, "not finished", broken, "--out", out)

    assert_refused(capsys, "no teacher", finished["none"], "--graph_of", finished["none"], "--out", out)
    assert_refused(capsys, "compares runs with a student alone", "--per_class", finished["ega"], "--out", out)
    assert_refused(capsys, "--graph_of is of the curves", "--embedding", finished["ega"], "--graph_of", finished["ega"])
    assert_refused(capsys, "none of the runs", finished["none"], "--graph_of", finished["kd"], "--out", out)
    (tmp_path / "file").touch()
    assert_refused(capsys, "file", finished["none"], "--out", tmp_path / "file" / "out.png")
    assert not out.exists()


def test_other_data_than_the_run_s_is_refused(finished, tiny_dataset, tmp_path, capsys):
    other = tmp_path / "save" / "student_model" / "run"
    shutil.copytree(finished["ega"], other)
    change_options(other, dataset_sha256="0")
    assert_refused(capsys, "another dataset", other)


def test_the_graphs_of_a_cnn_are_those_of_its_joint_space_or_of_its_pooled_features(
    from_a_cnn, tiny_dataset, monkeypatch
):
    folders, path = from_a_cnn
    seen = []
    real = curves.edge_matrix
    monkeypatch.setattr(curves, "edge_matrix", lambda embedding: seen.append(embedding) or real(embedding))
    graphs = {method: embedding_graphs(read_run(folder), 4, 3) for method, folder in folders.items()}
    tutor, student = model_dict["resnet14"](num_classes=5).eval(), model_dict["resnet8"](num_classes=5).eval()
    tutor.load_state_dict(torch.load(path, weights_only=True)["model"])
    for place, method in enumerate(folders):
        image = normalize(tiny_dataset.test.images[graphs[method].rows], CIFAR100_NORMALIZATION)
        state = torch.load(folders[method] / "resnet8_best.pth", weights_only=True)
        student.load_state_dict(state["model"])
        with torch.no_grad():
            pooled = [model(image, is_feat=True)[0][-1] for model in (tutor, student)]
        for embedding, x, layer in zip(seen[2 * place :], pooled, ("teacher_layer", "layer"), strict=False):
            if method == "ega":
                x = x @ state[layer]["fit_dim_Net.weight"].T + state[layer]["fit_dim_Net.bias"]
            torch.testing.assert_close(embedding, x, rtol=1e-4, atol=1e-5)
    assert_is_picture(plot_runs(list(folders.values())))


def test_a_cnn_that_is_another_by_now_is_refused(from_a_cnn):
    folders, path = from_a_cnn
    state = torch.load(path, weights_only=True)
    torch.save(state | {"more": 1}, path)
    with pytest.raises(ValueError, match="another teacher"):
        embedding_graphs(read_run(folders["ega"]))


def test_accuracies_are_dots_in_order_with_the_deviation_over_seeds():
    def run(distill, seed, accuracy):
        options = {"distill": distill, "seed": seed, "model_s": "resnet8", "model_t": "vit32"}
        return StoredRun("", options, [{"epoch": 1, "test_acc": accuracy, "heldout_loss": 1.0}])

    runs = [run("ega", 0, 60.0), run("ega", 1, 64.0), run("none", 0, 50.0), run("kd", 0, 55.0), run("kd", 0, None)]
    (axis,) = curves.accuracy_figure(runs[:4]).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["student alone", "KD", "EGA"]
    bars = [bar.lines for bar in axis.containers]
    assert [float(line.get_xdata()[0]) for line, _, _ in bars] == [50, 55, 62]
    ((left, right),) = [segments[0][:, 0] for _, _, (drawn,) in bars[2:] for segments in [drawn.get_segments()]]
    assert (left, right) == pytest.approx((62 - 8**0.5, 62 + 8**0.5))
    with pytest.raises(ValueError, match="none of these runs"):
        curves.accuracy_figure(runs[4:])
