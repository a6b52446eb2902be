"""A data set by what the options of a run say."""

import dataset
from helper.options import parse_student_options


def test_a_data_set_is_opened_by_what_a_run_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(dataset, "load_dataset", lambda *args, **options: (args, options))
    old = {"dataset": "cifar100", "data_dir": "there", "save_dir": "here", "holdout": None, "epochs": 3}
    assert dataset.open_dataset(old) == (("cifar100", "there"), {"save_dir": "here", "holdout": None})
    argv = ["--dataset", "folder", "--image_size", "64", "--max_bad_images", "2", "--holdout", "0.1"]
    args, options = dataset.open_dataset(vars(parse_student_options([*argv, "--data_dir", str(tmp_path)])))
    assert args == ("folder", str(tmp_path))
    assert options == {
        "save_dir": "./save",
        "image_size": 64,
        "max_bad_images": 2,
        "holdout": 0.1,
        "exact_decode": False,
        "data_list": None,
    }
