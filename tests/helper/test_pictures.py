"""What a run leaves to look at: the first batch's views, and TensorBoard's hyper-parameters."""

import io
import types

import numpy as np
import torch
from PIL import Image
from runs import read_metrics
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from conftest import make_dataset
from dataset.loader import Loader
from helper.pictures import _CELL, _LINE, first_views
from helper.teacher import EncoderTeacher


def first_loader() -> Loader:
    made = make_dataset()
    return Loader(made.train, "train", 32, torch.device("cpu"), training=True, teacher_views=4, views=made.views)


def cells(png: bytes, row: int) -> np.ndarray:
    """The cells of a row of the sheet, 8 of (94, 94, 3)."""
    sheet = np.asarray(Image.open(io.BytesIO(png)))
    top = row * (_CELL + _LINE) + _LINE
    return np.stack([sheet[top : top + _CELL - 2, x : x + _CELL - 2] for x in range(1, 8 * _CELL, _CELL)])


def test_the_picture_shows_the_views_of_the_first_batch():
    torch.manual_seed(0)
    encoder = types.SimpleNamespace(resolution=32, interpolation="bicubic", antialias=True, dim=4)
    drawn, loader = torch.get_rng_state(), first_loader()
    png = first_views(loader, EncoderTeacher(None, None, 4, encoder))["views.png"]
    assert torch.equal(torch.get_rng_state(), drawn)
    batch, made = next(loader.epoch(1)), make_dataset()
    mean, std = (torch.tensor(x)[:, None, None] for x in loader.normalization)
    student = ((batch.image * std + mean) * 255).round().to(torch.uint8)
    teacher = made.views.teacher(made.train.images[batch.index], batch.index, batch.teacher_view, 32)
    for row, images in enumerate((student[:8], teacher[:8], student[8:16], teacher[8:16])):
        nearest = torch.from_numpy(((np.arange(_CELL - 2) + 0.5) * 32 / (_CELL - 2)).astype(int))
        wanted = images[:, :, nearest][:, :, :, nearest].permute(0, 2, 3, 1)
        assert (cells(png, row) == wanted.numpy()).mean() > 0.95  # Pillow rounds two columns otherwise
    assert Image.open(io.BytesIO(first_views(loader, None)["views.png"])).height == 2 * (_CELL + _LINE)


def test_a_run_has_it_in_its_folder_and_in_tensorboard_beside_its_options(train):
    folder = train("--epochs", 2)
    events = EventAccumulator(str(folder.parents[1] / "student_tensorboards" / folder.name)).Reload()
    (picture,) = events.Images("views of the first batch")
    assert picture.encoded_image_string == (folder / "views.png").read_bytes()
    (best,) = events.Scalars("best/test_acc")
    assert best.value == max(record["test_acc"] for record in read_metrics(folder)) and best.step == 2
    metadata = events.SummaryMetadata("_hparams_/session_start_info")
    told = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.hparams
    assert told["distill"].string_value == "ega" and told["batch_size"].number_value == 16
    metadata = events.SummaryMetadata("_hparams_/experiment")
    experiment = plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content).experiment
    assert "best/test_acc" in [metric.name.tag for metric in experiment.metric_infos]


def test_a_small_batch_is_shown_whole():
    loader = first_loader()
    loader.rows = loader.rows[:3]
    png = first_views(loader, None)["views.png"]
    assert Image.open(io.BytesIO(png)).size == (8 * _CELL, _CELL + _LINE)
    loader.rank, loader.processes, loader.rows = 1, 2, loader.rows[:1]
    assert first_views(loader, None) == {}  # this process has no image
