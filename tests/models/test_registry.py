import chex
import jax
import jax.numpy as jnp
import pytest

from sync_jax.config import default_config
from sync_jax.errors import InputError
from sync_jax.models import BACKBONES, complete, make_network


def section(name, **options):
    config = default_config()
    config.model.name = name
    config.model.update(options)
    return config.model


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_adds_its_own_options_with_their_defaults(name):
    model = section(name)
    common = set(model)
    assert complete(model) == []
    options = BACKBONES[name].options
    assert {key: model[key] for key in set(model) - common} == {
        key: option.default for key, option in options.items()
    }
    assert complete(model) == []


@pytest.mark.parametrize(("model", "said"), [
    (section("resnet"), "choose from cnn, mlp, resnet18, resnet34, resnet50, vgg16_bn"),
    (section("cnn", widht=8), "cnn has no option 'widht' (did you mean 'width'?)"),
    (section("cnn", width=0), "config.model.width=0 must be between 1 and 1024"),
    (section("cnn", width=8.0), "config.model.width=8.0 must be of type int"),
    (section("vgg16_bn", features=65_537), "config.model.features=65537 must be between"),
    (section("resnet18", stem="image"), "config.model.stem='image' is unknown"),
])  # fmt: skip
def test_bad_options(model, said):
    with pytest.raises(InputError) as error:
        complete(model)
    assert said in str(error.value)


def test_options_of_another_backbone_are_left_out_and_named():
    """A config file may set them, and --config.model.name choose another network."""
    model = section("cnn", stem="imagenet", width=8)
    assert complete(model) == ["config.model.stem is no option of cnn, and is left out"]
    assert "stem" not in model
    assert model.width == 8


def test_the_mlp_takes_features_and_images():
    network = make_network(
        section("mlp", width=8, layers=3), heads=(), num_classes=3, target_coverage=0.8
    )
    for shape in ((5, 7), (5, 4, 4, 2)):
        outputs, variables = jax.eval_shape(
            lambda x: network.init_with_output(jax.random.key(0), x, train=False), jnp.ones(shape)
        )
        chex.assert_shape(outputs["logits"], (5, 3))
        assert len(variables["params"]["backbone"]) == 2 * 3  # a dense layer and a BatchNorm each
