"""Export a finished student, ``python export.py RUN``; classify images with it, ``export.py RUN --predict FILE...``."""

import argparse

from deploy.options import parse_export_options
from helper.exits import exit_on_bad_input, exits


@exits("export.py", memory="end what else is running")
def main(argv: list[str] | None = None) -> None:
    export_student(parse_export_options(argv))


def export_student(opt: argparse.Namespace) -> None:
    # These imports stand here so that neither --help nor a refused option waits for torch.
    from deploy.costs import Row, cost, cost_table, teacher_rows
    from deploy.export import BESIDE, FILES, check, check_kernels, export, new_files, quantize
    from deploy.model_card import model_config, processors, write_beside
    from deploy.predict import classify
    from evaluation.student import open_run_dataset, open_student

    with exit_on_bad_input("export.py"):
        if opt.predict is not None:
            print(*classify(opt.out, opt.predict), sep="\n")
            return

        student = open_student(opt.run, opt.checkpoint)
        with new_files(opt.out, [FILES[opt.format], *BESIDE], opt.force) as folder:
            print("opening the run's data set", flush=True)
            dataset = open_run_dataset(student.run, opt.data_dir)
            config = model_config(student, opt.format, FILES[opt.format], opt.with_preprocess)
            exported = export(student, opt.format, opt.with_preprocess, folder)
            config["accuracy"] = check(student, exported, config, dataset)
            rows = teacher_rows(student, folder)
            rows += [Row(config["architecture"], config["accuracy"], cost(exported))]
            if opt.quantize:
                quantize(exported, dataset, student.normalization)
                config["quantized"] = opt.quantize
                config["accuracy"] = check(student, exported, config, dataset)
                config |= check_kernels(student, exported, config, dataset)
                print(processors(config))
                rows += [Row(f"{config['architecture']}, {opt.quantize}", config["accuracy"], cost(exported))]
            write_beside(folder, config, student.classes, cost_table(rows))
    print(f"\n{cost_table(rows)}\n\nexported to {opt.out}")


if __name__ == "__main__":
    main()
