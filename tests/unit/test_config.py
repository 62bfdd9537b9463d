"""The config: precedence, errors for wrong keys and values, and the round trip of snapshots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from doccls.__main__ import render_schema
from doccls.config import Config, Override, load_config, parse_override, render_snapshot
from doccls.config.load import SECRET_NAME, list_values, redact_argument
from doccls.config.reference import render_keys
from doccls.config.schema import SECTIONS
from doccls.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DATA = "data: {train_csv: a.csv, image_dir_train: images}\n"
SECRET = "SEKRIT-4711"


def load(folder: Path, text: str | bytes, *overrides: str, mode: str | None = None) -> Config:
    path = folder / "c.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path, mode, [parse_override(override) for override in overrides])


def refuse(folder: Path, text: str | bytes, *overrides: str, mode: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, text, *overrides, mode=mode)
    return str(caught.value)


# --- precedence ------------------------------------------------------------------------------------------------------


def test_set_wins_over_yaml_over_mode_over_default(tmp_path: Path) -> None:
    stated = DATA + "train: {batch_size: 7, lr: 0.5}\n"
    config = load(tmp_path, stated, "train.lr=0.25", mode="highperf")
    assert config.train.lr == 0.25  # --set; YAML says 0.5, the mode 1e-4
    assert config.train.batch_size == 7  # YAML; the mode says 32
    assert config.train.img_size == 384  # mode; the default is 224
    assert config.train.decay_epochs == 10.0  # default; set nowhere else


def test_yaml_value_equal_to_default_wins_over_mode(tmp_path: Path) -> None:
    assert load(tmp_path, DATA + "train: {mixup_alpha: 0.0}\n", mode="highperf").train.mixup_alpha == 0.0


def test_last_override_of_key_wins(tmp_path: Path) -> None:
    assert load(tmp_path, DATA, "train.epochs=3", "train.epochs=4").train.epochs == 4


def test_mode_defaults_to_basic_and_key_changes_it(tmp_path: Path) -> None:
    assert load(tmp_path, DATA).mode == "basic"
    config = load(tmp_path, DATA + "mode: highperf\n")
    assert (config.mode, config.train.img_size) == ("highperf", 384)


def test_mode_flag_wins_over_mode_key(tmp_path: Path) -> None:
    config = load(tmp_path, DATA + "mode: highperf\n", mode="basic")
    assert (config.mode, config.train.img_size) == ("basic", 300)


def test_set_mode_wins_over_mode_key(tmp_path: Path) -> None:
    config = load(tmp_path, DATA + "mode: basic\n", "mode=highperf")
    assert (config.mode, config.train.img_size) == ("highperf", 384)


@pytest.mark.parametrize("mode", ["basic", "highperf"])
def test_each_mode_is_valid_and_sets_all_its_keys(tmp_path: Path, mode: str) -> None:
    config = load(tmp_path, DATA, mode=mode)
    source = Path(load_config.__code__.co_filename).parent / "modes" / f"{mode}.yaml"
    for section, keys in yaml.safe_load(source.read_text()).items():
        for key, value in keys.items():
            assert getattr(getattr(config, section), key) == (float(value) if key in ("lr", "min_lr") else value)


@pytest.mark.parametrize("name", ["train.yaml", "train_highperf.yaml"])
def test_shipped_configs_load_with_paths_beside_their_folder(name: str) -> None:
    config = load_config(CONFIGS / name)
    assert config.data.train_csv == CONFIGS.parent / "data/raw/train.csv"
    assert config.output.logs_dir == CONFIGS.parent / "logs"
    assert config.mode == ("highperf" if "highperf" in name else "basic")


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", ".001", "+1e-3"])
def test_numbers_with_exponent_are_floats(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, DATA + f"train: {{lr: {text}}}\n").train.lr == 1e-3
    assert load(tmp_path, DATA, f"train.lr={text}").train.lr == 1e-3


def test_override_values_are_yaml() -> None:
    assert parse_override("a.b=null").value is None
    assert parse_override("a.b=true").value is True
    assert parse_override("a.b=[1, 2.5]").value == [1, 2.5]
    assert parse_override("a.b=x=y").value == "x=y"
    assert parse_override(" a.b = 3").key == "a.b"


@pytest.mark.parametrize("text", ["train.epochs", "=3", " =3", "train.epochs=[1", "train.epochs=\t3", "a.b=\x00"])
def test_malformed_override_is_rejected(text: str) -> None:
    with pytest.raises(UserError, match="--set"):
        parse_override(text)


def test_wrong_override_value_names_flag(tmp_path: Path) -> None:
    message = refuse(tmp_path, DATA, "train.epochs=0")
    assert "train.epochs = 0 (--set train.epochs): allowed: an integer >= 1" in message


def test_flag_that_is_short_for_override_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(DATA)
    with pytest.raises(UserError, match=r"data.num_workers = -1 \(--num-workers\)"):
        load_config(tmp_path / "c.yaml", None, [Override("data.num_workers", -1, "--num-workers")])


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("train.epochs", "true", "an integer >= 1"),
        ("train.epochs", "3.0", "an integer >= 1"),
        ("train.epochs", "'3'", "an integer >= 1"),
        ("train.lr", "true", "a number > 0"),
        ("train.lr", "'0.1'", "a number > 0"),
        ("train.lr", ".inf", "a number > 0"),
        ("train.lr", ".nan", "a number > 0"),
        ("train.lr", "1e999", "a number > 0"),
        ("train.weight_decay", "-.inf", "a number >= 0"),
        ("train.label_smoothing", "1.0", "a number >= 0 and < 1"),
        ("train.scheduler", "cosin", "'cosine' or 'tanh'"),
        ("train.amp", "fp8", "true or false or 'fp16' or 'bf16'"),
        ("data.valid_fold", "some", "an integer >= 0 or 'all'"),
        ("data.valid_fold", "true", "an integer >= 0 or 'all'"),
        ("data.id_col", "3", "a string"),
        ("data.id_col", "''", "a string"),
        ("data.image_ext", ".pdf", ".jpg"),
        ("data.train_csv", "''", "a path"),
        ("data.train_csv", "3", "a path"),
        ("data.train_csv", "null", "a path"),
        ("output.logs_dir", "null", "a path"),
        ("model.name", "18", "a string (quote it"),
        ("model.pretrained", "1", "true or false"),
        ("model.mean", "[0.5, 0.5]", "three numbers"),
        ("model.mean", "[0.5, 0.5, x]", "three numbers"),
        ("model.std", "[0.5, 0.5, 0]", "three numbers above 0"),
        ("project.seed", "-1", "an integer >= 0"),
        ("project.version", "a/b", "a string that matches"),
        ("project.version", "../x", "a string that matches"),
        ("data.train_csv", "~nosuchuser4711/x.csv", "a path"),
    ],
)
def test_wrong_value_is_reported_with_key_value_line_and_allowed_values(
    tmp_path: Path, key: str, value: str, allowed: str
) -> None:
    section, name = key.split(".")
    data = {} if section == "data" else {section: {name: "VALUE"}}
    stated = {"data": {"train_csv": "a.csv", "image_dir_train": "b"}, **data}
    stated[section][name] = "VALUE"
    text = yaml.safe_dump(stated, sort_keys=False).replace("VALUE", value)
    number = next(n for n, line in enumerate(text.splitlines(), 1) if line.strip().startswith(f"{name}:"))
    message = refuse(tmp_path, text)
    assert "1 problem\n" in message
    problem = next(line for line in message.splitlines() if line.startswith(f"  {key} = "))
    assert repr(yaml.safe_load(value) if value != "1e999" else float("inf")) in problem
    assert f"({tmp_path / 'c.yaml'}:{number})" in problem
    assert "allowed: " in problem and allowed in problem.split("allowed: ")[1]


def test_wrong_mode_is_reported_with_its_line(tmp_path: Path) -> None:
    message = refuse(tmp_path, DATA + "mode: turbo\n")
    assert "mode = 'turbo'" in message and "'basic' or 'highperf'" in message
    assert f"{tmp_path / 'c.yaml'}:2" in message


@pytest.mark.parametrize(
    ("text", "key", "allowed"),
    [
        ("train: {epochs: 3, warmup_epochs: 3}", "train.warmup_epochs", "less than train.epochs, which is 3"),
        ("train: {lr: 0.1, min_lr: 0.2}", "train.min_lr", "at most train.lr, which is 0.1"),
        ("train: {batch_size: 2, num_processes: 3}", "train.num_processes", "at most train.batch_size, which is 2"),
        ("valid: {select: damaged}", "valid.select", "clean or null, since valid.damage is none"),
    ],
)
def test_contradicting_keys_are_reported(tmp_path: Path, text: str, key: str, allowed: str) -> None:
    message = refuse(tmp_path, DATA + text)
    assert f"{key} = " in message and f"c.yaml:2): allowed: {allowed}" in message


def test_valid_fold_out_of_range_is_reported(tmp_path: Path) -> None:
    message = refuse(tmp_path, "data: {train_csv: a, image_dir_train: b, folds: 3, valid_fold: 3}")
    assert "data.valid_fold = 3" in message and "'all' or 0 to 2, since data.folds is 3" in message


def test_all_contradictions_of_section_are_reported(tmp_path: Path) -> None:
    message = refuse(tmp_path, DATA + "train: {epochs: 2, warmup_epochs: 9, lr: 0.1, min_lr: 5, batch_size: 4}")
    assert "train.warmup_epochs = 9" in message
    assert "train.min_lr = 5" in message


def test_all_errors_of_config_are_reported_together(tmp_path: Path) -> None:
    text = """\
data: {train_csv: a.csv, fodls: 3, folds: 1}
train: {epochs: 2, epochs: 0, lr: fast}
model: 3
tracking:
  wandb: maybe
nothing: {like: this}
"""
    message = refuse(tmp_path, text, "project.seed=x", "output=3")
    for problem in (
        "data.fodls", "data.folds = 1", "data.image_dir_train: missing", "train.epochs", "train.lr = 'fast'",
        "model = 3", "tracking.wandb = 'maybe'", "nothing.like", "project.seed = 'x'", "output = 3",
    ):  # fmt: skip
        assert problem in message
    assert "stated twice, first in line 2" in message
    count = int(message.split(" problems")[0].rsplit(" ", 1)[1])
    assert count == len([line for line in message.splitlines() if line.startswith("  ")]) == 11


def test_missing_required_keys_are_named_with_allowed_values(tmp_path: Path) -> None:
    message = refuse(tmp_path, "train: {epochs: 1}\n")
    assert "data.train_csv: missing; required: a path" in message
    assert "data.image_dir_train: missing; required: a path" in message


# --- unknown keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "near"),
    [
        ("train: {epoch: 3}", "train.epochs"),
        ("trian: {epochs: 3}", "train.epochs"),
        ("model: {epochs: 3}", "train.epochs"),
        ("lr: 3", "train.lr"),
        ("data_x: {group_col: 3}", "data.group_col"),
        ("train: {optimzer: adam}", "train.optimizer"),
    ],
)
def test_unknown_key_suggests_nearest_known_key(tmp_path: Path, stated: str, near: str) -> None:
    message = refuse(tmp_path, DATA + stated)
    assert "c.yaml:2): unknown key; did you mean" in message
    assert f"did you mean {near}?" in message


def test_unknown_key_without_near_key_lists_sections(tmp_path: Path) -> None:
    assert "sections are project, data, model" in refuse(tmp_path, DATA + "zzzzqqqq: 3")


def test_unknown_key_in_override_names_flag(tmp_path: Path) -> None:
    message = refuse(tmp_path, DATA, "train.epoch=3")
    assert "train.epoch (--set train.epoch): unknown key; did you mean train.epochs?" in message


# --- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        DATA + "train:\n  epochs: 1\n  lr: 0.1\n  epochs: 1\n",
        "data:\n  train_csv: a\n  image_dir_train: b\n  train_csv: a\n",
    ],
)
def test_duplicate_key_is_error_even_with_equal_values(tmp_path: Path, text: str) -> None:
    assert "stated twice, first in line" in refuse(tmp_path, text)


def test_duplicate_section_is_error(tmp_path: Path) -> None:
    assert "train (" in refuse(tmp_path, DATA + "train: {epochs: 1}\ntrain: {lr: 1}\n")


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = DATA + "augment: &a {hflip_prob: 0.25, vflip_prob: &p 0.5, blur_prob: *p}\n"
    assert load(tmp_path, text).augment.blur_prob == 0.5
    text = "provenance: {base: &b {epochs: 7, lr: 1e-2}}\n" + DATA + "train: {<<: *b, epochs: 2}\n"
    config = load(tmp_path, text)
    assert (config.train.epochs, config.train.lr) == (2, 0.01)


@pytest.mark.parametrize(
    "text", ["train: &a\n  epochs: *a\n", "train: &a {x: *a}\n", "model: &a\n  mean: [*a, 1, 2]\n"]
)
def test_alias_inside_its_own_anchor_is_rejected(tmp_path: Path, text: str) -> None:
    refuse(tmp_path, DATA + text)


@pytest.mark.parametrize("text", ["train:\n", "train: null\n", "train: {}\n", "train: ~\n"])
def test_empty_section_keeps_defaults(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, DATA + text).train == load(tmp_path, DATA).train


@pytest.mark.parametrize("value", ["3", "cosine", "[1, 2]", "true", "''", "0"])
def test_plain_value_for_section_is_reported(tmp_path: Path, value: str) -> None:
    message = refuse(tmp_path, DATA + f"train: {value}\n")
    assert "train = " in message and "a section: keys such as img_size" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "empty"),
        (b"# only a comment\n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"- a\n- b\n", "top level"),
        (b"hello", "top level"),
        (b"\xff\xfe" + DATA.encode("utf-16-le"), "not UTF-8"),
        (DATA.encode() + b"# \xe9\n", "not UTF-8"),
        (DATA.encode() + b"train:\n\tepochs: 3\n", "not valid YAML"),
        (DATA.encode() + b"train: {epochs: 3\n", "not valid YAML"),
        (DATA.encode() + b"---\ntrain: {}\n", "not valid YAML"),
        (DATA.encode() + b"train: \x00\n", "not valid YAML"),
        (DATA.encode() + b"<<: 3\n", "not valid YAML"),
    ],
)
def test_file_that_is_no_config_is_rejected_with_its_path(tmp_path: Path, text: bytes, words: str) -> None:
    message = refuse(tmp_path, text)
    assert words in message and str(tmp_path / "c.yaml") in message


def test_python_tags_are_rejected_and_not_executed(tmp_path: Path) -> None:
    target = tmp_path / "made"
    tag = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{target}']]"
    refuse(tmp_path, DATA + f"train: {{epochs: {tag}}}\n")
    with pytest.raises(UserError):
        parse_override(f"train.epochs={tag}")
    assert not target.exists()


def test_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    assert load(tmp_path, b"\xef\xbb\xbf" + DATA.encode()).data.train_csv == tmp_path / "a.csv"


@pytest.mark.parametrize("name", ["absent.yaml", ""])
def test_unreadable_config_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="config file") as caught:
        load_config(tmp_path / name)
    assert str(tmp_path) in str(caught.value)


# --- paths -----------------------------------------------------------------------------------------------------------


def test_paths_are_relative_to_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = f"data: {{train_csv: ../data/a.csv, image_dir_train: ~/images, sample_csv: {tmp_path}/s.csv}}\n"
    (tmp_path / "configs" / "c.yaml").write_text(text)
    config = load_config(Path("../configs/c.yaml"))
    assert config.data.train_csv == tmp_path / "data" / "a.csv"
    assert config.data.image_dir_train == tmp_path / "home" / "images"
    assert config.data.sample_csv == tmp_path / "s.csv"
    assert config.output.logs_dir == tmp_path / "configs" / "logs"


def test_paths_in_overrides_are_relative_to_config_file(tmp_path: Path) -> None:
    assert load(tmp_path, DATA, "data.train_csv=x/y.csv").data.train_csv == tmp_path / "x" / "y.csv"


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"tracking: {{wandb_api_key: {SECRET}}}\n",
        f"wandb_api_key: {SECRET}\n",
        f"tracking: {{api: {{token: {SECRET}}}}}\n",
        f"tracking: {{password: {SECRET}, password: {SECRET}}}\n",
        f"tracking: {{wandb_api_key: {SECRET}\n",
        f"tracking:\n  wandb_api_key: {SECRET}: x\n",
        f"tracking:\n  wandb_api_key: '{SECRET}\n",
    ],
)
def test_secret_in_config_is_never_printed(tmp_path: Path, text: str) -> None:
    assert SECRET not in refuse(tmp_path, DATA + text)


def test_no_schema_key_holds_secret() -> None:
    keys = [*Config.model_fields, *(key for section in SECTIONS.values() for key in section.model_fields)]
    assert [key for key in keys if SECRET_NAME.search(key)] == []


@pytest.mark.parametrize("text", ["tracking.wandb_api_key=" + SECRET, "wandb_api_key=" + SECRET])
def test_secret_in_override_is_never_printed(tmp_path: Path, text: str) -> None:
    assert SECRET not in refuse(tmp_path, DATA, text)


def test_secret_in_malformed_override_is_never_printed() -> None:
    with pytest.raises(UserError) as caught:
        parse_override(f"wandb_api_key=[{SECRET}")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "argument",
    [
        f"tracking.wandb_api_key={SECRET}",
        f"WANDB_API_KEY={SECRET}",
        f"--token={SECRET}",
        f"--set=tracking.api_key={SECRET}",
        f"password={SECRET}=x",
    ],
)
def test_secret_on_command_line_is_redacted(argument: str) -> None:
    assert SECRET not in redact_argument(argument)
    assert redact_argument(argument).endswith("=***")


@pytest.mark.parametrize("argument", ["train.epochs=3", "--config", "key", "/a/key=/b".replace("key", "x"), "a=b=c"])
def test_other_arguments_are_unchanged(argument: str) -> None:
    assert redact_argument(argument) == argument


# --- snapshot and listing --------------------------------------------------------------------------------------------


def reload(folder: Path, config: Config) -> Config:
    path = folder / "elsewhere" / "config.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(render_snapshot(config, {"run_id": "v1-abc", "classes": ["1e3", "no"]}), encoding="utf-8")
    return load_config(path)


@pytest.mark.parametrize("mode", ["basic", "highperf"])
def test_snapshot_reads_back_to_same_config(tmp_path: Path, mode: str) -> None:
    text = DATA + "model: {mean: [0.5, 0.5, 0.25], std: [1, 1, 1], weights: w.pth}\ntrain: {lr: 1e-5, amp: fp16}\n"
    config = load(tmp_path, text, "data.valid_fold=2", "tracking.project='Größe: ß'", mode=mode)
    reloaded = reload(tmp_path, config)
    assert reloaded.provenance == {"run_id": "v1-abc", "classes": ["1e3", "no"]}
    assert reloaded.model_dump(exclude={"provenance"}) == config.model_dump(exclude={"provenance"})


@settings(
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    version=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", fullmatch=True)
    | st.sampled_from(["1e5", "12e4", "0x1f", "1_0", "yes", "null", "007", "1.5", "2024-01-01", "1.", "1.e3"]),
    column=st.text(
        st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufeff\u2028\u2029\x85"), min_size=1
    ),
    lr=st.floats(1e-12, 1e3),
)
def test_any_string_and_number_survives_snapshot(tmp_path: Path, version: str, column: str, lr: float) -> None:
    base = {"train_csv": "a", "image_dir_train": "b", "id_col": column}
    stated = {"data": base, "project": {"version": version}, "train": {"lr": lr}}
    config = Config.model_validate(stated, context={"base": tmp_path})
    reloaded = reload(tmp_path, config)
    assert reloaded.model_dump(exclude={"provenance"}) == config.model_dump(exclude={"provenance"})


def test_snapshot_does_not_depend_on_modes(tmp_path: Path) -> None:
    """A snapshot states every key, so nothing is left to the mode or the defaults."""
    stated = yaml.safe_load(render_snapshot(load(tmp_path, DATA, mode="highperf"), {}))
    for name, section in SECTIONS.items():
        assert set(stated[name]) == set(section.model_fields)


def test_list_values_lists_dotted_keys_without_provenance(tmp_path: Path) -> None:
    listed = dict(list_values(load(tmp_path, DATA + "provenance: {a: 1}\n", "train.epochs=3")))
    known = {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.model_fields}
    assert set(listed) == known | {"mode"}
    assert listed["train.epochs"] == 3


# --- schema ----------------------------------------------------------------------------------------------------------


def test_committed_schema_is_up_to_date() -> None:
    assert (CONFIGS / "config.schema.json").read_text(encoding="utf-8") == render_schema()


def test_committed_list_of_keys_is_up_to_date() -> None:
    assert (CONFIGS.parent / "docs" / "config.md").read_text(encoding="utf-8") == render_keys()


@pytest.mark.parametrize("name", ["train.yaml", "train_highperf.yaml"])
def test_schema_accepts_shipped_configs(name: str) -> None:
    import jsonschema  # a development extra: without it, only these two tests should fail

    jsonschema.validate(yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8")), json.loads(render_schema()))


@pytest.mark.parametrize("wrong", [{"train": {"epoch": 3}}, {"train": {"epochs": 0}}, {"trian": {}}, {"mode": "turbo"}])
def test_schema_rejects_what_loader_rejects(wrong: dict[str, Any]) -> None:
    import jsonschema

    stated = {"data": {"train_csv": "a", "image_dir_train": "b"}}
    jsonschema.validate(stated, json.loads(render_schema()))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(stated | wrong, json.loads(render_schema()))


def list_models(model: type[BaseModel]) -> list[type[BaseModel]]:
    kinds = [field.annotation for field in model.model_fields.values()]
    inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return [model, *(nested for kind in inner for nested in list_models(kind))]


def test_every_key_has_description() -> None:
    models = list_models(Config)
    assert len(models) == 1 + len(SECTIONS)
    for model in models:
        undescribed = [name for name, field in model.model_fields.items() if not field.description]
        assert model is Config or not undescribed, f"{model.__name__}: {undescribed}"


def test_config_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path, DATA).train.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "value"), [("off", "off"), ("'off'", "off"), ("auto", "auto"), ("pages", Path("pages"))]
)
def test_store_is_keyword_or_folder_even_if_yaml_reads_boolean(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"data: {{train_csv: a.csv, image_dir_train: b, store: {text}}}\n")
    assert load_config(path).data.store == (tmp_path / value if isinstance(value, Path) else value)


# --- a model in a folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overridden", [True, False])
@pytest.mark.parametrize(
    ("name", "folder"), [("local-dir:m", "m"), ("local-dir:../x/m", "../x/m"), ("local-dir:~/m", "~/m")]
)
def test_folder_of_model_is_relative_to_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str, overridden: bool
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    text = DATA if overridden else DATA + f"model: {{name: '{name}'}}\n"
    config = load(tmp_path, text, *([f"model.name={name}"] if overridden else []))
    expected = (tmp_path / Path(folder).expanduser()).resolve()
    assert config.model.name == f"local-dir:{expected}"
    assert Config.model_validate(config.model_dump(mode="json")) == config  # as prediction reads it, anywhere


def test_folder_of_model_may_not_be_empty(tmp_path: Path) -> None:
    assert "model.name = 'local-dir:'" in refuse(tmp_path, DATA, "model.name='local-dir:'")
