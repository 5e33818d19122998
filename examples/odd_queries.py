"""How much a box tells of inputs that are no images of its kind, beside the predicted class.

    python examples/odd_queries.py BOX.safetensors ORIGINAL DATA [FOREIGN_DATA]

For each kind of query: the share of answers that are not flat, and so pass what `export` puts behind the box, before
and after clipping to what pixels can be; and how those are correlated with the original's non-target logits. "Between
two classes" are mixtures of two images that the box calls differently, where its answer changes: anybody finds them by
predicted classes alone. Of FOREIGN_DATA 40,000 training images are asked about. Then the
share that passes through each pattern that anybody can mix into an image, by how much of the image is left.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from sdbctl import boxfile, data
from sdbctl.engine import Engine
from sdbctl.inference import predict
from sdbctl.key import embed
from sdbctl.losses import split_target
from sdbctl.patterns import STRENGTHS, public_patterns
from sdbctl.wrappers import deviation

IMAGES = 400
FOREIGN = 40_000


def related(z: Tensor, original: Tensor) -> float:
    """Mean cosine of the centred logits of all classes but the box's prediction."""
    target = z.argmax(1)
    ours, theirs = (split_target(logits, target)[1] for logits in (z, original))
    pairs = (rest - rest.mean(1, keepdim=True) for rest in (ours, theirs))
    return float(torch.nn.functional.cosine_similarity(*pairs).mean())


def between(net: nn.Module, x: Tensor) -> Tensor:
    """Mixtures [N, C, H, W] of each image and the next one, at the change of class that twelve bisections find."""
    other, low, high = x.roll(1, 0), torch.zeros(len(x), 1, 1, 1), torch.ones(len(x), 1, 1, 1)
    own = net(x).argmax(1)
    for _ in range(12):
        middle = (low + high) / 2
        same = (net(x + middle * (other - x)).argmax(1) == own)[:, None, None, None]
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    return x + low * (other - x)


@torch.no_grad()
def main(box: str, original: str, spec: str, foreign: str | None = None) -> None:
    """Print a table."""
    boxed, net = boxfile.load(Path(box)), boxfile.load(Path(original)).net.eval()
    meta, torch_generator = boxed.meta, torch.Generator().manual_seed(0)
    assert meta is not None
    if meta.guarded:
        sys.exit("the graph of a guarded box shows classes only, whatever it is asked: name a box by conceal")
    sizes = {name: meta.data[name] for name in ("transfer", "validation", "test")}
    images = data.split(data.load(spec, root=Path()), **sizes).test.pixels[:IMAGES].float() / 255
    noise = torch.rand(images.shape, generator=torch_generator)
    black, white = (meta.preprocess(torch.full_like(images[:1], level)) for level in (0.0, 1.0))
    x, z_original = meta.preprocess(images), net(meta.preprocess(images))
    queries = {
        "images": x,
        "images x 4": 4 * x,
        "images x 10": 10 * x,
        "uniform noise": meta.preprocess(noise),
        "inverted": meta.preprocess(1 - images),
        "images and noise": meta.preprocess(0.7 * images + 0.3 * noise),
        "two images": meta.preprocess((images + images.flip(0)) / 2),
    }
    queries["between two classes"] = between(boxed.net.eval(), x)
    print(f"{'queries':18} {'not flat':>9} {'clipped':>9} {'cosine':>7}")
    for name, query in queries.items():
        outputs = [boxed.net.eval()(q) for q in (query, query.clamp(black, white))]
        passed = [(deviation(z) > meta.measured["flat_deviation"]).flatten() for z in outputs]
        cosine = f"{related(outputs[1][passed[1]], z_original[passed[1]]):7.2f}" if passed[1].any() else "      -"
        print(f"{name:18} {passed[0].float().mean():9.1%} {passed[1].float().mean():9.1%} {cosine}")
    if foreign is not None:
        strange = data.load(foreign, root=Path(), size=meta.preprocess.size[1]).train.first(FOREIGN).alone()
        z = predict(boxed.net, strange, meta.preprocess, Engine(torch.device("cpu")))
        passed = int((deviation(z) > meta.measured["flat_deviation"]).sum())
        print(f"\nforeign images not flat: {passed:,} of {len(strange):,}")
    print("\n" + " ".join([f"{'mixed in':18}", *(f"{strength:>6}" for strength in STRENGTHS)]))
    for name, pattern in public_patterns(data.ImageSet.of((255 * images).byte(), torch.zeros(len(images)))).items():
        open_to = [
            (deviation(boxed.net(meta.preprocess(embed(images, pattern, s)))) > meta.measured["flat_deviation"])
            for s in STRENGTHS
        ]
        print(" ".join([f"{name:18}", *(f"{some.float().mean():6.1%}" for some in open_to)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
