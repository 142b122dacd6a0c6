from __future__ import annotations

from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from clusterns_ray.config import (
    BANK_KEYS,
    Config,
    Section,
    apply_override,
    dump_config,
    known_keys,
    load_config,
    make_config,
    nearest_multiple,
    parse_config,
    parse_saved_config,
)
from clusterns_ray.errors import ConfigError

BASE = "data: {corpus: sentences.txt}\n"


def parsed(*overrides: str, text: str = BASE) -> Config:
    return parse_config(text, overrides, "c.yaml")


def message(*overrides: str, text: str = BASE) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(*overrides, text=text)
    return str(caught.value)


def sections() -> dict[str, type[Section]]:
    found = {name: field.annotation for name, field in Config.model_fields.items()}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Section)}


# ---- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", "1.e-3", ".1e-2", "0.001", "10e-4"])
def test_scientific_notation_is_a_number(text: str) -> None:
    value = parsed(text=f"{BASE}clustering: {{rate: {text}}}").clustering.rate
    assert isinstance(value, float) and value == pytest.approx(1e-3)
    assert parsed(f"clustering.rate={text}").clustering.rate == value


def test_integers_stay_integers_and_words_stay_text() -> None:
    values: dict[str, Any] = {}
    for override in ("a=12", "b=-3", "c=1e3", "d=e5", "e=1.5", "f=1-2", "g=true", "h=null", "i=[1, 2]", "j=a=b"):
        apply_override(values, override)
    assert {key: type(value) for key, value in values.items()} == {
        "a": int,
        "b": int,
        "c": float,
        "d": str,
        "e": float,
        "f": str,
        "g": bool,
        "h": type(None),
        "i": list,
        "j": str,
    }
    assert values["j"] == "a=b"


def test_overrides_change_one_value_and_the_last_one_wins() -> None:
    config = parsed(
        "train.learning_rate=3e-5",
        "train.shards=4",
        "seed=7",
        "train.shards=2",
        "runtime.num_workers=[1, 2]",
        text=BASE + "train: {learning_rate: 1e-4, epochs: 2}",
    )
    assert (config.train.learning_rate, config.train.shards, config.seed) == (3e-5, 2, 7)
    assert config.train.epochs == 2, "a neighbour of an overridden key was lost"
    assert config.runtime.num_workers == (1, 2)
    assert list(config.runtime.worker_counts()) == [1, 2]


def test_an_override_may_give_text_that_is_not_yaml() -> None:
    assert parsed('encoder.prompt=A: "{sentence}" [MASK]').encoder.prompt == 'A: "{sentence}" [MASK]'


def test_override_does_not_need_its_section_in_the_file() -> None:
    assert parsed("loss.temperature=0.1").loss.temperature == 0.1
    assert parsed("loss.temperature=0.1", text=BASE + "loss:\n").loss.temperature == 0.1


@pytest.mark.parametrize("override", ["train.learning_rate", "=3", "train..shards=1", ".seed=1", ""])
def test_malformed_override(override: str) -> None:
    text = message(override)
    assert repr(override) in text and "section.key=value" in text and "train.learning_rate=3e-5" in text


def test_override_below_a_value() -> None:
    text = message("seed.x=1", text=BASE + "seed: 3")
    assert "--set 'seed.x=1'" in text and "'seed' is a value, not a section" in text


def test_structure_chooses_its_own_dev_set() -> None:
    config = parsed("data.documents=docs", "evaluation.sts=structure")
    assert config.evaluation.dev == "STRUCTURE/dev"
    assert parsed("evaluation.sts=dir").evaluation.dev == "STSB/dev"
    assert parsed("data.corpus=demo", "evaluation.sts=structure").evaluation.dev == "STRUCTURE/dev"


def test_no_such_file_and_not_yaml(tmp_path) -> None:
    with pytest.raises(ConfigError, match="No such file") as caught:
        load_config(tmp_path / "none.yaml")
    assert "none.yaml" in str(caught.value) and "quickstart.yaml" in str(caught.value)
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)
    broken = tmp_path / "broken.yaml"
    broken.write_text("train:\n  shards: [1,\nseed: 3\n")
    with pytest.raises(ConfigError, match="is not YAML") as caught:
        load_config(broken)
    assert "broken.yaml" in str(caught.value) and "line" in str(caught.value)
    broken.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="holds a list") as caught:
        load_config(broken)
    assert "section: {key: value}" in str(caught.value)


def test_a_file_that_is_not_text_is_a_configuration_error(tmp_path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"seed: 3\n\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        load_config(path)


def test_an_empty_file_says_what_is_missing(tmp_path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"data\.corpus is not set"):
        load_config(path)
    assert load_config(path, ["data.corpus=a.txt"]).data.corpus == "a.txt"


# ---- environment variables ----------------------------------------------------------------------------------------


def test_variables_are_expanded_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_BASE", "/data")
    monkeypatch.setenv("TEST_NAME", "one")
    config = parsed(
        "evaluation.sts=${TEST_BASE}/sts",
        text="data: {corpus: ['${TEST_BASE}/a.txt', b.txt]}\nruntime: {name: 'run-${TEST_NAME}-${TEST_NAME}'}",
    )
    assert config.data.corpus == ["/data/a.txt", "b.txt"]
    assert config.evaluation.sts == "/data/sts"
    assert config.runtime.name == "run-one-one"


def test_an_unset_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_UNSET", raising=False)
    text = message(text="data: {corpus: '${TEST_UNSET}/a.txt'}")
    for part in ("data.corpus", "'${TEST_UNSET}/a.txt'", "TEST_UNSET is not set", "--set data.corpus="):
        assert part in text
    assert parsed("data.corpus=a.txt", text="data: {corpus: '${TEST_UNSET}/a.txt'}").data.corpus == "a.txt"


def test_a_dollar_without_braces_is_text() -> None:
    assert parsed("data.corpus=$HOME/a.txt").data.corpus == "$HOME/a.txt"


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "suggestion"),
    [
        ("encoder.poling=cls", "encoder.poling", "did you mean encoder.pooling?"),
        ("train.lerning_rate=1", "train.lerning_rate", "did you mean train.learning_rate?"),
        ("train.learning-rate=1", "train.learning-rate", "did you mean train.learning_rate?"),
        ("sed=1", "sed", "did you mean seed?"),
        ("clustering.qqqqqqqqqqqqqqqq=1", "clustering.qqqqqqqqqqqqqqqq", "clustering.num_clusters, clustering."),
        ("bogus.key=1", "bogus", "the keys there are: seed, encoder, data, loss, clustering, train"),
    ],
)
def test_unknown_key(override: str, key: str, suggestion: str) -> None:
    text = message(override)
    assert f"unknown key {key}:" in text and suggestion in text and text.startswith("c.yaml: ")


REFUSED = [
    # override(s), what the message must hold: key, value, reason or remedy
    (["encoder.pooling=max"], ["encoder.pooling is 'max'", "'cls'", "'first_last'", "'top2'"]),
    (["encoder.pooling=mask"], ["encoder.pooling is mask", "encoder.prompt is not set", "set a prompt"]),
    (["encoder.prompt=hello"], ["encoder.prompt is 'hello'", "{sentence}", "exactly once"]),
    (["encoder.prompt={sentence} {sentence}"], ["encoder.prompt is '{sentence} {sentence}'", "exactly once"]),
    (["encoder.dropout=0"], ["encoder.dropout is 0", "greater than 0"]),
    (["encoder.dropout=1"], ["encoder.dropout is 1", "less than 1"]),
    (["encoder.num_layers=0"], ["encoder.num_layers is 0", "greater than or equal to 1"]),
    (["encoder.max_length=3"], ["encoder.max_length is 3", "greater than or equal to 4"]),
    (["encoder.max_length=abc"], ["encoder.max_length is 'abc'", "integer"]),
    (["encoder.head=two"], ["encoder.head is 'two'", "'mlp'", "'none'"]),
    (["data.corpus=null"], ["data.corpus is not set", "nothing to learn from", "a path", "demo"]),
    (["data.order=sorted"], ["data.order is 'sorted'", "'random'", "'length_grouped'"]),
    (["data.limit=0"], ["data.limit is 0", "greater than or equal to 1"]),
    (["loss.temperature=0"], ["loss.temperature is 0", "greater than 0"]),
    (["loss.bml_weight=-1"], ["loss.bml_weight is -1", "greater than or equal to 0"]),
    (["loss.bml_alpha=0.4"], ["loss.bml_alpha is 0.4", "loss.bml_beta 0.3", "margins cross", "alpha <= beta"]),
    (["loss.hard_negative_weight=21"], ["loss.hard_negative_weight is 21", "less than or equal to 20"]),
    (["loss.hard_negative_columns=all"], ["loss.hard_negative_columns is 'all'", "'own'", "'not_own_cluster'"]),
    (["loss.bml_reduction=sum"], ["loss.bml_reduction is 'sum'", "'all_pairs'", "'false_negatives'"]),
    (["clustering.num_clusters=1"], ["clustering.num_clusters is 1", "no second nearest", "2 or more, or 0"]),
    (["clustering.num_clusters=-2"], ["clustering.num_clusters is -2", "greater than or equal to 0"]),
    (
        ["clustering.num_clusters=257"],
        ["clustering.num_clusters is 257", "train.global_batch_size (256)", "at most 256"],
    ),
    (["clustering.scope=world"], ["clustering.scope is 'world'", "'batch'", "'corpus'"]),
    (
        ["clustering.scope=corpus", "clustering.num_clusters=501", "clustering.bank_rows=500"],
        ["clustering.num_clusters is 501", "clustering.bank_rows (500)", "a sentence of the bank", "at most 500"],
    ),
    (
        ["clustering.scope=corpus", "clustering.num_clusters=501", "data.limit=500"],
        ["clustering.num_clusters is 501", "data.limit (500)", "at most 500 clusters, or raise data.limit"],
    ),
    (
        ["clustering.scope=corpus", "clustering.bank_rows=500", "clustering.refresh_rows=501"],
        ["clustering.refresh_rows is 501", "clustering.bank_rows (500)", "the same row twice", "at most 500"],
    ),
    (
        ["clustering.bank_rows=500"],
        ["clustering.bank_rows is 500", "scope is batch", "no bank", "set"],
    ),
    (["loss.bank_negatives=2"], ["loss.bank_negatives is 2", "clustering.scope is batch", "leave loss.bank_negatives"]),
    (["clustering.refresh_rows=2"], ["clustering.refresh_rows is 2", "clustering.scope is batch"]),
    (["clustering.recluster_every_steps=2"], ["clustering.recluster_every_steps is 2", "clustering.scope is batch"]),
    (["clustering.false_negative_cosine=0"], ["clustering.false_negative_cosine is 0", "clustering.scope is batch"]),
    (["clustering.false_negative_cosine=2"], ["clustering.false_negative_cosine is 2", "less than or equal to 1"]),
    (["clustering.start_cosine=1.5"], ["clustering.start_cosine is 1.5", "less than or equal to 1"]),
    (["clustering.rate=0"], ["clustering.rate is 0", "greater than 0"]),
    (["clustering.update=median"], ["clustering.update is 'median'", "'replace_sum'"]),
    (["train.global_batch_size=1"], ["train.global_batch_size is 1", "greater than or equal to 2"]),
    (["train.shards=7"], ["train.global_batch_size is 256", "train.shards (7)", "Use a batch of 259"]),
    (["train.shards=0"], ["train.shards is 0", "greater than or equal to 1"]),
    (["train.precision=fp8"], ["train.precision is 'fp8'", "'auto', 'fp32', 'bf16' or 'fp16'"]),
    (["train.warmup_ratio=1"], ["train.warmup_ratio is 1", "less than 1"]),
    (["train.learning_rate=.nan"], ["train.learning_rate is nan", "finite number"]),
    (["evaluation.dev=STSB"], ["evaluation.dev is 'STSB'", "TASK/SUBSET", "STSB/dev"]),
    (["evaluation.dev=../x/y"], ["evaluation.dev is '../x/y'", "TASK/SUBSET"]),
    (["evaluation.sts=structure"], ["evaluation.sts is structure", "data.documents is not set", "name the documents"]),
    (["evaluation.patience=0"], ["evaluation.patience is 0", "greater than or equal to 1"]),
    (["runtime.num_workers=-1"], ["runtime.num_workers is -1", "0 (in this process) or more", "[min, max]"]),
    (["runtime.num_workers=[2, 1]"], ["runtime.num_workers is [2, 1]", "1 <= min <= max"]),
    (["runtime.num_workers=[0, 1]"], ["runtime.num_workers is [0, 1]", "1 <= min <= max"]),
    (["runtime.num_workers=3"], ["allows 3 workers", "train.shards (8)", "multiple of 3", "1, 2, 4, 8 workers"]),
    (["runtime.num_workers=[1, 3]"], ["allows 3 workers", "train.shards (8)", "multiple of 6"]),
    (["runtime.label_selector={market: spot}"], ["num_workers is 0, so no node is chosen", "Give workers"]),
    (["runtime.num_workers=2", "runtime.label_selector={market: '!spot'}"], ["market: !spot is not", "letters"]),
    (["runtime.num_workers=2", "runtime.label_selector={a b: c}"], ["a b: c is not", "{market: spot}"]),
    (["runtime.name=a/b"], ["runtime.name is 'a/b'", "file name", "letters, digits"]),
    (["runtime.name=../up"], ["runtime.name is '../up'", "file name"]),
    (["runtime.keep=0"], ["runtime.keep is 0", "greater than or equal to 1"]),
    (["runtime.max_failures=-2"], ["runtime.max_failures is -2", "greater than or equal to -1"]),
    (["seed=-1"], ["seed is -1", "greater than or equal to 0"]),
    (["train=5"], ["train is 5"]),
]


@pytest.mark.parametrize(("overrides", "parts"), REFUSED, ids=[" ".join(case[0]) for case in REFUSED])
def test_impossible_value(overrides: list[str], parts: list[str]) -> None:
    text = message(*overrides)
    assert text.startswith("c.yaml: ")
    assert [part for part in parts if part not in text] == [], text


def test_there_may_be_more_clusters_than_rows_of_a_batch_if_they_are_of_the_corpus() -> None:
    assert parsed("clustering.scope=corpus", "clustering.num_clusters=4096").clustering.num_clusters == 4096


@pytest.mark.parametrize("override", ["train.learning_rate=.inf", "loss.temperature=.inf", "loss.bml_weight=.inf"])
def test_infinity_is_an_impossible_value(override: str) -> None:
    key = override.partition("=")[0]
    assert f"{key} is inf" in message(override)


@pytest.mark.parametrize(
    ("override", "key"),
    [("runtime.num_workers=two", "runtime.num_workers"), ("data.corpus=[1, b.txt]", "data.corpus")],
)
def test_messages_name_only_keys_that_a_user_can_write(override: str, key: str) -> None:
    text = message(override)
    assert key in text
    for invented in (".int", ".str", "tuple[", "list[", "function-"):
        assert invented not in text


def test_all_mistakes_are_told_at_once() -> None:
    text = message("encoder.poling=cls", "loss.temperature=0")
    assert "encoder.poling" in text and "loss.temperature" in text


def test_no_message_speaks_of_pydantic() -> None:
    for overrides, _ in REFUSED:
        assert "pydantic" not in message(*overrides).lower()


def test_crossed_margins_do_not_matter_without_the_loss() -> None:
    assert parsed("loss.bml_alpha=0.4", "loss.bml_weight=0").loss.bml_alpha == 0.4


@pytest.mark.parametrize(("value", "of", "expected"), [(256, 7, 259), (256, 3, 255), (1, 4, 4), (8, 8, 8), (13, 4, 12)])
def test_nearest_multiple(value: int, of: int, expected: int) -> None:
    assert nearest_multiple(value, of) == expected


# ---- identity -----------------------------------------------------------------------------------------------------


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found


OTHER_VALUES: dict[str, Any] = {
    "runtime.label_selector": {"market": "spot"},
    "encoder.name": "x",
    "encoder.revision": "main",
    "encoder.num_layers": 2,
    "encoder.pooling": "mean",
    "encoder.dropout": 0.2,
    "encoder.prompt": "{sentence} means",
    "encoder.second_prompt": "{sentence} says",
    "data.corpus": "b.txt",
    "data.text_column": "t",
    "data.limit": 5,
    "data.document_column": "page",
    "data.documents": "docs",
    "data.cache_dir": "/cache",
    "loss.bml_alpha": 0.1,
    "loss.teacher": "teacher",
    "clustering.recluster_every_steps": 7,
    "train.max_steps": 3,
    "train.cache_chunk": 64,
    "evaluation.sts": "dir",
    "evaluation.dev": "STSB/test",
    "evaluation.also": ["STSB/test"],
    "evaluation.patience": None,
    "runtime.num_workers": 2,
    "runtime.use_gpu": False,
    "runtime.storage_path": "/elsewhere",
    "runtime.local_path": "/local",
    "runtime.trackers": [],
    "runtime.name": "other",
    "runtime.checkpoint_every_steps": 5,
    "runtime.resize_every_s": 5.0,
}
"""Of keys whose other values do not follow from their kind and default."""


def another_value(key: str, value: Any) -> Any:
    """One that the key may have, and that is not its default."""
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    section, _, name = key.rpartition(".")
    choices = get_args((sections()[section] if section else Config).model_fields[name].annotation)
    if isinstance(value, str):
        return next(choice for choice in choices if choice != value)
    assert isinstance(value, bool | int | float), f"{key} is new: give another value of it in OTHER_VALUES"
    return (
        not value
        if isinstance(value, bool)
        else value // 2 or value + 1
        if isinstance(value, int)
        else value / 2 or 0.5
    )


NEEDS = {
    "runtime.label_selector": ("runtime.num_workers=2",),
    "encoder.second_prompt": ("encoder.prompt={sentence} means",),
    "encoder.denoise": ("encoder.prompt={sentence} means", "encoder.pooling=mask"),
    "data.neighbour_distance": ("data.positives=neighbour",),
    "evaluation.also": ("evaluation.sts=some/directory",),
    "data.crop_ratio": ("data.positives=crop",),
    "data.document_column": ("data.corpus=a.csv",),
    **dict.fromkeys((f"{section}.{key}" for section, key in BANK_KEYS), ("clustering.scope=corpus",)),
}
"""What must be set for the other value to mean anything."""


@pytest.mark.parametrize("key", known_keys())
def test_fingerprint_ignores_where_it_runs_and_nothing_else(key: str) -> None:
    base = parsed(*NEEDS.get(key, ()))
    values = base.resolved()
    *path, last = key.split(".")
    node = values
    for part in path:
        node = node[part]
    other_value = another_value(key, node[last])
    assert node[last] != other_value, "not another value, so this test would prove nothing"
    node[last] = other_value
    other = make_config(values)
    same = key.startswith("runtime.") or key == "data.cache_dir"
    assert (other.fingerprint() == base.fingerprint()) is same
    assert (key in leaves(base.identity())) is not same


def test_fingerprint_is_a_short_stable_hash() -> None:
    assert parsed().fingerprint() == parsed("train.learning_rate=0.00005").fingerprint()
    assert len(parsed().fingerprint()) == 16 and int(parsed().fingerprint(), 16)


# ---- writing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.learning_rate=1e-5", "clustering.rate=1e-3", "runtime.num_workers=[1, 2]", "evaluation.patience=null"],
        [
            'encoder.prompt=This sentence: "{sentence}" means — [MASK].',
            "encoder.pooling=mask",
            "data.corpus=[a, 'b c']",
        ],
        ["encoder.revision='007'", "runtime.name='12'", "data.text_column='on'", "encoder.name='null'"],
    ],
)
def test_dump_and_load_give_the_same(overrides: list[str], tmp_path) -> None:
    config = parsed(*overrides)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert load_config(path).fingerprint() == config.fingerprint()


def test_dump_and_load_keep_text_that_looks_like_a_number(tmp_path) -> None:
    """1e5 is text to PyYAML, which would write it bare, and a number to our reader."""
    config = parsed("runtime.name='1e5'", "encoder.revision='7e3'")
    assert config.runtime.name == "1e5"
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_dump_holds_every_key() -> None:
    assert sorted(leaves(yaml.safe_load(dump_config(parsed())))) == sorted(known_keys())


# ---- the tree itself ----------------------------------------------------------------------------------------------


def test_frozen() -> None:
    config = parsed()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        config.train.shards = 3


def test_every_field_is_documented_beneath_it() -> None:
    found = sections()
    assert set(found) == {"encoder", "data", "loss", "clustering", "train", "evaluation", "runtime"}
    fields = {f"{name}.{key}": field for name, kind in found.items() for key, field in kind.model_fields.items()}
    assert len(fields) >= 50
    bare = [key for key, field in fields.items() if not (field.description or "").strip()]
    assert bare == []
    assert (Config.model_fields["seed"].description or "").strip()


def test_the_check_of_documentation_can_fail() -> None:
    class Bare(Section):
        documented: int = 0
        """Yes."""
        bare: int = 0

    assert Bare.model_fields["documented"].description == "Yes."
    assert Bare.model_fields["bare"].description is None


def test_known_keys_are_all_and_exist() -> None:
    keys = known_keys()
    assert len(keys) == len(set(keys)) and "seed" in keys and "encoder.name" in keys
    config: BaseModel = parsed()
    for key in keys:
        node: Any = config
        for part in key.split("."):
            node = getattr(node, part)


# ---- hostile values ------------------------------------------------------------------------------------------------

HOSTILE = [
    ("seed=9223372036854775808", "seed is 9223372036854775808, beyond 64 bits"),
    ("train.learning_rate=1e300", "train.learning_rate is 1e+300, which 32-bit"),
    ("train.learning_rate=4e-320", "32-bit"),
    ("loss.temperature=.nan", "32-bit"),
    ("loss.temperature=1e400", "32-bit"),
    ("train.epochs=true", "train.epochs is true, but it is not a switch"),
    ("runtime.num_workers=[1, 1000000]", "at most 65,536"),
    ("runtime.num_workers=[1, 60000]", "does not divide train.shards"),
    ("runtime.name=no", "in quotes"),
    ("runtime.name=2024", "reads it as a number"),
    ("runtime.name=cache", "another name"),
    ("runtime.name=" + "n" * 201, "200 bytes"),
    ("train.epochs=12:30", "valid integer"),
    ("train.epochs=2024-01-02", "valid integer"),
    ("train.epochs=0x", "valid integer"),
    ("train.epochs=010", "begins with 0"),
    ("train.global_batch_size=99999999999", "less than or equal to"),
    ("a.b.c.d.e=1", "not section.key=value"),
    ("train=3", "it is a section"),
    ("runtime.storage_path=S3://b/x", "runtime.storage_path 'S3://b/x' is not a well-formed URL"),
    ("runtime.local_path=s3://b/x", "runtime.local_path 's3://b/x': s3:// is not possible"),
    ("data.corpus=[a.txt, ~nobody-of-that-name/x]", "data.corpus '~nobody-of-that-name/x'"),
    ("data.documents=hf://x", "data.documents 'hf://x'"),
    ("data.cache_dir=", "data.corpus"),
    ("evaluation.sts=s3://b/x", "evaluation.sts"),
    ("encoder.name=hf://x", "encoder.name 'hf://x'"),
    ("loss.teacher=s3:///x", "loss.teacher 's3:///x' names no bucket"),
    ('runtime.storage_path="a\\0b"', "control character"),
]


@pytest.mark.parametrize(("override", "reason"), HOSTILE)
def test_hostile_settings_are_refused_by_name(override: str, reason: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config("data: {corpus: null}" if "cache_dir" in override else "data: {corpus: demo}", [override])
    assert reason in str(raised.value) and len(str(raised.value)) < 1200


def test_no_secret_of_a_setting_is_repeated() -> None:
    for override in ("runtime.storage_path=s3://AKIA1:q7w8@b/x", "runtime.storage_path=[s3://AKIA1:q7w8@b/x]"):
        with pytest.raises(ConfigError) as raised:
            parse_config("data: {corpus: demo}", [override])
        assert "q7w8" not in str(raised.value)


def test_large_shards_do_not_take_long() -> None:
    with pytest.raises(ConfigError, match="use 1, 16769023 workers"):
        parse_config(
            "data: {corpus: demo}\ntrain: {shards: 16769023, global_batch_size: 16769023}\nruntime: {num_workers: 2}"
        )


def test_a_saved_configuration_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "q7w8")
    text = "data: {corpus: '${SOME_SECRET}', text_column: '${NOT_SET_ANYWHERE}'}"
    assert parse_saved_config(text, "s").data.corpus == "${SOME_SECRET}"
    assert parse_config("data: {corpus: '${SOME_SECRET}'}").data.corpus == "q7w8"
