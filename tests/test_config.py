"""Right configs are read exactly; wrong ones get one line that names the place and the key."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from pathlib import Path
from typing import Any, get_origin

import pytest
import yaml

from palette import config as configs
from palette.config import ConfigError

ROOT = Path(__file__).parent.parent
OPTIONS = configs.options()


def rejected(text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        configs.from_yaml(text, origin="run.yaml", overrides=overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def as_yaml(key: str, value: Any) -> str:
    section, name = key.split(".")
    return yaml.safe_dump({section: {name: value}})


def wrong_values(key: str) -> list[Any]:
    """Values of the wrong type or out of range for one option."""
    option = OPTIONS[key]
    facts, kind = option.field.metadata, str(option.type)
    found: list[Any] = [{"a": 1}, [[1]], "???"]
    if "None" not in kind:
        found.append(None)
    if option.type is not str:
        found += ["wrong", "1,5"]
    if "int" in kind or "float" in kind:
        found += [True, math.nan, math.inf, -math.inf]
        if facts["low"] is not None:
            found.append(int(facts["low"]) - 1)
        if facts["high"] is not None:
            found.append(int(facts["high"]) + 1)
        for edge in ("above", "below"):
            if facts[edge] is not None:
                found.append(facts[edge])
    if "float" not in kind:
        found += [1.5] if option.type is not str else []
    if get_origin(option.type) is list:
        found += [["x"], [-1], {}]
        found += [] if facts["empty"] else [[]]
    if facts["pair"]:
        found += [[4], [4, 4, 4]]
    if facts["longest"] is not None:
        found.append([1] * (facts["longest"] + 1))
    if facts["known"] is not None:
        found += ["inpant", "", 3]
    return found


MUTATIONS = [(key, value) for key in OPTIONS for value in wrong_values(key)]


def test_mutations_of_values_are_all_rejected_by_key() -> None:
    assert len(MUTATIONS) >= 300
    accepted = []
    for key, value in MUTATIONS:
        try:
            configs.from_yaml(as_yaml(key, value), origin="run.yaml")
        except ConfigError as error:
            message = str(error)
            assert len(message.splitlines()) == 1
            assert re.match(r"run\.yaml:\d: ", message), message
            assert key in message, message
        else:
            accepted.append((key, value))
    print(f"{len(MUTATIONS)} mutations, {len(MUTATIONS) - len(accepted)} rejected")
    assert accepted == []


def test_mutations_of_values_are_rejected_as_overrides() -> None:
    for key, value in random.Random(0).sample(MUTATIONS, 60):
        if isinstance(value, dict) or (isinstance(value, str) and "," in value):
            continue
        written = "null" if value is None else str(value).lower().replace("'", "")
        message = rejected("", (f"{key}={written}",))
        assert key in message
        assert message.startswith("--set ")


def test_typos_are_rejected_and_the_right_key_suggested() -> None:
    draw = random.Random(1)
    right = total = 0
    for key in OPTIONS:
        section, name = key.split(".")
        for _ in range(6):
            place = draw.randrange(1, len(name))
            damaged = draw.choice(
                (
                    name[:place] + name[place + 1 :],
                    name[:place] + draw.choice("aeiot") + name[place:],
                    name[: place - 1] + name[place] + name[place - 1] + name[place + 1 :],
                )
            )
            if f"{section}.{damaged}" in OPTIONS or len(name) < 4:
                continue
            message = rejected(f"{section}:\n  {damaged}: 1\n")
            assert f"run.yaml:2: unknown option {section}.{damaged}" in message
            total += 1
            right += f"did you mean {key}?" in message
    print(f"{right} of {total} typos: the right key suggested")
    assert total > 150
    assert right / total > 0.95


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("train:\n  bacth_size: 3", "data.batch_size"),
        ("trian:\n  lr: 3", "train.lr"),
        ("lr: 3", "train.lr"),
        ("batch_size: 3", "data.batch_size"),
        ("data:\n  imagesize: 3", "data.image_size"),
    ],
)
def test_suggestions_across_sections(text: str, suggestion: str) -> None:
    assert f"did you mean {suggestion}?" in rejected(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {lr: 1, lr: 2}", "run.yaml:1: train.lr is given twice"),
        ("train:\n  lr: 1\ntrain:\n  lr: 2", "run.yaml:3: train is given twice"),
        ("train: 3", "run.yaml:1: train is a section"),
        ("- 1", "expected sections"),
        ("hello", "expected sections"),
        ("train: [1", "run.yaml:1: broken YAML"),
        ("run:\n  seed: 1\n\tdir: x", "run.yaml:3: broken YAML"),
        ("a: &x [1]\nb: *x", "YAML aliases are not used"),
        ("<<: {train: {lr: 1}}", "YAML merge keys are not used"),
        ("train: {1: 2}", "unknown option train.1"),
        ("0x10: {a: 1}", "unknown option 16.a"),
        ("train: {? [1] : 2}", "a name was expected"),
        ("train: {lr: !x 3}", "broken YAML"),
        ("train: {lr: !!python/object/apply:os.system [ls]}", "broken YAML"),
        ("train: {steps: {a: {b: {c: 1}}}}", "nested too deeply"),
        ("[" * 5000, "nested too deeply"),
        ("a\0b", "broken YAML"),
        ("a: 1\n---\na: 2", "broken YAML"),
        ("train: {lr: 1e-4}\n" + "#" * 300_000, "larger than"),
        ("schedule: {start: 0.1}", "schedule.start must not exceed schedule.end"),
        ("data: {source: folder}", "data.path is needed"),
        ("data: {batch_size: 9}\ntrain: {accumulate: 2}", "train.accumulate must divide"),
        ("run: {dir: ' '}", "run.dir must name a directory"),
        ("task: {name: mixture, tasks: [inpaint, inpaint]}", "task.tasks must be different"),
        ("task: {name: mixture, weights: [1, 2]}", "one number for each of 3 task.tasks"),
        ("task: {name: mixture, weights: [0, 0, 0]}", "not all 0"),
        ("task: {name: mixture, tasks: [generate]}", "task.tasks must be one of colorize, inp"),
        ("task: {name: upscale}\nmodel: {kind: sr3}", "task.augmentation must be 0 with"),
        (
            "model: {prediction: regression}\nsample: {steps: 1}\ntrain: {min_snr: 5}",
            "train.min_snr must be null with model.prediction=regression",
        ),
        ("model: {kind: sr3, attention: local}", "model.attention must be global with"),
        ("task: {name: colorize}\nsummary: {crops: 4}", "summary.crops must be 0"),
    ],
)
def test_broken_texts(text: str, expected: str) -> None:
    assert expected in rejected(text)


def test_interpolation_is_refused_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "do-not-show")
    for text in (
        "run: {dir: '${oc.env:SECRET}'}",
        "run: {dir: 'a${oc.env:SECRET}b'}",
        "run: {dir: '\\${oc.env:SECRET}'}",
        "model: {channel_mults: [1, '${oc.env:SECRET}']}",
        "${oc.env:SECRET}: {a: 1}",
        "run: {'${oc.env:SECRET}': 1}",
        "run: ${train}",
        "train: {lr: '${train.lr}'}",
    ):
        message = rejected(text)
        assert "do-not-show" not in message
        assert "is never resolved here" in message
    assert "is never resolved here" in rejected("", ("run.dir=${oc.env:SECRET}",))


def test_broken_overrides() -> None:
    assert "expected section.option=value" in rejected("", ("train.lr",))
    assert "unknown option train.betas[0]" in rejected("", ("train.betas[0]=3",))
    assert "train is a section" in rejected("", ("train=3",))
    assert "quote it" in rejected("", ("data.path=[",))
    assert "not UTF-8 text" in rejected("", ("data.path=a\udc80",))
    assert "expected section.option=value" in rejected("", ("train.lr=1\ntrain.steps=2",))


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        configs.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        configs.load(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(byte 0\)"):
        configs.load(tmp_path / "bytes.yaml")


def test_numbers_lists_and_overrides_are_read(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {dir: runs/a b}\ntrain:\n  lr: 1e-4\n  betas:\n    - 0.8\n    - 0.99\nsample:\n"
        "data: {image_size: [32, 48], flip: no}\nmodel: {num_classes: null}\n"
    )
    config = configs.load(
        path, ["train.steps=5", "data.batch_size=4", "data.path=/x y", "data.source=list"]
    )
    assert config.train.lr == 0.0001
    assert config.train.betas == [0.8, 0.99]
    assert config.data.image_size == [32, 48]
    assert config.data.flip is False
    assert (config.train.steps, config.data.batch_size, config.data.path) == (5, 4, "/x y")
    assert config.run.dir == "runs/a b"


TEXTS = ("2024_01_15", "007", "1:30", "1e3", "yes", "off", "0x1F", "2024-01-15", ".5", "1_000.0")
TYPED = ("runs/a #1", "#1", "C:/a: b", "*.tar", "!x", "&x", "a = b", "- 1", "?", "50%", "it's")


@pytest.mark.parametrize("key", ["run.dir", "run.wandb", "data.path", "train.init_from"])
def test_text_is_what_was_written(key: str) -> None:
    section, name = key.split(".")

    def read(text: str, *overrides: str) -> Any:
        return getattr(getattr(configs.from_yaml(text, overrides=overrides), section), name)

    for text in TEXTS:
        assert read(f"{section}:\n  {name}: {text}") == text
        assert read(f"{section}: {{{name}: {text}}}  # a comment") == text
        assert read(f"{section}: {{{name}: '{text}'}}") == text
        assert read(f"{key}: {text}") == text
    for text in (*TEXTS, *TYPED):
        assert read("", f"{key}={text}") == text
        assert read("", f" {key} = {text} ") == text
        assert read("", f'{key}=" {text}"') == f" {text}"
    for null in ("null", "~", ""):
        assert f"{key} must be text; got None" in rejected("", (f"{key}={null}",))
        assert f"{key} must be text; got None" in rejected(f"{section}: {{{name}: {null}}}")
    assert read("", f"{key}='null'") == "null"


def test_only_text_is_taken_as_written() -> None:
    assert configs.from_yaml("", overrides=("run.tensorboard=no",)).run.tensorboard is False
    assert configs.from_yaml("", overrides=("train.steps=1_000",)).train.steps == 1000
    assert configs.from_yaml("", overrides=("task.tasks=[inpaint]",)).task.tasks == ["inpaint"]
    assert "task.mask must be one of" in rejected("", ("task.mask=007",))


def test_every_value_survives_the_round_trip() -> None:
    config = configs.Config()
    config.train.lr = 0.1 + 0.2
    config.data.image_size = [5, 7]
    config.model.attention_resolutions = []
    config.model.num_classes = 10
    config.run.dir = "no: # 'x' \u00e9"
    assert configs.from_yaml(configs.to_yaml(config)) == config
    assert configs.from_yaml("") == configs.Config()


def test_defaults_pass_their_own_checks() -> None:
    for option in OPTIONS.values():
        assert option.accepts(option.default), option.key
        assert option.field.metadata["doc"]


def test_configs_of_the_repository_load() -> None:
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        configs.load(path)


def test_help_names_every_option() -> None:
    text = configs.help_text()
    for key in OPTIONS:
        assert f"  {key} = " in text
    assert max(map(len, text.splitlines())) <= 100


def test_what_a_resumed_run_may_not_change() -> None:
    before, after = configs.Config(), configs.Config()
    after.train.lr, after.train.steps, after.data.batch_size = 1e-5, 7, 3
    assert configs.fixed_differences(before, after) == []
    after.model.channels = 65
    after.data.image_size = [64, 64]
    assert configs.fixed_differences(before, after) == [
        "model.channels: 64 -> 65",
        "data.image_size: 64 -> [64, 64]",
    ]


def test_names_registered_by_a_program_are_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from palette.data import tasks

    assert "task.name must be one of" in rejected("task: {name: my_own}")
    monkeypatch.setitem(tasks.TASKS, "my_own", lambda image, seed, draws: {})
    assert configs.from_yaml("task: {name: my_own}").task.name == "my_own"


def test_the_schema_is_two_levels_of_dataclasses() -> None:
    for section in dataclasses.fields(configs.Config):
        assert dataclasses.is_dataclass(getattr(configs.Config(), section.name))
