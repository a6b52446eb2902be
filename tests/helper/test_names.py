"""The names of runs."""

import hashlib
import json

import pytest

from helper.clip_options import parse_clip_options
from helper.names import clip_run_name, student_run_name, teacher_run_name
from helper.options import parse_student_options, parse_teacher_options

HASHES = {"clip_sha256": "c", "dataset_sha256": "d"}


def name(*words: str, hashes: dict = HASHES, data: str = "cifar100") -> str:
    return student_run_name(parse_student_options([*words]), data, hashes)


def test_a_name_says_what_is_run_and_ends_with_a_hash():
    assert name()[:-6] == "resnet8x4_vit32_cifar100_ega_seed0_trial1_"
    assert name("--distill", "none", "--seed", "3", "-t", "b")[:-6] == "resnet8x4_none_cifar100_none_seed3_trialb_"
    teacher = parse_teacher_options(["--model", "wrn_40_2", "--trial", "3"])
    assert teacher_run_name(teacher, "cifar100", HASHES)[:-6] == "wrn_40_2_cifar100_seed0_trial3_"
    clip = parse_clip_options(["--dataset", "shapes"])
    assert clip_run_name(clip, "shapes", HASHES)[:-6] == "rn1-1-1-1_shapes_seed0_trial1_"
    clip = parse_clip_options(["--vision_layers", "3", "--vision_width", "64", "--vision_patch", "8"])
    assert clip_run_name(clip, "shapes", HASHES)[:-6] == "vit3-8_shapes_seed0_trial1_"
    library = name("--clip_mode", "timm:resnet10t", "--model_s", "torchvision:resnet18", "--teacher_resolution", "64")
    assert library[:-6] == "resnet18_resnet10t_cifar100_ega_seed0_trial1_"


def test_the_hash_is_of_every_option_that_changes_the_result_and_of_the_files():
    opt = parse_student_options([])
    aside = "name resume data_dir data_list probe_dir max_bad_images exact_decode clip_root save_dir clip_mode path_t "
    aside += "init_s print_freq save_freq save_steps log"
    kept = {key: value for key, value in vars(opt).items() if key not in [*aside.split(), "save_seconds"]}
    kept = {
        key: int(value) if isinstance(value, float) and value == int(value) else value for key, value in kept.items()
    }
    told = json.dumps(kept | HASHES, sort_keys=True)
    assert name().rpartition("_")[2] == hashlib.sha256(told.encode()).hexdigest()[:6]


DIFFERENT = ["--learning_rate 0.1", "--epochs 300", "--kd_T 2", "--teacher_views 4", "--views shared --teacher_views 4"]
DIFFERENT += ["-b 0.5", "-node 0", "--amp bf16", "--labels 0.1", "--holdout 0.1", "--max_steps 3", "--batch_size 32"]
DIFFERENT += ["--teacher_resolution 160 --clip_mode timm:resnet10t", "--weight_decay 1e-4", "--lr_decay_epochs 3"]


def test_runs_that_differ_in_one_of_these_have_names_of_their_own(tmp_path):
    names = [name(*words.split()) for words in ["", *DIFFERENT]]
    names += [name(hashes=HASHES | {key: "other"}) for key in (*HASHES, "init_sha256", "head_sha256")]
    assert len(set(names)) == len(names)


def test_a_place_a_print_and_another_spelling_of_a_number_change_no_name():
    same = ["-b 1.0", "--kd_T 4", "--data_dir elsewhere", "--save_dir elsewhere", "--print_freq 1", "--save_freq 1"]
    same += ["--clip_root elsewhere", "--save_steps 5", "--resume none", "--learning_rate 0.05", "--beta 1"]
    assert {name(*words.split()) for words in same} == {name()}


def test_start_weights_count_by_their_hash_wherever_they_lie(tmp_path):
    files = [tmp_path / "a.pth", tmp_path / "b.safetensors"]
    for path in files:
        path.touch()
    moved = {name("--model_s", f"timm:test_resnet={path}") for path in files}
    assert len(moved | {name("--model_s", "timm:test_resnet")}) == 2  # --init_s starts otherwise


def test_a_long_name_loses_the_ends_of_its_longest_parts():
    long = name("--trial", "t" * 99, "--clip_mode", f"timm:{'resnet10t' * 9}", data="folder-" + "x" * 99 + "@96px")
    other = name("--trial", "t" * 98, "--clip_mode", f"timm:{'resnet10t' * 9}", data="folder-" + "x" * 99 + "@96px")
    assert len(long) == len(other) == 72
    assert long != other
    assert long.startswith("resnet8x4_resnet10t") and "_folder-x" in long and "_ega_seed0_trialtt" in long
    assert len(name("--trial", "\u8a66" * 50).encode()) <= 72


@pytest.mark.parametrize("clip", ["a b/c:d e.pt", "open_clip:ViT-B-32/openai", "ViT-B/16", "/x/-odd @name.pt"])
def test_a_name_is_a_folders(clip):
    found = name("--clip_mode", clip)
    assert not set(found) & set("/:\\ @")
    assert not found.startswith(("-", "."))


def test_a_name_of_ones_own(capsys):
    assert name("--name", "my.run-1", "--epochs", "3") == "my.run-1"
    assert teacher_run_name(parse_teacher_options(["--name", "a"]), "cifar100", HASHES) == "a"
    assert clip_run_name(parse_clip_options(["--name", "a"]), "cifar100", HASHES) == "a"
    for bad in ("", ".", "..", "a/b", "a b", ".a", "-a", "a" * 201):
        with pytest.raises(SystemExit):
            parse_student_options([f"--name={bad}"])
        assert "--name" in capsys.readouterr().err
