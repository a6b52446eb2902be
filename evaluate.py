"""Measure what a finished student knows, beside its teacher: ``python evaluate.py SAVE/student_model/NAME``."""

import argparse

from evaluation.options import parse_evaluate_options
from helper.exits import exit_on_bad_input, exits


@exits("evaluate.py", memory="use --device cpu, or evaluate fewer runs at once")
def main(argv: list[str] | None = None) -> None:
    evaluate(parse_evaluate_options(argv))


def evaluate(opt: argparse.Namespace) -> None:
    # These imports stand here so that neither --help nor a refused option waits for torch.
    from evaluation.accuracy import Accuracy, Corruptions
    from evaluation.answers import ask
    from evaluation.embed import embed_folder
    from evaluation.probe import Transfer
    from evaluation.search import search
    from evaluation.subjects import open_subjects, save_dir
    from evaluation.zero_shot import ZeroShot
    from helper.runtime import resolve_device

    with exit_on_bad_input("evaluate.py"):
        device = resolve_device(opt.device)
        if opt.searches:
            print(search(opt, device))
            return
        if opt.embed is not None:
            print(embed_folder(opt, device))
            return

        subjects = open_subjects(opt.runs, opt, device)
        questions = [Transfer(opt, save_dir(subjects[0].run))] if opt.probe is not None else []
        questions += [ZeroShot(opt.labels)] if opt.zero_shot else []
        questions += [Corruptions(opt.data_dir)] if opt.corruptions else []
        questions = questions or [Accuracy()]
        # This finds everything that can be wrong with the input, before anything is computed.
        for question in questions:
            for subject in subjects:
                question.check(subject)
        for question in questions:
            ask(question, subjects)


if __name__ == "__main__":
    main()
