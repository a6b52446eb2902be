"""evaluate.py as its users run it, on students of a tiny CLIP and of a tiny CNN."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import clip
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import change_options
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import KNeighborsClassifier

import dataset
import evaluate
import train_student
import train_teacher
from conftest import make_dataset
from dataset import ImageDataset, Split
from dataset.resize import resize
from dataset.views import CIFAR100_NORMALIZATION, CLIP_NORMALIZATION, CropViews, normalize
from evaluation import load_student
from helper.contrastive import TEMPLATES
from models import create_student, model_dict
from models.clip_teacher import ImageEncoder, load_clip
from models.heads import TeacNet


def other_dataset() -> ImageDataset:
    """Larger pictures of other classes; some without a label."""
    made = make_dataset(80, 30, 3)

    def larger(split: Split, unlabelled: int) -> Split:
        targets = split.targets.clone()
        targets[:unlabelled] = -1
        return Split(resize(split.images, 48), targets)

    splits = (larger(made.train, 5), larger(made.test, 0))
    return ImageDataset("other", ["red", "green", "blue"], *splits, views=CropViews(48))


@pytest.fixture(scope="module", autouse=True)
def datasets():
    """--dataset tiny; other, of other classes; cifar10 and large, which are tiny with its classes in another order, or
    in larger pictures."""
    made = make_dataset()
    order = torch.tensor([4, 3, 2, 1, 0])
    turned = [Split(split.images, order[split.targets]) for split in (made.train, made.test)]
    known = {"tiny": made, "other": other_dataset()}
    known["cifar10"] = ImageDataset("cifar10", made.classes[::-1], *turned)
    large = [Split(resize(split.images, 48), split.targets) for split in (made.train, made.test)]
    known["few"] = make_dataset(num_train=5)
    known["large"] = ImageDataset("large", made.classes, *large, views=CropViews(48))
    with pytest.MonkeyPatch.context() as patch:
        for name, data in known.items():
            patch.setitem(dataset.DATASETS, name, lambda data_dir, data=data: data)
        yield known


@pytest.fixture(scope="module")
def runs(datasets, tiny_clip, tmp_path_factory) -> dict[str, Path]:
    """The folder of a run by what it is."""
    root = tmp_path_factory.mktemp("save")
    (root / "left_out.txt").write_text("colour 1\n\ncolour 4\n")

    def train(*options, script=train_student) -> Path:
        base = f"--dataset tiny --save_dir {root} --device cpu --amp off --batch_size 16"
        script.main([*base.split(), *map(str, options)])
        kind = "student_model" if script is train_student else "models"
        return max((root / kind).iterdir(), key=lambda folder: (folder / "resume.pth").stat().st_mtime_ns)

    student = ("--clip_mode", tiny_clip, "--model_s", "resnet8")
    joint = (*student, "--joint", "teacher", "--epochs", 1)
    found = {f"ega{seed}": train(*student, "--feature_dim", 8, "--epochs", 2, "--seed", seed) for seed in (0, 1)}
    found["none"] = train(*student, "--feature_dim", 8, "--distill", "none", "--epochs", 1)
    found["joint"] = train(*joint)
    found["unlabelled"] = train(*joint, "--labels", 0, "-r", 0, "-b", 1)
    found["without"] = train(*joint, "--leave_out", root / "left_out.txt")
    found["head"] = train("--model", tiny_clip, "--feature_dim", 8, "--epochs", 1, script=train_teacher)
    found["cnn"] = train("--model", "resnet14", "--epochs", 1, script=train_teacher)
    path = found["cnn"] / "resnet14_last.pth"
    found["kd"] = train("--distill", "kd", "--model_s", "resnet8", "--path_t", path, "--epochs", 1)
    return found


def ask(*options) -> None:
    evaluate.main(["--device", "cpu", *map(str, options)])


def answers(folder: Path, section: str, data: str = "tiny", stem: str = "resnet8_best") -> dict:
    return json.loads((folder / "evaluation.json").read_text())[section][data][stem]


def cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def pixels(data: ImageDataset, normalization: tuple = CLIP_NORMALIZATION) -> torch.Tensor:
    return normalize(data.test.images, normalization)


@pytest.mark.parametrize("name", ["ega0", "none", "kd"])
@pytest.mark.parametrize("which", ["best", "last"])
def test_accuracies_are_the_run_s_own_to_the_last_digit(runs, datasets, name, which):
    folder = runs[name]
    ask(folder, "--checkpoint", which)
    found = answers(folder, "accuracy", stem=f"resnet8_{which}")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record = records[-1] if which == "last" else max(records, key=lambda record: record["test_acc"])
    student = found["student"]
    assert (student["top1"], student["top5"]) == (record["test_acc"], record["test_acc_top5"])
    assert student["cross_entropy"] == record["test_loss"]
    assert student["class_mean"] == pytest.approx(student["top1"])  # every class has as many test images
    assert set(student["per_class"]) == set(datasets["tiny"].classes)
    if name == "none":
        assert "teacher" not in found
    else:
        assert found["teacher"]["top1"] == record["teacher_acc"]


def test_the_confusion_matrix_is_scikit_learn_s(runs, datasets):
    ask(runs["none"])
    rows = list(csv.reader((runs["none"] / "confusion_tiny_resnet8_best.csv").open()))
    net, _, classes = load_student(runs["none"])
    with torch.no_grad():
        predicted = net(pixels(datasets["tiny"])).argmax(1)
    assert rows[0] == ["true class", *classes] and [row[0] for row in rows[1:]] == classes
    expected = confusion_matrix(datasets["tiny"].test.targets, predicted, labels=range(5))
    assert [list(map(int, row[1:])) for row in rows[1:]] == expected.tolist()
    with Image.open(runs["none"] / "confusion_tiny_resnet8_best.png") as image:
        assert min(image.size) > 300


def test_agreement_where_there_are_logits_and_a_joint_space(runs):
    for name, there in (("ega0", "same_class divergence node_error edge_error"), ("kd", "same_class divergence"),
                        ("joint", "node_error edge_error"), ("unlabelled", "node_error edge_error")):  # fmt: skip
        ask(runs[name])
        found = answers(runs[name], "agreement")["student"]
        assert {key for key, value in found.items() if value is not None} == {*there.split(), "cka"}
        assert 0 < found["cka"] <= 1
        graphs = json.loads((runs[name] / "evaluation.json").read_text()).get("graphs")
        assert (graphs is not None) == ("node_error" in there)
    assert not answers(runs["unlabelled"], "accuracy")
    assert set(answers(runs["joint"], "accuracy")) == {"student"}
    ask(runs["none"])
    assert "agreement" not in json.loads((runs["none"] / "evaluation.json").read_text())


def test_agreement_of_embeddings_is_that_of_the_stored_weights(runs, datasets, tiny_clip):
    ask(runs["joint"])
    net, _, _ = load_student(runs["joint"])
    images = pixels(datasets["tiny"])
    with torch.no_grad():
        f_s, f_t = net.embed(images).double(), ImageEncoder(str(tiny_clip), "")(images).double()
    e_s, e_t = np.corrcoef(f_s.numpy()), np.corrcoef(f_t.numpy())
    found = answers(runs["joint"], "agreement")["student"]
    assert found["edge_error"] == pytest.approx(np.sqrt(np.mean((e_s - e_t) ** 2)), rel=1e-2)  # the bank is in fp16
    graphs = answers(runs["joint"], "graphs")
    assert graphs["teacher"]["edge"] == 0 and graphs["teacher"]["itself"] == pytest.approx(1)
    assert graphs["student"]["edge"] == pytest.approx(16 * found["edge_error"], rel=0.2)  # in batches of 16


def test_another_data_set_of_the_same_classes_in_another_order(runs):
    ask(runs["ega0"])
    ask(runs["ega0"], "--dataset", "cifar10")
    own, other = (answers(runs["ega0"], "accuracy", data) for data in ("tiny", "cifar10"))
    assert other["student"]["per_class"] == own["student"]["per_class"]
    assert other["teacher"]["top1"] == pytest.approx(own["teacher"]["top1"], abs=5)  # encoded anew, not from the bank


def test_larger_pictures_are_seen_by_each_at_its_own_size(runs, datasets, tiny_clip):
    ask(runs["ega0"], "--dataset", "large")
    found, test = answers(runs["ega0"], "accuracy", data="large"), datasets["large"].test
    net, _, _ = load_student(runs["ega0"])
    head = TeacNet(16, 8, 5)
    head.load_state_dict(torch.load(runs["ega0"] / "resnet8_best.pth", weights_only=True)["teacher_layer"])
    small = normalize(resize(test.images, 32), CLIP_NORMALIZATION)
    with torch.no_grad():
        expected = {"student": net(small), "teacher": head(ImageEncoder(str(tiny_clip), "")(small))[1]}
    for side, logits in expected.items():
        assert found[side]["cross_entropy"] == pytest.approx(float(F.cross_entropy(logits, test.targets)), rel=1e-4)


def test_seeds_are_averaged_in_one_table(runs, capsys):
    ask(runs["ega0"], runs["ega1"], runs["none"])
    table = cells(capsys.readouterr().out.partition("Agreement")[0])
    assert [row[0] for row in table] == ["", "resnet8: EGA", "teacher: tiny_clip", "resnet8: student alone"]
    top1 = [answers(runs[f"ega{seed}"], "accuracy")["student"]["top1"] for seed in (0, 1)]
    assert table[1][1] == f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f} (2)"
    assert table[3][1] == f"{answers(runs['none'], 'accuracy')['student']['top1']:.2f}"


def test_transfer_is_of_frozen_features_at_the_student_s_size(runs, datasets, tiny_clip, monkeypatch, capsys):
    encoded = []
    real = ImageEncoder.forward
    monkeypatch.setattr(ImageEncoder, "forward", lambda self, image: encoded.append(len(image)) or real(self, image))
    ask(runs["ega0"], runs["ega1"], runs["none"], "--probe", "other")
    assert sum(encoded) == 75 + 30  # once for all runs, and no image without a label
    assert [row[0] for row in cells(capsys.readouterr().out)] == [
        "", "resnet8: EGA", "teacher: tiny_clip", "resnet8: student alone",
    ]  # fmt: skip
    train, test = datasets["other"].train, datasets["other"].test
    rows = train.targets >= 0

    def neighbours(features) -> float:
        with torch.no_grad():
            x, y = features(train.images[rows]), features(test.images)
        model = KNeighborsClassifier(1, metric="cosine").fit(x.numpy(), train.targets[rows].numpy())
        return 100 * model.score(y.numpy(), test.targets.numpy())

    net, _, _ = load_student(runs["ega0"])
    encoder = ImageEncoder(str(tiny_clip), "")
    found = answers(runs["ega0"], "transfer", "other")
    small = {"knn_1": neighbours(lambda x: net.student(normalize(resize(x, 32), CLIP_NORMALIZATION)).features[-1])}
    large = {"knn_1": neighbours(lambda x: encoder(normalize(resize(x, 32), CLIP_NORMALIZATION)))}
    assert found["student"]["knn_1"] == pytest.approx(small["knn_1"])
    assert found["teacher"]["knn_1"] == pytest.approx(large["knn_1"], abs=4)  # the bank is in fp16
    assert found["student"]["linear"] > 60 and found["student"]["strength"] in [10.0**-power for power in range(7)]


def test_zero_shot_is_clip_s_own_ensemble(runs, datasets, tiny_clip, capsys):
    ask(runs["without"], "--zero_shot", "--dataset", "tiny")
    out = capsys.readouterr().out
    model = load_clip(tiny_clip).float()
    weights = []
    for name in datasets["tiny"].classes:
        with torch.no_grad():
            texts = model.encode_text(clip.tokenize([template.format(name) for template in TEMPLATES]))
        weights.append(F.normalize(F.normalize(texts).mean(0), dim=0))
    net, _, classes = load_student(runs["without"])
    assert classes == ["colour 0", "colour 2", "colour 3"]
    targets = datasets["tiny"].test.targets
    with torch.no_grad():
        images = pixels(datasets["tiny"])
        for side, embedding in (("student", net.embed(images)), ("teacher", model.encode_image(images))):
            right = (F.normalize(embedding) @ torch.stack(weights).T).argmax(1) == targets
            found, new = answers(runs["without"], "zero_shot")[side], (targets == 1) | (targets == 4)
            assert found["top1"] == pytest.approx(100 * float(right.double().mean()), abs=0.01)
            assert found["unseen"] == pytest.approx(100 * float(right[new].double().mean()), abs=0.01)
            assert found["seen"] == pytest.approx(100 * float(right[~new].double().mean()), abs=0.01)
    assert "classes never seen" in out


def test_zero_shot_chooses_from_any_names(runs, tmp_path, capsys):
    (tmp_path / "names.txt").write_text("colour 1\nan unheard-of thing\ncolour 2\n")
    (tmp_path / "others.txt").write_text("colour 0\ncolour 1\ncolour 3\n")
    for names in ("names.txt", "others.txt", "names.txt"):
        ask(runs["joint"], "--labels", tmp_path / names)
    asked = json.loads((runs["joint"] / "evaluation.json").read_text())["zero_shot"]
    found = [name for name in asked if name.startswith("tiny, 3 names (")]
    first, second = (asked[name]["resnet8_best"]["student"]["per_class"] for name in found)
    assert set(first) == {"colour 1", "an unheard-of thing", "colour 2"}
    assert set(second) == {"colour 0", "colour 1", "colour 3"}
    assert first["an unheard-of thing"] is None  # no image is of it
    assert first["colour 1"] is not None
    (tmp_path / "none.txt").write_text("nothing\n")
    refused(
        capsys, "names none of the classes of tiny, such as colour 0", runs["joint"], "--labels", tmp_path / "none.txt"
    )


def test_the_sections_of_an_evaluation_stand_beside_one_another(runs):
    ask(runs["joint"])
    ask(runs["joint"], "--zero_shot", "--no_teacher")
    ask(runs["joint"], "--checkpoint", "last")
    content = json.loads((runs["joint"] / "evaluation.json").read_text())
    assert {"accuracy", "agreement", "zero_shot"} <= set(content)
    assert set(content["accuracy"]["tiny"]) == {"resnet8_best", "resnet8_last"}
    assert set(content["zero_shot"]["tiny"]["resnet8_best"]) == {"student"}


def test_corruptions_are_read_by_severity(runs, datasets, tmp_path, capsys):
    test = datasets["cifar10"].test
    rng = np.random.default_rng(0)
    clean = test.images.permute(0, 2, 3, 1).numpy()
    folder = tmp_path / "CIFAR-10-C"
    refused(
        capsys,
        "CIFAR-10-C has no labels.npy",
        runs["kd"],
        "--corruptions",
        "--dataset",
        "cifar10",
        "--data_dir",
        tmp_path,
    )
    folder.mkdir()
    noise = rng.integers(0, 256, (4 * len(test), 32, 32, 3), dtype=np.uint8)
    np.save(folder / "fog.npy", np.concatenate([clean] * 5))
    np.save(folder / "noise.npy", np.concatenate([clean, noise]))
    np.save(folder / "labels.npy", np.concatenate([test.targets.numpy()] * 5).astype(np.uint8))
    for name in ("kd", "ega0"):
        common = (runs[name], "--dataset", "cifar10", "--data_dir", tmp_path)
        ask(*common)
        ask(*common, "--corruptions")
        accuracy, found = (answers(runs[name], section, "cifar10") for section in ("accuracy", "corruptions"))
        for side in ("student", "teacher"):
            whole = accuracy[side]["top1"]
            assert found[side]["per_corruption"]["fog"] == pytest.approx([whole] * 5)
            assert found[side]["per_corruption"]["noise"][0] == pytest.approx(whole)
            assert found[side]["severity_1"] == pytest.approx(whole)
            mean = np.mean(list(found[side]["per_corruption"].values()))
            assert found[side]["mean"] == pytest.approx(mean)
    net, _, classes = load_student(runs["ega0"])
    severity_3 = torch.from_numpy(noise[len(test) : 2 * len(test)]).permute(0, 3, 1, 2)
    with torch.no_grad():
        predicted = net(normalize(severity_3, CLIP_NORMALIZATION)).argmax(1)
    right = [classes[p] == datasets["cifar10"].classes[t] for p, t in zip(predicted, test.targets, strict=True)]
    assert found["student"]["per_corruption"]["noise"][2] == pytest.approx(100 * np.mean(right))
    refused(capsys, "not tiny", runs["kd"], "--corruptions")


def save_release(folder: Path, student) -> Path:
    """A student's file as the release writes one: no options, no classes."""
    folder.mkdir()
    state = {"epoch": 3, "model": student.backbone.state_dict(), "layer": student.head.state_dict()}
    torch.save(state, folder / "resnet8_best.pth")
    return folder / "resnet8_best.pth"


def test_files_of_weights_of_every_kind(runs, datasets, tmp_path, capsys):
    torch.manual_seed(0)
    cnn, student = model_dict["resnet20"](num_classes=5).eval(), create_student("resnet8", 8, 5).eval()
    (tmp_path / "resnet20_vanilla").mkdir()
    published = tmp_path / "resnet20_vanilla" / "ckpt_epoch_240.pth"
    torch.save({"epoch": 240, "model": cnn.state_dict(), "best_acc": torch.tensor(1.0)}, published)
    release = save_release(tmp_path / "S:resnet8_T:vit32_tiny_ega", student)
    shutil.copy(published, tmp_path / "resnet20_best.pth")  # RepDistiller's students are named so
    head, own = runs["head"] / "tiny_clip_last.pth", runs["ega0"] / "resnet8_best.pth"
    ask(
        published,
        release,
        tmp_path / "resnet20_best.pth",
        runs["cnn"] / "resnet14_last.pth",
        head,
        own,
        "--dataset",
        "tiny",
    )
    names = [row[0].partition(", file")[0] for row in cells(capsys.readouterr().out)]
    assert names == [
        "", "resnet20: ckpt_epoch_240.pth", "resnet8: resnet8_best.pth", "resnet20: resnet20_best.pth",
        "resnet14: resnet14_last.pth", "teacher: tiny_clip", "resnet8: resnet8_best.pth",
    ]  # fmt: skip

    targets = datasets["tiny"].test.targets
    with torch.no_grad():
        direct = cnn(pixels(datasets["tiny"], CIFAR100_NORMALIZATION))
        released = student(pixels(datasets["tiny"])).logits
    found = {path: answers(path.parent, "accuracy", stem=path.stem) for path in (published, release, head, own)}
    assert found[published]["student"]["cross_entropy"] == pytest.approx(
        float(F.cross_entropy(direct, targets)), rel=1e-4
    )
    assert found[release]["student"]["cross_entropy"] == pytest.approx(
        float(F.cross_entropy(released, targets)), rel=1e-4
    )
    for path, side in ((head, "teacher"), (runs["cnn"] / "resnet14_last.pth", "student")):
        last = json.loads((path.parent / "metrics.jsonl").read_text().splitlines()[-1])
        assert answers(path.parent, "accuracy", stem=path.stem)[side]["top1"] == last["test_acc"]


@pytest.fixture(scope="module")
def pictures(datasets, tmp_path_factory) -> Path:
    """A folder of pictures, of every mode and size, some deep, one broken."""
    folder = tmp_path_factory.mktemp("pictures")
    images = datasets["tiny"].test.images.permute(0, 2, 3, 1).numpy()
    (folder / "deep" / "er").mkdir(parents=True)
    for number, image in enumerate(images[:8]):
        picture = Image.fromarray(image).resize((40 + number, 32))
        picture = picture.convert(("RGB", "L", "RGBA", "P")[number % 4])
        if picture.mode == "RGBA":
            picture.putalpha(100)
        picture.save(folder / ("deep/er" if number % 2 else ".") / f"{number}.png")
    (folder / "broken.JPG").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    return folder


def test_search_by_text_ranks_by_similarity(runs, pictures, tiny_clip, tmp_path, capsys):
    sheet = tmp_path / "deep" / "sheet.png"
    ask(runs["joint"], "--search", "colour 3, or so", "--images", pictures, "--top", 5, "--out", sheet)
    out = capsys.readouterr().out
    assert "skipped " in out and "broken.JPG" in out and "notes.txt" not in out
    assert out.splitlines()[-1] == str(sheet)
    rows = list(csv.DictReader(sheet.with_suffix(".csv").open()))
    model = load_clip(tiny_clip).float()
    net, transform, _ = load_student(runs["joint"])
    with torch.no_grad():
        text = F.normalize(model.encode_text(clip.tokenize(["colour 3, or so"])))
        expected = {}
        for path in pictures.rglob("*.png"):
            with Image.open(path) as image:
                expected[str(path)] = float(F.normalize(net.embed(transform(image)[None])) @ text.T)
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, 9)]
    assert {row["file"]: float(row["score"]) for row in rows} == pytest.approx(expected, abs=1e-5)
    assert [row["file"] for row in rows] == sorted(expected, key=expected.get, reverse=True)
    assert len([line for line in out.splitlines() if line.endswith(".png")]) == 5 + 1
    with Image.open(sheet) as image:
        assert image.format == "PNG" and image.width > 300


def test_search_by_image_works_for_any_student(runs, pictures, capsys):
    wanted = pictures / "deep" / "er" / "3.png"
    for name in ("kd", "ega0"):
        ask(runs[name], "--search_image", wanted, "--images", pictures)
        rows = list(csv.DictReader((runs[name] / "search_3-png.csv").open()))
        assert rows[0]["file"] == str(wanted) and float(rows[0]["score"]) == pytest.approx(1, abs=1e-5)
        sheet = (runs[name] / "search_3-png.png").read_bytes()
        refused(capsys, "use --force", runs[name], "--search-image", wanted, "--images", pictures, "--top", 2)
        assert (runs[name] / "search_3-png.png").read_bytes() == sheet
        ask(runs[name], "--search_image", wanted, "--images", pictures, "--top", 2, "--force")
        assert (runs[name] / "search_3-png.png").read_bytes() != sheet


def refused(capsys, words: str, *argv) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        ask(*argv)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert words in said.err
    assert said.err.count("\n") == 1


def test_bad_input_ends_in_one_line(runs, pictures, tiny_clip, tmp_path, capsys):
    images = ("--images", pictures)
    (tmp_path / "unknown.txt").write_text("colour 1\nmauve\n")
    names = ["--leave_out", str(tmp_path / "unknown.txt"), "--clip_mode", str(tiny_clip)]
    with pytest.raises(SystemExit) as stopped:
        train_student.main(["--dataset", "tiny", "--save_dir", str(tmp_path), *names])
    assert stopped.value.code == 2 and "tiny has no class 'mauve'" in capsys.readouterr().err
    refused(capsys, "not the folder of a run", tmp_path)
    refused(capsys, "not the folder of a run", tmp_path / "nowhere.pth")
    refused(capsys, "it has red, green, blue and it lacks colour 0", runs["ega0"], "--dataset", "other")
    refused(capsys, "no class has two training images", runs["ega0"], "--probe", "few")
    refused(capsys, "nowhere.pth is missing", runs["ega0"], "--checkpoint", tmp_path / "nowhere.pth")
    refused(capsys, "not of 2", runs["ega0"], runs["ega1"], "--checkpoint", tmp_path / "x.pth")
    refused(capsys, "--joint teacher", runs["ega0"], "--zero_shot")
    refused(capsys, "--joint teacher", runs["kd"], "--search", "red", *images)
    refused(capsys, "needs --images", runs["kd"], "--search", "red")
    refused(capsys, "--search: an empty text", runs["joint"], "--search", " ", *images)
    refused(capsys, "too long", runs["joint"], "--search", "red " * 100, *images)
    refused(capsys, "leave one of them out", runs["kd"], "--search", "red", "--search_image", "x.png", *images)
    refused(capsys, "belong to a search", runs["kd"], *images)
    refused(capsys, "by one RUN", runs["kd"], runs["ega0"], "--search", "red", *images)
    refused(capsys, "is not a folder", runs["joint"], "--search", "red", "--images", tmp_path / "nowhere")
    refused(capsys, "holds no images", runs["joint"], "--search", "red", "--images", tmp_path)
    broken = pictures / "broken.JPG"
    refused(capsys, "broken.JPG cannot be read as an image", runs["kd"], "--search_image", broken, *images)
    (tmp_path / "empty.txt").write_text("\n \n")
    refused(capsys, "holds no name", runs["joint"], "--labels", tmp_path / "empty.txt")
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    refused(capsys, "names a more than once", runs["joint"], "--labels", tmp_path / "twice.txt")
    torch.save({"model": model_dict["resnet8"](num_classes=5).state_dict()}, tmp_path / "weights.pth")
    refused(capsys, "does not say which CNN it holds, and neither", tmp_path / "weights.pth", "--dataset", "tiny")
    torch.save({"model": model_dict["resnet8"](num_classes=7).state_dict()}, tmp_path / "resnet8_last.pth")
    refused(capsys, "has another shape", tmp_path / "resnet8_last.pth", "--dataset", "tiny")
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    refused(capsys, "is corrupt", tmp_path / "garbage.pth")


def test_other_data_or_another_teacher_than_the_run_s_is_refused(
    runs, datasets, pictures, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "save" / "student_model" / "run"
    shutil.copytree(runs["joint"], folder)
    change_options(folder, clip_sha256="0")
    with monkeypatch.context() as patch:
        patch.setitem(dataset.DATASETS, "tiny", lambda data_dir: pytest.fail("the data set was opened"))
        refused(capsys, "another clip", folder)
    refused(capsys, "another clip", folder, "--search", "red", "--images", pictures)
    change_options(folder, clip_sha256=json.loads((runs["joint"] / "options.json").read_text())["clip_sha256"])
    changed = replace(datasets["tiny"], test=datasets["tiny"].train)
    monkeypatch.setitem(dataset.DATASETS, "tiny", lambda data_dir: changed)
    refused(capsys, "another dataset", folder)


def test_a_run_says_how_to_go_on(runs, tiny_clip, capsys):
    options = json.loads((runs["none"] / "options.json").read_text())
    argv = ["--dataset", "tiny", "--distill", "none", "--model_s", "resnet8", "--feature_dim", "8", "--epochs", "1"]
    argv += ["--save_dir", options["save_dir"], "--batch_size", "16", "--clip_mode", str(tiny_clip)]
    train_student.main([*argv, "--device", "cpu", "--amp", "off"])  # it is finished, and says so again
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3].endswith(f", in {runs['none']}")
    assert lines[-2].endswith(f"python evaluate.py {runs['none']}")
    assert lines[-1].endswith(f"python export.py {runs['none']} --format onnx")
