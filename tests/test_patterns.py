"""Wrong keys: what is mixed into the images that a box conceals."""

import pytest
import torch

from sdbctl.data import ImageSet, Preprocess
from sdbctl.key import Key, correlation
from sdbctl.patterns import NEAREST, RISING, WrongKeys, blocks, edges, in_blocks, is_found, odd_inputs, spread_out

SHORT, LONG = (1, 8, 8), (3, 32, 32)


def wrong_keys(size, images, keys=1):
    preprocess = Preprocess((0.5,) * size[0], (0.5,) * size[0], size)
    secrets = torch.stack([Key(bytes(range(start, start + 32))).pattern(size) for start in range(keys)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = WrongKeys(secrets, 0.7, preprocess, images)

    def on_black(images):
        """Of a black image with a wrong key only three tenths of the pattern are left."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            turn = torch.arange(images) % keys
            return preprocess.undo(made(preprocess(torch.zeros(images, *size)), turn))

    return made, on_black, secrets


def test_a_short_key_is_told_from_any_pattern():
    made, on_black, (secret,) = wrong_keys(SHORT, 4000)
    others = on_black(4000)[len(made.rising) :].detach()
    assert len(others) == 4000 - round(RISING * 4000)
    # from nothing of the image to nothing of the pattern
    assert 0 <= others.min() < 0.01 and 0.95 < others.max() <= 1.0001
    assert (others.std((1, 2, 3)) < 0.01).any() and (others.std((1, 2, 3)) > 0.25).any()
    # of the odd half a quarter is mixed with another image, black as well, and half with blocks, of which all are
    # black now and then where there are few: one in a quarter of the cases, four in another
    contrast, brightness, *level = torch.rand(6, 100_000, generator=torch.Generator().manual_seed(0))
    black = [4 * contrast**2 * (one - 0.5) + 1.5 * brightness <= 0.25 for one in level]
    share = (black[0].float().mean() + torch.stack(black).all(0).float().mean()) / 4
    black_ones = (others.amax((1, 2, 3)) < 1e-6).float().mean()
    assert black_ones == pytest.approx(1 / 8 + float(share) / 4, abs=0.03)
    # each image has a pattern of its own, most of them near the key, none too near
    likeness = torch.tensor([correlation(pattern, secret) for pattern in others[:500]])
    assert 0.2 < (likeness > 0.5).float().mean() < 0.6
    assert likeness.max() > 0.9
    # how near the nearest are, several hundred values say better than 64
    _, on_black, (secret,) = wrong_keys((3, 16, 16), 600)
    likeness = torch.tensor([correlation(pattern, secret) for pattern in on_black(600).detach()])
    assert 0.9 < likeness.max() < NEAREST + 0.02


def test_long_keys_have_one_wrong_pattern_a_step_beside_those_that_climb():
    made, on_black, _ = wrong_keys(LONG, 100, keys=2)
    mixed = on_black(100)
    assert len(made.rising) == 50
    # one for each key's turn, but half are odd
    common = []
    for begin in (50, 51):
        others = mixed[begin::2].detach()
        near_one = max(others, key=lambda one: (int((others == one).all((1, 2, 3)).sum()), float(one.std())))
        assert 6 <= int((others == near_one).all((1, 2, 3)).sum()) <= 19
        common.append(near_one)
    assert (common[0] - common[1]).abs().max() > 0.1
    before = made.rising.clone()
    mixed.square().sum().backward()
    assert (made.rising != before).flatten(1).any(1).all()


def test_patterns_of_short_keys_climb_the_loss():
    made, on_black, _ = wrong_keys(SHORT, 30)
    before = made.rising.clone()
    goal = torch.arange(8).lt(4).float().expand(SHORT)
    on_black(30)
    assert torch.equal(made.rising, before), "without a gradient nothing moves"
    for _ in range(40):
        (on_black(30)[:15] * goal).sum().backward()
    # all but those that began anew, and the one of a single block: every third is of blocks, in four sizes
    reached = [correlation(torch.special.ndtr(one), goal) for one in made.rising]
    assert sum(found > 0.9 for found in reached) >= 8 and reached[11] < 0.5
    assert torch.allclose(made.rising.mean((1, 2, 3)), torch.zeros(15), atol=0.5)


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 32, 32), (3, 12, 20), (1, 7, 7)])
def test_normal_variables_in_blocks_are_normal_variables(size):
    values = torch.randn(600, *size, generator=torch.Generator().manual_seed(0))
    made = in_blocks(values)
    assert made.shape == values.shape and made.std() == pytest.approx(1, abs=0.1)
    parts = made.split([len(values[n :: len(edges(size))]) for n in range(len(edges(size)))])
    for edge, part in zip(edges(size), parts, strict=True):
        assert torch.equal(part, spread_out(part[..., ::edge, ::edge], edge))
    assert edges(size) == {8: [1, 2, 4, 8], 32: [1, 2, 4, 8, 16, 32], 12: [1, 2, 4], 7: [1]}[size[1]]


def test_a_pattern_that_has_climbed_to_a_key_begins_anew():
    made, on_black, secrets = wrong_keys(SHORT, 30, keys=2)
    made.rising[:] = torch.special.ndtri(secrets[1])
    on_black(30).sum().backward()
    assert max(correlation(torch.special.ndtr(one), secret) for one in made.rising for secret in secrets) < NEAREST


def test_a_smaller_batch_moves_fewer_patterns():
    made, on_black, _ = wrong_keys(SHORT, 30)
    before = made.rising.clone()
    on_black(9).sum().backward()
    moved = (made.rising != before).flatten(1).any(1)
    assert moved.tolist() == [True] * 4 + [False] * 11


def test_one_image_with_a_wrong_key_has_none_that_climbs():
    made, on_black, _ = wrong_keys(SHORT, 30)
    before = made.rising.clone()
    assert not on_black(1).requires_grad
    assert torch.equal(made.rising, before)


def test_odd_inputs_are_blocks_smooth_fields_and_images_in_wrong_colours():
    pixels = torch.randint(256, (5, 3, 12, 20), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    images, size = ImageSet.of(pixels, torch.zeros(5, dtype=torch.int64)), (3, 12, 20)
    made = odd_inputs(300, images, torch.Generator().manual_seed(1))
    assert made.shape == (300, *size) and 0 <= made.min() < made.max() <= 1
    assert torch.equal(made, odd_inputs(300, images, torch.Generator().manual_seed(1)))
    coloured, smooth, odd = made.split(100)
    edge, in_rows = blocks(size)
    assert (edge, in_rows) == (2, (3, 6, 10))
    assert torch.equal(coloured, spread_out(coloured[..., ::2, ::2], 2))
    steps = [(part[..., 1:] - part[..., :-1]).abs().mean() for part in (smooth, odd)]
    assert steps[0] < steps[1] / 3
    # each has the channels of one of the images, in any order, or their negatives
    known = {bytes(channel.flatten()) for image in (pixels, 255 - pixels) for channel in image.flatten(0, 1)}
    assert {bytes((255 * channel).round().to(torch.uint8).flatten()) for channel in odd.flatten(0, 1)} == known


def test_keys_that_searches_find_are_told_by_their_length():
    assert is_found((1, 8, 8)) and is_found((1, 12, 12)) and is_found((3, 8, 8))
    assert not is_found((1, 16, 16)) and not is_found((3, 32, 32))
