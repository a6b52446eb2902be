"""Published archives: use what is extracted or downloaded already, or fetch it; md5s check each file."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock


class Archive(NamedTuple):
    """A published archive.

    title: the data set's name.
    url: where the archive is published.
    filename: the archive's name.
    md5: the archive's md5.
    folder: the folder that it is extracted to.
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
    """The folder of the extracted files, all of them whole; the archive is downloaded to ``root`` if it is missing.

    Raises:
        OSError: a file is corrupt, or is missing and cannot be downloaded. Nothing is overwritten.
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
        # This import takes longer than opening a data set that is there, so it comes late.
        from torchvision.datasets.utils import download_and_extract_archive

        with FileLock(root / f".{archive.folder}.lock"):
            if whole():  # another run fetched it meanwhile
                return folder
            if packed.exists() and not _intact(packed, archive.md5):
                raise OSError(f"{packed} is corrupt (its md5 differs): delete it and run again")
            # The download goes to its own folder first, so that an interrupted one is never taken for the data.
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
