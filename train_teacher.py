"""Train what teaches: a head on a frozen CLIP, for ``train_student.py --path_t``."""

import time

import torch

from dataset import load_dataset
from dataset.loader import Loader, epoch_seed
from dataset.views import NUM_VIEWS
from helper.loops import EVAL_BATCH_SIZE, print_record, sgd, train_head, validate
from helper.options import parse_teacher_options, resolve_auto, teacher_run_name
from helper.run import Run
from helper.teacher import build_teacher
from helper.util import adjust_learning_rate, exit_on_bad_input, exit_on_non_finite_loss


def main(argv: list[str] | None = None) -> None:
    opt = parse_teacher_options(argv)

    with exit_on_bad_input("train_teacher.py"):
        run = Run(opt, "models", "tensorboard", teacher_run_name(opt), opt.model_t)
        resolve_auto(opt, run)
        if run.finished:
            run.print_result()
            return
        dataset = load_dataset(opt.dataset, opt.data_dir)
        run.record(dataset_sha256=dataset.fingerprint())
        teacher = build_teacher(opt, dataset, run)
        device = torch.device(opt.device)
        train_loader = Loader(
            dataset.train,
            "train",
            opt.batch_size,
            device,
            training=True,
            seed=opt.seed,
            teacher_views=opt.teacher_views or NUM_VIEWS,
            images=False,
            max_steps=opt.max_steps,
        )
        test_loader = Loader(dataset.test, "test", EVAL_BATCH_SIZE, device, images=False)
        run.start()

    optimizer = sgd(teacher.head.parameters(), opt.learning_rate, opt)
    if run.state is not None:
        teacher.head.load_state_dict(run.state["teacher_head"])
        optimizer.load_state_dict(run.state["optimizer"])

    def model() -> dict:
        """The content of the head's file: with the SHA-256 of the CLIP that it belongs to."""
        return {"model": teacher.head.state_dict(), "clip_sha256": run.options["clip_sha256"], "options": run.options}

    with exit_on_non_finite_loss("train_teacher.py"):
        for epoch in range(run.first_epoch, opt.epochs + 1):
            start = time.perf_counter()
            torch.manual_seed(epoch_seed(opt.seed, epoch))
            record = {"epoch": epoch, "lr": adjust_learning_rate(epoch, opt, optimizer)}
            record |= train_head(epoch, train_loader, teacher, optimizer, opt)
            if epoch % opt.eval_freq == 0 or epoch == opt.epochs:
                record |= validate(test_loader, None, teacher, opt)
            record["seconds"] = time.perf_counter() - start
            print_record(record)
            state = {"teacher_head": teacher.head.state_dict(), "optimizer": optimizer.state_dict()}
            run.end_epoch(record, state, model(), opt.save_freq)

    run.finish(model())
    run.print_result()


if __name__ == "__main__":
    main()
