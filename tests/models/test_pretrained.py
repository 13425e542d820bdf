"""Files of weights: what is read, what is refused, what is said of them."""

import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from sync_jax.config import default_config
from sync_jax.errors import InputError
from sync_jax.models import make_network
from sync_jax.models.pretrained import load_pretrained, read_weights, torch_name

SMALL = Path(__file__).parent / "torch_small.pth"  # written by torch.save of PyTorch 2.13


def variables(classes=3, name="resnet18"):
    config = default_config().model
    config.name, config.width = name, 2
    network = make_network(config, heads=("selection",), num_classes=classes, target_coverage=0.8)
    images = np.zeros((1, 32, 32, 3), np.float32)
    return jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=False))


def test_a_file_that_pytorch_wrote():
    weights = read_weights(SMALL)
    np.testing.assert_array_equal(
        weights["conv1.weight"], np.arange(54, dtype=np.float32).reshape(2, 3, 3, 3)
    )
    np.testing.assert_array_equal(weights["bn1.weight"], [3, 4])
    np.testing.assert_array_equal(weights["fc.weight"], np.ones((3, 2)))  # a Parameter
    np.testing.assert_array_equal(weights["view"], [[1, 4], [2, 5]])  # offset and strides
    assert weights["half"].dtype == np.float16
    assert weights["bn1.num_batches_tracked"] == 7


@pytest.mark.parametrize(("path", "expected"), [
    ("backbone/conv1/kernel", "conv1.weight"),
    ("backbone/bn1/scale", "bn1.weight"),
    ("backbone/layer3_0/downsample_conv/kernel", "layer3.0.downsample.0.weight"),
    ("backbone/layer3_0/downsample_bn/var", "layer3.0.downsample.1.running_var"),
    # torchvision's vgg16_bn: its features are 0 conv, 1 norm, 2 relu, 3 conv, ..., 6 pool, 7.
    ("backbone/features_conv0/bias", "features.0.bias"),
    ("backbone/features_norm0/mean", "features.1.running_mean"),
    ("backbone/features_conv2/kernel", "features.7.weight"),
    ("backbone/features_conv12/kernel", "features.40.weight"),
    ("class_head/kernel", "fc.weight"),
])  # fmt: skip
def test_names_are_torchvisions(path, expected):
    assert torch_name(path.split("/")) == expected


def test_what_matches_is_replaced_and_the_rest_is_named():
    before = variables(classes=5)
    params, batch_stats, message = load_pretrained(SMALL, before["params"], before["batch_stats"])
    kernel = params["backbone"]["conv1"]["kernel"]
    assert kernel.shape == (3, 3, 3, 2)
    assert kernel[1, 2, 0, 1] == 1 * 27 + 0 * 9 + 1 * 3 + 2  # out 1, in 0, row 1, column 2
    np.testing.assert_array_equal(params["backbone"]["bn1"]["scale"], [3, 4])
    assert params["class_head"]["kernel"] is before["params"]["class_head"]["kernel"]
    assert jax.tree.structure((params, batch_stats)) == jax.tree.structure(
        (before["params"], before["batch_stats"])
    )
    assert message.startswith(
        "pretrained: 2 arrays from torch_small.pth; not in the file: backbone"
    )
    assert "of another shape: fc.weight (3, 2) for class_head/kernel (16, 5)" in message
    assert message.endswith("not in this network: half, view")


def test_safetensors_of_half_precision(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"bn1.bias": np.asarray([1, 2], np.float16)}, path)
    before = variables()
    params, _, _ = load_pretrained(path, before["params"], before["batch_stats"])
    bias = params["backbone"]["bn1"]["bias"]
    np.testing.assert_array_equal(bias, np.asarray([1, 2], np.float32))
    assert bias.dtype == np.float32


def tensor_pickle(*, key="0", size=4, offset=0, shape=(2, 2), strides=(2, 1)):
    """A state dict as torch.save spells it, with anything in it."""
    storage = f"(S'storage'\nctorch\nFloatStorage\nS'{key}'\nS'cpu'\nI{size}\ntQ"
    shape, strides = (f"({''.join(f'I{n}' + chr(10) for n in x)}t" for x in (shape, strides))
    arguments = f"({storage}I{offset}\n{shape}{strides}I00\nNt"
    return f"(dS'w'\nctorch._utils\n_rebuild_tensor_v2\n{arguments}Rs.".encode()


def write_pth(path, contents, **storages):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", contents)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key.removeprefix('storage')}", data)
    return path


def test_tensors_beyond_their_storage_are_refused(tmp_path):
    data = np.arange(4, dtype="<f4").tobytes()
    good = write_pth(tmp_path / "good.pth", tensor_pickle(), storage0=data)
    np.testing.assert_array_equal(read_weights(good)["w"], [[0, 1], [2, 3]])
    for number, fields in enumerate(
        (
            {"shape": (2, 3)},
            {"offset": 1},
            {"offset": -1},
            {"strides": (-1, 1)},
            {"strides": (1,)},
            {"size": 5},
            {"key": "1"},
        )
    ):
        path = write_pth(tmp_path / f"{number}.pth", tensor_pickle(**fields), storage0=data)
        with pytest.raises(InputError):
            read_weights(path)


def test_a_tensor_that_would_expand_takes_no_memory(tmp_path):
    """One number with strides of 0, a thousand million times."""
    content = tensor_pickle(size=1, shape=(32_000, 32_000), strides=(0, 0))
    path = write_pth(tmp_path / "w.pth", content, storage0=np.float32(3).tobytes())
    weights = read_weights(path)["w"]
    assert (weights.shape, weights.strides) == ((32_000, 32_000), (0, 0))
    assert weights[31_999, 7] == 3


@pytest.mark.parametrize(("name", "contents", "message"), [
    ("a.safetensors", b"\xff" * 100, "cannot be read"),
    ("a.pth", b"", "no file of torch.save"),
    ("a.pth", b"\x80\x02}q\x00.", "no file of torch.save"),
])  # fmt: skip
def test_damaged_files_are_refused_in_one_line(tmp_path, name, contents, message):
    path = tmp_path / name
    path.write_bytes(contents)
    with pytest.raises(InputError, match=message):
        read_weights(path)


def test_a_file_that_fits_nowhere_and_one_with_nan(tmp_path):
    before = variables()
    for weights, message in (
        ({"blocks.0.weight": np.ones(3, np.float32)}, "no name and shape fits .* blocks.0.weight"),
        ({"bn1.bias": np.asarray([1, np.nan], np.float32)}, "bn1.bias holds a number that is not"),
    ):
        path = tmp_path / "weights.safetensors"
        save_file(weights, path)
        with pytest.raises(InputError, match=message):
            load_pretrained(path, before["params"], before["batch_stats"])


@pytest.mark.parametrize("path", ["nowhere.pth", "weights.h5"])
def test_what_is_no_file_of_weights(path):
    before = variables()
    with pytest.raises(InputError, match=r"must be a file that ends in .safetensors, .pth or .pt"):
        load_pretrained(Path(path), before["params"], before["batch_stats"])
