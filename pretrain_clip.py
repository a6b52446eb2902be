"""Train a small CLIP from scratch on images and captions: ``python pretrain_clip.py --dataset shapes``.

The result, SAVE/clip/NAME/clip.pt, is a state dict in OpenAI's format and precision:
``train_student.py --clip_mode SAVE/clip/NAME/clip.pt`` takes it for a teacher like any published one.
"""

import time

import torch

from dataset.loader import Loader
from helper import checkpoint, distributed
from helper.clip_model import check_batch_norm, create_clip, published_state
from helper.clip_options import parse_clip_options
from helper.contrastive import Images, caption_tokens, train_clip, zero_shot_accuracy
from helper.data import eval_batch_size, open_dataset
from helper.exits import exits
from helper.meters import print_record
from helper.names import clip_run_name
from helper.options import recorded_options
from helper.run import Run
from helper.runtime import resolve
from helper.util import exit_on_bad_input
from models.library import synchronize_norms


@exits("pretrain_clip.py", memory="lower --micro_batch or --batch_size")
def main(argv: list[str] | None = None) -> None:
    opt = parse_clip_options(argv)

    with exit_on_bad_input("pretrain_clip.py"):
        run = Run(opt, "clip", "clip_tensorboards", clip_run_name(opt), "clip")
        path = run.folder / "clip.pt"
        if run.finished:
            print_result(run)
            return
        dataset = open_dataset(vars(opt))
        captioned = dataset.captioned()
        opt, views = resolve(opt, run.recorded, len(captioned)), dataset.views
        run.record(**recorded_options(opt), dataset_sha256=dataset.fingerprint())
        device = torch.device(opt.device)
        # The views for a teacher are the ones that are resized to its resolution.
        place = {"images": False, "views": views, "rank": distributed.rank(), "processes": distributed.count()}
        how = {"training": True, "seed": opt.seed, "max_steps": opt.max_steps}
        rows = (captioned.targets >= 0).nonzero().flatten()  # the others have no caption
        loader = Loader(captioned, "captioned", opt.batch_size, device, rows=rows, **how, **place)
        size = eval_batch_size(opt.device, opt.resolution)
        test_loader = Loader(dataset.test, "test", size, device, **place)
        check_batch_norm(opt, loader)
        run.start()

    pixels, test_pixels = (Images(split, opt.resolution, device, views) for split in (captioned, dataset.test))
    tokens = caption_tokens(dataset.classes).to(device)
    model = create_clip(opt)
    model = synchronize_norms(model) if opt.sync_bn else model
    model = model.to(device, memory_format=torch.channels_last)
    trained = train_clip(opt, model, pixels, tokens, loader)
    if run.state is not None:
        trained.load_state_dict(run.state)
    for epoch in range(run.first_epoch, opt.epochs + 1):
        start = time.perf_counter()
        record = trained.epoch(epoch, run.save_inside)
        if epoch % opt.eval_freq == 0 or epoch == opt.epochs:
            record["zero_shot_acc"] = zero_shot_accuracy(model, test_loader, test_pixels, tokens, opt)
        record["seconds"] = trained.earlier + time.perf_counter() - start
        print_record(record)
        run.end_epoch(record, trained.state_dict(), {"model": model.state_dict()}, opt.save_freq)

    if distributed.rank() == 0:
        sample = next(Loader(dataset.test, "test", size, device, images=False, views=views).epoch())
        checkpoint.save(published_state(model, test_pixels(sample)), path)
    run.finish({})
    print_result(run)


def print_result(run: Run) -> None:
    last = next(record for record in reversed(run.history) if "zero_shot_acc" in record)
    print(f"zero-shot accuracy: {last['zero_shot_acc']:.2f}, in {run.folder / 'clip.pt'}")


if __name__ == "__main__":
    with distributed.processes():
        main()
