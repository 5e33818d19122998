"""A network that can be trained, out of an ONNX graph: what somebody has who holds nothing but the file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdbctl.errors import UsageError

if TYPE_CHECKING:
    import onnx

Settings = Mapping[str, Any]
"""Attributes of a node, and those of its inputs that are constants, as numbers and lists, by name."""


def _reduce_mean(x: Tensor, s: Settings) -> Tensor:
    return x.mean(s.get("axes") or list(range(x.ndim)), keepdim=bool(s.get("keepdims", 1)))


def _clip(x: Tensor, s: Settings) -> Tensor:
    return x.clamp(s.get("min"), s.get("max"))


def _flatten(x: Tensor, s: Settings) -> Tensor:
    axis = s.get("axis", 1)
    return x.flatten(axis) if axis == 1 else x.reshape(int(torch.tensor(x.shape[:axis]).prod()), -1)


def _reshape(x: Tensor, s: Settings) -> Tensor:
    shape = [x.shape[place] if size == 0 else size for place, size in enumerate(s["shape"])]
    # the graph was traced with some number of images
    return x.reshape(-1 if shape[0] == 1 and len(shape) > 1 and -1 not in shape else shape[0], *shape[1:])


def _pads(s: Settings) -> tuple[int, int]:
    pads = s.get("pads", [0, 0, 0, 0])
    if pads[:2] != pads[2:] or s.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise UsageError("the graph pads unevenly")
    return pads[0], pads[1]


def _max_pool(x: Tensor, s: Settings) -> Tensor:
    dilations, up = s.get("dilations", 1), bool(s.get("ceil_mode", 0))
    pooled: Tensor = F.max_pool2d(x, s["kernel_shape"], s.get("strides", 1), _pads(s), dilations, up)
    return pooled


def _average_pool(x: Tensor, s: Settings) -> Tensor:
    up, padded = bool(s.get("ceil_mode", 0)), bool(s.get("count_include_pad", 0))
    return F.avg_pool2d(x, s["kernel_shape"], s.get("strides", 1), _pads(s), up, padded)


def _pad(x: Tensor, s: Settings) -> Tensor:
    if s.get("mode", "constant") != "constant" or s.get("value", 0.0):
        raise UsageError("the graph pads with something else than zeros")
    pads, axes = s["pads"], s.get("axes") or list(range(x.ndim))
    around = {axis % x.ndim: (pads[place], pads[place + len(axes)]) for place, axis in enumerate(axes)}
    flat = [size for axis in reversed(range(x.ndim)) for size in around.get(axis, (0, 0))]
    return F.pad(x, flat, value=float(s.get("constant_value", 0.0)))


def _slice(x: Tensor, s: Settings) -> Tensor:
    axes = s.get("axes") or list(range(len(s["starts"])))
    where = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, s["starts"], s["ends"], s.get("steps") or [1] * len(axes), strict=True):
        where[axis] = slice(start, end, step)
    return x[tuple(where)]


def _split(x: Tensor, s: Settings) -> tuple[Tensor, ...]:
    axis = s.get("axis", 0)
    return tuple(torch.functional.split(x, s.get("split") or -(-x.shape[axis] // s["parts"]), axis))


UNARY: Mapping[str, Callable[[Tensor, Settings], Any]] = {
    "Relu": lambda x, s: x.relu(),
    "Sigmoid": lambda x, s: x.sigmoid(),
    "Tanh": lambda x, s: x.tanh(),
    "LeakyRelu": lambda x, s: F.leaky_relu(x, s.get("alpha", 0.01)),
    "HardSigmoid": lambda x, s: (s.get("alpha", 0.2) * x + s.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda x, s: F.hardswish(x),
    "Gelu": lambda x, s: F.gelu(x, approximate=s.get("approximate", "none")),
    "Identity": lambda x, s: x,
    "Dropout": lambda x, s: x,
    "Clip": _clip,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Transpose": lambda x, s: x.permute(s["perm"]),
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda x, s: x.mean((2, 3), keepdim=True),
    "ReduceMean": _reduce_mean,
    "Pad": _pad,
    "Slice": _slice,
    "Split": _split,
}
"""Operators of one tensor; what else they are given must be constant."""
NAMED: Mapping[str, tuple[str, ...]] = {
    "Clip": ("min", "max"),
    "Reshape": ("shape",),
    "ReduceMean": ("axes",),
    "Pad": ("pads", "constant_value", "axes"),
    "Slice": ("starts", "ends", "axes", "steps"),
    "Split": ("split",),
}
"""Names of further inputs, in order."""
SEVERAL: Mapping[str, Callable[[Sequence[Tensor], Settings], Any]] = {
    "Add": lambda xs, s: xs[0] + xs[1],
    "Sub": lambda xs, s: xs[0] - xs[1],
    "Mul": lambda xs, s: xs[0] * xs[1],
    "Div": lambda xs, s: xs[0] / xs[1],
    "Max": lambda xs, s: functools.reduce(torch.maximum, xs),
    "Min": lambda xs, s: functools.reduce(torch.minimum, xs),
    "Concat": lambda xs, s: torch.cat(list(xs), s["axis"]),
}
"""Operators of several tensors, some of which may be constant."""


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Of feature maps or of vectors: a graph does not say."""

    def _check_input_dim(self, input: Tensor) -> None:
        return


class Operator(nn.Module):
    """One node without weights."""

    def __init__(self, kind: str, settings: Settings) -> None:
        super().__init__()
        self.kind, self.settings = kind, settings

    def forward(self, *inputs: Tensor) -> Any:
        """What the operator makes of its inputs."""
        if self.kind in UNARY:
            return UNARY[self.kind](inputs[0], self.settings)
        return SEVERAL[self.kind](inputs, self.settings)


class Graph(nn.Module):
    """The part of an ONNX classifier up to its last weights: images [B, C, H, W] → logits [B, classes].

    What comes after, such as what hides a box's outputs, is left out. Convolutions, linear layers and BatchNorm are
    torch's own modules; exporters often have folded BatchNorm into convolutions.

    Args:
        model: The ONNX model.
        classes: Its number of classes.

    Raises:
        UsageError: It holds an operator that is not known here, or no layer with so many outputs.
    """

    def __init__(self, model: onnx.ModelProto, classes: int) -> None:
        super().__init__()
        from onnx import numpy_helper
        from onnx.reference import ReferenceEvaluator

        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        version = {known.domain: known.version for known in model.opset_import}
        nodes, used = [], {name for node in model.graph.node for name in node.input}
        for node in model.graph.node:
            # exporters leave sums of constants, and weights under several names
            if not all(name in constants or not name for name in node.input):
                nodes.append(node)
            elif used & set(node.output):
                given = {name: constants[name] for name in node.input if name}
                made = ReferenceEvaluator(node, opsets=version).run(None, given)
                constants.update(zip(node.output, made, strict=True))
        self.input = next(given.name for given in model.graph.input if given.name not in constants)
        self.output = _last(nodes, constants, classes)
        self.steps = nn.ModuleList()
        self.wires: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
        needed = {self.output}
        for node in reversed(nodes):
            if needed & set(node.output):
                layer, inputs = _layer(node, constants)
                self.steps.insert(0, layer)
                self.wires.insert(0, (inputs, tuple(node.output)))
                needed |= set(inputs)
        self.fixed = {name: f"fixed_{place}" for place, name in enumerate(sorted(needed & constants.keys()))}
        for name, place in self.fixed.items():
            self.register_buffer(place, torch.tensor(constants[name]))

    def forward(self, x: Tensor) -> Tensor:
        """Images → logits."""
        values: dict[str, Tensor] = {name: getattr(self, place) for name, place in self.fixed.items()}
        values[self.input] = x
        for layer, (inputs, outputs) in zip(self.steps, self.wires, strict=True):
            made = layer(*(values[name] for name in inputs))
            values.update(zip(outputs, made if isinstance(made, tuple) else (made,), strict=False))
        return values[self.output].flatten(1)


def _last(nodes: Sequence[onnx.NodeProto], constants: Mapping[str, Any], classes: int) -> str:
    """The output of the last layer with one output per class, its bias included."""
    for place, node in reversed(list(enumerate(nodes))):
        weight = constants.get(node.input[1]) if len(node.input) > 1 else None
        if weight is None or node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        outputs = weight.shape[0] if node.op_type == "Conv" or transposed else weight.shape[-1]
        if outputs == classes:
            last = str(node.output[0])
            # a bias may be added, and the maps of a convolution averaged
            more = ("GlobalAveragePool", "ReduceMean", "Flatten") if node.op_type == "Conv" else ()
            for after in nodes[place + 1 :]:
                bias = after.op_type == "Add" and any(
                    constants[n].size == classes for n in after.input if n in constants
                )
                if last in after.input and (bias or after.op_type in more):
                    last = str(after.output[0])
            return last
    raise UsageError(f"the graph has no last layer of {classes} classes")


def _layer(node: onnx.NodeProto, constants: Mapping[str, Any]) -> tuple[nn.Module, tuple[str, ...]]:
    """The module of a node, and what it is given."""
    from onnx import helper

    s: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    s = {name: value.decode() if isinstance(value, bytes) else value for name, value in s.items()}
    kind, inputs = node.op_type, list(node.input)
    weights = [torch.tensor(constants[name]) for name in inputs[1:] if name in constants]
    if kind in ("Conv", "Gemm", "MatMul", "BatchNormalization") and len(weights) == len(inputs) - 1:
        return _weighted(kind, weights, s), (inputs[0],)
    if kind in SEVERAL:
        return Operator(kind, s), tuple(inputs)
    if kind not in UNARY:
        raise UsageError(f"the graph has the operator {kind}, which cannot be trained here")
    for name, given in zip(NAMED.get(kind, ()), inputs[1:], strict=False):
        if given and given not in constants:
            raise UsageError(f"the {name} of an operator {kind} in the graph is not constant")
        if given:
            s[name] = constants[given].tolist()
    return Operator(kind, {**s, "parts": len(node.output)}), (inputs[0],)


def _weighted(kind: str, weights: Sequence[Tensor], s: Settings) -> nn.Module:
    if kind == "Conv" and weights[0].ndim == 4:
        out, per_group = weights[0].shape[:2]
        groups, bias, kernel = s.get("group", 1), len(weights) > 1, (weights[0].shape[2], weights[0].shape[3])
        stride, dilation = tuple(s.get("strides", (1, 1))), tuple(s.get("dilations", (1, 1)))
        layer: nn.Module = nn.Conv2d(groups * per_group, out, kernel, stride, _pads(s), dilation, groups, bias)
    elif kind in ("Gemm", "MatMul") and weights[0].ndim == 2:
        if s.get("transA", 0) or s.get("alpha", 1.0) != 1.0 or s.get("beta", 1.0) != 1.0:
            raise UsageError("the graph scales or transposes a linear layer")
        weights = [weights[0] if s.get("transB", 0) else weights[0].T.contiguous(), *weights[1:]]
        weights[1:] = [bias.reshape(-1).expand(len(weights[0])) for bias in weights[1:]]
        layer = nn.Linear(weights[0].shape[1], weights[0].shape[0], bias=len(weights) > 1)
    elif kind == "BatchNormalization":
        layer = BatchNorm(len(weights[0]), eps=s.get("epsilon", 1e-5))
        layer.running_mean, layer.running_var = weights[2].clone(), weights[3].clone()
    else:
        raise UsageError(f"the graph has a {kind} of {weights[0].ndim} dimensions, which cannot be trained here")
    with torch.no_grad():
        for parameter, value in zip(layer.parameters(), weights, strict=False):
            parameter.copy_(value)
    return layer
