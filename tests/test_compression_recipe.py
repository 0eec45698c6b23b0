import pytest
import yaml

from deltamux.compression.quantize import Scheme
from deltamux.compression.recipe import Recipe, dump_recipe, load_recipe


def write(path, text):
    path.write_text(text)
    return path


def test_no_file_gives_two_bits_and_eight_salient_channels():
    recipe = load_recipe(None)
    assert recipe.linear.scheme is Scheme.INT2
    assert recipe.linear.salient_channels == 8
    assert recipe.embedding.scheme is Scheme.INT4


def test_an_empty_file_gives_the_default(tmp_path):
    assert load_recipe(write(tmp_path / "recipe.yaml", "")) == Recipe()


def test_what_a_file_does_not_name_keeps_its_default(tmp_path):
    recipe = load_recipe(write(tmp_path / "recipe.yaml", "linear: {scheme: ternary}"))
    assert recipe.linear.scheme is Scheme.TERNARY
    assert recipe.linear.salient_channels == 8


def test_a_dumped_recipe_is_read_back(tmp_path):
    recipe = Recipe.model_validate(
        {"linear": {"scheme": "int3", "salient_channels": 0}, "calibration": {"samples": 3}}
    )
    assert load_recipe(write(tmp_path / "recipe.yaml", dump_recipe(recipe))) == recipe


def test_a_dump_is_plain_yaml():
    assert yaml.safe_load(dump_recipe(Recipe()))["linear"] == {
        "scheme": "int2",
        "salient_channels": 8,
    }


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("linear: {scheme: int5}", "linear.scheme"),
        ("linear: {salient_channels: -1}", "linear.salient_channels"),
        ("linear: {width: 2}", "linear.width"),
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


@pytest.mark.parametrize("text", ["linear: [", "- one\n- two", "just words"])
def test_what_is_no_recipe_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match="is not a recipe"):
        load_recipe(write(tmp_path / "recipe.yaml", text))


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Recipe().version = 1
