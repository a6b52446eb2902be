"""What a GPU is asked to do, on a pretended one: a CPU's numbers come out, and nothing that CUDA refuses is asked."""

import pytest
from pretend_gpu import PretendGpu
from runs import read_metrics

from distiller_zoo import METHODS


@pytest.fixture(scope="module")
def gpu():
    gpu = PretendGpu()
    yield gpu
    gpu.end()


@pytest.fixture
def train_on_gpu(gpu, tiny_clip, tmp_path):
    """Run train_student.py there with these options besides; gives how many graphs were captured."""

    def run(*options, **how):
        base = ["--dataset", "tiny", "--device", "gpu", "--amp", "off", "--batch_size", 16, "--feature_dim", 8]
        base += ["--clip_mode", tiny_clip, "--model_s", "resnet8", "--save_dir", tmp_path / "gpu"]
        return gpu("train_student", list(map(str, base + list(options))), **how)

    return run


@pytest.fixture
def both(train, train_on_gpu, tmp_path):
    """Train on the CPU and on the GPU; gives both runs' folders and how many graphs were captured."""

    def run(*options, cuda=(), free=2**40):
        options = ["--learning_rate", 0.001, "--epochs", 2, *options]
        on_cpu = train(*options, save_dir=tmp_path / "cpu")
        captures = train_on_gpu(*options, *cuda, free=free)
        (on_gpu,) = (tmp_path / "gpu" / on_cpu.parent.name).iterdir()
        return on_cpu, on_gpu, captures

    return run


def assert_same(on_cpu, on_gpu):
    for a, b in zip(read_metrics(on_cpu), read_metrics(on_gpu), strict=True):
        assert a == pytest.approx(b, rel=1e-2)  # on CUDA the teacher computes in fp16


@pytest.mark.parametrize(
    ("options", "cuda", "free", "captures"),
    [
        ("--teacher_views 2", "--graph off --compile on", 2**40, 0),
        ("--teacher_views 2", "", 2**40, 1),
        ("--teacher_views 2", "--graph on --compile on", 2**40, 1),
        ("--teacher_views 2 --optimizer adamw --schedule cosine", "", 2**40, 1),
        ("--teacher_views 2 --holdout 0.3 --labels 0.5", "", 2**40, 1),
        ("--teacher_views 2", "--amp fp16", 2**40, 1),
        ("--teacher_views 2", "--amp bf16", 2**40, 1),
        ("--teacher_views 2", "", 0, 0),  # images and bank stay on the host
        ("--teacher_views 0", "", 2**40, 0),
        ("--teacher_views 0", "", 0, 0),
        ("--teacher_views 3 --views shared --distill kd --logit_standard", "", 2**40, 1),
    ],
)
def test_it_trains_as_a_cpu_does(both, options, cuda, free, captures):
    *folders, found = both(*options.split(), cuda=cuda.split(), free=free)
    assert_same(*folders)
    assert found == captures


def test_a_run_resumes_between_epochs_and_inside_one(train_on_gpu, tmp_path):
    options = ["--distill", "crd", "--nce_k", 20, "--feat_dim", 8, "--learning_rate", 0.001]
    train_on_gpu(*options, "--epochs", 3, "--name", "whole")
    options += ["--name", "cut"]
    train_on_gpu(*options, "--epochs", 1)
    with pytest.raises(AssertionError, match="stopped after step 2"):
        train_on_gpu(*options, "--epochs", 3, "--save_steps", 2, stop=True)
    train_on_gpu(*options, "--epochs", 3)
    whole, cut = (tmp_path / "gpu" / "student_model" / name for name in ("whole", "cut"))
    for a, b in zip(read_metrics(whole), read_metrics(cut), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.fixture(scope="module")
def cnn(gpu, tmp_path_factory):
    """A CNN that was trained there."""
    root = tmp_path_factory.mktemp("cnn")
    base = ["--dataset", "tiny", "--device", "gpu", "--amp", "off", "--batch_size", "16", "--save_dir", str(root)]
    gpu("train_teacher", [*base, "--model", "resnet8", "--epochs", "1", "--max_steps", "1"])
    return next(root.glob("models/*/resnet8_last.pth"))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.build])
def test_every_methods_step_can_be_captured_unless_its_row_says_that_it_waits(train_on_gpu, cnn, name):
    options = ["--path_t", cnn, "--feat_dim", 8, "--nce_k", 20, "--init_epochs", 1, "--epochs", 1, "--max_steps", 4]
    captures = train_on_gpu("--distill", name, *options, "--learning_rate", 0.001)
    assert captures == (not METHODS[name].waits)


def test_the_other_scripts_run(gpu, train_on_gpu, tiny_clip, tmp_path):
    """A head on a CLIP; a student evaluated and probed; a CLIP from scratch; what measures speed."""
    base = ["--dataset", "tiny", "--device", "gpu", "--amp", "off"]
    train = [*base, "--batch_size", "16", "--epochs", "1", "--save_dir", str(tmp_path / "gpu")]
    small = ["--vision_layers", "1,1,1,1", "--vision_width", "8", "--text_layers", "1", "--embed_dim", "16"]
    measured = [*base, "--model_s", "resnet8", "--compile", "on", "--clip_mode", str(tiny_clip), "--steps", "6"]
    worker = ["--worker", "8", "--measure", "step", "--seconds", "0.01", "--dim", "16"]
    gpu("train_teacher", [*train, "--model", str(tiny_clip)])
    gpu("pretrain_clip", [*train, *small])
    train_on_gpu("--epochs", 1)
    (run,) = (tmp_path / "gpu" / "student_model").iterdir()
    gpu("evaluate", [str(run), "--device", "gpu", "--probe", "tiny"])
    gpu("evaluate", [str(run), "--device", "gpu"])
    few = ["--batch_size", "8", "--release_steps", "1", "--workers", "1", "--chunks", "1"]
    assert gpu("benchmarks.pipeline", [*measured, *few]) == 2  # of the student alone too
    assert gpu("benchmarks.growth", [*measured, *worker]) == 1


def test_it_refuses_what_cuda_refuses(gpu):
    gpu("pretend_gpu", [])
