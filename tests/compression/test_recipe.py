import pytest
import yaml

from deltamux.compression.recipe import PRESETS, Recipe, dump_recipe, load_recipe
from deltamux.compression.rounding.quantize import Scheme


def write(path, text):
    path.write_text(text)
    return path


def test_no_file_gives_entropy_coded_linears_at_one_bit():
    recipe = load_recipe(None)
    assert recipe.linear.scheme == recipe.embedding.scheme == "coded"
    assert recipe.linear.fixed_scheme is recipe.embedding.fixed_scheme is None
    assert recipe.linear.feedback
    assert recipe.allocation.bits == 1


def test_presets_differ_in_bits():
    limits = [PRESETS[name].allocation for name in ("small", "balanced", "faithful")]
    assert [limit.bits for limit in limits] == [0.5, 1.0, 2.0]
    assert [limit.slot_bits for limit in limits] == [1.7, 2.2, 4.2]


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({}, 2.2),
        ({"allocation": {"bits": 1.0}}, 2.2),
        ({"allocation": {"num_bytes": 9}}, 2.2),
        ({"allocation": {"bits": 1.1}}, 4.2),
        ({"allocation": {"target_kl": 0.1}}, 4.2),
        ({"allocation": {"bits": 3.0, "slot_bits": 2.5}}, 2.5),
        ({"linear": {"scheme": "int4"}}, None),
        ({"linear": {"scheme": "int4"}, "allocation": {"slot_bits": 5.0}}, 5.0),
        ({"lossless": True}, None),
    ],
)
def test_the_limit_in_a_slot_goes_with_that_on_disk(settings, bits):
    assert Recipe.model_validate(settings).limiting_slot_bits == bits


def test_an_empty_file_gives_the_default(tmp_path):
    assert load_recipe(write(tmp_path / "recipe.yaml", "")) == Recipe()


def test_what_a_file_does_not_name_keeps_its_default(tmp_path):
    recipe = load_recipe(write(tmp_path / "recipe.yaml", "linear: {scheme: ternary}"))
    assert recipe.linear.fixed_scheme is Scheme.TERNARY
    assert recipe.embedding == Recipe().embedding


def test_a_dumped_recipe_is_read_back(tmp_path):
    recipe = Recipe.model_validate(
        {
            "linear": {"pruning": {"score": "wanda", "pattern": "2:4"}},
            "allocation": {"method": "evolution", "importance": "fisher", "num_bytes": 10_000},
            "calibration": {"samples": 3},
        }
    )
    assert load_recipe(write(tmp_path / "recipe.yaml", dump_recipe(recipe))) == recipe


def test_a_dump_is_plain_yaml():
    assert yaml.safe_load(dump_recipe(Recipe()))["linear"] == {
        "scheme": "coded",
        "salient_channels": 0,
        "feedback": True,
        "low_rank": True,
        "pruning": None,
    }


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("linear: {scheme: int5}", "linear.scheme"),
        ("linear: {salient_channels: -1}", "linear.salient_channels"),
        ("linear: {width: 2}", "linear.width"),
        ("linear: {scheme: quinary}", "linear.scheme"),
        ("embedding: {scheme: sign}", "embedding.scheme"),
        ("embedding: {step: 0}", "embedding.step"),
        ("allocation: {bits: 0}", "allocation.bits"),
        ("allocation: {bits: .inf}", "allocation.bits"),
        ("allocation: {num_bytes: 0}", "allocation.num_bytes"),
        ("allocation: {slot_bits: 0}", "allocation.slot_bits"),
        ("allocation: {target_kl: .nan}", "allocation.target_kl"),
        ("allocation: {method: greedy}", "allocation.method"),
        ("distillation: {learning_rate: .inf}", "distillation.learning_rate"),
        ("calibration: {samples: 0}", "calibration.samples"),
        ("calibration: {max_tokens: 7}", "calibration.max_tokens"),
        ("version: 2", "version"),
        ("unknown: 1", "unknown"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path, text, field):
    path = write(tmp_path / "recipe.yaml", text)
    with pytest.raises(ValueError, match=rf"recipe\.yaml' is not a recipe: [^$]*{field}"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("allocation: {bits: 1, num_bytes: 9}", "give one of bits, num_bytes and target_kl"),
        ("allocation: {bits: 1, target_kl: 0.1}", "give one of bits, num_bytes and target_kl"),
        ("{linear: {scheme: int2}, allocation: {bits: 1}}", "leaves nothing to allocate"),
        ("linear: {scheme: int2, pruning: {}}", "pruning needs scheme 'coded'"),
        ("linear: {salient_channels: 8}", "salient_channels need a scheme of fixed width"),
        ("allocation: {proposer: {base_url: u, model: m}}", "a proposer needs method 'evolution'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path, text, rule):
    with pytest.raises(ValueError, match=rule):
        load_recipe(write(tmp_path / "recipe.yaml", text))


@pytest.mark.parametrize("text", ["linear: [", "- one\n- two", "just words"])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="is not a recipe"):
        load_recipe(write(tmp_path / "recipe.yaml", text))


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().version = 1
