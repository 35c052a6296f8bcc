"""The configuration: every key documented, every wrong one named with what would do, layers that add up."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pipeline.config.batch_size import check_world_size, padding_share
from pipeline.config.parsing import changes, read_config, read_resolved, to_yaml, validate
from pipeline.config.schema import Config, Section, Train, documented_keys, item_type, section_type
from pipeline.errors import UsageError

BLOCKS = "kind: mbconv, blocks: 1, width: 8"
SMALL = """
data: {train: somewhere}
model: {name: coatnet_0}
train: {steps: 10, global_batch: 16, micro_batch: 4}
"""


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("configs") / "small.yaml"
    path.write_text(SMALL)
    return str(path)


LAUGHS = "a: &a [1, 2, 3, 4]\n" + "\n".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghijk")
)
"""A few lines that stand for 14 billion values."""


def preset(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def refused(path: str, *overrides: str) -> list[str]:
    """The lines of the refusal."""
    with pytest.raises(UsageError) as error:
        read_config(path, list(overrides))
    return str(error.value).splitlines()


def sections(section: type[Section] = Config) -> set[type[Section]]:
    inner = [section_type(field.annotation) or item_type(field.annotation) for field in section.model_fields.values()]
    return {section}.union(*(sections(each) for each in inner if each is not None))


# --------------------------------------------------------------------------------------------------------- its own keys


def test_every_key_is_documented_with_what_changing_it_does():
    for section in sections() - {Config}:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            assert isinstance(field.json_schema_extra, dict)
            assert field.json_schema_extra["change"] in ("immutable", "tracked", "mutable")
    assert len(documented_keys()) > 40


def test_every_default_is_a_value_that_is_allowed():
    for section in sections() - {Config}:
        for name, field in section.model_fields.items():
            if not field.is_required():
                kept = TypeAdapter(section.__pydantic_fields__[name].rebuild_annotation()).validate_python(
                    field.default
                )
                assert kept == field.default, name


def test_what_defines_a_run_may_not_change_and_how_and_where_it_runs_may():
    """As DESIGN.md section 2 lists them."""
    of_change: dict[str, set[str]] = {}
    for name, facts in documented_keys().items():
        of_change.setdefault(facts["change"], set()).add(name)
    mutable = ("run.dir", "run.hang_timeout", "data.val", "data.max_bad_fraction", "data.cache.", "augment.allow_new")
    mutable += (
        "train.precision",
        "train.activation_checkpointing",
        "train.compile",
        "train.deterministic",
        "model.attention",
    )
    mutable += ("zero.", "evaluate.", "checkpoint.", "log.", "slurm.")
    assert of_change["mutable"] == {name for name in documented_keys() if name.startswith(mutable)}
    assert of_change["tracked"] == {
        "train.epochs", "train.steps", "optim.learning_rate", "optim.final_learning_rate", "optim.warmup_steps",
        "optim.decay", "data.train",
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rte=1", "optim.learning_rte: unknown; did you mean optim.learning_rate?"),
        ("trian.epochs=1", "trian: unknown; did you mean train?"),
        ("learning_rate=1", "learning_rate: unknown; did you mean optim.learning_rate?"),
        ("train.warmup_steps=1", "train.warmup_steps: unknown; did you mean optim.warmup_steps?"),
        ("augment.randaugment.layer=1", "augment.randaugment.layer: unknown; did you mean augment.randaugment.layers?"),
        ("model.stage=1", "model.stage: unknown; did you mean model.stages?"),
        ("zero.nothing=1", "zero.nothing: unknown; zero has stage, offload"),
        ("nothing=1", "nothing: unknown; the configuration has run, data, model, augment, train, optim, zero,"),
        (f"model.stages=[{{{BLOCKS}, wdth: 8}}]", "model.stages.0.wdth: unknown; did you mean model.stages.0.width?"),
        ("base=small.yaml", "base: unknown"),
        ("train..steps=1", "train.: unknown"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_with_its_full_name_and_the_nearest_known_one(small, override, message):
    (line,) = refused(small, *(["model.name=null", "model.stem.width=8"] if "stages" in override else []), override)
    assert message in line


def test_an_unknown_key_in_a_file_is_refused_with_the_files_name(tmp_path):
    base = preset(tmp_path, "base.yaml", SMALL + "optim: {learning_rte: 1}")
    assert refused(preset(tmp_path, "top.yaml", "base: base.yaml")) == [
        f"{base}: optim.learning_rte: unknown; did you mean optim.learning_rate?"
    ]


@given(st.sampled_from(list(documented_keys())), st.integers(0, 30), st.sampled_from("xq_7"))
def test_a_misspelt_key_is_never_taken_and_is_recognised(small, key, place, letter):
    section, _, leaf = key.rpartition(".")
    place %= len(leaf)
    misspelt = f"{section}.{leaf[:place]}{letter}{leaf[place + 1 :]}"
    if misspelt not in documented_keys():
        (line,) = refused(small, f"{misspelt}=1")
        assert f"{misspelt}: unknown" in line
        assert len(leaf) < 4 or "did you mean" in line


# --------------------------------------------------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.micro_batch=x", 'train.micro_batch is "x"; it must be a whole number at least 1'),
        ("train.micro_batch=2.5", "train.micro_batch is 2.5; it must be a whole number at least 1"),
        ("train.micro_batch=null", "train.micro_batch is null; it must be a whole number at least 1"),
        ("run.seed=-1", "run.seed is -1; it must be a whole number at least 0 and below 281474976710656"),
        ("train.ema=1", "train.ema is 1; it must be a number above 0 and below 1, or null"),
        ("optim.learning_rate=.nan", "optim.learning_rate is NaN; it must be a number above 0"),
        ("optim.learning_rate=[1]", "optim.learning_rate is [1]; it must be a number above 0"),
        ("train.precision=fp16", 'train.precision is "fp16"; it must be fp32 or bf16'),
        ("zero.stage=4", "zero.stage is 4; it must be 1 or 2 or 3"),
        ("model.stride=dw", 'model.stride is "dw"; it must be expand or depthwise, or null'),
        ("model.pool=null", "model.pool is null; it must be max or average"),
        (
            "train.activation_checkpointing=some",
            'train.activation_checkpointing is "some"; it must be none or all, or a list of whole numbers',
        ),
        ("augment.flip=perhaps", 'augment.flip is "perhaps"; it must be true or false'),
        ("log.samples=3", "log.samples is 3; it must be true or false, or pixels"),
        ("log.samples=pixel", 'log.samples is "pixel"; it must be true or false, or pixels'),
        ("augment.crop_area=0.5", "augment.crop_area is 0.5; it must be a list of 2 numbers"),
        ("augment.crop_area=[0.5]", "augment.crop_area is [0.5]; it must be a list of 2 numbers"),
        ("augment.crop_area=[a, b, 1]", 'augment.crop_area is ["a", "b", 1]; it must be a list of 2 numbers'),
        ("augment.crop_area=[0.9, 0.1]", "augment.crop_area is [0.9, 0.1]; it must be 0 < smallest <= largest <= 1"),
        ("augment.crop_area=[0, 1]", "augment.crop_area is [0.0, 1.0]; it must be 0 < smallest <= largest <= 1"),
        ("augment.crop_area=[0.5, 1.1]", "augment.crop_area is [0.5, 1.1]; it must be 0 < smallest <= largest <= 1"),
        ("optim.betas=[0.9, 1.0]", "optim.betas is [0.9, 1.0]; both must be at least 0 and below 1"),
        ("checkpoint.every=true", "checkpoint.every is true; it must be a whole number at least 1"),
        ("zero.stage=True", "zero.stage is true; it must be 1 or 2 or 3"),
        ("optim.eps=true", "optim.eps is true; it must be a number above 0"),
        ("evaluate.every=false", "evaluate.every is false; it must be a whole number at least 1, or null"),
        ("augment.crop_area=[0.5, true]", "augment.crop_area is [0.5, true]; it must be a list of 2 numbers"),
        ("train.activation_checkpointing=[true]", "train.activation_checkpointing is [true]; it must be none or all"),
        ("slurm.time=1.5", 'slurm.time is "1.5"; it must be minutes, minutes:seconds,'),
        ("slurm.setup=module load", 'slurm.setup is "module load"; it must be a list of strings'),
        ("run.dir=", "run.dir is null; it must be text, not empty"),
        ("run.dir=''", 'run.dir is ""; it must be text, not empty'),
        ("run.seed.more=3", 'run.seed is {"more": 3}; it must be a whole number'),
        ("run.dir.more=3", 'run.dir is {"more": 3}; it must be text, not empty'),
        ("augment.crop_area.0=0.5", 'augment.crop_area is {"0": 0.5}; it must be a list of 2 numbers'),
        ("train=5", "train is 5; it is a section with epochs, steps,"),
        ("train=null", "train is null; it is a section with epochs, steps,"),
        ("augment.randaugment=on", 'augment.randaugment is "on"; it is a section with layers, magnitude'),
        ("model.stages=3", "model.stages is 3; it must be a list of sections, or null"),
        ("model.stages=[3]", "model.stages.0 is 3; it must be a section with kind, blocks, width, stride"),
        ("model.stages=[{kind: a, blocks: 1, width: 8}]", '0.kind is "a"; it must be mbconv or transformer'),
        ("model.stages=[{kind: mbconv, blocks: 1}]", "model.stages.0.width: must be given"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_in_a_line_with_key_value_and_what_is_allowed(small, override, message):
    (line,) = refused(small, override)
    assert message in line and (line.startswith(override) or "is null" in line)


MALFORMED = ["train.steps", "=3", "train.steps=[1", "train.steps=3 #b", "run.seed=!!int 3", "slurm.setup=[&a b]"]
MALFORMED += ["slurm.setup=[a\nb]", "run={dir: !x b}"]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_override_is_refused_in_a_line_that_repeats_it(small, text):
    (line,) = refused(small, text)
    assert text.replace("\n", "\\n") in line


def test_compiling_batch_norm_across_ranks_is_refused(small):
    (line,) = refused(small, "train.compile=true", "train.micro_batch=2", "train.batch_norm_group=4")
    assert "train.batch_norm_group spans several ranks" in line and "train.compile=false" in line


def test_attention_in_no_fixed_order_is_refused_where_one_is_asked_for(small):
    (line,) = refused(small, "train.deterministic=true", "model.attention=flex")
    assert "train.deterministic is true and model.attention is flex" in line and "model.attention=auto" in line


def test_all_wrong_values_are_named_at_once(small):
    lines = refused(small, "train.micro_batch=x", "optim.grad_clip_norm=-1", "model.resolution=0")
    assert [re.findall(r"[a-z]+\.[a-z_]+ is", line) for line in lines] == [
        ["model.resolution is"],
        ["train.micro_batch is"],
        ["optim.grad_clip_norm is"],
    ]


@pytest.mark.parametrize("key", [name for name in documented_keys() if not name.startswith("model.")])
def test_no_key_takes_a_mapping(small, key):
    assert refused(small, f"{key}.a=1")[0].startswith(f'{key}.a=1: {key} is {{"a": 1}}; it must be ')


def test_what_must_be_given_is_named(tmp_path):
    lines = refused(preset(tmp_path, "empty.yaml", "{}"))
    assert [line.partition("empty.yaml: ")[2] for line in lines] == [
        "data.train: must be given (data.train=...)",
        "model.name is null, so model.stem and model.stages must be given",
        "exactly one of train.epochs and train.steps must be set; neither is",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "top.yaml: holds a list; a preset is a mapping of sections"),
        ("a", "top.yaml: holds a single value; a preset is a mapping of sections"),
        ("# nothing", "top.yaml: is empty; a preset is a mapping of sections"),
        ("a:\n- [", "top.yaml: line 2: not YAML"),
        ("a:\n\tb: 1", "top.yaml: line 2: not YAML"),
        ("a: 1\n---\nb: 2", "top.yaml: line 2: not YAML: expected a single document"),
        ("1: x", "top.yaml: 1: unknown; the configuration has run, data"),
        ("[a]: x", "top.yaml: line 1: a key must be text"),
        ("run: !mine {}", "top.yaml: line 1: !mine is not a type of YAML's core schema"),
        ("run: &run {seed: 1}\nlog: {<<: *run}", "top.yaml: line 2: merge keys (<<) are not part of YAML 1.2"),
        ("run: &run [*run]", "nested too deeply, or an alias that contains itself"),
        ("[" * 10_000, "nested too deeply"),
        (LAUGHS, "more than 10,000 values"),
        ("base: [x]", 'base is ["x"]; it must be the name of a YAML file'),
        ("base: tip.yaml", "tip.yaml: No such file or directory; did you mean"),
        ("base: 5", "top.yaml: base: "),
        ("train:", "train is null; it is a section with"),
    ],
)
def test_a_file_that_is_no_preset_is_refused_in_one_line(tmp_path, text, message):
    (line,) = refused(preset(tmp_path, "top.yaml", text))
    assert message in line


# --------------------------------------------------------------------------------------------------------------- layers


def test_later_layers_win_defaults_base_preset_overrides(tmp_path):
    preset(tmp_path, "base.yaml", SMALL + "optim: {grad_clip_norm: 2, eps: 0.1, weight_decay: 0.2, betas: [0.1, 0.2]}")
    top = preset(tmp_path, "top.yaml", "base: base.yaml\noptim: {eps: 0.3, weight_decay: 0.3}")
    optim = read_config(top, ["optim.weight_decay=0.4", "optim.weight_decay=0.5"]).optim
    assert (optim.decay, optim.grad_clip_norm, optim.betas, optim.eps, optim.weight_decay) == (
        "cosine",
        2,
        (0.1, 0.2),
        0.3,
        0.5,
    )


def test_a_base_lies_beside_its_preset_and_may_have_a_base_of_its_own(tmp_path):
    (tmp_path / "a").mkdir()
    preset(tmp_path / "a", "bottom.yaml", SMALL + "run: {seed: 1}\nlog: {every: 7}")
    preset(tmp_path / "a", "middle.yaml", "base: bottom.yaml\nrun: {seed: 2}")
    config = read_config(preset(tmp_path, "top.yaml", "base: a/middle.yaml"), [])
    assert (config.run.seed, config.log.every) == (2, 7)


@pytest.mark.parametrize("way", ["a.yaml", "../{folder}/a.yaml", "./b.yaml", "link.yaml", "here/a.yaml"])
def test_a_base_that_leads_back_to_itself_is_refused(tmp_path, way):
    top = preset(tmp_path, "a.yaml", f"base: {way.format(folder=tmp_path.name)}")
    preset(tmp_path, "b.yaml", "base: a.yaml")
    (tmp_path / "link.yaml").symlink_to(top)
    (tmp_path / "here").symlink_to(tmp_path)
    (line,) = refused(top)
    assert "base leads back to itself" in line


@pytest.mark.parametrize(
    ("below", "above", "length"),
    [
        ("steps: 10", "epochs: 3", (3, None)),
        ("epochs: 3", "steps: 10", (None, 10)),
        ("steps: 10", "epochs: null", (None, 10)),
        ("steps: 10", "global_batch: 4", (None, 10)),
    ],
)
def test_setting_epochs_or_steps_in_a_later_layer_clears_the_other(tmp_path, below, above, length):
    rest = "data: {train: x}\nmodel: {name: coatnet_0}\ntrain: {micro_batch: 4, %s}\n"
    base = preset(tmp_path, "base.yaml", rest % below)
    config = read_config(preset(tmp_path, "top.yaml", f"base: base.yaml\ntrain: {{{above}}}"), [])
    assert (config.train.epochs, config.train.steps) == length
    assert read_config(base, [f"train.{above.replace(': ', '=')}"]).train.epochs == length[0]


def test_epochs_and_steps_in_one_layer_are_refused_and_the_last_override_wins(small, tmp_path):
    both = preset(tmp_path, "both.yaml", SMALL.replace("steps: 10", "steps: 10, epochs: 3"))
    assert "both are" in refused(both)[0]
    assert read_config(small, ["train.epochs=2", "train.steps=3", "train.epochs=4"]).train.epochs == 4


WITH_STAGES = "model: {stem: {width: 8}, stages: [{kind: mbconv, blocks: 1, width: 8}]}"


def test_a_models_name_and_stages_clear_each_other_in_later_layers(small, tmp_path):
    preset(tmp_path, "base.yaml", SMALL)
    with_stages = preset(tmp_path, "top.yaml", f"base: base.yaml\n{WITH_STAGES}")
    model = read_config(with_stages, []).model
    assert model.name is None and model.stages is not None and model.stages[0].stride == 2
    model = read_config(with_stages, ["model.name=coatnet_1"]).model
    assert (model.name, model.stem, model.stages) == ("coatnet_1", None, None)


def test_a_model_with_both_a_name_and_stages_is_refused_with_what_to_set(small, tmp_path):
    both = preset(tmp_path, "both.yaml", SMALL.replace("model: {", WITH_STAGES[:-1] + ", "))
    assert "set model.name=null" in refused(both)[0]
    assert read_config(both, ["model.name=null"]).model.name is None
    assert "set model.name=null" in refused(small, "model.stem.width=4")[0]
    assert "model.stem and model.stages must be given" in refused(small, "model.name=null")[0]


# ----------------------------------------------------------------------------------------------- written and read again

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "run.dir": st.text(st.characters(exclude_categories=["Cs"], exclude_characters="~$"), min_size=1, max_size=200),
    "run.seed": st.integers(0, 2**48 - 1),
    "data.train": st.sampled_from(["1e-3", "null", "yes", "0x10", "a: b", "s3://bucket/train#1", " x ", "'", '"', "~"]),
    "data.max_bad_fraction": st.floats(0, 1),
    "augment.crop_area": st.tuples(st.floats(1e-9, 0.5), st.floats(0.5, 1)).map(list),
    "augment.flip": st.booleans(),
    "train.steps": st.integers(1, 10**12),
    "train.epochs": st.floats(1e-9, 1e6),
    "train.ema": st.none() | st.floats(1e-12, 1 - 1e-12),
    "optim.learning_rate": st.floats(1e-300, 1e300),
    "optim.betas": st.lists(st.floats(0, 1 - 1e-12), min_size=2, max_size=2),
    "log.samples": st.sampled_from([True, False, "pixels"]),
    "evaluate.every": st.none() | st.integers(1, 10**9),
    "model.stages": st.lists(
        st.fixed_dictionaries({"kind": st.just("mbconv"), "blocks": st.integers(1, 9), "width": st.integers(1, 9)}),
        min_size=1,
    ),
}


def quoted(text: str) -> str:
    return yaml.safe_dump(text, default_style='"', width=10**9).rstrip("\n")


settings_of_keys = st.fixed_dictionaries({}, optional=VALUES).map(lambda chosen: list(chosen.items()))


@given(settings_of_keys)
def test_a_configuration_survives_overrides_and_yaml_unchanged(small, tmp_path_factory, chosen):
    overrides = [f"{key}={quoted(value) if isinstance(value, str) else json.dumps(value)}" for key, value in chosen]
    if "model.stages" in dict(chosen):
        overrides.append("model.stem.width=8")
    config = read_config(small, overrides)
    path = tmp_path_factory.getbasetemp() / "resolved.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert read_resolved(path) == config
    assert read_config(str(path), []) == config
    assert changes(config, read_resolved(path)) == {}
    assert validate(config.model_dump(mode="json"), "checkpoint") == config


TEXT_KEYS = sorted(name for name, facts in documented_keys().items() if facts["text"])
LOOKS_LIKE_A_NUMBER = r"[-+]?[0-9][0-9_]{0,3}(\.[0-9]{0,3})?([eE][-+]?[0-9]{1,3})?|0[xob][0-9a-fA-F]{1,6}|\.(inf|NAN)"
LOOKS_LIKE_A_TIME = r"[0-9]{1,4}(:[0-5]?[0-9]){1,2}|[12][0-9]{3}-[01][0-9]-[0-3][0-9]"
LOOKS_LIKE_A_BOOLEAN = r"true|TRUE|False|yes|No|on|OFF|y|N"
words = st.one_of(*(st.from_regex(each, fullmatch=True) for each in (LOOKS_LIKE_A_NUMBER, LOOKS_LIKE_A_TIME)))
words |= st.sampled_from(LOOKS_LIKE_A_BOOLEAN.split("|"))
texts = words | st.sampled_from(
    ["null", "~", "a: b", "a #b", "#", "- a", "@", "'", '"', "\u2028", "=", "<<", "[", "\ufeff"]
)
texts |= st.text(st.characters(exclude_categories=["Cs"], exclude_characters="~$"), min_size=1)


def with_text(key: str, text: str) -> Config:
    """A configuration in which this key has this text; texts that it does not take are not tried."""
    section, *inside, leaf = key.split(".")
    is_list = documented_keys()[key]["default"] == ()
    value: Any = [f"--{text}" if leaf == "sbatch" else text, text][: 1 if leaf == "sbatch" else 2] if is_list else text
    for name in reversed([*inside, leaf]):
        value = {name: value}
    sections = {"data": {"train": "x"}, "model": {"name": "coatnet_0"}, "train": {"steps": 1}}
    try:
        return validate({**sections, section: {**sections.get(section, {}), **value}}, "tree")
    except UsageError:
        reject()


@given(st.sampled_from(TEXT_KEYS), texts)
def test_a_text_that_is_written_is_read_again_by_this_and_by_older_yaml(tmp_path_factory, key, text):
    assume(not {"~", "$"} & set(text))
    config, path = with_text(key, text), tmp_path_factory.getbasetemp() / "text.yaml"
    by_pyyaml = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=120)
    for written in (to_yaml(config), by_pyyaml):  # older runs have PyYAML's
        path.write_text(written, encoding="utf-8")
        assert read_resolved(path) == config
    assert yaml.safe_load(to_yaml(config)) == config.model_dump(mode="json")


AS_IT_IS = sorted(key for key in TEXT_KEYS if not documented_keys()[key]["list"])
SIGNS = ["&x ", "!!str ", "*", "- ", "[", "{a: b}", "|\n ", "'", '"', " "]


@given(st.sampled_from(AS_IT_IS), texts | st.builds(str.__add__, st.sampled_from(SIGNS), texts))
def test_what_is_typed_for_a_text_is_it_unless_null_or_quoted(small, key, typed):
    assume(typed.lower() not in ("null", "~") and not (typed[0] in "'\"" and typed[0] == typed[-1]))
    assume(not set("~$") & set(typed) and with_text(key, typed) and key != "model.name")
    found: Any = read_config(small, [f"{key}={typed}"])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == typed


@given(st.sampled_from(TEXT_KEYS), words)
def test_what_is_typed_for_a_text_is_never_changed(small, tmp_path_factory, key, word):
    assume(with_text(key, word) and key != "model.name")
    section, _, leaf = key.rpartition(".")
    typed = ("--" if leaf == "sbatch" else "") + word
    typed = f"[{typed}]" if documented_keys()[key]["default"] == () else typed
    above = preset(
        tmp_path_factory.getbasetemp(), "above.yaml", f"base: {small}\n{nested(section, f'{leaf}: {typed}')}"
    )
    for config in (read_config(small, [f"{key}={typed}"]), read_config(above, [])):
        found: Any = config
        for name in key.split("."):
            found = getattr(found, name)
        assert str(found[0] if isinstance(found, tuple) else found).removeprefix("--") == word


def nested(section: str, content: str) -> str:
    """YAML in which a section, of any depth, has this content."""
    return "".join(f"{name}: {{" for name in section.split(".")) + content + "}" * len(section.split("."))


@given(st.integers(0, 10**6), st.integers(0, 3), st.floats(1e-9, 1e9))
def test_a_number_is_decimal_with_zeros_before_it_and_with_an_exponent(small, whole, zeros, number):
    config = read_config(
        small, [f"run.seed={'0' * zeros}{whole}", f"optim.eps={number:e}", f"optim.weight_decay={whole}e3"]
    )
    assert (config.run.seed, config.optim.eps, config.optim.weight_decay) == (whole, float(f"{number:e}"), whole * 1000)


@pytest.mark.parametrize("value", [True, False])
def test_a_switch_takes_the_words_of_older_yaml_too(small, value):
    for word in ("true", "yes", "on", "TRUE", "Yes", "On") if value else ("false", "no", "off", "False", "NO", "OFF"):
        config = read_config(small, [f"augment.flip={word}", f"log.samples={word}"])
        assert (config.augment.flip, config.log.samples) == (value, value)


def test_minutes_that_an_older_run_kept_as_a_number_are_read(small):
    tree = read_config(small, ["slurm.time=90"]).model_dump(mode="json")
    older = {**tree, "slurm": {**tree["slurm"], "time": 90}}
    assert validate(older, "checkpoint") == validate(tree, "checkpoint")


def test_a_key_that_was_removed_is_refused_in_a_request_and_read_of_an_older_run(small, tmp_path):
    config = read_config(small, [])
    tree, older = config.model_dump(mode="json"), tmp_path / "config.yaml"
    for value in ("ib", None):
        older.write_text(yaml.safe_dump({**tree, "slurm": {**tree["slurm"], "constraint": value}}))
        assert read_resolved(older) == config
    assert read_config(str(older), []) == config  # an older run's own file, with which it is resumed
    with pytest.raises(
        UsageError, match=r"slurm.constraint: was removed; set slurm.sbatch=\[--constraint=...\] instead"
    ):
        read_config(small, ["slurm.constraint=ib"])


def test_a_file_with_the_line_ends_and_the_mark_of_windows_is_read(small, tmp_path):
    path = tmp_path / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert read_config(str(path), []) == read_config(small, [])


NAMES = st.lists(st.sampled_from("abcdefgh"), min_size=1, unique=True)


@given(NAMES, st.lists(st.sampled_from("xyz"), max_size=3), st.booleans(), st.integers(0, 8), st.integers(0, 8))
def test_a_key_that_is_given_twice_is_refused_with_both_lines(
    small, tmp_path_factory, names, sections, flow, which, place
):
    """In block or flow style, at any depth, in a file or as the value of an override."""
    twice, place = names[which % len(names)], place % (len(names) + 1)
    keys = [f"{name}: 1" for name in (*names[:place], twice, *names[place:])]
    one, other = (number for number, line in enumerate(keys, 1) if line.startswith(twice))
    if flow:
        text = "".join(f"{{{name}: " for name in sections) + "{" + ",\n".join(keys) + "}" * (1 + len(sections))
    else:
        above = [f"{'  ' * depth}{name}:" for depth, name in enumerate(sections)]
        text = "\n".join([*above, *("  " * len(sections) + line for line in keys)])
        one, other = one + len(sections), other + len(sections)
    path = preset(tmp_path_factory.getbasetemp(), "twice.yaml", text)
    message = f"{'.'.join([*sections, twice])} is given twice, here and in line {one}"
    assert refused(path) == [f"{path}: line {other}: {message}"]
    assert refused(small, f"run={text}")[-1].endswith(f": run.{message}")


@given(st.text("ab:{}[]&*!#-?|>'\"%@`<~,=\\ \n\t\r0.e\ufeff\x00\u2028") | st.binary())
def test_any_file_at_all_is_read_or_refused_in_yamls_words(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for line in refused(str(path)):
        assert line.startswith(f"{path}: ") or f"{path.parent}/" in line  # of a base
        assert not re.search(r"Error|NoneType|dict|\bstr\b|codec", line)


@given(settings_of_keys, settings_of_keys)
def test_changes_name_exactly_the_keys_that_differ_with_both_values(small, one, other):
    def config(chosen: list) -> Config:
        keys = [(key, value) for key, value in chosen if not key.startswith(("model.", "train.epochs"))]
        return read_config(
            small, [f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**9)}" for key, value in keys]
        )

    before, after = config(one), config(other)
    found = changes(before, after)
    for key, facts in documented_keys().items():
        section, *inside, leaf = key.split(".")
        values: list[Any] = []
        for each in (before, after):
            value = getattr(each, section)
            for name in (*inside, leaf):
                value = getattr(value, name, None)
            values.append(list(value) if isinstance(value, tuple) else value)
        assert (key in found) == (values[0] != values[1])
        if key in found:
            assert found[key] == (facts["change"], *values)


def test_changes_see_another_model(small):
    with_stages = read_config(small, ["model.stem.width=8", "model.stages=[{kind: mbconv, blocks: 1, width: 8}]"])
    named = read_config(small, [])
    assert {"model.name", "model.stem.width", "model.stages"} <= set(changes(named, with_stages))
    wider = read_config(small, ["model.stem.width=8", "model.stages=[{kind: mbconv, blocks: 1, width: 9}]"])
    assert list(changes(with_stages, wider)) == ["model.stages"]


# ---------------------------------------------------------------------------------------------------- splits of a batch


def offers(message: str) -> list[tuple[str, int]]:
    suggested = re.search(r"; (.*) would do", message)
    found = re.findall(r"(ranks|train\.\w+)=(\d+)", suggested[1]) if suggested else []
    return [(key, int(number)) for key, number in found]


groups = st.none() | st.integers(2, 24)


@given(st.integers(1, 300), st.integers(1, 64), groups)
def test_an_impossible_batch_is_refused_with_sizes_that_would_do(global_batch, micro_batch, group):
    wanted: dict[str, Any] = {
        "steps": 1,
        "global_batch": global_batch,
        "micro_batch": micro_batch,
        "batch_norm_group": group,
    }
    one_holds_the_other = micro_batch % (group or 1) == 0 or (group or 1) % micro_batch == 0
    possible = global_batch % micro_batch == 0 and global_batch % (group or 1) == 0 and one_holds_the_other
    try:
        Train(**wanted)
        assert possible
    except ValidationError as error:
        assert not possible
        message = str(error)
        assert offers(message) or "; change both" in message
        for key, number in offers(message):
            wanted_then: dict[str, Any] = {**wanted, key.removeprefix("train."): number}
            Train(**wanted_then)


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.integers(1, 40))
def test_ranks_that_cannot_share_a_step_are_refused_with_sizes_that_would_do(batches, groups, group, parts, ranks):
    """A micro batch of some groups, or, where there is one group, a group of some micro batches."""
    micro_batch, micro_batches = groups * group, batches * (parts if groups == 1 else 1)
    group_size, together = (group * parts, parts) if groups == 1 else (group, 1)
    wanted: dict[str, Any] = {"steps": 1, "global_batch": micro_batches * micro_batch, "micro_batch": micro_batch}
    wanted |= {"batch_norm_group": group_size if group_size > 1 else None}
    try:
        check_world_size(Train(**wanted), ranks)
        assert ranks <= micro_batches and ranks % together == 0
    except ValueError as error:
        assert ranks > micro_batches or ranks % together
        assert f"{ranks} ranks" in str(error)
        offered = offers(str(error))
        assert offered
        for key, number in offered:
            if key == "ranks":
                check_world_size(Train(**wanted), number)
            else:
                wanted_then: dict[str, Any] = {**wanted, key.removeprefix("train."): number}
                check_world_size(Train(**wanted_then), ranks)


@given(st.integers(1, 60), st.integers(1, 60))
def test_a_warning_of_padding_names_a_number_of_ranks_without(micro_batches, ranks):
    train = Train(steps=1, global_batch=2 * micro_batches, micro_batch=2)
    assume(ranks <= micro_batches)
    warning = padding_share(train, ranks)
    assert (warning is None) == (micro_batches % ranks == 0)
    if warning is not None:
        better = re.search(r"; (\d+) ranks would waste none", warning)
        assert better and padding_share(train, int(better[1])) is None
