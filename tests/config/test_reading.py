"""Configurations: presets, files, overrides, and faults named all at once."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from coadvise.config.reading import differences, load_config, parse_config, preset_names, preset_text, read_config
from coadvise.config.schema import AugmentConfig, RunConfig
from coadvise.errors import UserError


def valid(**changes: Any) -> dict[str, Any]:
    return {"teachers": {"conv": {"model": "resnet18"}}, "student": {"model": "cit_micro_patch4_32"}, **changes}


def fault(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(values)
    return str(caught.value)


@pytest.mark.parametrize("name", preset_names())
def test_presets_parse_and_survive_being_written(name: str) -> None:
    config = load_config(name)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
    assert differences(config, config) == []
    assert preset_text(name).startswith("#")  # says what it is for
    for teacher in config.teachers.values():
        assert teacher.recipe.batch_size % teacher.recipe.accumulate == 0
    assert config.student.recipe.batch_size % config.student.recipe.accumulate == 0


def all_keys(model: type[BaseModel], path: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(path + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += all_keys(field.annotation, f"{path}{name}.")
    return keys


@given(st.sampled_from([key for key in all_keys(RunConfig) if "." in key]), st.data())
def test_a_typo_is_answered_with_the_nearest_name(key: str, data: st.DataObject) -> None:
    *parents, name = key.split(".")
    place = data.draw(st.integers(1, len(name) - 1))
    typo = name[:place] + "z" + name[place:]
    values = valid()
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
    node[typo] = 1
    message = fault(values)
    assert f"unknown key '{'.'.join([*parents, typo])}', did you mean '{name}'?; allowed here: " in message
    assert name in message.split("allowed here: ")[1]


def test_all_faults_at_once() -> None:
    message = fault({
        "sead": 1,
        "data": {"workers": -1},
        "augment": {"kind": "heavy"},
        "teachers": {"class": {"model": "a"}, "conv": {"augment": {"flop": True}}},
        "student": {"model": "s", "recipe": {"learning_rate": "fast"}},
    })  # fmt: skip
    for phrase in (
        "'sead', did you mean 'seed'?",
        "'data.workers' is -1",
        "'augment.kind' is 'heavy'",
        "'teachers.class' is 'class'",
        "'teachers.conv.model' is missing",
        "'teachers.conv.augment.flop', did you mean 'flip'?",
        "'student.recipe.learning_rate' is 'fast'",
    ):
        assert phrase in message
    assert "'teachers' is missing; 'student' is missing" in fault({})
    assert "'teachers' is {}" in fault(valid(teachers={}))
    assert "'data' is 3" in fault(valid(data=3))


@pytest.mark.parametrize(
    "override",
    [
        *(f"student.recipe.clip={value}" for value in (".inf", "nan", "-1")),
        "teachers.conv.temperature=0",
        "teachers.conv.weight=-1",
        "student.recipe.learning_rate=0",
        "student.recipe.ema=1",
        "data.val_fraction=1",
        "data.presize=8",
        "data.image_size=[32]",
        "data.image_size=[16, 7]",
        "data.image_size=[16, 2000]",
        "data.image_size=[16.5, 16]",
        "data.image_size=.inf",
        "data.image_size=wide",
        "data.fit=foo",
        "augment.smoothing=1",
        "augment.crop_scale=[0.9, 0.1]",
        "augment.crop_scale=[-1, 0.5]",
    ],
)
def test_what_would_train_nothing_or_the_wrong_way_is_refused(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(UserError, match="'data': presize must" if "presize" in key else f"'{key}' is "):
        load_config("digits", ["data.image_size=16", override])
    assert load_config("digits", ["data.image_size=16", "data.presize=16"]).data.presize == 16
    with pytest.raises(UserError, match="views=device needs presized images; give presize too"):
        load_config("digits", ["data.views=device"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("teachers.total.model=resnet_small", "'total' is the sum of all losses"),
        ("student.recipe.betas=[1.5, 0.9]", "betas.0' is 1.5"),
        ("student.recipe.head_epochs=40", "student.recipe.head_epochs=40 leaves none of the 40 epochs"),
        ("teachers.conv.adapt=none", "adapt=none needs a start"),
        ("data.class_weights={a: 2}", "give data.balance=loss too"),
        ("engine.trackers=[wandb, wandb]", "names one twice"),
    ],
)
def test_what_would_have_no_effect_or_fail_later_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        load_config("digits", ["student.recipe.epochs=40", override])


def test_an_image_size_is_a_square_or_a_pair() -> None:
    square, pair = (load_config("digits", [f"data.image_size={size}"]) for size in ("[16, 16]", "[16, 24]"))
    assert square == load_config("digits")
    assert square.to_yaml() == load_config("digits").to_yaml()
    assert "fit" not in square.to_yaml()
    assert pair.data.image_size == (16, 24)
    assert parse_config(yaml.safe_load(pair.to_yaml())) == pair
    assert differences(square, pair) == ["data.image_size: 16 -> [16, 24]"]
    with pytest.raises(UserError, match="at least the longer side of the image_size of 16 x 24 pixels"):
        load_config("digits", ["data.image_size=[16, 24]", "data.presize=20"])


def test_chosen_classes_are_two_or_more_and_their_order_decides_nothing() -> None:
    assert load_config("digits", ["data.classes=['7', '1']"]).data.classes == ("1", "7")
    for classes in (["a"], ["a", "b", "a"], [1, 2]):
        assert "'data.classes" in fault(valid(data={"classes": classes}))


def test_a_start_and_a_recipe_s_later_keys_are_written_only_where_they_are_given() -> None:
    plain = parse_config(valid())
    assert not {"start", "layer_decay", "head_epochs"} & set(re.findall(r"\w+", plain.to_yaml()))
    given = load_config(
        "digits", ["student.start=true", "student.recipe.layer_decay=0.7", "student.recipe.head_epochs=2"]
    )
    assert given.student.start is True
    assert parse_config(yaml.safe_load(given.to_yaml())) == given
    assert load_config("digits", ["student.start=deit_tiny_patch16_224"]).student.start == "deit_tiny_patch16_224"
    assert load_config("digits", ["student.start=false"]).student.start is None
    for wrong in ("start=3", "recipe.layer_decay=0", "recipe.layer_decay=1.1", "recipe.head_epochs=-1"):
        with pytest.raises(UserError, match=f"'student.{wrong.partition('=')[0]}' is "):
            load_config("digits", [f"student.{wrong}"])


def test_what_does_not_choose_classes_is_written_as_before_one_could() -> None:
    """Older runs and studies continue: they are found by their config.yaml and by a hash of what is written."""
    every, two = parse_config(valid()), parse_config(valid(data={"classes": ["a", "b"]}))
    assert "classes" not in every.to_yaml() + every.model_dump_json()
    assert parse_config(yaml.safe_load(every.to_yaml())) == every
    assert parse_config(yaml.safe_load(two.to_yaml())) == two
    assert differences(every, two) == ["data.classes: None -> ['a', 'b']"]


# overrides ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("student.recipe.learning_rate=3e-4", "student.recipe.learning_rate", 3e-4),
        ("augment.flip=true", "augment.flip", True),
        ("augment.crop_scale=[0.5, 1]", "augment.crop_scale", [0.5, 1.0]),
        ("augment.rand_augment=rand-m5=x", "augment.rand_augment", "rand-m5=x"),
        ("student.model_kwargs.new.deep={a: [1]}", "student.model_kwargs.new.deep.a", [1]),
        ("teachers.conv.augment.erase=0.25", "teachers.conv.augment.erase", 0.25),
        ("data.label_column='1'", "data.label_column", "1"),
        ("teachers.conv.start=/some where/else", "teachers.conv.start", "/some where/else"),
    ],
)
def test_an_override_changes_one_thing(override: str, key: str, value: object) -> None:
    before, after = load_config("digits"), load_config("digits", [override])
    changed = differences(before, after)
    assert any(line.startswith(f"{key}: ") and line.endswith(f" -> {value}") for line in changed)
    if key != "teachers.conv.augment.erase":  # that makes a whole section
        assert len(changed) == 1


def test_later_overrides_win_and_seed_and_source_come_last() -> None:
    config = load_config("digits", ["seed=1", "seed=2", "data.source=a"], source="b")
    assert (config.seed, config.data.source) == (2, "b")
    assert load_config("digits", ["seed=1"], seed=0).seed == 0


def test_a_file_that_is_no_preset_says_where(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    for text, said in (
        ("seed: 3\na: [1,\n", "is not YAML: .*, at line 3, character 1"),
        ("", "is empty; it must hold keys and values"),
        ("words", "holds something else; it must hold"),
        ("seed: 3\nstudent: {model: a, recipe: 3}\nteachers: {c: {model: b}}", "'student.recipe' is 3: give keys and"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            load_config(str(path))
    path.write_text("seed: 3", encoding="utf-16")
    with pytest.raises(UserError, match="is not UTF-8; save it so"):
        preset_text(str(path))


@pytest.mark.parametrize("first", [0, 1])
def test_a_new_model_drops_the_preset_s_arguments(first: int) -> None:
    assert load_config("digits").teachers["conv"].model_kwargs
    overrides = ["teachers.conv.model=resnet18", "teachers.conv.model_kwargs.drop_rate=0.1"]
    config = load_config("digits", [overrides[first], overrides[1 - first]])
    assert config.teachers["conv"].model_kwargs == {"drop_rate": 0.1}
    assert config.student == load_config("digits").student


def test_an_alias_is_overridden_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "teachers: {conv: {model: a, recipe: &r {epochs: 3}}, inv: {model: b, recipe: *r}}\nstudent: {model: s}\n"
    )
    config = load_config(str(path), ["teachers.conv.recipe.epochs=9"])
    assert (config.teachers["conv"].recipe.epochs, config.teachers["inv"].recipe.epochs) == (9, 3)
    path.write_text("data:\nteachers: {conv: {model: a, augment: null}}\nstudent: {model: s}\n")
    config = load_config(str(path), ["teachers.conv.augment.kind=none"], source="here")  # keys without a value
    assert config.data.source == "here"
    assert config.teachers["conv"].augment == AugmentConfig(kind="none")


def test_a_faulty_override_or_preset_is_named(tmp_path: Path) -> None:
    for override in ("epochs", "=3", "seed.deep=1", "seed={", "seeed=1"):
        with pytest.raises(UserError) as caught:
            load_config("digits", ["seed=3", override])
        assert f"'{override.partition('=')[0]}" in str(caught.value)
    for name, text in (("list.yaml", "- 1"), ("bad.yaml", "a: [")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=name):
            load_config(str(tmp_path / name))
    with pytest.raises(UserError, match=r"'digts'.*digits"):
        load_config("digts")


# what follows from it -----------------------------------------------------------------------------------------------


def test_pixels_are_kept_in_memory_unless_files_are_read_for_views() -> None:
    for run, teacher, expected in (("light", None, True), ("deit", None, False), ("light", "deit", False)):
        augment = {"kind": teacher} if teacher else None
        config = parse_config(valid(augment={"kind": run}, teachers={"conv": {"model": "r", "augment": augment}}))
        assert config.in_memory is expected


def test_a_misspelt_token_is_no_new_token() -> None:
    for token, meant in (("conf", "conv"), ("clas", "class"), ("[inv, con]", "conv")):
        with pytest.raises(UserError, match=rf"teachers.conv.token, did you mean '{meant}'"):
            load_config("digits", [f"teachers.conv.token={token}"])
    assert load_config("digits", ["teachers.conv.token=shape"]).tokens == ("shape", "inv")
    assert load_config("digits", [f"teachers.{name}.token=conv2" for name in ("conv", "inv")]).tokens == ("conv2",)


def test_loss_weights_and_tokens_are_those_of_the_teachers() -> None:
    teachers = {
        "a": {"model": "r", "weight": 2, "temperature": 3},
        "b": {"model": "r", "token": "a"},
        "c": {"model": "r", "token": "class", "hard": True},
    }
    config = parse_config(valid(teachers=teachers, student={"model": "s", "weight": 0.5}))
    assert config.tokens == ("a",)
    assert config.loss_weights.label == 0.5
    found = {name: (a.weight, a.temperature, a.hard) for name, a in config.loss_weights.advice.items()}
    assert found == {"a": (2, 3, False), "b": (1, 1, False), "c": (1, 1, True)}


def test_a_teacher_may_advise_several_tokens() -> None:
    teachers = {"a": {"model": "r", "token": ["a", "class"]}, "b": {"model": "r", "token": ["class", "c"]}}
    config = parse_config(valid(teachers=teachers))
    assert config.tokens == ("a", "c")
    assert config.loss_weights.by_token == {"a": ["a"], "class": ["a", "b"], "c": ["b"]}
    assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_labels_may_train_several_tokens() -> None:
    config = load_config("digits", ["student.label_tokens=[class, conv, extra]", "teachers.inv.weight=0"])
    assert config.tokens == ("conv", "inv", "extra")
    assert config.loss_weights.trained_tokens == ("class", "conv", "extra")
    assert config.loss_weights.without_advice.trained_tokens == ("class", "conv", "extra")
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
    for tokens, says in (
        ("[conv]", "class must be among"),
        ("[class, clas]", "did you mean 'class'"),
        ("[class, 3]", "give"),
    ):
        with pytest.raises(UserError, match=says):
            load_config("digits", [f"student.label_tokens={tokens}"])


@pytest.mark.parametrize("token", ["average", [], ["class", "class"], ["a", "average"], ["a", "B"], 3, ["a", 3]])
def test_a_wrong_list_of_tokens_is_named(token: object) -> None:
    assert "'teachers.b.token" in fault(valid(teachers={"b": {"model": "r", "token": token}}))


def test_teachers_that_cannot_be_averaged_are_refused() -> None:
    teachers = {"a": {"model": "r", "token": "class", "temperature": 2}, "b": {"model": "r", "token": "class"}}
    student = {"model": "s", "combine": "mean"}
    with pytest.raises(UserError, match=r"a, b .*'class'"):
        parse_config(valid(teachers=teachers, student=student))


def test_a_class_token_that_nothing_trains_is_refused() -> None:
    for more in ([], ["teachers.conv.token=class", "teachers.conv.weight=0"]):
        with pytest.raises(UserError, match=r"^student.weight=0 "):
            load_config("digits", ["student.weight=0", *more])
    advised = load_config("digits", ["student.weight=0", "teachers.conv.token=[conv, class]"])
    assert advised.loss_weights.trained_tokens == ("class", "conv", "inv")


@pytest.mark.parametrize("part", ["student", "teachers.inv"])
def test_a_network_has_no_image_size_of_its_own(part: str) -> None:
    with pytest.raises(UserError, match=rf"^{part}.model_kwargs.img_size=64.*data.image_size"):
        load_config("digits", [f"{part}.model_kwargs.img_size=64"])


def test_files_from_before_start_are_read(tmp_path: Path) -> None:
    text = preset_text("small-images")
    old = text.replace("  conv:\n", "  conv:\n    checkpoint: runs/first/teachers/conv\n    pretrained: false\n", 1)
    assert old != text
    (tmp_path / "old.yaml").write_text(old)
    for config in (load_config(str(tmp_path / "old.yaml")), read_config(tmp_path / "old.yaml")):
        teacher = config.teachers["conv"]
        assert (teacher.start, teacher.adaptation) == ("runs/first/teachers/conv", "none")
