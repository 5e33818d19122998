"""Teachers: whatever answers queries with logits, and how much of the answer somebody may see."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from sdbctl import files, onnxfile
from sdbctl.data import ImageSet, Preprocess
from sdbctl.data.images import sized
from sdbctl.data.preprocess import usable
from sdbctl.engine import Engine, exact
from sdbctl.errors import BadInput
from sdbctl.inference import predict
from sdbctl.key import embed
from sdbctl.metrics import class_only

PATIENCE = 600.0
"""Seconds that a student waits for what another one is being told."""
PROBED = 4
"""Images of noise by which a graph is seen to answer with probabilities, and alike when asked again."""
UNSTEADY = 1e-3
"""Part of the largest output by which answers to the same image may differ."""
MOST_CLASSES = 1_000_000


class Access(IntEnum):
    """What an attacker sees of a model; each level includes those before it.

    Logits are no level of their own: but for what all classes have in common, they are logarithms of probabilities.
    """

    NONE = 0
    LABELS = 1
    PROBABILITIES = 2
    WEIGHTS = 3


class Teacher(Protocol):
    """Something that answers queries.

    Attributes:
        classes: Number of classes C.
    """

    classes: int

    @property
    def where(self) -> str:
        """Where it runs, for people ("torch on cpu")."""

    def logits(self, x: Tensor) -> Tensor:
        """Logits [B, C], float32, on the device of the normalised images ``x`` [B, C, H, W]; no gradient."""


class TorchTeacher:
    """A torch module as a teacher."""

    def __init__(self, model: nn.Module, classes: int, engine: Engine) -> None:
        # a network that other processes get stays on the CPU
        net = model if engine.device.type == "cpu" else copy.deepcopy(model)
        self.model = net.to(engine.device).to(memory_format=torch.channels_last).eval()
        self.classes = classes
        self.where = f"torch on {engine.device}"
        self._engine = engine

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """See :class:`Teacher`."""
        with exact(x.device), self._engine.autocast():
            return self.model(x).float()  # type: ignore[no-any-return]


class OnnxTeacher:
    """An ONNX classifier, run in ONNX Runtime on torch's memory through IO binding.

    A graph that ends in a softmax answers with probabilities; their logarithms are logits.

    Args:
        path: The file. It needs one image input [batch, C, H, W] float32 with a free batch size, and an
            output [batch, classes].
        device: Where the queries are. On a GPU the file runs there if ONNX Runtime's CUDA provider really starts, else
            on the CPU; ``where`` says which.

    Attributes:
        shape: Of an image (C, H, W).
        unasked: Names of further outputs of the file.

    Raises:
        BadInput: The file is no such model.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        import onnxruntime as ort

        content = onnxfile.read(path).SerializeToString()
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in ort.get_available_providers():
            ort.preload_dlls()
            options = {
                "device_id": device.index,
                "use_tf32": "0",
                "user_compute_stream": str(torch.cuda.current_stream(device).cuda_stream),
            }
            providers.insert(0, ("CUDAExecutionProvider", options))
        settings = ort.SessionOptions()
        settings.log_severity_level = 4  # its lines would stand beside ours
        settings.intra_op_num_threads = torch.get_num_threads()
        # spinning threads would take the cores from torch between two queries
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = ort.InferenceSession(content, settings, providers=providers)
        except Exception as error:
            reason = str(error).splitlines()[0][:120]
            raise BadInput(f"{path} is not a usable ONNX model: {reason}", "check the file") from None
        there = device.type == "cuda" and self._session.get_providers()[0] == "CUDAExecutionProvider"
        self.device, self._path = device if there else torch.device("cpu"), path
        self.shape, self.classes, self._input, self._output = _signature(self._session, path)
        missing = ", which cannot use CUDA here" if device.type != self.device.type else ""
        outputs = self._outputs(self._noise())
        if not outputs.isfinite().all():
            raise BadInput(f"{path} answers random images with what is no number", "export it again")
        self._probabilities = _are_probabilities(outputs)
        self.unasked = [output.name for output in self._session.get_outputs() if output.name != self._output]
        what = ", with probabilities" if self._probabilities else ""
        self.where = f"ONNX Runtime {ort.__version__} on {self.device}{missing}{what}"

    def logits(self, x: Tensor) -> Tensor:
        """See :class:`Teacher`."""
        outputs = self._outputs(x)
        if not self._probabilities:
            return outputs
        if not _are_probabilities(outputs):
            raise BadInput(f"{self._path} answers some images with probabilities, others not", "export its logits")
        return outputs.clamp(min=torch.finfo(torch.float32).tiny).log()

    def is_steady(self) -> bool:
        """Whether it answers images of noise alike when it is asked again, one by one."""
        noise = self._noise()
        outputs, again = self._outputs(noise), torch.cat([self._outputs(one[None]) for one in noise])
        return bool((again - outputs).abs().max() <= UNSTEADY * outputs.abs().max())

    def _noise(self) -> Tensor:
        return torch.rand(PROBED, *self.shape, generator=torch.Generator().manual_seed(0)) - 0.5

    def _outputs(self, x: Tensor) -> Tensor:
        asked, x = x.device, x.detach().float().to(self.device).contiguous()
        output = torch.empty(len(x), self.classes, device=x.device)
        if x.is_cuda:
            # the session's stream is that of its making, and x may be made on another
            torch.cuda.current_stream(x.device).synchronize()
        binding = self._session.io_binding()
        index = x.device.index or 0
        binding.bind_input(self._input, x.device.type, index, np.float32, tuple(x.shape), x.data_ptr())
        binding.bind_output(self._output, x.device.type, index, np.float32, tuple(output.shape), output.data_ptr())
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            reason = str(error).splitlines()[0][:160]
            raise BadInput(
                f"the ONNX model fails on {len(x)} images: {reason}", "export it with a free batch size"
            ) from None
        return output.to(asked)


class ClosedTeacher:
    """A teacher that is opened only when a query is not on record."""

    def __init__(self, classes: int, open_it: Callable[[], Teacher]) -> None:
        self.classes, self._open = classes, functools.cache(open_it)

    @property
    def where(self) -> str:
        """See :class:`Teacher`."""
        return self._open().where

    def logits(self, x: Tensor) -> Tensor:
        """See :class:`Teacher`."""
        return self._open().logits(x)


class KeyedTeacher:
    """A teacher that is asked with the key: it sees λx + (1 − λ)K instead of x."""

    def __init__(self, teacher: Teacher, pattern: Tensor, strength: float) -> None:
        self.teacher, self.pattern, self.strength = teacher, pattern, strength
        self.classes, self.where = teacher.classes, teacher.where

    def logits(self, x: Tensor) -> Tensor:
        """See :class:`Teacher`."""
        self.pattern = self.pattern.to(x.device)
        return self.teacher.logits(embed(x, self.pattern, self.strength))


@dataclass(frozen=True)
class Record:
    """Where answers to whole sets are kept, so that many students share one set of queries.

    Attributes:
        folder: Of one file per teacher and set, named by the hash of both.
        identity: What tells teachers, their precision and versions apart; not secret.
    """

    folder: Path
    identity: str

    def recall(self, digest: str, ask: Callable[[], Tensor]) -> Tensor:
        """The answers to the set with this digest: read if they are there, else asked for and kept."""
        name = hashlib.sha256(f"{self.identity} {digest}".encode()).hexdigest()[:32]
        path = self.folder / f"{name}.answers"
        known = self._known(path)
        if known is not None:
            return known
        # of students side by side one asks, the others wait for what it is told
        # a disk may keep locks of jobs that were killed: better to ask twice than never
        with files.locked(path.with_suffix(".lock"), PATIENCE):
            known = self._known(path)
            if known is None:
                known = ask()
                files.write(path, safetensors.torch.save({"answers": known.contiguous()}), private=True)
        return known

    def _known(self, path: Path) -> Tensor | None:
        try:
            answers: Tensor = safetensors.torch.load(path.read_bytes())["answers"]
            return answers
        except (OSError, KeyError, safetensors.SafetensorError):
            return None


class Oracle:
    """A teacher behind an interface of limited access, which counts queries.

    It has no attribute but answers: the teacher lives in a closure. That keeps honest attacks honest; it is no sandbox.

    Args:
        teacher: Who answers.
        access: How much of the answer is shown.
        record: Where answers to whole sets are kept, or None.
        levels: What answers that say nothing but the predicted class look like, see :func:`sdbctl.metrics.usual`; those
            that look otherwise are counted.
        limited: Whether all answers are made to look so.
    """

    def __init__(
        self,
        teacher: Teacher,
        access: Access,
        record: Record | None = None,
        levels: Tensor | None = None,
        *,
        limited: bool = False,
    ) -> None:
        self.classes, self.queries = teacher.classes, 0
        self._beyond: dict[torch.device, Tensor] = {}
        if not Access.NONE < access < Access.WEIGHTS:
            raise ValueError("who asks for nothing, or holds the weights, gets no oracle")

        def show(z: Tensor) -> Tensor:
            if levels is not None and access > Access.LABELS:
                bare = class_only(z, levels)
                # a sum on each device: to ask for it would make a GPU wait
                self._beyond[z.device] = self._beyond.get(z.device, 0) + (z != bare).any(1).sum()
                z = bare if limited else z
            return z.argmax(1) if access == Access.LABELS else z.log_softmax(1)

        def answer(x: Tensor) -> Tensor:
            return show(teacher.logits(x))

        def answers(images: ImageSet, preprocess: Preprocess, engine: Engine) -> Tensor:
            def ask() -> Tensor:
                return predict(teacher.logits, images, preprocess, engine)

            return show(record.recall(images.digest, ask) if record else ask())

        def recall(what: str, find: Callable[[], Tensor]) -> Tensor:
            told = [access.name, limited, None if levels is None else levels.tolist()]
            return record.recall(f"{what} {told}", find) if record else find()

        self._answer, self._answers, self._recall = answer, answers, recall

    @property
    def beyond(self) -> int:
        """How many answers said more than the predicted class; asked again, they count again."""
        return sum(int(count) for count in self._beyond.values())

    def __call__(self, x: Tensor) -> Tensor:
        """Answer a batch of queries.

        Args:
            x: Normalised images [B, C, H, W].

        Returns:
            Log-probabilities [B, C] or predicted classes [B], by access level.
        """
        self.queries += len(x)
        return self._answer(x)

    def answers(self, images: ImageSet, preprocess: Preprocess, engine: Engine, *, again: bool = False) -> Tensor:
        """Answer one query for each image of a set, in order, without augmentation.

        Recorded answers count as queries too, so that a budget does not depend on what other students asked.

        Args:
            images: The queries, in memory.
            preprocess: Normalisation.
            engine: Where to compute.
            again: Whether this very set was asked before, which is no new query.

        Returns:
            As from a batch, on the CPU.
        """
        self.queries += 0 if again else len(images)
        return self._answers(images, preprocess, engine)

    def recall(self, what: str, find: Callable[[], Tensor]) -> Tensor:
        """What a search comes to, kept as answers are: others who search for the same need not ask again.

        Its queries count for each of them, so that a budget does not depend on who searched first.

        Args:
            what: What the outcome depends on, but for the teacher.
            find: Searches, with queries to this oracle.

        Returns:
            What was found as float64 [N].
        """
        queries, beyond = self.queries, self.beyond

        def counted() -> Tensor:
            found = find().double().flatten()
            return torch.cat([found.new_tensor([self.queries - queries, self.beyond - beyond]), found])

        kept = self._recall(what, counted)
        self.queries = queries + int(kept[0])
        here = torch.device("cpu")
        self._beyond[here] = self._beyond.get(here, torch.tensor(0)) + beyond + int(kept[1]) - self.beyond
        return kept[2:]


def _are_probabilities(outputs: Tensor) -> bool:
    return bool((outputs >= 0).all() and (outputs.sum(1) - 1).abs().amax() <= 1e-3) if len(outputs) else True


def _signature(session: Any, path: Path) -> tuple[tuple[int, int, int], int, str, str]:
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or not outputs:
        raise BadInput(
            f"{path} has {len(inputs)} inputs ({', '.join(i.name for i in inputs)})",
            "one image input is needed",
        )
    shape = inputs[0].shape
    if inputs[0].type != "tensor(float)" or len(shape) != 4 or not all(isinstance(n, int) for n in shape[1:]):
        raise BadInput(
            f"{path} takes {inputs[0].type} {shape}",
            "a float32 input [batch, C, H, W] with fixed C, H, W is needed",
        )
    if not usable(shape[1:]):
        raise BadInput(f"{path} takes images of {sized(shape[1:])}", "at most 64 channels of 8192x8192 are possible")
    if isinstance(shape[0], int):
        raise BadInput(f"{path} has a fixed batch size of {shape[0]}", "export it again with a dynamic batch dimension")
    names = [output.name for output in outputs]
    output = outputs[names.index("logits") if "logits" in names else 0]
    if output.type != "tensor(float)" or len(output.shape) != 2 or not isinstance(output.shape[1], int):
        raise BadInput(f"{path} returns {output.type} {output.shape}", "an output [batch, classes] is needed")
    if not 2 <= output.shape[1] <= MOST_CLASSES:
        raise BadInput(f"{path} has {output.shape[1]} output classes", f"2 to {MOST_CLASSES:,} are needed")
    return (shape[1], shape[2], shape[3]), output.shape[1], inputs[0].name, output.name
