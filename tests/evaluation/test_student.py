import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from conftest import make_dataset
from dataset.decode import read_square
from dataset.views import CIFAR100_NORMALIZATION, CLIP_NORMALIZATION, CropViews, ResizedCropViews, normalize
from evaluation import load_student
from evaluation.student import image_transform, model_path, open_student
from helper import checkpoint
from helper.records import read_run
from models import create_student


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_a_student_is_loaded_without_its_data_set(finished):
    """No data set of this name is known here: the run's files alone tell classes, size and normalisation."""
    net, transform, classes = load_student(finished["ega"])
    images = make_dataset().test.images
    assert classes == make_dataset().classes
    assert not any(module.training for module in net.modules())

    x = torch.stack([transform(to_pil(image)) for image in images])
    assert type(x) is torch.Tensor
    assert torch.equal(x, normalize(images, CLIP_NORMALIZATION))

    state = torch.load(finished["ega"] / "resnet8_best.pth", weights_only=True)
    student = create_student("resnet8", 8, 5).eval()
    student.backbone.load_state_dict(state["model"])
    student.head.load_state_dict(state["layer"])
    with torch.no_grad():
        logits = net(x)
        assert torch.equal(logits, student(x).logits)
        assert torch.equal(net.embed(x), student(x).embedding)
    accuracy = 100 * (logits.argmax(1) == make_dataset().test.targets).float().mean()
    assert float(accuracy) == pytest.approx(state["test_acc"])


def test_pictures_of_any_size_and_mode(finished):
    _, transform, _ = load_student(finished["none"])
    for mode, size in (("L", (20, 50)), ("P", (64, 40)), ("RGBA", (32, 32))):
        assert transform(Image.new(mode, size, 255)).shape == (3, 32, 32)


@pytest.mark.parametrize(("size", "stored"), [(32, 32), (112, 128)])
@pytest.mark.parametrize("shape", [(150, 200), (301, 130), (40, 40)])
def test_a_picture_of_any_shape_is_seen_as_in_the_test_pass(tmp_path, size, stored, shape):
    """As a folder's picture is: decoded to a square that is stored, of which the test view is the centre."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "picture.png")
    square = torch.from_numpy(read_square(tmp_path / "picture.png", stored).copy()).permute(2, 0, 1)[None]
    views = CropViews(size) if size == stored else ResizedCropViews(size)
    wanted = views.student(square, torch.tensor([0]), torch.tensor([views.test]))[0]
    with Image.open(tmp_path / "picture.png") as picture:
        found = image_transform(size, None, stored)(picture)
        normalised = image_transform(size, CLIP_NORMALIZATION, stored)(picture)
    assert torch.equal(found, wanted)
    assert torch.equal(normalised, normalize(wanted[None], CLIP_NORMALIZATION)[0])


def test_the_transform_is_torchvision_s_and_can_be_sent_to_other_processes(finished):
    """On a wide picture, whose centre is cut out after it is resized."""
    _, transform, _ = load_student(finished["ega"])
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 150, 3), dtype=np.uint8))
    resize = [Resize(32, InterpolationMode.BICUBIC), CenterCrop(32)]
    expected = Compose([*resize, ToTensor(), Normalize(*CLIP_NORMALIZATION)])(picture)
    torch.testing.assert_close(pickle.loads(pickle.dumps(transform))(picture), expected, rtol=0, atol=1e-6)


def test_best_last_and_any_other_file(finished, tmp_path):
    run = read_run(finished["kd"])
    for which, epoch in (("last", 2), ("best", checkpoint.load(model_path(run))["epoch"])):
        assert open_student(run, which).state["epoch"] == epoch
    other = shutil.copy(model_path(run, "last"), tmp_path / "copy.pth")
    assert open_student(run, str(other)).state["epoch"] == 2


def test_a_student_of_a_cnn_is_normalised_as_it_was_trained(train, tmp_path):
    folder = train("--epochs", 1, "--max_steps", 1, "--distill", "none", "--clip_tn", 0)
    opened = open_student(folder)
    assert opened.normalization == CIFAR100_NORMALIZATION


def test_what_cannot_be_opened(finished, tmp_path):
    with pytest.raises(ValueError, match="not the folder of a run"):
        load_student(tmp_path)
    with pytest.raises(ValueError, match="is missing .best, last"):
        load_student(finished["ega"], tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is not a file of the student"):
        load_student(finished["ega"], finished["ega"] / "resume.pth")
    for name in ("classes", "layer", "stored_size"):
        state = checkpoint.load(model_path(read_run(finished["ega"])))
        del state[name]
        checkpoint.save(state, tmp_path / "less.pth")
        with pytest.raises(ValueError, match="less.pth is not a file of the student in"):
            load_student(finished["ega"], tmp_path / "less.pth")
    (tmp_path / "run").mkdir()
    for name in ("options.json", "metrics.jsonl"):
        shutil.copy(finished["ega"] / name, tmp_path / "run")
    with pytest.raises(ValueError, match="resnet8_best.pth is missing$"):
        load_student(tmp_path / "run")


def test_the_lines_of_the_readme(finished, tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.partition("## Use a student")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    shutil.copytree(finished["ega"], tmp_path / "save" / "student_model" / "NAME")
    image = make_dataset().test.images[0]
    to_pil(image).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    net, _, classes = load_student(finished["ega"])
    with torch.no_grad():
        shares = net(normalize(image[None], CLIP_NORMALIZATION)).softmax(1)[0]
    assert capsys.readouterr().out.strip() == f"{classes[int(shares.argmax())]}: {shares.max():.1%}"
