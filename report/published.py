"""Published accuracies on CIFAR-100, which stand beside one's own."""

# Top-1 % on CIFAR-100 by teacher, student and method. RepDistiller's values are means of five runs' last epochs (Tian
# et al., ICLR 2020). The paper's are best epochs of one run each (Ma et al., BMVC 2022); "about" marks a value that is
# read off its curves.
_REPDISTILLER = {
    ("resnet32x4", "resnet8x4"): {
        "none": 72.50, "kd": 73.33, "hint": 73.50, "attention": 73.44, "similarity": 72.94, "correlation": 72.97,
        "vid": 73.09, "rkd": 71.90, "pkt": 73.64, "abound": 73.17, "factor": 72.86, "fsp": 72.62, "nst": 73.30,
        "crd": 75.51,
    },
}  # fmt: skip


REPDISTILLER_TEACHERS = {"resnet32x4": 79.42}


_PAPER_METHODS = ("kd", "hint", "pkt", "rkd", "nce", "irg", "crd", "ccl", "ega")


_PAPER = {
    ("vit32", "resnet8x4"): (71.55, 73.93, 73.86, 73.34, 74.30, 75.11, 75.73, 75.91, 76.65),
    ("vit16", "resnet8x4"): (71.99, 74.13, 73.55, 73.42, 74.41, 74.72, 75.68, 76.13, 76.30),
    ("rn101", "resnet8x4"): (64.77, 74.14, 72.21, 73.70, 73.69, 74.17, 75.13, 75.08, 75.41),
    ("vit32", "ShuffleV1"): (72.90, None, 75.31, 73.93, 73.99, 74.79, 75.54, 76.14, 76.24),
    ("vit32", "vgg13"): (75.20, 75.56, 75.55, 76.41, 76.42, 75.98, 76.83, 77.68, 77.59),
}


_PAPER_CURVES = {"alone": "about 72.1", "edge": "about 75.0", "node": "about 74.6"}  # ViT-B/32, resnet8x4


def published(options: dict) -> str:
    """The accuracy that a paper reports for a run with these options, and its epoch; empty where no paper does."""
    method, pair = options["distill"], (options["model_t"], options["model_s"])
    if options["dataset"] != "cifar100":
        return ""
    if not options["clip_tn"]:
        if method == "none":  # a student alone has no teacher to look it up by
            found = {table["none"] for (_, student), table in _REPDISTILLER.items() if student == pair[1]}
            value = found.pop() if len(found) == 1 else None
        else:
            value = _REPDISTILLER.get(pair, {}).get(method)
        return "" if value is None else f"{value:.2f} (last)"
    if pair[1] == "resnet8x4" and method == "none":
        return f"{_PAPER_CURVES['alone']} (best)"
    if pair == ("vit32", "resnet8x4") and method == "ega" and not (options["node_weight"] and options["edge_weight"]):
        return f"{_PAPER_CURVES['node' if options['node_weight'] else 'edge']} (best)"
    value = dict(zip(_PAPER_METHODS, _PAPER.get(pair, ()), strict=False)).get(method)
    return "" if value is None else f"{value:.2f} (best)"
