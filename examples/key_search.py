"""How often a search by answers alone finds a pattern that opens a box, and how near the key it is.

    python examples/key_search.py BOX.onnx KEY_FILE DATA [--searches 20] [--rounds 100] [--strength 0.7] [--coins]

Each search is the suite's (``searched_key``): 100 rounds of natural evolution strategies over the order of the levels,
judged by the answers to 64 transfer images, 102,400 queries. Other strengths than the box's, and patterns of black and
white alone, are tried on demand. Printed are the correlation with the key, which a search cannot know, the share of 200
test images whose answer says more than the predicted class, and that of right classes.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from sdbctl import boxfile, data
from sdbctl.attacks.keys import SEARCH_IMAGES, opened, search
from sdbctl.data import ImageSet
from sdbctl.key import Key, correlation, embed, ordered
from sdbctl.teacher import OnnxTeacher
from sdbctl.wrappers import deviation

TESTED = 200
OPEN = 0.05
"""Share of answers from which a box is open."""


def coins(values: Tensor) -> Tensor:
    """Half of the values black, half white."""
    return (values > values.median()).float()


def main() -> None:
    """Print a line for each search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("box", type=Path)
    parser.add_argument("key_file", type=Path)
    parser.add_argument("data")
    parser.add_argument("--searches", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, metavar="SEED")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--strength", type=float)
    parser.add_argument("--coins", action="store_true")
    parser.add_argument("--block", type=int, default=1)
    asked = parser.parse_args()

    meta, teacher = boxfile.read_metadata(asked.box), OnnxTeacher(asked.box, torch.device("cpu"))
    assert meta is not None
    splits = data.split(
        data.load(asked.data, root=Path(), size=meta.preprocess.size[1]),
        **{name: meta.data[name] for name in ("transfer", "validation", "test")},
    )
    secret = Key.load(asked.key_file).pattern(meta.preprocess.size)

    def answers(images: ImageSet, pattern: Tensor, strength: float) -> Tensor:
        x = images.pixels.float() / 255
        return teacher.logits(meta.preprocess(embed(x, pattern, strength)))

    own, tested = splits.transfer.first(SEARCH_IMAGES).alone(), splits.test.first(TESTED).alone()

    def says(pattern: Tensor, strength: float) -> tuple[float, float]:
        z = answers(tested, pattern, strength)
        beyond = deviation(z) > meta.measured["flat_deviation"]
        return float(beyond.float().mean()), float((z.argmax(1) == tested.labels).float().mean())

    strength = asked.strength or meta.strength

    def judge(pattern: Tensor) -> float:
        return float(opened(answers(own, pattern, strength), own.labels))

    channels, height, width = meta.preprocess.size

    def form(values: Tensor) -> Tensor:
        blocks = coins(values) if asked.coins else ordered(values)
        return blocks.repeat_interleave(asked.block, 1).repeat_interleave(asked.block, 2)

    print(
        "with the key: {:.1%} of the answers say more than the class, {:.1%} are right".format(
            *says(secret, meta.strength)
        )
    )
    count = 0
    for seed in range(asked.first, asked.first + asked.searches):
        generator = torch.Generator().manual_seed(seed)
        found = search(judge, (channels, height // asked.block, width // asked.block), asked.rounds, generator, form)
        share, right = says(found, strength)
        count += share > OPEN
        near = correlation(found, secret)
        print(f"search {seed:2}: correlation {near:+.2f}, {share:.1%}, {right:.1%} right", flush=True)
    print(f"{count} of {asked.searches} searches open more than {OPEN:.0%}")


if __name__ == "__main__":
    main()
