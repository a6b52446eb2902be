import csv
import os

from PIL import Image

import evaluate


def test_files_with_names_that_are_not_utf_8(finished, tmp_path, capsys):
    folder, name = tmp_path / "pictures", os.fsdecode(b"caf\xe9.png")
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    Image.new("RGB", (32, 32), "blue").save(folder / name)
    (folder / os.fsdecode(b"br\xf6ken.png")).write_bytes(b"no picture")
    sheet = tmp_path / "sheet.png"
    options = ["--search_image", str(folder / "red.png"), "--images", str(folder), "--out", str(sheet)]
    evaluate.main([str(finished["none"]), "--device", "cpu", *options])
    printed = capsys.readouterr().out
    assert "caf\\udce9.png" in printed and "br\\udcf6ken.png" in printed
    with sheet.with_suffix(".csv").open(errors="surrogateescape") as file:
        assert [row["file"] for row in csv.DictReader(file)] == [str(folder / "red.png"), str(folder / name)]
