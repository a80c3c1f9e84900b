"""Matrix resampling against torch's own cropping, resizing and convolving."""

import pytest
import torch
import torch.nn.functional as F

from dino_adapters.pretrain.resample import apply_matrices, blur_matrices, crop_matrices


def images(count, bands=3, height=40, width=52):
    return torch.rand(count, bands, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [8, 24, 40, 96])
@pytest.mark.parametrize("bands", [1, 3, 13])
def test_equals_crop_then_antialiased_bicubic(size, bands):
    x = images(4, bands)
    top, left = torch.tensor([0, 3, 7, 20]), torch.tensor([0, 10, 2, 31])
    height, width = torch.tensor([40, 20, 33, 9]), torch.tensor([52, 42, 17, 11])
    ours = apply_matrices(
        x, crop_matrices(top, height, 40, size), crop_matrices(left, width, 52, size)
    )
    for i in range(4):
        crop = x[i : i + 1, :, top[i] : top[i] + height[i], left[i] : left[i] + width[i]]
        theirs = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)
        torch.testing.assert_close(ours[i : i + 1], theirs, atol=2e-5, rtol=0)


def test_a_whole_image_at_its_own_size_is_itself():
    x = images(2, height=16, width=16)
    same = crop_matrices(torch.zeros(2).long(), torch.full((2,), 16), 16, 16)
    torch.testing.assert_close(apply_matrices(x, same, same), x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [5, 24])
def test_blur_equals_a_mirrored_convolution(size):
    x = images(3, 2, size, size)
    sigma = torch.tensor([0.3, 1.0, 2.0])
    matrices = blur_matrices(sigma, size)
    reach = min(4, size - 1)
    taps = torch.arange(-reach, reach + 1)
    for i in range(3):
        kernel = torch.exp(-0.5 * (taps / sigma[i]) ** 2)
        kernel = (kernel / kernel.sum()).outer(kernel / kernel.sum())[None, None]
        padded = F.pad(x[i : i + 1], (reach,) * 4, mode="reflect")
        theirs = F.conv2d(padded.transpose(0, 1), kernel).transpose(0, 1)
        ours = apply_matrices(x[i : i + 1], matrices[i : i + 1], matrices[i : i + 1])
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_no_blur_is_the_identity():
    torch.testing.assert_close(blur_matrices(torch.zeros(1), 7)[0], torch.eye(7))
