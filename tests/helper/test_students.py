import pytest
import torch

from dataset.loader import Batch
from errors import InputError
from helper.student import reuse
from helper.teacher import CnnTeacher, EncoderTeacher
from models import create_classifier, create_model, create_student
from models.heads import TeacNet


def test_a_student_reuses_an_encoders_head():
    torch.manual_seed(0)
    head = TeacNet(12, 8, 5).requires_grad_(False)
    student = reuse(create_student("resnet8", 8, 5), EncoderTeacher(None, head), 32, factor=3)
    out = student.train()(torch.randn(6, 3, 32, 32))
    assert out.embedding.shape == (6, 12) and out.features[-1] is out.embedding
    torch.testing.assert_close(out.logits, head(out.embedding)[1])
    trained = {name for name, x in student.head.named_parameters() if x.requires_grad}
    assert trained == {name for name, _ in student.head.named_parameters() if name.startswith("projector.")}
    assert student.head.projector[0].weight.shape == (4, 64) and out.embedding.min() < 0


@pytest.mark.parametrize(("model_s", "size"), [("resnet8", 8), ("vgg8", 4)])
def test_a_student_reuses_a_cnns_classifier_on_maps_of_the_smaller_size(model_s, size):
    torch.manual_seed(0)
    teacher = CnnTeacher(create_model("resnet14", 5), None, "off")
    student = reuse(create_classifier(model_s, 0), teacher, 32, factor=2).train()
    image = torch.randn(3, 3, 32, 32)
    out, zeros = student(image), torch.zeros(3, dtype=torch.int64)
    out_t = teacher("train", Batch(zeros, zeros, image, zeros))
    assert out.features[-2].shape == (3, 64, size, size) and out.features[-2].min() == 0
    torch.testing.assert_close(out.embedding, out.features[-2].mean(dim=(2, 3)))
    torch.testing.assert_close(out.logits, teacher.backbone.fc(out.embedding))
    torch.testing.assert_close(out_t.logits, teacher.backbone.fc(out_t.features[-1]))
    assert not student.head.classifier.weight.requires_grad
    assert student.head.classifier.weight is not teacher.backbone.fc.weight


def test_a_teachers_smaller_maps_are_what_the_students_are_pooled_to():
    teacher = CnnTeacher(create_model("vgg8", 5), None, "off")
    student = reuse(create_classifier("resnet8", 0), teacher, 32, factor=2)
    assert student(torch.randn(2, 3, 32, 32)).features[-2].shape == (2, 512, 4, 4)


def test_a_teacher_that_does_not_classify_the_mean_of_its_last_map_is_refused():
    teacher = CnnTeacher(create_model("MobileNetV2", 5), None, "off")
    with pytest.raises(InputError, match="mean of its last map"):
        reuse(create_classifier("resnet8", 0), teacher, 32, factor=2)
