"""Windows of tokens and of images against loops over the windows."""

import pytest
import torch
from timm.layers import Attention, DropPath

from bigdet.models.backbones.timm_net import TimmPlain
from bigdet.models.backbones.windows import cut_image, join_windows, use_windows

EVA02 = "eva02_tiny_patch14_224"
SMALL = {"embed_dim": 64, "num_heads": 2, "depth": 8}


def attention_pair():
    """An attention layer of timm, and the same one within windows of 3x3 tokens after 2 others."""
    torch.manual_seed(0)
    whole, windowed = (Attention(8, num_heads=2, qkv_bias=True).double() for _ in range(2))
    windowed.load_state_dict(whole.state_dict())
    use_windows(windowed, 3, num_prefix=2)
    return whole, windowed


def test_windows_of_tokens_equal_a_loop_over_them():
    whole, windowed = attention_pair()
    x = torch.randn(2, 2 + 4 * 5, 8, dtype=torch.float64)
    windowed.grid_size = (4, 5)
    found = windowed(x)
    for image in range(2):
        grid = torch.zeros(6, 6, 8, dtype=torch.float64)  # the next multiples of 3
        grid[:4, :5] = x[image, 2:].view(4, 5, 8)
        expected, prefixes = torch.zeros_like(grid), []
        for top in (0, 3):
            for left in (0, 3):
                tokens = grid[top : top + 3, left : left + 3].reshape(9, 8)
                attended = whole(torch.cat([x[image, :2], tokens])[None])[0]
                prefixes.append(attended[:2])
                expected[top : top + 3, left : left + 3] = attended[2:].view(3, 3, 8)
        torch.testing.assert_close(found[image, 2:].view(4, 5, 8), expected[:4, :5])
        torch.testing.assert_close(found[image, :2], sum(prefixes) / 4)


def test_one_window_is_attention_over_all_tokens():
    whole, windowed = attention_pair()
    x = torch.randn(2, 2 + 9, 8, dtype=torch.float64)
    windowed.grid_size = (3, 3)
    torch.testing.assert_close(windowed(x), whole(x))


def test_an_image_is_cut_row_by_row_and_joined_again():
    images = torch.randn(2, 3, 8, 12)
    windows = cut_image(images, 2)
    assert windows.shape == (8, 3, 4, 6)
    for image in range(2):
        for row in range(2):
            for column in range(2):
                expected = images[image, :, 4 * row : 4 * row + 4, 6 * column : 6 * column + 6]
                assert torch.equal(windows[4 * image + 2 * row + column], expected)
    assert torch.equal(join_windows(windows, 2), images)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_four_blocks_at_the_ends_of_the_quarters_attend_over_the_image(name):
    backbone = TimmPlain(name, token_window=2, **SMALL)
    is_windowed = [hasattr(block.attn, "window") for block in backbone.net.blocks]
    assert is_windowed == [True, False] * 4


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", EVA02])
def test_blocks_with_rotary_positions_have_no_windows_of_tokens_unasked(name):
    backbone = TimmPlain(name, **SMALL)
    assert not any(hasattr(block.attn, "window") for block in backbone.net.blocks)


def test_windows_with_rotary_positions_equal_a_loop_over_them():
    torch.manual_seed(0)
    backbone = TimmPlain(EVA02, rope_window=3, global_blocks=2, **SMALL).double().eval()
    blocks = backbone.net.blocks
    assert [hasattr(block.attn, "window") for block in blocks] == [True, True, True, False] * 2
    whole = TimmPlain(EVA02, **SMALL).double().eval()
    whole.load_state_dict(backbone.state_dict())
    given, found = {}, {}
    for place in (0, 3):  # of either kind
        blocks[place].register_forward_pre_hook(
            lambda _module, inputs, place=place: given.update({place: inputs[0]})
        )
        blocks[place].register_forward_hook(
            lambda _module, _inputs, output, place=place: found.update({place: output})
        )
    with torch.no_grad():
        backbone.features(torch.randn(1, 3, 64, 96, dtype=torch.float64))  # 4 x 6 patches
        rope = whole.net.rope.get_embed((4, 6))
        torch.testing.assert_close(found[3], whole.net.blocks[3](given[3], rope=rope))
        # By hand: the window alone, with the positions of an image of 3 x 3 patches.
        rope = whole.net.rope.get_embed((3, 3))
        block, tokens = whole.net.blocks[0], given[0]
        normed = torch.zeros(1, 6, 6, 64, dtype=torch.float64)
        normed[:, :4] = block.norm1(tokens[:, 1:]).view(1, 4, 6, 64)
        attended, prefixes = torch.zeros_like(normed), []
        for top in (0, 3):
            for left in (0, 3):
                window = normed[:, top : top + 3, left : left + 3].reshape(1, 9, 64)
                out = block.attn(torch.cat([block.norm1(tokens[:, :1]), window], 1), rope=rope)
                prefixes.append(out[:, :1])
                attended[:, top : top + 3, left : left + 3] = out[:, 1:].view(1, 3, 3, 64)
        mean = sum(prefixes) / 4
        x = tokens + torch.cat([mean, attended[:, :4].reshape(1, 24, 64)], 1)
        torch.testing.assert_close(found[0], x + block.mlp(block.norm2(x)))


def test_an_image_of_one_window_is_seen_as_without_windows():
    torch.manual_seed(0)
    backbone = TimmPlain(EVA02, rope_window=4, **SMALL).double().eval()
    whole = TimmPlain(EVA02, **SMALL).double().eval()
    whole.load_state_dict(backbone.state_dict())
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(backbone.features(images), whole.features(images))
        other = torch.randn(1, 3, 64, 128, dtype=torch.float64)
        assert not torch.allclose(backbone.features(other), whole.features(other))


def test_positions_in_a_window_are_those_of_eva02s_detectors():
    # EVA-02/det, VisionRotaryEmbeddingFast: the places of 8 patches are scaled to the 16 of the
    # training; a half of the channels turns with the row, the other with the column.
    backbone = TimmPlain(EVA02, rope_window=8, **SMALL)
    with torch.no_grad():
        backbone.features(torch.zeros(1, 3, 64, 64))
    half = 64 // 2 // 2  # of a head's channels, two heads
    frequencies = 10_000.0 ** (-torch.arange(0, half, 2).double() / half)
    angles = (torch.arange(8).double() / 8 * 16)[:, None] * frequencies
    angles = angles.repeat_interleave(2, dim=1)
    rows = angles[:, None].expand(8, 8, half)
    columns = angles[None].expand(8, 8, half)
    table = torch.cat([rows, columns], dim=2).flatten(0, 1)
    found = backbone.net.blocks[0].attn.window_rope
    torch.testing.assert_close(found, torch.cat([table.sin(), table.cos()], 1).float())


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_tiny_patch16_224"])
def test_a_window_of_the_image_gets_the_features_of_an_image_of_its_own(name):
    torch.manual_seed(0)
    backbone = TimmPlain(name, image_windows=3, token_window=None, **SMALL).double().eval()
    assert backbone.channels == [32, 64, 128, 128]  # of 2 x 64
    images = torch.randn(1, 3, 96, 192, dtype=torch.float64)
    whole = torch.nn.functional.interpolate(images, size=(32, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        found = backbone.features(images)
        assert found.shape == (1, 128, 6, 12)
        for row in range(3):
            for column in range(3):
                window = images[..., 32 * row : 32 * row + 32, 64 * column : 64 * column + 64]
                torch.testing.assert_close(
                    found[:, :64, 2 * row : 2 * row + 2, 4 * column : 4 * column + 4],
                    backbone.net(window, indices=[7])[0],
                )
        small = backbone.net(whole, indices=[7])[0]
        spread = torch.nn.functional.interpolate(small, size=(6, 12), mode="bilinear")
        torch.testing.assert_close(found[:, 64:], spread)


def test_taps_are_the_blocks_at_their_depths_after_the_last_norm():
    torch.manual_seed(0)
    name = "vit_small_patch16_dinov3"
    backbone = TimmPlain(name, taps=[2, 5, 6], final_norm=True, **SMALL).double().eval()
    assert len(backbone.net.blocks) == 6  # what comes after the last is not there
    torch.nn.init.uniform_(backbone.net.norm.weight, 0.5, 2.0)
    images = torch.randn(1, 3, 64, 32, dtype=torch.float64)
    outputs = []
    hooks = [
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for block in backbone.net.blocks
    ]
    with torch.no_grad():
        found = backbone.features(images)
        for hook in hooks:
            hook.remove()
        for place, depth in enumerate((2, 5, 6)):
            tokens = backbone.net.norm(outputs[depth - 1])[:, 5:]  # a class token and 4 registers
            expected = tokens.transpose(1, 2).view(1, 64, 4, 2)
            torch.testing.assert_close(found[:, 64 * place : 64 * place + 64], expected)


def test_drop_path_grows_to_its_rate():
    backbone = TimmPlain("vit_tiny_patch16_224", drop_path=0.2, **SMALL)
    rates = [layer.drop_prob for layer in backbone.modules() if isinstance(layer, DropPath)]
    assert rates == pytest.approx([0.2 * index / 7 for index in range(1, 8) for _ in range(2)])
