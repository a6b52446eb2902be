"""The views of a data set, as a student of another size sees them; and classes that share a name."""

import copy
import json
import pickle

import numpy as np
import torch
from PIL import Image
from runs import load, read_metrics

import evaluate
import train_student
from dataset.resize import resize
from dataset.views import CropViews, SeenAt


def test_views_at_another_size_are_copied_and_pickled_as_what_they_are():
    seen = SeenAt(CropViews(40), 32)
    for other in (copy.copy(seen), copy.deepcopy(seen), pickle.loads(pickle.dumps(seen))):
        assert other == seen
    assert (seen.count, seen.test) == (CropViews(40).count, CropViews(40).test)


def test_views_at_another_size_are_the_data_set_s_own_resized():
    views = CropViews(40)
    images = torch.randint(256, (3, 3, 40, 40), dtype=torch.uint8)
    index, view = torch.arange(3), torch.full((3,), views.test)
    found = SeenAt(views, 32).student(images, index, view)
    assert torch.equal(found, resize(images, 32))


def test_classes_of_one_name_are_evaluated_and_left_out_each_for_itself(tmp_path):
    """Brightness tells the classes apart, and two of them have folders that read alike."""
    rng, root = np.random.default_rng(0), tmp_path / "birds"
    for level, folder in zip((20, 90, 160, 230), ("crane bird", "crane_bird", "heron", "ibis"), strict=True):
        for split, count in (("train", 16), ("val", 8)):
            (root / split / folder).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(level + rng.normal(0, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / folder / f"{number}.png")
    (tmp_path / "left_out.txt").write_text("crane bird (crane_bird)\n")
    common = f"--dataset folder --image_size 16 --data_dir {root} --save_dir {tmp_path} --device cpu --amp off"
    common += " --distill none --clip_tn 0 --model_s resnet8 --batch_size 16 --epochs 2 --learning_rate 0.02"
    runs = {name: tmp_path / "student_model" / name for name in ("all", "three")}
    train_student.main([*common.split(), "--name", "all"])
    train_student.main([*common.split(), "--name", "three", "--leave_out", str(tmp_path / "left_out.txt")])
    assert load(runs["three"] / "resnet8_last.pth")["classes"] == ["crane bird (crane bird)", "heron", "ibis"]
    for name, folder in runs.items():
        evaluate.main([str(folder), "--device", "cpu", "--checkpoint", "last"])
        (answer,) = json.loads((folder / "evaluation.json").read_text())["accuracy"].values()
        found = answer["resnet8_last"]["student"]
        assert found["top1"] == read_metrics(folder)[-1]["test_acc"]
        assert len(found["per_class"]) == {"all": 4, "three": 3}[name]
    assert found["top1"] > 0
