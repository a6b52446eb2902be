"""The command line of evaluate.py."""

import argparse
from pathlib import Path

from dataset import DATASETS, FROM_FILES
from helper.parser import Parser, names_file, positive_int


def parse_evaluate_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check evaluate.py's options."""
    what = "What a finished student knows, beside its teacher. Without a question: accuracy and agreement."
    parser = Parser("evaluate.py", what)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a finished run, or a file of weights: RepDistiller's, ours")
    add("--checkpoint", default="best", metavar="best|last|PATH", help="which of a run's files")
    add("--no_teacher", action="store_true", help="ask the student alone")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what to compute on")
    group = parser.add_argument_group("data")
    choices = (*DATASETS, *FROM_FILES)
    group.add_argument("--dataset", choices=choices, help="with the same classes; if unset, the run's own")
    group.add_argument("--data_dir", help="folder of the data sets; if unset, the run's own")
    what = "with --dataset folder or --probe folder: the images are resized to R pixels"
    group.add_argument("--image_size", type=positive_int, metavar="R", help=what)
    group = parser.add_argument_group("questions")
    what = "transfer to this data set: a linear probe and nearest neighbours on frozen features"
    group.add_argument("--probe", choices=choices, help=what)
    group.add_argument("--probe_dir", help="its folder; if unset, --data_dir, or ./data")
    what = "classify by the classes' names; the student needs --joint teacher and a CLIP that understands texts"
    group.add_argument("--zero_shot", action="store_true", help=what)
    what = "names that zero-shot chooses from, one a line; if unset, the data set's classes"
    group.add_argument("--labels", type=names_file, metavar="FILE", help=what)
    what = "accuracy on the corrupted images in CIFAR-100-C/ (or CIFAR-10-C/) under --data_dir"
    group.add_argument("--corruptions", action="store_true", help=what)
    group = parser.add_argument_group("search")
    group.add_argument("--search", metavar="TEXT", help="rank images by a text")
    group.add_argument(
        "--search_image", "--search-image", metavar="FILE", help="rank images by an image, with any student"
    )
    group.add_argument("--images", metavar="DIR", help="the folder that is searched, with all folders in it")
    group.add_argument("--top", type=positive_int, default=20, help="images on the contact sheet")
    group = parser.add_argument_group("embeddings")
    what = "embed all pictures below this folder, in the order of their paths, and write --out"
    group.add_argument("--embed", metavar="DIR", help=what)
    group.add_argument("--teacher", action="store_true", help="the teacher's embeddings, not the student's")
    group = parser.add_argument_group("output of a search and of embeddings")
    what = "search: the contact sheet, if unset RUN/search_TEXT.png; embed: a file .npz, .csv or .parquet"
    group.add_argument("--out", metavar="FILE", help=what)
    group.add_argument("--force", action="store_true", help="overwrite it, and a search's scores beside it")
    opt = parser.parse_args(argv)

    if opt.image_size and "folder" not in (opt.dataset, opt.probe):
        parser.error(f"--image_size {opt.image_size} belongs to --dataset folder or --probe folder; leave it out")
    opt.zero_shot = opt.zero_shot or opt.labels is not None
    opt.probe_dir = opt.probe_dir or opt.data_dir or "./data"
    opt.searches = opt.search is not None or opt.search_image is not None
    if opt.search is not None and opt.search_image is not None:
        parser.error("--search and --search_image both say what to search for; leave one of them out")
    if opt.searches and opt.embed is not None:
        parser.error("--embed and a search are two questions; leave one of them out")
    if opt.searches and opt.images is None:
        parser.error("--search needs --images, the folder that is searched")
    if not opt.searches and (opt.images is not None or (opt.out is not None and opt.embed is None)):
        parser.error("--images and --out belong to a search: say for what, --search TEXT or --search_image FILE")
    if opt.embed is None and opt.teacher:
        parser.error("--teacher says which embeddings --embed DIR gives; leave it out")
    if opt.embed is not None and (opt.out is None or Path(opt.out).suffix not in (".npz", ".csv", ".parquet")):
        parser.error("--embed needs --out FILE, a file .npz, .csv or .parquet")
    if opt.searches or opt.embed is not None:
        others = (opt.probe, opt.zero_shot, opt.corruptions)
        if len(opt.runs) > 1 or any(others):
            what = "a search is done" if opt.searches else "--embed is answered"
            parser.error(f"{what} by one RUN, and alone: leave the others out")
    if len(opt.runs) > 1 and opt.checkpoint not in ("best", "last"):
        parser.error(f"--checkpoint {opt.checkpoint} is a file of one RUN, not of {len(opt.runs)}")
    return opt
