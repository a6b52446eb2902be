"""Published archives: found as they were extracted, or as they were downloaded, or fetched; checked by their md5."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock


class Archive(NamedTuple):
    """What is published.

    title: of the data set.
    url: of the archive.
    filename: of the archive.
    md5: of the archive.
    folder: what it is extracted to.
    files: names and md5s of files in that folder, checked whenever it is opened.
    """

    title: str
    url: str
    filename: str
    md5: str
    folder: str
    files: list[tuple[str, str]]


def _intact(path: Path, md5: str) -> bool:
    """Whether a file is there and has this md5."""
    if not path.is_file():
        return False
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == md5


def fetch(archive: Archive, root: Path) -> Path:
    """The folder of the extracted files, which are there and whole; downloaded to ``root`` if nothing is.

    Raises:
        OSError: when a file is corrupt, or missing and not to be downloaded. Nothing is overwritten.
    """
    folder, packed = root / archive.folder, root / archive.filename

    def whole() -> bool:
        if not folder.exists():
            return False
        for name, md5 in archive.files:
            if not _intact(folder / name, md5):
                raise OSError(f"{folder / name} is missing or corrupt (its md5 differs): delete {folder} and run again")
        return True

    if whole():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Here, as it takes longer to import than a data set that is there takes to open.
        from torchvision.datasets.utils import download_and_extract_archive

        with FileLock(root / f".{archive.folder}.lock"):
            if whole():  # another run fetched it meanwhile
                return folder
            if packed.exists() and not _intact(packed, archive.md5):
                raise OSError(f"{packed} is corrupt (its md5 differs): delete it and run again")
            # Into a folder of its own first, so that an interrupted download is never taken for the data.
            with tempfile.TemporaryDirectory(dir=root, prefix=f".{archive.folder}-") as temporary:
                if packed.exists():
                    os.link(packed, Path(temporary) / packed.name)
                try:
                    download_and_extract_archive(archive.url, temporary, filename=packed.name, md5=archive.md5)
                except Exception as error:
                    raise OSError(
                        f"{archive.title} is not in {root} and could not be downloaded ({error}); "
                        f"with no network, put {packed.name} there"
                    ) from error
                shutil.move(Path(temporary) / archive.folder, folder)
    except PermissionError as error:
        raise OSError(f"cannot write to {root}: {error.strerror}; choose another --data_dir") from error
    return folder
