import pytest
import torch
import torch.nn.functional as F

from models import create_classifier, create_student


@pytest.mark.parametrize("name", ["resnet8", "vgg8", "MobileNetV2", "ShuffleV1", "timm:mobilenetv3_small_050"])
@pytest.mark.parametrize("create", [create_student, create_classifier])
def test_under_autocast_a_head_computes_in_float32(create, name):
    torch.manual_seed(0)
    student = create(name, 8, 100) if create is create_student else create(name, 100, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = student.eval()(torch.randn(2, 3, 32, 32))
    pooled = out.features[-1].float()
    embedding = F.linear(pooled, student.head.fit_dim_Net.weight, student.head.fit_dim_Net.bias)
    linear = [module for module in student.modules() if isinstance(module, torch.nn.Linear)]
    classifier = next(module for module in linear if module.out_features == 100)
    logits = F.linear(embedding if create is create_student else pooled, classifier.weight, classifier.bias)
    assert out.embedding.dtype == out.logits.dtype == torch.float32
    assert torch.equal(out.embedding, embedding)
    assert torch.equal(out.logits, logits)
