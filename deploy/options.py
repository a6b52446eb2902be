"""The command line of export.py."""

import argparse
from pathlib import Path

from helper.parser import Parser


def parse_export_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse export.py's options."""
    what = "Export a finished student, check and measure the file; or classify pictures with what it wrote."
    parser = Parser("export.py", what)
    parser.add_argument(
        "run", nargs="?", metavar="RUN", help="folder of a finished run; --predict with --out needs none"
    )
    group = parser.add_argument_group("export")
    group.add_argument(
        "--format",
        choices=("onnx", "exported", "safetensors"),
        default="onnx",
        help="exported: torch.export's program (.pt2); safetensors: weights for the library's own network",
    )
    out = "folder of the files; if unset, RUN/export/FORMAT, and RUN/export/onnx_int8 with --quantize int8"
    group.add_argument("--out", type=Path, metavar="DIR", help=out)
    group.add_argument("--force", action="store_true", help="overwrite files that are there")
    group.add_argument(
        "--checkpoint",
        default="best",
        metavar="best|last|PATH",
        help="which epoch, or another file of the student",
    )
    group.add_argument("--data_dir", help="folder of the run's data set; if unset, where the run had it")
    group.add_argument(
        "--with_preprocess", action="store_true", help="8-bit pixels go in: they are scaled and normalised inside"
    )
    group.add_argument(
        "--quantize", choices=("int8",), help="8-bit weights and activations, calibrated on training images (onnx)"
    )
    parser.add_argument_group("use").add_argument(
        "--predict", nargs="+", metavar="FILE", help="classify these pictures with the exported file alone"
    )
    opt = parser.parse_args(argv)
    if opt.run is None and (opt.predict is None or opt.out is None):
        parser.error("which RUN? the folder of a finished run: SAVE/student_model/NAME")
    if opt.quantize and opt.format != "onnx":
        parser.error(f"--quantize {opt.quantize} makes an ONNX file: use --format onnx")
    if opt.with_preprocess and opt.format == "safetensors":
        parser.error("--with_preprocess: a file of weights computes nothing; use --format onnx or exported")
    if opt.out is None:
        opt.out = Path(opt.run) / "export" / (f"{opt.format}_{opt.quantize}" if opt.quantize else opt.format)
    return opt
