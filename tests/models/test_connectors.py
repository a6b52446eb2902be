import math

import pytest
import torch
from torch import nn

from models.util import ABF, Connector, ConnectorV2, ConvReg, Embed, LinearEmbed, Paraphraser, ReviewFusion, Translator

# A student's features and two teachers': of its sizes, and of others; the pooled ones last.
STUDENT = [(2, 4, 16, 16), (2, 8, 8, 8), (2, 12, 4, 4), (2, 12)]
TEACHER = [(2, 6, 16, 16), (2, 8, 8, 8), (2, 24, 4, 4), (2, 24)]
TEACHER_OF_OTHER_SIZES = [(2, 6, 32, 32), (2, 8, 5, 7), (2, 24, 8, 8), (2, 20)]


def tensors(shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def channels_last(f: torch.Tensor) -> torch.Tensor:
    return f.contiguous(memory_format=torch.channels_last) if f.dim() == 4 else f


def map_shapes(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [(*shape, 1, 1) if len(shape) == 2 else shape for shape in shapes]


def train_step(module: nn.Module, *args) -> None:
    """Every parameter gets a finite gradient, and weights one that is not zero (a bias before a batch norm may)."""
    out = module(*args)
    out = out if isinstance(out, (list, tuple)) else [out]
    sum((f * torch.linspace(-1, 2, f.numel()).view(f.shape)).sum() for f in out).backward()
    for name, p in module.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert not name.endswith("weight") or p.grad.abs().max() > 0, name


@pytest.mark.parametrize("module", [LinearEmbed, Embed])
def test_an_embedding_flattens_projects_and_takes_any_memory_format(module):
    embed = module(3 * 4 * 4, 5)
    assert list(embed.state_dict()) == ["linear.weight", "linear.bias"]
    (f,) = tensors([(2, 3, 4, 4)])
    rows = f.reshape(2, -1) @ embed.linear.weight.T + embed.linear.bias
    expected = rows if module is LinearEmbed else rows / (rows * rows).sum(1, keepdim=True) ** 0.5
    torch.testing.assert_close(embed(f), expected)
    assert torch.equal(embed(channels_last(f)), embed(f))
    assert torch.equal(embed(f.flatten(1)), embed(f))
    train_step(embed, f)


def test_a_zero_row_is_embedded_to_zero_with_a_finite_gradient():
    embed = Embed(3, 4)
    nn.init.zeros_(embed.linear.bias)
    f = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    out = embed(f)
    assert out[0].tolist() == [0] * 4
    out.sum().backward()
    assert f.grad.isfinite().all()
    assert embed.linear.weight.grad.isfinite().all()


def test_an_embedding_does_not_hide_what_is_no_number():
    assert Embed(3, 4)(torch.full((1, 3), torch.nan)).isnan().all()


@pytest.mark.parametrize(
    ("s_size", "t_size", "conv", "kernel"),
    [
        ((8, 8), (4, 4), nn.Conv2d, (3, 3)),
        ((4, 4), (8, 8), nn.ConvTranspose2d, (4, 4)),
        ((8, 8), (8, 8), nn.Conv2d, (1, 1)),
        ((7, 9), (5, 4), nn.Conv2d, (3, 6)),
        ((8, 4), (4, 4), nn.Conv2d, (5, 1)),
    ],
)
def test_a_regressor_halves_doubles_or_narrows_a_map(s_size, t_size, conv, kernel):
    s_shape, t_shape = (2, 3, *s_size), (2, 5, *t_size)
    regress = ConvReg(s_shape, t_shape)
    assert type(regress.conv) is conv
    assert regress.conv.kernel_size == kernel
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(regress.state_dict()) == ["conv.weight", "conv.bias", *(f"bn.{name}" for name in names)]
    (f,) = tensors([s_shape])
    out = regress(f)
    assert out.shape == t_shape
    assert out.min() == 0
    assert ConvReg(s_shape, t_shape, use_relu=False)(f).min() < 0
    torch.testing.assert_close(regress(channels_last(f)), out)
    train_step(regress, f)


@pytest.mark.parametrize("t_size", [(9, 9), (24, 24), (8, 9), (12, 4)])
def test_a_regressor_refuses_to_enlarge_by_other_factors_than_two(t_size):
    with pytest.raises(ValueError, match=rf"\(2, 3, 8, 8\) to \(2, 5, {t_size[0]}, {t_size[1]}\)"):
        ConvReg((2, 3, 8, 8), (2, 5, *t_size))


@pytest.mark.parametrize(
    "build",
    [
        lambda s, t: ConvReg(s, t),
        lambda s, t: Translator(s, t),
        lambda s, t: ConnectorV2([s], [t]),
        lambda s, t: Connector([s], [t]),
    ],
)
def test_what_connects_maps_refuses_pooled_features_in_one_line(build):
    with pytest.raises(ValueError, match=r"connects maps \(N, C, H, W\), got \(2, 64\) and \(2, 32\)$"):
        build((2, 64), (2, 32))


def test_a_connector_regresses_what_differs_and_passes_the_rest():
    connector = Connector(STUDENT[:-1], TEACHER[:-1])
    maps = tensors(STUDENT[:-1])
    out = connector(maps)
    assert [f.shape for f in out] == TEACHER[:-1]
    assert out[1] is maps[1]
    assert {name.split(".")[1] for name in connector.state_dict()} == {"0", "2"}
    assert "connectors.2.conv.weight" in connector.state_dict()
    assert out[0].min() < 0  # no ReLU: the activation boundary is what is compared
    train_step(connector, maps)


def test_the_second_connector_changes_channels_alone_and_is_initialised_as_published():
    shapes = [(2, 6, 7, 5), (2, 400, 4, 4)]
    connector = ConnectorV2(shapes, [(2, 9, 3, 3), (2, 300, 8, 8)])
    maps = tensors(shapes)
    assert [f.shape for f in connector(maps)] == [(2, 9, 7, 5), (2, 300, 4, 4)]
    assert list(connector.state_dict())[:3] == [f"connectors.0.{n}" for n in ("0.weight", "1.weight", "1.bias")]
    conv, bn = connector.connectors[1]
    assert conv.bias is None
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / 300), rel=0.02)
    assert (bn.weight == 1).all() and (bn.bias == 0).all()
    # Normalised and without a ReLU.
    torch.testing.assert_close(connector(maps)[1].mean(dim=(0, 2, 3)), torch.zeros(300), rtol=0, atol=1e-5)
    train_step(connector, maps)


@pytest.mark.parametrize("module", [Connector, ConnectorV2, ReviewFusion])
def test_unequal_numbers_of_maps_are_refused(module):
    maps = STUDENT[:3]
    with pytest.raises(ValueError, match=r"as many student as teacher maps, got \[\(2, 4, 16, 16\).*\] and \[.*\]$"):
        module(maps, TEACHER[:2])
    with pytest.raises(ValueError, match=r"as many student as teacher maps, got \[\] and \[\]"):
        module([], [])
    with pytest.raises(ValueError, match=r"built for 3 .*, got 2"):
        module(maps, TEACHER[:3])(tensors(STUDENT[:2]))


def names(prefix: str, use_bn: bool) -> list[str]:
    """The names of three convolutions, each followed by batch norm or nothing and an activation."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"] if use_bn else []
    entries = [[f"{3 * i}.weight", f"{3 * i}.bias", *(f"{3 * i + 1}.{name}" for name in norm)] for i in range(3)]
    return [f"{prefix}.{entry}" for layer in entries for entry in layer]


@pytest.mark.parametrize("use_bn", [False, True])
def test_a_paraphraser_gives_the_factor_and_what_it_makes_of_it(use_bn):
    paraphraser = Paraphraser((2, 10, 4, 4), k=0.3, use_bn=use_bn)
    assert list(paraphraser.state_dict()) == names("encoder", use_bn) + names("decoder", use_bn)
    (f,) = tensors([(2, 10, 4, 4)])
    kept = f.clone()
    factor, again = paraphraser(f)
    assert (factor.shape, again.shape) == ((2, 3, 4, 4), f.shape)
    assert torch.equal(paraphraser(f, is_factor=True), factor)
    assert torch.equal(f, kept)
    train_step(paraphraser, f)


@pytest.mark.parametrize("use_bn", [False, True])
def test_a_translator_gives_a_factor_of_the_teachers_shape(use_bn):
    translator = Translator((2, 7, 4, 4), (2, 10, 4, 4), use_bn=use_bn)
    assert list(translator.state_dict()) == names("encoder", use_bn)
    (f,) = tensors([(2, 7, 4, 4)])
    assert translator(f).shape == Paraphraser((2, 10, 4, 4))(torch.ones(2, 10, 4, 4))[0].shape == (2, 5, 4, 4)
    train_step(translator, f)


def test_a_factor_without_channels_is_refused():
    with pytest.raises(ValueError, match=r"k = 0.1 leaves no channel of the teacher's map \(2, 8, 4, 4\)"):
        Paraphraser((2, 8, 4, 4), k=0.1)


@pytest.mark.parametrize("teacher", [TEACHER, TEACHER_OF_OTHER_SIZES])
@pytest.mark.parametrize("stages", [slice(None), slice(1, None), slice(-1), slice(-1, None)])
def test_fused_maps_have_the_teachers_shapes_in_order(teacher, stages):
    """With and without the pooled features, of any number of stages."""
    s_shapes, t_shapes = STUDENT[stages], teacher[stages]
    fusion = ReviewFusion(s_shapes, t_shapes)
    features = tensors(s_shapes)
    out = fusion(features)
    assert [f.shape for f in out] == map_shapes(t_shapes)
    for a, b in zip(fusion([channels_last(f) for f in features]), out, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    train_step(fusion, features)


def pixelwise(conv: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """A 1 x 1 convolution without bias and its batch norm in eval mode as published: mean 0, variance 1."""
    return torch.einsum("oi,nihw->nohw", conv[0].weight[:, :, 0, 0], x) / math.sqrt(1 + 1e-5)


def test_a_stage_is_mixed_pixel_by_pixel_with_what_the_deeper_one_passes_on():
    """Two stages, the deeper half as large; the teacher's maps are twice as large as the student's."""
    fusion = ReviewFusion([(2, 3, 4, 4), (2, 5, 2, 2)], [(2, 6, 8, 8), (2, 7, 4, 4)]).eval()
    shallow, deep = tensors([(2, 3, 4, 4), (2, 5, 2, 2)])
    last, first = fusion.abfs
    assert last.att_conv is None

    def double(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    passed = double(pixelwise(last.conv1, deep))  # to the teacher's 4 x 4, which is the shallow stage's size too
    x = pixelwise(first.conv1, shallow)
    conv = first.att_conv[0]
    scores = torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], torch.cat([x, passed], 1))
    share = 1 / (1 + torch.exp(-scores - conv.bias[:, None, None]))
    mixed = double(x * share[:, 0, None] + passed * share[:, 1, None])
    with torch.no_grad():
        out = fusion([shallow, deep])
        torch.testing.assert_close(out[1], last.conv2(passed))
        torch.testing.assert_close(out[0], first.conv2(mixed))


def test_a_stage_depends_on_the_deeper_ones_and_not_on_the_shallower():
    fusion = ReviewFusion(STUDENT, TEACHER).eval()
    features = tensors(STUDENT)
    before = fusion(features)
    features[1] = features[1] + 1
    changed = [not torch.equal(a, b) for a, b in zip(fusion(features), before, strict=True)]
    assert changed == [True, True, False, False]


def test_the_fusions_state_dict_has_the_published_names_the_last_stage_first():
    fusion = ReviewFusion(STUDENT, TEACHER)
    shapes = {name: tuple(value.shape) for name, value in fusion.state_dict().items()}
    assert shapes["abfs.0.conv1.0.weight"] == (12, 12, 1, 1)
    assert shapes["abfs.0.conv2.0.weight"] == (24, 12, 3, 3)
    assert shapes["abfs.3.conv1.0.weight"] == (12, 4, 1, 1)
    assert shapes["abfs.3.conv2.1.weight"] == (6,)
    assert shapes["abfs.3.att_conv.0.weight"] == (2, 24, 1, 1)
    assert not any(name.startswith("abfs.0.att_conv") for name in shapes)


def test_no_more_than_512_channels_are_passed_on():
    assert ReviewFusion([(2, 600)], [(2, 3)]).abfs[0].conv1[0].out_channels == 512


def test_a_fusions_convolutions_are_initialised_as_published():
    """Uniform up to the square root of 3 / fan-in."""
    abf = ABF(64, 64, 32, fuse=True)
    for conv, fan_in in ((abf.conv1[0], 64), (abf.conv2[0], 64 * 9)):
        bound = math.sqrt(3 / fan_in)
        assert 0.98 * bound < conv.weight.abs().max() <= bound
        assert conv.bias is None


def test_fusing_other_than_maps_and_pooled_features_is_refused():
    with pytest.raises(ValueError, match=r"ReviewFusion connects maps \(N, C, H, W\), got .*\(2, 3, 4\)"):
        ReviewFusion([(2, 3, 4)], [(2, 3, 4, 4)])
