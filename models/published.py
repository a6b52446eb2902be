"""OpenAI's published CLIPs: the addresses of their files, and the files' SHA-256.

``clip`` knows the same, but takes longer to import than a file takes to hash.
"""

from pathlib import Path

import torch
from filelock import FileLock

from errors import InputError

from .names import LIBRARIES, PUBLISHED
from .weights import sha256_of

_FILES = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599/RN101.pt",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd/RN50x4.pt",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa/RN50x16.pt",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c/RN50x64.pt",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
}
URLS = {name: f"https://openaipublic.azureedge.net/clip/models/{file}" for name, file in _FILES.items()}


def fetch_clip(clip_mode: str, root: str) -> tuple[Path, str]:
    """The checkpoint's path and SHA-256; a published one is downloaded into ``root`` when it is missing.

    Processes that want the same file download it once: the others wait for the first.

    Args:
        clip_mode: one of ``PUBLISHED``, or the path of a checkpoint in OpenAI's format.
        root: the folder of the published weights.

    Raises:
        InputError: ``clip_mode`` is neither a published name nor a file.
        OSError: a published file is corrupt, or is missing and cannot be downloaded. Nothing is overwritten.
    """
    if clip_mode not in PUBLISHED:
        path = Path(clip_mode)
        if not path.is_file():
            raise InputError(
                f"--clip_mode {clip_mode}: neither a file nor a published CLIP; known: {', '.join(PUBLISHED)}, "
                f"and {', '.join(f'{library}:NAME' for library in LIBRARIES)}"
            )
        return path, sha256_of(path)

    url = URLS[clip_mode]
    expected, filename = url.split("/")[-2:]
    path = Path(root) / filename
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{filename}.lock")):
                if not path.exists():  # else another process has fetched it meanwhile
                    # This downloads beside the target, checks the hash, then renames.
                    torch.hub.download_url_to_file(url, str(path), hash_prefix=expected)
        except Exception as error:
            raise OSError(
                f"{clip_mode} is not in {root} and could not be downloaded ({error}); "
                f"with no network, put {filename} there or give --clip_mode a path"
            ) from error
    # clip.load would overwrite a file of another hash with a new download.
    found = sha256_of(path)
    if found != expected:
        raise OSError(f"{path} is not the published {clip_mode} (its SHA-256 differs): delete it and run again")
    return path, found
