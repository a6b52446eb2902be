import torch
import torch.nn.functional as F
from torch import nn

from conftest import check_finite, check_golden, formula_weights
from distiller_zoo.CLIPKD import CLIPKD, ContrastiveRelation, FeatureMimicry, InteractiveContrastive

FED = ("image_t", "text_t")


def layer(dtype: torch.dtype) -> nn.Linear:
    return formula_weights(nn.Linear(12, 20).to(dtype))


def test_mimicry_is_the_authors_in_value_and_gradient(newer_losses):
    def wide(image_s, text_s, image_t, text_t):
        return FeatureMimicry(20, 20)(image_s, image_t) + FeatureMimicry(20, 20)(text_s, text_t)

    def projected(image_s, text_s, image_t, text_t):
        losses = [formula_weights(FeatureMimicry(12, 20).to(image_s.dtype)) for _ in range(2)]
        return losses[0](image_s, image_t) + losses[1](text_s, text_t)

    check_golden(newer_losses, "clip_fd", wide, "f_s_wide", "text_s_wide", *FED)
    check_golden(newer_losses, "clip_fd_projected", projected, "f_s", "text_s", *FED)


def test_contrast_is_the_authors_in_value_and_gradient(newer_losses):
    def projected(image_s, text_s, *fed):
        return InteractiveContrastive()(layer(image_s.dtype)(image_s), layer(text_s.dtype)(text_s), *fed)

    def wide(*fed):
        return InteractiveContrastive().to(fed[0].dtype)(*fed)

    check_golden(newer_losses, "clip_icl", wide, "f_s_wide", "text_s_wide", *FED)
    check_golden(newer_losses, "clip_icl_projected", projected, "f_s", "text_s", *FED)


def test_relation_is_the_authors_in_value_and_gradient(newer_losses):
    check_golden(newer_losses, "clip_crd", ContrastiveRelation(20, 30), "f_s_wide", "text_s_wide", *FED)


def embeddings() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    f_t, noise = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    return f_t + noise, f_t, torch.tensor([0, 1, -1, 2, 0, -1])


def test_without_names_the_teachers_images_stand_for_the_texts():
    f_s, f_t, label = embeddings()
    n_s, n_t = F.normalize(f_s, dim=1), F.normalize(f_t, dim=1)
    loss = CLIPKD(5, 5).double()
    loss.acquaint(f_t, label, lambda: None)
    terms = loss.terms(f_s, f_t, label)
    torch.testing.assert_close(terms["mimicry"], 2000 * (n_s - n_t).square().mean())
    torch.testing.assert_close(terms["contrast"], F.cross_entropy(loss.contrast.scale * n_s @ n_t.T, torch.arange(6)))
    p_t = (n_t @ n_t.T / 0.07).softmax(dim=1)
    log_s = (n_s @ n_t.T / 0.07).log_softmax(dim=1), (n_t @ n_s.T / 0.07).log_softmax(dim=1)
    torch.testing.assert_close(terms["relation"], sum((p_t * (p_t.log() - x)).sum() for x in log_s) / 12)
    perfect = loss.terms(f_t, f_t, label)
    assert max(perfect["mimicry"], perfect["relation"]) < 1e-6 < perfect["contrast"]


def test_the_contrast_runs_over_the_classes_names_and_the_labels_that_are_known():
    f_s, f_t, label = embeddings()
    captions = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = CLIPKD(5, 5, weights=(1, 1, 1)).double()
    loss.acquaint(f_t, label, lambda: captions)
    text = F.normalize(F.normalize(captions, dim=2).mean(dim=1), dim=1)
    logits = F.normalize(f_s, dim=1) @ text.T
    terms = loss.terms(f_s, f_t, label)
    known = label >= 0
    contrast = F.cross_entropy(loss.contrast.scale * logits[known], label[known], reduction="sum") / 6
    torch.testing.assert_close(terms["contrast"], contrast)
    p_t = (100 * F.normalize(f_t, dim=1) @ text.T).softmax(dim=1)
    relation = (p_t * (p_t.log() - (100 * logits).log_softmax(dim=1))).sum(dim=1).mean()
    torch.testing.assert_close(terms["relation"], relation)
    assert loss.state_dict().keys() == {"contrast.scale"}
    check_finite(lambda s, t: loss(s, t, label), torch.zeros(6, 5).double(), torch.zeros(6, 5).double())
