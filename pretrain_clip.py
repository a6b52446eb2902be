"""Train a small CLIP from scratch on images and captions: ``python pretrain_clip.py --dataset shapes``.

The result, SAVE/clip/NAME/clip.pt, is a state dict in OpenAI's format and precision:
``train_student.py --clip_mode SAVE/clip/NAME/clip.pt`` uses it as a teacher, like a published CLIP.
"""

import argparse
import time
from typing import TYPE_CHECKING

from dataset import open_dataset
from helper import launch
from helper.clip_options import parse_clip_options
from helper.exits import exit_on_bad_input, exits
from helper.names import clip_run_name
from helper.options import recorded_options

if TYPE_CHECKING:
    from helper.run import Run


@exits("pretrain_clip.py", memory="lower --micro_batch or --batch_size")
def main(argv: list[str] | None = None) -> None:
    train(parse_clip_options(argv))


def train(opt: argparse.Namespace) -> None:
    # These imports stand here so that neither --help nor a refused option waits for torch.
    from helper import checkpoint
    from helper.clip_data import build_clip_data
    from helper.clip_model import build_clip, check_batch_norm, published_state
    from helper.contrastive import train_clip, zero_shot_accuracy
    from helper.meters import print_record
    from helper.run import Run
    from helper.runtime import check_machine, resolve

    with exit_on_bad_input("pretrain_clip.py"):
        check_machine(opt)
        dataset = open_dataset(vars(opt))
        identity = {"dataset_sha256": dataset.fingerprint()}
        run = Run(opt, identity, "clip", "clip_tensorboards", clip_run_name(opt, dataset.name, identity), "clip")
        if run.finished:
            print_result(run)
            return
        captioned = dataset.captioned()
        opt = resolve(opt, run.recorded, len(captioned))
        data = build_clip_data(opt, dataset, captioned)
        check_batch_norm(opt, data.train)
        run.record(**recorded_options(opt))
        run.start()

    model = build_clip(opt)
    trained = train_clip(opt, model, data.pixels, data.tokens, data.train)
    if run.state is not None:
        trained.load_state_dict(run.state)
    for epoch in range(run.first_epoch, opt.epochs + 1):
        start = time.perf_counter()
        record = trained.epoch(epoch, run.save_inside)
        if epoch % opt.eval_freq == 0 or epoch == opt.epochs:
            record["zero_shot_acc"] = zero_shot_accuracy(model, data.test, data.test_pixels, data.tokens, opt)
        record["seconds"] = trained.earlier + time.perf_counter() - start
        print_record(record)
        run.end_epoch(record, trained.state_dict(), {"model": model.state_dict()}, opt.save_freq)

    if launch.rank() == 0:
        checkpoint.save(published_state(model, data.sample()), run.folder / "clip.pt")
    run.finish({})
    print_result(run)


def print_result(run: "Run") -> None:
    last = next(record for record in reversed(run.history) if "zero_shot_acc" in record)
    print(f"zero-shot accuracy: {last['zero_shot_acc']:.2f}, in {run.folder / 'clip.pt'}")


if __name__ == "__main__":
    with launch.processes():
        main()
