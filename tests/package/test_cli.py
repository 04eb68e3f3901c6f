"""The command line: options, YAML, presets, errors; no command runs here."""

import dataclasses
import json
import subprocess
import sys
from typing import get_type_hints

import docstring_parser
import pytest
import yaml

from ercn import cli, config
from ercn.benchmarks.config import BenchConfig, CompareConfig


@pytest.fixture
def called(monkeypatch):
    """Records the configuration instead of running the command."""
    seen = []

    def function(module, name):
        return lambda *args, **kwargs: seen.append((name, args, kwargs))

    monkeypatch.setattr(cli, "_function", function)
    return seen


def run(capsys, *argv):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    output = capsys.readouterr()
    return exit.value.code, output.out, output.err


# The tools of the bench have no defaults: they need files.
@pytest.mark.parametrize("command", [command for command in cli.COMMANDS if cli.POSITIONAL.get(command) != "files"])
def test_defaults_are_those_of_the_dataclass(command, called, capsys):
    assert run(capsys, *command.split())[0] == 0
    assert called == [(cli.FUNCTIONS.get(command, command), (cli.COMMANDS[command][1](),), {})]


def joined(text):
    """Without spaces and line breaks, since the help is wrapped at hyphens too."""
    return "".join(text.split())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_explains_every_field(command, capsys):
    code, out, _ = run(capsys, *command.split(), "--help")
    assert code == 0 and joined(cli.SUMMARIES[command][1:]) in joined(out)
    given = {word.rstrip(",") for word in out.split()}

    def check(cls, prefix=""):
        doc, hints = docstring_parser.parse(cls.__doc__), get_type_hints(cls)
        assert f"\n{prefix.rstrip('.') or cls.__name__}:\n" in out
        texts = {param.arg_name: param.description for param in doc.params}
        for name, hint in hints.items():
            if dataclasses.is_dataclass(hint):
                check(hint, f"{prefix}{name}.")
            else:
                assert f"--{prefix}{name}" in given
                assert joined(f"{texts[name]} (type: ") in joined(out), f"{cls.__name__} does not explain {name}"

    check(cli.COMMANDS[command][1])


def test_options_reach_the_nested_fields(called, capsys):
    argv = ["--model.backbone", "resnet18", "--model.mask_thresholds", "[0.1,0.2]", "--run.lr=1e-5", "--init", "runs/p"]
    assert run(capsys, "train", *argv)[0] == 0
    (given,) = called[0][1]
    assert given.model.backbone == "resnet18" and given.model.mask_thresholds == (0.1, 0.2)
    assert given.run.lr == 1e-5 and given.init == "runs/p"


@pytest.mark.parametrize(
    "argv, config",
    [
        (["bench", "--quick", "mil", "--no-memory"], BenchConfig(op="mil", quick=True, memory=False)),
        (["bench", "compare", "--metric", "time", "a.json", "b c.json"], CompareConfig(("a.json", "b c.json"), "time")),
        (["report", "--out", "x.html", "a", "b"], config.ReportConfig(("a", "b"), "x.html")),
    ],
)
def test_words_and_flags_fill_their_fields(argv, config, called, capsys, tmp_path):
    text = run(capsys, *argv, "--print_config")[1]
    (tmp_path / "c.yaml").write_text(text)
    command = [word for word in argv[:2] if word in ("bench", "compare", "report")]
    assert run(capsys, *argv)[0] == run(capsys, *command, "--config", str(tmp_path / "c.yaml"))[0] == 0
    assert [args for _, args, _ in called] == [(config,), (config,)]


def test_printed_config_is_read_back_and_options_win_over_it(called, capsys, tmp_path):
    text = run(capsys, "train", "--preset", "seam", "--print_config")[1]
    assert yaml.safe_load(text) == json.loads(json.dumps(dataclasses.asdict(config.preset("seam"))))
    (tmp_path / "c.yaml").write_text(text)
    assert run(capsys, "train", "--config", str(tmp_path / "c.yaml"), "--run.epochs", "3")[0] == 0
    expected = config.preset("seam")
    assert called[0][1][0] == dataclasses.replace(expected, run=dataclasses.replace(expected.run, epochs=3))


def test_config_file_wins_over_preset(called, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("loss: {er: 0.25}\n")
    assert run(capsys, "train", "--config", str(tmp_path / "c.yaml"), "--preset=chikontwe")[0] == 0
    expected = config.preset("chikontwe")
    assert called[0][1][0] == dataclasses.replace(expected, loss=dataclasses.replace(expected.loss, er=0.25))


def test_a_group_of_options_may_be_a_file(called, capsys, tmp_path):
    (tmp_path / "data.yaml").write_text("root: pictures\n")
    assert run(capsys, "train", "--data", str(tmp_path / "data.yaml"), "--data.workers", "0")[0] == 0
    assert called[0][1][0] == config.TrainConfig(data=config.DataConfig(root="pictures", workers=0))


@pytest.mark.parametrize(
    "argv, words",
    [
        (["fly"], ["'fly'", "prepare", "doctor"]),
        (["train", "--run.epochs", "many"], ["--run.epochs", "int", "many"]),
        (["train", "--model.mask", "maybe"], ["--model.mask", "soft", "maybe"]),
        (["train", "--model.maks", "soft"], ["--model.maks"]),
        (["train", "--run.epoch", "3"], ["--run.epoch 3"]),
        (["train", "--model.backbone_kwargs", '{"a": 1'], ["--model.backbone_kwargs: ", '{"a": 1;']),
        (["train", "--preset", "best"], ["best", "seam"]),
        (["train", "--preset"], ["seam", "chikontwe"]),
        (["train", "--config", "/nowhere.yaml"], ["/nowhere.yaml"]),
        (["evaluate", "--split", "dev"], ["--split", "dev", "val"]),
        (["predict", "--overlays", "cam"], ["--overlays", "cam"]),
        (["train", "--data", "pictures"], ["--data takes a YAML file", "'pictures'", "--data.root, --data.image_size"]),
        (["bench", "mil", "--op", "walk"], ["'mil' and --op give the same field"]),
        (["report", "run", "--runs", '["other"]'], ["'run' and --runs give the same field"]),
        (["export", "--format", "tflite"], ["--format", "onnx", "pt2", "aoti", "tflite"]),
    ],
)
def test_wrong_arguments_are_one_line_and_code_2(argv, words, called, capsys):
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not called


def test_an_unknown_key_in_yaml_is_named(called, capsys, tmp_path):
    (tmp_path / "c.yaml").write_text("model: {bakcbone: x}\n")
    code, _, err = run(capsys, "train", "--config", str(tmp_path / "c.yaml"))
    assert code == 2 and "'model' does not accept option 'bakcbone'" in err


@pytest.mark.parametrize("error", [ValueError("size must be\n even"), FileNotFoundError("x.csv is missing")])
def test_user_errors_end_without_traceback(error, monkeypatch, capsys):
    def fail(config):
        raise error

    monkeypatch.setattr(cli, "_function", lambda module, name: fail)
    monkeypatch.delenv("ERCN_DEBUG", raising=False)
    code, _, err = run(capsys, "prepare")
    assert code == 2 and err == f"error: {' '.join(str(error).split())}\n"
    with pytest.raises(type(error)):
        cli.main(["prepare", "--debug"])
    monkeypatch.setenv("ERCN_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["prepare"])


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_function", lambda module, name: lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["prepare"])


def test_interrupt_says_how_to_resume(monkeypatch, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_function", lambda module, name: interrupt)
    code, _, err = run(capsys, "train", "--run.out", "runs/my run")
    assert code == 130 and "ercn train --run.out 'runs/my run' --run.resume true" in err


@pytest.mark.parametrize(
    "command, package, extra",
    [("train", "lightning", "train"), ("export", "timm", "train"), ("export", "onnxscript", "export")],
)
def test_a_missing_extra_names_what_to_install(command, package, extra, monkeypatch, capsys):
    def missing(config):
        raise ModuleNotFoundError(f"No module named '{package}'", name=package)

    monkeypatch.setattr(cli, "_function", lambda module, name: missing)
    code, _, err = run(capsys, command)
    assert code == 2 and package in err and f"pip install 'ercn[{extra}]'" in err


def test_a_missing_extra_for_the_parser_itself(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    code, _, err = run(capsys, "train")
    assert code == 2 and "jsonargparse" in err and "pip install 'ercn[train]'" in err


def test_doctor_passes_its_option_and_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_function", lambda module, name: lambda selftest: 1 if selftest else 0)
    assert run(capsys, "doctor")[0] == 0
    assert run(capsys, "doctor", "--selftest")[0] == 1


def test_overview_and_module_entry():
    out = subprocess.run([sys.executable, "-m", "ercn", "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in out for name in cli.SUMMARIES) and "medical device" in out
