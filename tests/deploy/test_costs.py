import torch
from torch import nn

from deploy.costs import Cost, Row, cost_table, flops
from models import create_student


class Attention(nn.Module):
    """By the module that CLIP's transformer uses."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

    def forward(self, image):
        tokens = image.flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def test_attention_is_counted_too():
    """Four projections, and in each head two products of all tokens with all tokens."""
    tokens, width = 5, 12
    counted = flops(Attention().eval(), torch.randn(1, width, tokens, 1))
    assert counted == 2 * (4 * tokens * width**2 + 2 * tokens**2 * width)
    assert torch.backends.mha.get_fastpath_enabled()


def test_convolutions_and_linear_layers_are_counted_as_by_their_shapes():
    student, wanted = create_student("resnet8", 16, 5).eval(), []

    def count(module, inputs, output):
        pixels = output[0, 0].numel() if isinstance(module, nn.Conv2d) else 1
        wanted.append(2 * module.weight.numel() * pixels)

    hooks = [m.register_forward_hook(count) for m in student.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        student(image)
    for hook in hooks:
        hook.remove()
    assert flops(student, image) == sum(wanted)


def test_the_table_s_rows():
    rows = [
        Row("teacher", None, Cost(87_849_216, 8818.4, 351.42, (30.5, 20.25))),
        Row("student", 76.5, Cost(1, 2, 3, (4, 5))),
    ]
    lines = cost_table(rows).splitlines()
    assert lines[2] == "| teacher | 87,849,216 | 8,818.4 | 351.42 | 30.500 | 20.250 | – |"
    assert lines[3] == "| student | 1 | 2.0 | 3.00 | 4.000 | 5.000 | 76.50 |"
