import itertools
import json
import re
from types import SimpleNamespace

import pytest
import torch

from dataset import DATASETS
from dataset.views import CIFAR_VIEWS, CropViews, ResizedCropViews
from distiller_zoo import METHODS
from errors import InputError, SpeedUpFailed
from helper import options, runtime
from helper.options import parse_student_options, parse_teacher_options
from helper.runtime import resolve
from models import model_dict
from models.names import PUBLISHED


def refused(capsys, parse, argv: list[str]) -> str:
    """The one line that a wrong command line ends with, together with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        parse(argv)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.out == ""
    assert said.err.endswith("\n")
    assert said.err.count("\n") == 1
    assert ": error: " in said.err
    return said.err


@pytest.mark.parametrize("option", ["--save_dir", "--data_dir", "--path_t", "--model_s"])
def test_an_empty_text_is_no_value(option, capsys):
    """``--save_dir "$RUNS"`` with RUNS unset would write into the present folder."""
    assert option in refused(capsys, parse_student_options, [option, ""])
    assert parse_student_options(["--lr_decay_epochs", ""]).lr_decay_epochs == []


def test_a_file_of_names_has_one_a_line(tmp_path):
    """A name may hold what else Unicode takes for the end of a line; Windows' editors begin a file with a mark."""
    path = tmp_path / "names.txt"
    path.write_text("a\u2028cat\r\n\r\n a\vdog \r\n", "utf-8-sig", newline="")
    assert parse_student_options(["--leave_out", str(path)]).leave_out == ["a\u2028cat", "a\vdog"]


@pytest.mark.parametrize(
    ("distill", "weights"), [("ega", (1, 0, 1)), ("kd", (0.1, 0.9, 0)), ("none", (1, 0, 0)), (None, (1, 0, 1))]
)
def test_weights_left_unset_are_the_methods_own(distill, weights):
    opt = parse_student_options([] if distill is None else ["--distill", distill])
    assert (opt.gamma, opt.alpha, opt.beta) == weights


def test_weights_that_are_set_stay_zero_too():
    opt = parse_student_options(["--distill", "ega", "-r", "0", "-a", "0.3", "-b", "0.02"])
    assert (opt.gamma, opt.alpha, opt.beta) == (0, 0.3, 0.02)
    opt = parse_student_options(["--distill", "kd", "-r", "0", "-a", "2"])
    assert (opt.gamma, opt.alpha, opt.beta) == (0, 2, 0)


def test_the_defaults_are_the_papers():
    opt = parse_student_options([])
    assert (opt.distill, opt.model_s, opt.clip_mode, opt.dataset) == ("ega", "resnet8x4", "ViT-B/32", "cifar100")
    assert (opt.node_weight, opt.edge_weight, opt.kd_T, opt.feature_dim) == (0.8, 0.24, 4, 256)
    assert (opt.epochs, opt.batch_size) == (240, 64)
    assert (opt.learning_rate, opt.learning_rate_t, opt.lr_decay_rate) == (0.05, 0.01, 0.1)
    assert (opt.momentum, opt.weight_decay, opt.lr_decay_epochs) == (0.9, 5e-4, [150, 180, 210])
    assert (opt.views, opt.holdout, opt.path_t, opt.seed) == ("independent", None, None, 0)
    head = parse_teacher_options([])
    assert (head.learning_rate, head.epochs, head.batch_size, head.feature_dim) == (0.01, 240, 64, 256)
    assert (head.lr_decay_epochs, head.clip_mode) == ([150, 180, 210], "ViT-B/32")


@pytest.mark.parametrize("parse", [parse_student_options, parse_teacher_options])
@pytest.mark.parametrize(
    ("flag", "known"),
    [("--dataset", DATASETS), ("--device", ["auto", "cpu", "cuda"]), ("--amp", ["auto", "off", "bf16", "fp16"])],
)
def test_unknown_names_are_refused_with_the_known_ones(capsys, parse, flag, known):
    line = refused(capsys, parse, [flag, "unheard-of"])
    assert "unheard-of" in line
    assert all(name in line for name in known)


@pytest.mark.parametrize("name", ["timm:", "torchvision:=x", "open_clip:RN50="])
@pytest.mark.parametrize(
    ("parse", "flag"),
    [(parse_student_options, "--clip_mode"), (parse_student_options, "--model_s"), (parse_teacher_options, "--model")],
)
def test_a_library_without_a_name_is_no_network(capsys, parse, flag, name):
    assert f"{name!r} is no network: write " in refused(capsys, parse, [flag, name])


@pytest.mark.parametrize(
    ("flag", "known"),
    [
        ("--distill", METHODS),
        ("--model_s", model_dict),
        ("--views", ["independent", "shared"]),
        ("--compile", ["auto", "on", "off"]),
        ("--graph", ["auto", "on", "off"]),
        ("--clip_tn", ["0", "1"]),
    ],
)
def test_the_students_unknown_names_too(capsys, flag, known):
    line = refused(capsys, parse_student_options, [flag, "9"])
    assert flag in line
    assert all(name in line for name in known)


NOT_POSITIVE = ["-1", "0", "nan", "inf", "-inf", "x", ""]
NOT_A_WEIGHT = ["-0.1", "nan", "inf", "x", ""]
NOT_A_COUNT = ["0", "-3", "1.5", "nan", "x", "1e3", ""]


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *itertools.product(["-r", "-a", "-b", "--weight_decay", "-node", "-edge"], NOT_A_WEIGHT),
        *itertools.product(["--learning_rate", "--learning_rate_t", "--lr_decay_rate", "--kd_T"], NOT_POSITIVE),
        *itertools.product(["--batch_size", "--epochs", "--feature_dim", "--max_steps"], NOT_A_COUNT),
        *itertools.product(["--eval_freq", "--print_freq", "--save_freq"], NOT_A_COUNT),
        *itertools.product(["--seed"], ["-1", "1.5", "4294967296", "x"]),
        *itertools.product(["--momentum"], ["-0.1", "1.1", "nan"]),
        *itertools.product(["--holdout"], ["0", "-0.1", "0.6", "1", "nan", "x"]),
        *itertools.product(["--lr_decay_epochs"], ["a,b", "150,", "0", "-1,2", "1.5", "nan", "1 2"]),
        *itertools.product(["--teacher_views"], ["-1", "many", "1.5", "²", ""]),
        *itertools.product(["--trial"], ["", "a/b", "..\\x", "a b", "a:b"]),
    ],
)
def test_senseless_numbers_and_words_are_refused(capsys, flag, value):
    line = refused(capsys, parse_student_options, [f"{flag}={value}"])
    assert f"{flag}:" in line or f"{flag}/" in line or f"/{flag}" in line
    assert repr(value) in line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("-r 0 -b 0", "nothing would be trained"),
        ("--distill none -r 0", "nothing would be trained"),
        ("--distill kd -a 0", "distils nothing"),
        ("--distill kd -r 1 -a 0 -b 0", "distils nothing"),
        ("--distill kd -b 1", "leave -b at 0"),
        ("--distill none -b 1", "leave -b at 0"),
        ("--distill none -a 0.5", "use --distill kd"),
        ("-node 0 -edge 0", "both 0"),
        ("--clip_tn 0", "needs --path_t"),
        ("--views shared", "--teacher_views N, all or 0"),
        ("--labels 0", "use -r 0"),
        ("--labels 0 -r 0", "use --joint teacher"),
        ("--labels 0.5 --distill nce", "nce needs the class of every image"),
        ("--labels 0.5 --distill ccl", "ccl needs the class of every image"),
        ("--labels 0.5 --distill dkd", "dkd needs the class of every image"),
        ("--labels 0.5 --distill crd --mode relax", "crd --mode relax needs the class of every image"),
        ("--labels 0 -r 0 --joint teacher --distill crd --mode relax", "crd --mode relax needs the class"),
        ("--labels 1.5", "at most 1"),
        ("--seed -1", "at least 0 and at most 4294967295"),
        ("--joint teacher --distill none", "--distill none has none"),
        ("--joint teacher --distill kd", "the teacher has no classifier, so KD (-a) has no"),
        ("--joint teacher --distill irg", "the teacher has no classifier, so irg has no"),
        ("--joint teacher -a 1", "the teacher has no classifier, so KD (-a) has no"),
        ("--joint teacher --feature_dim 64", "leave it out"),
        ("--save_steps 0", "--save_steps"),
        ("--dataset folder", "--dataset folder needs --image_size R"),
        ("--image_size 64", "the images of cifar100 have their own size"),
        ("--dataset tinyimagenet --image_size 64", "the images of tinyimagenet have their own size"),
        ("--max_bad_images 2", "cifar100 is not decoded from image files"),
        ("--exact_decode", "cifar100 is not decoded from image files"),
        ("--unknown 3", "--unknown"),
        ("stray", "stray"),
        ("--batch_size", "--batch_size"),
    ],
)
def test_contradictions_are_refused_with_a_way_out(capsys, argv, words):
    assert words in refused(capsys, parse_student_options, argv.split())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--compile on", "no faster"),
        ("--graph on", "--graph on: only"),
        ("--model resnet8 --teacher_views 3", "a CNN sees every view"),
        ("--model resnet9 --dataset x", "--dataset"),
        ("--num_workers 8", "--num_workers"),
        ("--labels 0", "above 0"),
        ("--dataset folder", "--dataset folder needs --image_size R"),
    ],
)
def test_a_teachers_contradictions_are_refused_too(capsys, argv, words):
    assert words in refused(capsys, parse_teacher_options, argv.split())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--distill nst", "needs feature maps"),
        ("--distill hint --logit_standard", "compares no logits"),
        ("--distill none --clip_tn 0 --teacher_views 4", "always sees the student's own view"),
        ("--hint_layer 5", "--hint_layer"),
        ("--mode fuzzy", "--mode"),
        ("--warmup -1", "--beta_warmup"),
    ],
)
def test_a_methods_contradictions_are_refused(capsys, argv, words):
    assert words in refused(capsys, parse_student_options, argv.split())


def test_the_warm_up_of_b_goes_by_its_older_spelling_too():
    assert parse_student_options(["--beta_warmup", "3"]).beta_warmup == 3
    assert parse_student_options(["--warmup", "3"]).beta_warmup == 3
    assert parse_student_options(["--distill", "dkd"]).beta_warmup == METHODS["dkd"].beta_warmup == 20


def test_repdistillers_defaults_are_kept():
    opt = parse_student_options(["--distill", "crd"])
    assert (opt.feat_dim, opt.mode, opt.nce_k, opt.nce_t, opt.nce_m) == (128, "exact", 16384, 0.07, 0.5)
    assert (opt.hint_layer, opt.init_epochs) == (2, 30)
    teacher = parse_teacher_options(["--model", "wrn_40_2", "-t", "3"])
    assert (teacher.learning_rate, teacher.trial) == (0.05, "3")
    assert parse_teacher_options(["--model", "ShuffleV2"]).learning_rate == 0.01


@pytest.mark.parametrize("argv", ["--batch 32", "--learn 0.1", "--teacher 4", "--dist kd", "--see 3", "--node 1"])
def test_abbreviations_are_refused(capsys, argv):
    assert argv.split()[0] in refused(capsys, parse_student_options, argv.split())


def test_what_makes_sense_is_taken():
    opt = parse_student_options(["--views", "shared", "--teacher_views", "all", "--lr_decay_epochs", ""])
    assert (opt.teacher_views, opt.lr_decay_epochs) == ("all", [])
    assert parse_student_options(["--views", "shared", "--teacher_views", "0"]).teacher_views == 0
    assert parse_student_options(["--lr_decay_epochs", "3,1"]).lr_decay_epochs == [3, 1]
    assert parse_student_options(["--views", "shared", "--teacher_views", "16"]).teacher_views == 16
    assert parse_student_options(["--labels", "0.1", "--distill", "crd"]).labels == 0.1
    assert parse_student_options(["--labels", "0.1", "--distill", "nce", "-b", "0"]).beta == 0
    without = parse_student_options(["--labels", "0", "--joint", "teacher", "-r", "0", "-b", "1"])
    assert (without.labels, without.joint, without.feature_dim) == (0, "teacher", None)
    assert parse_student_options(["--momentum", "0", "--weight_decay", "0", "-node", "0"]).momentum == 0
    assert parse_student_options(["--holdout", "0.1", "--seed", "4294967295"]).holdout == 0.1


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_published_clips_are_taken_by_name(name):
    assert parse_student_options(["--clip_mode", name]).clip_mode == name
    assert parse_teacher_options(["--model", name]).clip_mode == name


def test_help_shows_groups_and_every_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_student_options(["--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    parser = options.student_parser()
    shown = [action for action in parser._actions if action.default not in (None, "==SUPPRESS==")]
    assert len(shown) > 25
    for action in shown:
        start = said.index(action.option_strings[-1] + " ", said.index("method:"))
        assert f"(default: {action.default})" in said[start:], action.option_strings
    for group in ("method", "student", "teacher", "data", "optimisation", "run", "speed"):
        assert f"{group}:" in said


@pytest.fixture
def machine(monkeypatch) -> SimpleNamespace:
    """What PyTorch finds: nothing, until a test changes it."""
    found = SimpleNamespace(cuda=False, cuda_bf16=False, avx512=False, amx=False, compiler=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found.cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: found.cuda_bf16)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: found.avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: found.amx)
    monkeypatch.setattr(runtime.shutil, "which", lambda name: name if name == found.compiler else None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return found


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({}, ("cpu", "off", 1)),
        ({"avx512": True}, ("cpu", "bf16", 1)),
        ({"amx": True}, ("cpu", "bf16", 1)),
        ({"cuda": True}, ("cuda", "fp16", 16)),
        ({"cuda": True, "cuda_bf16": True}, ("cuda", "bf16", 16)),
    ],
)
def test_auto_becomes_what_the_machine_has_and_is_printed(machine, capsys, has, expected):
    vars(machine).update(has)
    parsed = parse_student_options(["--compile", "off", "--graph", "off"])
    before = dict(vars(parsed))
    opt = resolve(parsed, None, images=50_000)
    assert (opt.device, opt.amp, opt.teacher_views) == expected
    assert opt.processes == 1
    assert vars(parsed) == before
    device, amp, views = expected
    assert capsys.readouterr().out == f"auto: device {device}, amp {amp}, teacher_views {views}\n"
    json.dumps(vars(opt))


def test_what_is_given_is_not_resolved_nor_printed(machine, capsys):
    argv = ["--device", "cpu", "--amp", "bf16", "--teacher_views", "5", "--compile", "off", "--graph", "off"]
    opt = resolve(parse_student_options(argv), None, images=50_000)
    assert (opt.device, opt.amp, opt.teacher_views, opt.compile) == ("cpu", "bf16", 5, "off")
    assert capsys.readouterr().out == ""


def test_a_resumed_run_keeps_what_auto_became(machine):
    machine.compiler, machine.amx = "g++", True
    recorded = {"device": "cpu", "amp": "bf16", "teacher_views": 7, "compile": "off"}
    opt = resolve(parse_student_options([]), recorded, images=10**9)
    assert (opt.device, opt.amp, opt.teacher_views, opt.compile) == ("cpu", "bf16", 7, "off")


@pytest.mark.parametrize(
    ("views", "given", "expected"),
    [
        (CIFAR_VIEWS, "all", 162),
        (CropViews(64), "all", 578),
        (CropViews(96), "1250", 1250),
        (CropViews(7), "auto", 2),  # the picture and its mirror image
        (ResizedCropViews(224), "auto", 16),
        (ResizedCropViews(224), "2000", 2000),
        (ResizedCropViews(224), "0", 0),
    ],
)
def test_teacher_views_become_a_number_that_the_images_have(machine, views, given, expected):
    machine.cuda = True
    parsed = parse_student_options(["--teacher_views", given, "--compile", "off"])
    assert resolve(parsed, None, images=50_000, views=views).teacher_views == expected


@pytest.mark.parametrize(
    ("views", "given", "message"),
    [
        (CIFAR_VIEWS, "163", "--teacher_views 163: an image of 32 pixels has 162 views"),
        (CropViews(64), "579", "--teacher_views 579: an image of 64 pixels has 578 views"),
        (ResizedCropViews(224), "all", "--teacher_views all: a photograph has endlessly many views"),
    ],
)
def test_views_that_the_images_have_not_are_refused(machine, views, given, message):
    with pytest.raises(ValueError, match=message):
        resolve(parse_student_options(["--teacher_views", given]), None, images=50_000, views=views)


@pytest.mark.parametrize("argv", ["--device cuda", "--amp fp16", "--device cpu --amp fp16"])
def test_what_the_machine_lacks_is_refused(machine, argv):
    with pytest.raises(ValueError, match=r"--device cpu|--device cuda"):
        resolve(parse_student_options(argv.split()), None, images=50_000)


@pytest.mark.parametrize(
    ("device", "compiler", "amx", "given", "steps", "expected"),
    [
        ("cpu", "g++", True, "auto", runtime.COMPILE_PAYS_AFTER_STEPS, "on"),
        ("cpu", "g++", True, "auto", runtime.COMPILE_PAYS_AFTER_STEPS - 2, "off"),
        ("cpu", "g++", False, "auto", 10**9, "off"),
        ("cpu", None, True, "auto", 10**9, "off"),
        ("cpu", "g++", False, "on", 2, "on"),
        ("cpu", None, True, "off", 10**9, "off"),
        ("cuda", "gcc", False, "auto", runtime.COMPILE_PAYS_AFTER_STEPS, "on"),
        ("cuda", "clang", False, "auto", runtime.COMPILE_PAYS_AFTER_STEPS, "on"),
        ("cuda", "g++", False, "auto", 10**9, "off"),
        ("cuda", None, False, "auto", 10**9, "off"),
    ],
)
def test_compilation_is_on_where_it_pays_and_is_possible(machine, device, compiler, amx, given, steps, expected):
    machine.cuda, machine.compiler, machine.amx = device == "cuda", compiler, amx
    argv = ["--device", device, "--compile", given, "--epochs", "2", "--batch_size", "10"]
    assert resolve(parse_student_options(argv), None, images=steps // 2 * 10).compile == expected
    limited = parse_student_options([*argv, "--max_steps", "3"])
    assert resolve(limited, None, images=10**9).compile == ("off" if given == "auto" else expected)


@pytest.mark.parametrize(("device", "variable", "usual"), [("cpu", "CXX", "g++"), ("cuda", "CC", "gcc")])
def test_compilation_without_a_compiler_is_refused(machine, monkeypatch, device, variable, usual):
    machine.cuda = device == "cuda"
    opt = parse_student_options(["--device", device, "--compile", "on"])
    with pytest.raises(ValueError, match=rf"needs a compiler \({re.escape(usual)}, or .* {variable} names"):
        resolve(opt, None, images=50_000)
    machine.compiler = "my-compiler"
    monkeypatch.setenv(variable, "my-compiler")
    assert resolve(opt, None, images=50_000).compile == "on"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("", "on"),
        ("--graph on --compile off", "on"),
        ("--graph off --compile on", "off"),
        ("--device cpu", "off"),
        ("--teacher_views 0", "off"),
        ("--distill kdsvd --path_t t.pth", "off"),
        ("--distill none", "on"),
    ],
)
def test_steps_are_replayed_where_they_can_be(machine, monkeypatch, capsys, argv, expected):
    machine.cuda, machine.compiler = True, "gcc"
    monkeypatch.setattr("helper.teacher.architecture", lambda path: "resnet20")
    assert resolve(parse_student_options(argv.split()), None, images=50_000).graph == expected
    assert (f"graph {expected}" in capsys.readouterr().out) == ("--graph" not in argv)


@pytest.mark.parametrize(
    ("argv", "processes", "message"),
    [
        ("--device cpu", 1, "--graph on needs --device cuda"),
        ("", 2, "--graph on needs a single process, not 2"),
        ("--teacher_views 0", 1, "--teacher_views 0, which encodes every batch"),
        ("--distill kdsvd --path_t t.pth", 1, "--distill kdsvd, which waits for the GPU"),
    ],
)
def test_steps_that_cannot_be_replayed_are_refused_to_be(machine, monkeypatch, argv, processes, message):
    machine.cuda = True
    monkeypatch.setattr("helper.teacher.architecture", lambda path: "resnet20")
    monkeypatch.setattr(runtime.distributed, "count", lambda: processes)
    opt = parse_student_options([*argv.split(), "--graph", "on"])
    with pytest.raises(InputError, match=message):
        resolve(opt, None, images=50_000)
    opt.graph = "auto"
    assert resolve(opt, None, images=50_000).graph == "off"


def test_float32_is_never_tf32(machine):
    """Whatever PyTorch's own default is, for convolutions and for matrices."""
    places = (torch.backends.cudnn, torch.backends.cuda.matmul)
    for place in places:
        place.allow_tf32 = True
    resolve(parse_student_options(["--amp", "off"]), None, images=100)
    assert not any(place.allow_tf32 for place in places)


def test_batch_norm_over_all_processes_is_not_compiled_unless_that_is_asked_for(machine):
    machine.cuda, machine.compiler = True, "gcc"
    for given, expected in (("auto", "off"), ("on", "on")):
        opt = parse_student_options(["--sync_bn", "--compile", given])
        assert resolve(opt, None, images=50_000).compile == expected


def test_a_cosine_under_way_keeps_its_end(machine):
    opt = parse_student_options(["--schedule", "cosine", "--epochs", "9"])
    with pytest.raises(ValueError, match="cosine of 10 epochs cannot go on with --epochs 9"):
        resolve(opt, vars(opt) | {"epochs": 10, "compile": "off", "device": "cpu", "amp": "off"}, images=100)


def test_without_pythons_headers_nothing_is_compiled(machine, monkeypatch, tmp_path, capsys):
    """Neither Triton's launchers nor Inductor's kernels are built without them."""
    machine.cuda, machine.compiler = True, "gcc"
    monkeypatch.setattr(runtime.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert resolve(parse_student_options([]), None, images=10**9).compile == "off"
    assert f"steps are not compiled, which makes them slower: that needs {tmp_path}/Python.h" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--compile on needs .*Python\.h .*python3-dev.*; install it or use off"):
        resolve(parse_student_options(["--compile", "on"]), None, images=10)
    (tmp_path / "Python.h").touch()
    assert resolve(parse_student_options([]), None, images=10**9).compile == "on"


def test_a_gpu_that_pytorch_cannot_use_is_told(machine, monkeypatch, capsys):
    def old_driver():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nPlease update")

    monkeypatch.setattr(torch.cuda, "init", old_driver)
    assert resolve(parse_student_options([]), None, images=100).device == "cpu"
    assert "a GPU is here" not in capsys.readouterr().out
    machine.compiler = "nvidia-smi"
    assert resolve(parse_student_options([]), None, images=100).device == "cpu"
    said = capsys.readouterr().out
    assert "a GPU is here, but PyTorch" in said
    assert "(The NVIDIA driver on your system is too old (found version 12040).): computing on the CPU" in said
    with pytest.raises(InputError, match=r"finds no CUDA GPU here \(The NVIDIA driver .* too old"):
        resolve(parse_student_options(["--device", "cuda"]), None, images=100)


def test_what_failed_before_a_new_start_is_off_even_in_a_resumed_run(machine, monkeypatch):
    machine.cuda, machine.compiler = True, "gcc"
    recorded = {"device": "cuda", "amp": "bf16", "teacher_views": 7, "compile": "on", "graph": "on"}
    for failed in ("graph", "compile", "compile graph"):
        monkeypatch.setenv("EGA_WITHOUT", failed)
        for before in (None, recorded):
            opt = resolve(parse_student_options([]), before, images=10**9)
            assert {name for name in ("compile", "graph") if getattr(opt, name) == "off"} == set(failed.split())
    given = resolve(parse_student_options(["--graph", "on", "--compile", "on"]), None, images=10)
    assert (given.graph, given.compile) == ("on", "on")


def test_only_a_first_compiled_step_that_fails_says_that_compiling_did(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for values, error in (([0], SpeedUpFailed), ([1, 0], ZeroDivisionError)):
        call = runtime.compiled(lambda x: 1 / x)
        with pytest.raises(error):
            [call(value) for value in values]
    with pytest.raises(SpeedUpFailed, match=r"steps cannot be compiled \(ZeroDivisionError: division by zero\)"):
        runtime.compiled(lambda x: 1 / x)(0)


def test_a_queue_is_the_bank_or_has_a_row(capsys):
    assert [parse_student_options(["--queue", text]).queue for text in ("bank", "7")] == ["bank", 7]
    for text in ("0", "-1", "all"):
        assert "neither bank nor a number from 1 on" in refused(capsys, parse_student_options, ["--queue", text])


def test_a_cost_from_names_needs_a_clip(capsys):
    wkd = ["--distill", "wkd", "--wkd_cost", "names", "--clip_mode"]
    assert parse_student_options([*wkd, "open_clip:ViT-B-32/laion2b_s34b_b79k"]).wkd_cost == "names"
    assert "needs a CLIP" in refused(capsys, parse_student_options, [*wkd, "timm:tf_efficientnet_lite2"])


@pytest.mark.parametrize("labels", ["--labels 0 -r 0", ""])
def test_every_method_that_is_named_for_a_teacher_without_a_head_is_accepted(capsys, labels):
    line = refused(capsys, parse_student_options, f"--joint teacher --distill kd {labels}".split())
    named = re.search(r"one of (.*) with -a 0", line)[1].split(", ")
    assert {"ega", "rkd"} <= set(named) and ("nce" in named) == (not labels)
    assert ("--joint projected" in line) == (not labels)
    for method in named:
        parse_student_options(f"--joint teacher -a 0 --distill {method} {labels}".split())
