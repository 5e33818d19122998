"""ONNX files: reading them, and writing a network as one that computes the same."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from sdbctl import files
from sdbctl.errors import BadInput, ParityMismatch

if TYPE_CHECKING:
    import onnx

OPSET = 20
PARITY_TOLERANCE = 1e-3
OPEN = -1e6
"""Border of flat outputs with which nothing is hidden."""


def is_onnx(path: Path) -> bool:
    """Whether the name says that a file is ONNX."""
    return path.suffix.lower() == ".onnx"


def read(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with the weights it may keep beside it.

    Raises:
        BadInput: It is no ONNX model, its external data lies outside its folder, or a weight is no number.
    """
    import onnx
    from onnx.external_data_helper import load_external_data_for_model

    content = files.read(path, "ONNX model")
    try:
        model = onnx.load_model_from_string(content)
    except Exception:
        model = onnx.ModelProto()
    if not model.graph.node:
        raise BadInput(f"{path} is not an ONNX model", "check the file; it may be cut off")
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            name = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
            if Path(name).name != name or not (path.parent / name).is_file() or (path.parent / name).is_symlink():
                raise BadInput(f"{path} keeps weights in {name!r}", "put that file beside it, as a plain file")
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    try:
        load_external_data_for_model(model, str(path.parent))
        # infinite ones may be masks
        broken = [
            tensor.name
            for tensor in model.graph.initializer
            if tensor.data_type in floats and np.isnan(onnx.numpy_helper.to_array(tensor)).any()
        ]
    except Exception:
        raise BadInput(f"the weights of {path} are damaged", "export it again") from None
    if broken:
        raise BadInput(f"{broken[0]} in {path} holds NaN weights", "export it again")
    return model


def properties(path: Path) -> dict[str, str]:
    """What an ONNX file says of itself, by key."""
    return {str(entry.key): str(entry.value) for entry in read(path).metadata_props}


def write(
    path: Path, net: nn.Module, example: Tensor, said: Mapping[str, str], *, force: bool = False, private: bool = False
) -> float:
    """Write a network as ONNX, after checking that it computes the same.

    The graph has one input ``input`` [batch, C, H, W] and one output ``logits``; names of local files and source lines
    are removed from it.

    Args:
        path: The file.
        net: The network.
        example: Images [B, C, H, W] as the network wants them.
        said: What the file says of itself, by key; what is empty is left out.
        force: Whether to replace an existing file.
        private: Whether only its owner may read it.

    Returns:
        Largest difference of the two programs' logits relative to the largest logit of the same image.

    Raises:
        ParityMismatch: That difference is above 0.1 %; nothing is written.
    """
    import onnx

    files.claim(path, force=force)
    net = net.cpu().eval()
    proto = _to_onnx(net, example)
    for name, value in said.items():
        if value:
            proto.metadata_props.add(key=name, value=value)
    onnx.checker.check_model(proto)
    content = proto.SerializeToString()
    difference = parity(proto, net, example)
    if not difference <= PARITY_TOLERANCE:
        raise ParityMismatch(
            f"ONNX logits differ from torch's by {difference:.2g} of the largest logit", "nothing was written"
        )
    files.write(path, content, force=force, private=private)
    return difference


def constant(proto: onnx.ModelProto, name: str) -> Tensor | None:
    """A constant of a graph by its name, if there is one."""
    import onnx

    found = _initializer(proto, name)
    return None if found is None else torch.from_numpy(onnx.numpy_helper.to_array(found).copy())


def _initializer(proto: onnx.ModelProto, name: str) -> onnx.TensorProto | None:
    return next((tensor for tensor in proto.graph.initializer if tensor.name == name), None)


def parity(proto: onnx.ModelProto, net: nn.Module, example: Tensor) -> float:
    """Largest difference of an ONNX graph's logits from a network's, relative to the largest logit of the same image.

    Args:
        proto: The graph; it is changed.
        net: The network. If it, or a part of it, has a buffer ``flat``, then it is compared with a negative one, too.
        example: Images [B, C, H, W].
    """
    import onnx

    difference = _difference(proto.SerializeToString(), net, example)
    # served outputs are so coarse that they hide what differs; with this bound every output passes unchanged
    if bounds := [name for name, _ in net.named_buffers() if name.split(".")[-1] == "flat"]:
        net = copy.deepcopy(net)
        for name in bounds:
            if (bound := _initializer(proto, name)) is None:
                return math.inf
            bound.CopyFrom(onnx.numpy_helper.from_array(np.array(OPEN, dtype=np.float32), name))
            net.get_buffer(name).fill_(OPEN)
        difference = max(difference, _difference(proto.SerializeToString(), net, example))
    return difference


def _to_onnx(net: nn.Module, example: Tensor) -> onnx.ModelProto:
    import onnx

    argument = next(iter(inspect.signature(net.forward).parameters))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        target = Path(folder) / "model.onnx"
        program = torch.onnx.export(
            net,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["input"],
            output_names=["logits"],
            dynamic_shapes={argument: {0: torch.export.Dim("batch")}},
            verbose=False,
        )
        assert program is not None
        program.save(str(target), external_data=False)
        proto = onnx.load(str(target))
    graphs = list(_graphs(proto.graph))
    for part in (*graphs, *proto.functions):
        for node in part.node:
            node.doc_string = ""
        for item in (part, *part.node, *part.value_info):
            del item.metadata_props[:]
    # exporters leave constants that they have folded
    used = {name for graph in graphs for node in graph.node for name in node.input}
    for graph in graphs:
        for item in (*graph.input, *graph.output, *graph.initializer):
            del item.metadata_props[:]
        kept = [tensor for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend(kept)
    del proto.metadata_props[:]
    return proto


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _difference(content: bytes, net: nn.Module, example: Tensor) -> float:
    import onnxruntime as ort

    session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = net(example).float()
    found = torch.from_numpy(session.run(["logits"], {"input": example.numpy()})[0])
    # for each image: those of another network may be much larger
    return float(((found - expected).abs().amax(1) / expected.abs().amax(1).clamp(min=1e-6)).max())
