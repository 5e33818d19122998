"""How often a search by answers alone finds a pattern that opens a box, and how near the key it is.

    python examples/key_search.py BOX.onnx KEY_FILE DATA [SEARCHES [ROUNDS]]

Each search is the suite's (``searched_key``): 100 rounds of natural evolution strategies over the order of the levels,
judged by the answers to 64 transfer images, 102,400 queries. Printed are the correlation with the key, which a search
cannot know, the share of 200 test images whose answer says more than the predicted class, and that of right classes.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from sdbctl import boxfile, data
from sdbctl.attacks.keys import SEARCH_IMAGES, opened, search
from sdbctl.data import ImageSet
from sdbctl.key import Key, correlation, embed
from sdbctl.teacher import OnnxTeacher
from sdbctl.wrappers import deviation

TESTED = 200
OPEN = 0.05
"""Share of answers from which a box is open."""


def main(box: str, key_file: str, spec: str, searches: str = "20", rounds: str = "100") -> None:
    """Print a line for each search."""
    meta, teacher = boxfile.read_metadata(Path(box)), OnnxTeacher(Path(box), torch.device("cpu"))
    assert meta is not None
    splits = data.split(
        data.load(spec, root=Path(), size=meta.preprocess.size[1]),
        **{name: meta.data[name] for name in ("transfer", "validation", "test")},
    )
    secret = Key.load(Path(key_file)).pattern(meta.preprocess.size)

    def answers(images: ImageSet, pattern: Tensor) -> Tensor:
        x = images.pixels.float() / 255
        return teacher.logits(meta.preprocess(embed(x, pattern, meta.strength)))

    own, tested = splits.transfer.first(SEARCH_IMAGES).alone(), splits.test.first(TESTED).alone()

    def says(pattern: Tensor) -> tuple[float, float]:
        z = answers(tested, pattern)
        beyond = deviation(z) > meta.measured["flat_deviation"]
        return float(beyond.float().mean()), float((z.argmax(1) == tested.labels).float().mean())

    def judge(pattern: Tensor) -> float:
        return float(opened(answers(own, pattern), own.labels))

    print("with the key: {:.1%} of the answers say more than the class, {:.1%} are right".format(*says(secret)))
    count = 0
    for seed in range(int(searches)):
        found = search(judge, meta.preprocess.size, int(rounds), torch.Generator().manual_seed(seed))
        share, right = says(found)
        count += share > OPEN
        near = correlation(found, secret)
        print(f"search {seed:2}: correlation {near:+.2f}, {share:.1%}, {right:.1%} right", flush=True)
    print(f"{count} of {searches} searches open more than {OPEN:.0%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
