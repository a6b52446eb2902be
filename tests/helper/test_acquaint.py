from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

from conftest import make_dataset
from dataset.loader import Loader
from distiller_zoo import METHODS
from helper.acquaint import acquaint, caption_embeddings, training_embeddings
from helper.bank import EmbeddingBank
from helper.contrastive import caption_tokens, class_embeddings
from helper.objective import Objective
from helper.teacher import CnnTeacher, EncoderTeacher
from models import create_model, create_text_encoder
from models.heads import TeacNet

CPU = torch.device("cpu")


def make_loader(**options) -> Loader:
    data = make_dataset(num_train=12)
    return Loader(data.train, "train", 5, CPU, rows=torch.tensor([1, 2, 5, 9]), training=True, max_steps=1, **options)


def bank() -> EmbeddingBank:
    """Two views of 12 training rows after 3 test rows; a row holds its own number."""
    return EmbeddingBank(torch.arange(27).half()[:, None], 12, 3, 2, CPU)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("place", [{}, {"rank": 1, "processes": 2}])
def test_a_loss_sees_the_test_view_of_every_training_row_once(head, place):
    """Without a head's projection, whatever --max_steps says, and all of them in each process."""
    teacher = EncoderTeacher(bank(), TeacNet(1, 2, 5) if head else None, 1)
    loader = make_loader(**place, teacher_views=2)
    torch.testing.assert_close(training_embeddings(teacher, loader), torch.tensor([[4.0], [5], [8], [12]]))
    assert loader.training and loader.max_steps == 1 and loader.images is not None


def test_a_cnn_shows_its_pooled_features_of_the_images_themselves():
    torch.manual_seed(0)
    teacher, loader = CnnTeacher(create_model("resnet8", 5), None, "off"), make_loader()
    (batch,) = Loader(make_dataset(num_train=12).train, "train", 20, CPU).epoch()
    expected = teacher("train", batch).features[-1][[1, 2, 5, 9]]
    torch.testing.assert_close(training_embeddings(teacher, loader), expected, rtol=1e-4, atol=1e-5)


def test_captions_are_those_of_the_zero_shot_classifier(tiny_clip):
    opt = Namespace(clip_mode=str(tiny_clip), clip_root="")
    classes = ["colour 0", "colour 1"]
    text = create_text_encoder(str(tiny_clip), "")
    expected = class_embeddings(text, caption_tokens(classes, tokenize=text.tokenize))
    captions = caption_embeddings(classes, opt)
    assert captions.shape == (2, 8, 16)
    torch.testing.assert_close(F.normalize(captions.mean(dim=1), dim=1), expected)


class Asking(torch.nn.Module):
    def acquaint(self, f_t, target, names):
        self.told = f_t.flatten().tolist(), target.tolist(), names()


@pytest.mark.parametrize(("clip_mode", "text"), [("timm:vit", False), ("tiny", True)])
def test_a_loss_is_told_its_rows_classes_and_the_names_of_a_clip(clip_mode, text, tiny_clip):
    loader, loss = make_loader(), Asking()
    loader.targets = loader.targets.clone()
    loader.targets[5] = -1
    loaders = Namespace(train=loader, classes=["a", "b", "c"])
    opt = Namespace(clip_tn=1, clip_mode=str(tiny_clip) if text else clip_mode, clip_root="", device="cpu")
    objective = Objective(loss, METHODS["unic"].feeds, 1, 0, 1, 4)
    acquaint(objective, EncoderTeacher(bank(), None, 1), loaders, opt)
    rows, target, captions = loss.told
    assert (rows, target) == ([4, 5, 8, 12], [1, 2, -1, 4])
    assert captions.shape == (3, 8, 16) if text else captions is None


def test_nothing_is_computed_for_a_loss_that_does_not_ask_or_counts_for_nothing():
    for criterion, beta in ((Asking(), 0), (torch.nn.Identity(), 1), (None, 1)):
        acquaint(Objective(criterion, (), 1, 0, beta, 4), None, None, None)
    assert not hasattr(criterion, "told")
