"""How often a search by answers alone finds a pattern that opens a box, and how near the key it is.

    python examples/key_search.py BOX.onnx KEY_FILE DATA [--kind any] [--searches 20] [--effort 1] [--surrogate DATA]

Searches are the suite's. ``order`` is one of the two of ``searched_key``: 50 rounds of natural evolution strategies
over the order of the levels, with a transfer image for each pair of directions, 103,400 queries, by default with 0.7
of the box's λ (``--share``). ``any`` is one of the three of ``searched_pattern``: from blocks, a smooth field, or an
image in wrong colours (of ``--surrogate``, or else a transfer image) that opens the box, if there is one, to a
pattern and λ that open it for images, 32,400 queries. ``--effort`` multiplies the steps. Printed are λ, the
correlation with the key, which a search cannot know, the share of 200 test images whose answer says more than the
class, and that of right classes.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from sdbctl import boxfile, data
from sdbctl.attacks.keys import (
    DIMMED,
    OPENED_IMAGES,
    SEARCHED_IMAGES,
    SEARCHED_KEY,
    SEARCHED_PATTERN,
    search,
    search_any,
)
from sdbctl.key import Key, correlation, embed
from sdbctl.teacher import OnnxTeacher
from sdbctl.wrappers import deviation

TESTED = 200
OPEN = 0.05
"""Share of answers from which a box is open."""


def main() -> None:
    """Print a line for each search."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("box", type=Path)
    parser.add_argument("key_file", type=Path)
    parser.add_argument("data")
    parser.add_argument("--kind", choices=("order", "any"), default="any")
    parser.add_argument("--searches", type=int, default=20)
    parser.add_argument("--effort", type=float, default=1.0)
    parser.add_argument("--share", type=float, default=DIMMED[1])
    parser.add_argument("--surrogate")
    asked = parser.parse_args()

    meta, teacher = boxfile.read_metadata(asked.box), OnnxTeacher(asked.box, torch.device("cpu"))
    assert meta is not None
    preprocess, lam = meta.preprocess, meta.strength
    splits = data.split(
        data.load(asked.data, root=Path(), size=preprocess.size[1]),
        **{name: meta.data[name] for name in ("transfer", "validation", "test")},
    )
    others = splits.transfer
    if asked.surrogate:
        others = data.load(asked.surrogate, root=Path(), size=preprocess.size[1]).train
    secret = Key.load(asked.key_file).pattern(preprocess.size)
    own, tested = splits.transfer.first(SEARCHED_IMAGES).alone(), splits.test.first(TESTED).alone()

    def ask(pixels: Tensor) -> Tensor:
        return teacher.logits(preprocess(pixels))

    def find(generator: torch.Generator) -> tuple[Tensor, float]:
        if asked.kind == "any":
            steps = round(asked.effort * SEARCHED_PATTERN.grid[0]["steps"])
            return search_any(ask, own.pixels[:OPENED_IMAGES].float() / 255, others, steps, generator)
        rounds = round(asked.effort * SEARCHED_KEY.grid[0]["rounds"])
        return search(ask, own.pixels, asked.share * lam, rounds, generator), asked.share * lam

    def says(pattern: Tensor, strength: float) -> tuple[float, float]:
        z = ask(embed(tested.pixels.float() / 255, pattern, strength))
        # of what was not boxed every answer that is not flat
        beyond = deviation(z) > meta.measured.get("flat_deviation", 1e-3)
        return float(beyond.float().mean()), float((z.argmax(1) == tested.labels).float().mean())

    print("with the key: {:.1%} of the answers say more than the class, {:.1%} are right".format(*says(secret, lam)))
    count = 0
    for seed in range(asked.searches):
        found, strength = find(torch.Generator().manual_seed(seed))
        share, right = says(found, strength)
        count += share > OPEN
        near = f"λ {strength:.2f}, correlation {correlation(found, secret):+.2f}"
        print(f"search {seed:2}: {near}, {share:.1%}, {right:.1%} right", flush=True)
    print(f"{count} of {asked.searches} searches open more than {OPEN:.0%}")


if __name__ == "__main__":
    main()
