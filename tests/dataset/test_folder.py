import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset.files
from dataset import folder_name, load_dataset
from dataset.decode import read_square
from dataset.folder import UNLABELLED, class_names
from dataset.images import told_apart
from dataset.views import CropViews, ResizedCropViews
from errors import InputError


def paint(path: Path, number: int, size: tuple[int, int] = (12, 10)) -> None:
    """A picture whose colour is ``number``, in no format with losses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (number, 255 - number, 7)).save(path)


def make(root: Path, files: str) -> Path:
    """Files by their names, the n-th a picture of colour n."""
    for number, name in enumerate(files.split(), 1):
        paint(root / name, number)
    return root


SMALL = "train/cat/1.png train/cat/2.png train/dog/1.png train/dog/deep/er/2.png val/cat/1.png val/dog/1.png"


def load(root: Path, size: int = 8, **options):
    return load_dataset("folder", str(root), image_size=size, save_dir=str(root.parent / "save"), **options)


def numbers(split) -> list[tuple[int, int]]:
    """Each image's number and its target."""
    assert (split.images == split.images[:, :, :1, :1]).all()
    return list(zip(split.images[:, 0, 0, 0].tolist(), split.targets.tolist(), strict=True))


def test_classes_are_the_folders_in_order_and_images_may_lie_deep(tmp_path):
    data = load(make(tmp_path / "pets", SMALL))
    assert data.classes == ["cat", "dog"]
    assert numbers(data.train) == [(1, 0), (2, 0), (3, 1), (4, 1)]
    assert numbers(data.test) == [(5, 0), (6, 1)]
    assert data.name == "folder-pets@8px"
    assert data.views == CropViews(8)
    assert data.train.mapped and data.test.mapped


def test_photographs_are_stored_larger_than_they_are_seen(tmp_path):
    root = make(tmp_path / "pets", SMALL)
    data = load(root, 112)
    assert data.views == ResizedCropViews(112)
    assert data.train.images.shape == (4, 3, 128, 128)
    assert load(root, 96).train.images.shape == (4, 3, 96, 96)


def test_pixels_are_those_that_decoding_gives(tmp_path):
    root, rng = make(tmp_path / "pets", SMALL), np.random.default_rng(0)
    for i, name in enumerate(SMALL.split()[:4]):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(root / name)
    expected = np.stack([read_square(root / name, 16) for name in SMALL.split()[:4]])
    assert np.array_equal(load(root, 16).train.images.permute(0, 2, 3, 1).numpy(), expected)


def test_unlabelled_images_are_of_the_training_split_without_a_target(tmp_path):
    data = load(make(tmp_path / "pets", f"{SMALL} unlabelled/a.png unlabelled/deep/b.png"))
    assert numbers(data.train) == [(1, 0), (2, 0), (3, 1), (4, 1), (7, -1), (8, -1)]


def test_images_without_any_label_take_their_classes_from_the_test_split(tmp_path):
    data = load(make(tmp_path / "pets", "unlabelled/a.png unlabelled/b.png test/x/1.png test/y/1.png"))
    assert numbers(data.train) == [(1, -1), (2, -1)]
    assert data.classes == ["x", "y"] and numbers(data.test) == [(3, 0), (4, 1)]


def test_a_test_folder_goes_before_val_if_it_has_classes(tmp_path):
    root = make(tmp_path / "pets", SMALL)
    paint(root / "test" / "ILSVRC2012_test_00000001.png", 9)  # as ImageNet's, without labels
    assert numbers(load(root).test) == [(5, 0), (6, 1)]
    paint(root / "test" / "dog" / "1.png", 10)
    assert numbers(load(root).test) == [(10, 1)]


def test_a_class_may_have_no_test_image(tmp_path):
    data = load(make(tmp_path / "pets", "train/a/1.png train/b/1.png train/c/1.png test/b/1.png"))
    assert numbers(data.test) == [(4, 1)]


def test_without_a_test_folder_a_share_of_each_class_becomes_it(tmp_path):
    files = [f"train/{name}/{i}.png" for name in "ab" for i in range(8)]
    root = make(tmp_path / "pets", f"{' '.join(files)} unlabelled/u.png")
    with pytest.raises(ValueError, match="no image in test/CLASS/ or val/CLASS/.*--holdout F"):
        load(root)
    data = load(root, holdout=0.25)
    assert data.holdout == 0.25
    train, test = numbers(data.train), numbers(data.test)
    assert [target for _, target in test] == [0, 0, 1, 1]
    assert [target for _, target in train] == [0] * 6 + [1] * 6 + [-1]
    labelled = sorted(train[:-1] + test)
    assert labelled == [(i, int(i > 8)) for i in range(1, 17)]  # each once, with its own class
    assert numbers(load(root, holdout=0.25).test) == test


def test_a_holdout_takes_one_image_of_a_class_that_it_is_too_small_for(tmp_path):
    files = [f"train/big/{i}.png" for i in range(20)] + [f"train/crane_bird/{i}.png" for i in range(4)]
    data = load(make(tmp_path / "pets", " ".join([*files, "train/one/1.png"])), holdout=0.1)
    assert torch.bincount(data.test.targets, minlength=3).tolist() == [2, 1, 0]
    assert torch.bincount(data.train.targets).tolist() == [18, 3, 1]


def test_with_a_test_folder_a_hold_out_is_left_to_the_run(tmp_path):
    data = load(make(tmp_path / "pets", SMALL), holdout=0.5)
    assert data.holdout is None and len(data.train) == 4


def test_names_with_spaces_and_of_any_script(tmp_path):
    root = tmp_path / "my höuse pets"
    for number, name in enumerate(("train/Löwe & co/ein bild.png", "train/猫/写真.png", "val/猫/1 (2).png"), 1):
        paint(root / name, number)
    data = load(root)
    assert data.classes == ["Löwe & co", "猫"]
    assert numbers(data.train) == [(1, 0), (2, 1)] and numbers(data.test) == [(3, 1)]
    assert data.name == "folder-my-höuse-pets@8px"


def test_names_with_what_unicode_takes_for_the_end_of_a_line(tmp_path):
    root = tmp_path / "pets"
    for number, name in enumerate(("train/a\u2028cat/1.png", "train/a\vdog/1.png", "test/a\vdog/1.png"), 1):
        paint(root / name, number)
    assert load(root).classes == ["a\vdog", "a\u2028cat"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (b"caf\xe9", r"train/caf\udce9: the folder's name holds bytes that are not UTF-8"),
        (b"two\nlines", r"train/two\nlines: the folder's name holds a line break"),
        (b"two\rlines", r"train/two\rlines: the folder's name holds a line break"),
    ],
)
def test_a_class_that_no_file_of_names_can_hold_is_refused(tmp_path, name, said):
    root = make(tmp_path / "pets", SMALL)
    paint(root / "train" / os.fsdecode(name) / "1.png", 9)
    with pytest.raises(InputError) as error:
        load(root)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "save").exists()


def test_what_is_no_image_by_its_extension_is_passed_over_and_told(tmp_path, capsys):
    root = make(tmp_path / "pets", f"{SMALL} train/cat/.hidden.png train/.hidden/x.png")
    (root / "train" / "cat" / "notes.txt").write_text("meow")
    (root / "train" / "README").write_text("about")
    assert len(load(root).train) == 4
    assert "passed over 1 files that have no image's extension: train/cat/notes.txt" in capsys.readouterr().out


def test_files_of_every_kind_in_one_folder(tmp_path, capsys):
    root = make(tmp_path / "pets", SMALL)
    Image.new("L", (9, 9), 77).save(root / "train" / "cat" / "3-grey.png")
    jpeg = root / "train" / "cat" / "4-truncated.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(jpeg)
    jpeg.write_bytes(jpeg.read_bytes()[:-200])
    (root / "train" / "dog" / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match="2 of the images.*4-truncated.jpg.*text.jpg.*--max_bad_images 2"):
        load(root)
    data = load(root, max_bad_images=2)
    assert sorted(numbers(data.train)) == [(1, 0), (2, 0), (3, 1), (4, 1), (77, 0)]
    assert "4-truncated.jpg" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("other/x.png", "no image in test/CLASS/ or val/CLASS/"),
        ("train/.hidden/x.png", "holds no train/CLASS/ with images in it, and no image in unlabelled/"),
        ("train/x.png val/a/1.png", "train/ holds an image outside of its classes' folders, x.png"),
        ("train/a/1.png", "no image in test/CLASS/ or val/CLASS/"),
        ("train/a/1.png val/x.png", "no image in test/CLASS/ or val/CLASS/"),
        ("train/a/1.png val/b/1.png", "val/b is a class that train/ does not have"),
        ("unlabelled/1.png", "no image in test/CLASS/ or val/CLASS/"),
    ],
)
def test_a_folder_that_is_not_as_described_ends_in_one_line(tmp_path, files, said):
    with pytest.raises(ValueError, match=said):
        load(make(tmp_path / "pets", files))
    assert not (tmp_path / "save").exists()


FLAT = " ".join(f"{folder}{i}.png" for folder in ("", "a/", "a/deep/er/", "b/") for i in range(5))


def test_every_picture_below_any_other_folder_has_no_label(tmp_path, capsys):
    root = make(tmp_path / "photos", FLAT)
    (root / "a" / "notes.txt").write_text("not a picture")
    data = load(root, holdout=0.1)
    assert data.classes == [UNLABELLED] and data.holdout == 0.1
    train, test = numbers(data.train), numbers(data.test)
    assert (len(train), len(test)) == (18, 2)
    assert sorted(train + test) == [(i, -1) for i in range(1, 21)]
    assert "passed over 1 files that have no image's extension: a/notes.txt" in capsys.readouterr().out
    assert numbers(load(root, holdout=0.1).test) == test
    assert len(load(root, holdout=0.5).test) == 10


def test_the_images_in_unlabelled_alone_are_a_data_set(tmp_path):
    data = load(
        make(tmp_path / "pets", "unlabelled/a.png unlabelled/deep/b.png unlabelled/c.png other/d.png"), holdout=0.3
    )
    assert data.classes == [UNLABELLED]
    assert sorted(numbers(data.train) + numbers(data.test)) == [(1, -1), (2, -1), (3, -1)]


def test_several_folders_and_files_are_one_data_set(tmp_path):
    make(tmp_path, "x/1.png x/train/2.png y/3.png z/4.png z/5.png")
    places = [str(tmp_path / name) for name in ("x", "y", "z/5.png", "x/1.png")]  # one of them twice
    data = load_dataset("folder", places, image_size=8, save_dir=str(tmp_path / "save"), holdout=0.25)
    assert sorted(numbers(data.train) + numbers(data.test)) == [(1, -1), (2, -1), (3, -1), (5, -1)]
    assert data.name == "folder-x-and-3-more@8px"


def test_a_data_set_of_several_folders_that_moved_together_is_the_same(tmp_path):
    prints = []
    for place in ("here", "there"):
        make(tmp_path / place, "x/1.png y/2.png")
        places = [str(tmp_path / place / name) for name in "xy"]
        made = load_dataset("folder", places, image_size=8, save_dir=str(tmp_path / place / "save"), holdout=0.5)
        prints.append(made.fingerprint())
    assert prints[0] == prints[1]


def load_list(path: Path, **options):
    save = str(path.parent / "save")
    return load_dataset("folder", "./data", data_list=str(path), image_size=8, save_dir=save, **options)


def test_a_list_names_pictures_relative_to_its_own_folder(tmp_path):
    make(tmp_path, "photos/1.png photos/2.png photos/3.png")
    path = tmp_path / "mine.txt"
    path.write_text(f"photos/3.png\r\n\n{tmp_path}/photos/1.png\n")
    data = load_list(path, holdout=0.5)
    assert sorted(numbers(data.train) + numbers(data.test)) == [(1, -1), (3, -1)]
    assert data.classes == [UNLABELLED] and data.name == "folder-mine@8px"


def test_a_csv_has_labels_and_its_classes_are_in_the_order_of_their_names(tmp_path):
    make(tmp_path, " ".join(f"{i}.png" for i in range(1, 8)))
    path = tmp_path / "mine.csv"
    rows = ["1.png,dog,x", "2.png,a cat,", '3.png,"a cat",', "4.png,dog,", "5.png,,", "6.png,dog,", "7.png,a cat,"]
    path.write_text("\n".join(["path,label,by", *rows]))
    data = load_list(path, holdout=0.3)
    assert data.classes == ["a cat", "dog"]
    assert sorted(numbers(data.train) + numbers(data.test)) == [(1, 1), (2, 0), (3, 0), (4, 1), (5, -1), (6, 1), (7, 0)]
    assert sorted(target for _, target in numbers(data.test)) == [0, 1]
    before = data.fingerprint()
    path.write_text(path.read_text().replace("4.png,dog", "4.png,a cat"))
    assert load_list(path, holdout=0.3).fingerprint() != before


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("mine.txt", "\n \n", "mine.txt names no picture"),
        ("mine.csv", "path,label\n", "mine.csv names no picture"),
        ("mine.csv", "path,label\n1.png,a\n,b\n", "mine.csv has a row with the label b and no path"),
        ("mine.csv", "", "mine.csv has no column path and no column label: its first line must be path,label"),
        ("mine.csv", "path,Label\n1.png,a\n", "mine.csv has no column label"),
        ("mine.csv", f"path,label\n{'x' * 200_000},a\n", "mine.csv is no CSV .field larger than field limit"),
        ("mine.txt", "1.png\n1.png\n", "mine.txt names 1.png twice"),
        ("mine.txt", "1.png\n./1.png\n", "mine.txt names ./1.png twice"),
        ("mine.txt", "1.png\n.\n", "mine.txt names ., which is a folder: a list names pictures"),
        ("mine.txt", "1.png\n2.png\n", "mine.txt names 2.png, which cannot be read .No such file"),
        ("mine.txt", b"\xff\xfe1", "mine.txt cannot be read as text in UTF-8"),
        ("mine.txt", None, "mine.txt cannot be read .No such file"),
    ],
)
def test_a_list_that_is_not_as_described_ends_in_one_line(tmp_path, name, text, said):
    make(tmp_path, "1.png")
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=said):
        load_list(tmp_path / name, holdout=0.5)
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize(
    ("files", "said"), [("notes.txt", "photos: no picture in it, at any depth"), ("1.png", "holds a single image")]
)
def test_a_folder_without_two_pictures_ends_in_one_line(tmp_path, files, said):
    root = tmp_path / "photos"
    make(root, files) if files.endswith("png") else root.mkdir()
    with pytest.raises(InputError, match=said):
        load(root, holdout=0.1)
    assert not (tmp_path / "save").exists()


def test_an_empty_class_ends_in_one_line(tmp_path):
    root = make(tmp_path / "pets", SMALL)
    (root / "train" / "cow").mkdir()
    with pytest.raises(ValueError, match="train/cow holds no image: delete it, or fill it"):
        load(root)
    (root / "train" / "cow" / "1.jpg").write_text("no picture")
    with pytest.raises(ValueError, match="no image in .*train/cow can be decoded"):
        load(root, max_bad_images=1)


def test_a_missing_folder_ends_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")


def test_twenty_thousand_files_in_one_folder(tmp_path, monkeypatch):
    root = make(tmp_path / "pets", SMALL)
    for i in range(20_000):
        os.link(root / "train" / "cat" / "1.png", root / "train" / "cat" / f"copy{i}.png")
    square = np.zeros((2, 2, 3), np.uint8)
    monkeypatch.setattr(dataset.files, "read_square", lambda path, side, exact: square)
    data = load(root, 2)
    assert torch.bincount(data.train.targets).tolist() == [20_002, 2]
    assert data.train.images.shape == (20_004, 3, 2, 2)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a cat\na dog\n", ["a cat", "a dog"]),
        ("\ufeffKatze\r\nHund, klein\r\n\r\n", ["Katze", "Hund, klein"]),
        ("n2 the dog\nn1\tthe cat\nn3 the cow\n", ["the cat", "the dog"]),
        ("a\u2028cat\na\vdog\x85!\n", ["a\u2028cat", "a\vdog\x85!"]),
    ],
)
def test_classes_are_called_by_a_file(tmp_path, text, names):
    path = tmp_path / "classes.txt"
    path.write_text(text, "utf-8")
    assert class_names(path, ["n1", "n2"]) == names


def test_classes_without_a_file_are_called_as_their_folders(tmp_path):
    assert class_names(tmp_path / "classes.txt", ["hot_dog", "cat"]) == ["hot dog", "cat"]


def test_a_folder_that_begins_as_another_does_keeps_its_own_name(tmp_path):
    (tmp_path / "classes.txt").write_text("big cat a tiger\nbig something\n")
    assert class_names(tmp_path / "classes.txt", ["big", "big cat"]) == ["something", "a tiger"]


@pytest.mark.parametrize("content", [b"one\ntwo\nthree\n", b"n1 one\n", b"\xff\xfe\x00"])
def test_a_file_of_other_names_ends_in_one_line(tmp_path, content):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match="classes.txt"):
        class_names(tmp_path / "classes.txt", ["n1", "n2"])


def test_the_name_is_the_folder_s_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path.name.replace(" ", "-")
    assert folder_name(".", 32) == folder_name(str(tmp_path) + "/", 32) == f"folder-{own}@32px"


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [("folder", None, "needs --image_size"), ("shapes", 64, "their own size"), ("tinyimagenet", 32, "their own size")],
)
def test_a_size_is_for_folders_alone(tmp_path, name, size, said):
    with pytest.raises(ValueError, match=said):
        load_dataset(name, str(tmp_path), image_size=size)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["crane", "heron", "crane"], ["crane (a)", "heron", "crane (c)"]),
        (["crane", "crane (a)", "crane"], ["crane (a) (a)", "crane (a) (b)", "crane (c)"]),
        (["crane", "heron", "ibis"], ["crane", "heron", "ibis"]),
    ],
)
def test_classes_of_one_name_are_told_apart_by_their_folders(names, told):
    assert told_apart(names, ["a", "b", "c"]) == told


def test_two_folders_that_read_alike_are_two_classes(tmp_path):
    for number, folder in enumerate(("train/crane bird", "train/crane_bird", "val/crane_bird"), 1):
        paint(tmp_path / folder / "1.png", number)
    assert load(tmp_path).classes == ["crane bird (crane bird)", "crane bird (crane_bird)"]
    (tmp_path / "classes.txt").write_text("crane\ncrane\n")
    assert load(tmp_path).classes == ["crane (crane bird)", "crane (crane_bird)"]
