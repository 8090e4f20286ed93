"""An ONNX graph as an expert, run by onnxruntime on one CPU thread; any intermediate value can be tapped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model_fusion.errors import InputError, IntegrityError, MissingDependencyError
from model_fusion.fuse.experts.base import Decision
from model_fusion.fuse.experts.schema import InputSchema
from model_fusion.fuse.experts.scored import Preprocess, ScoredExpert, Scores, Words, as_given, tensor

try:
    import onnx
    import onnxruntime
except ImportError:
    raise MissingDependencyError("ONNX experts need onnx and onnxruntime: pip install 'model-fusion[onnx]'") from None

GRAPH = "graph.onnx"
NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
FLOATS = ("tensor(float)", "tensor(double)", "tensor(float16)")


class OnnxExpert(ScoredExpert):
    """`graph` is the path or the bytes of a model with one input.

    **Arguments**: `output` is the graph output that holds the answer (default: the first of floats); `tap` is
    "output" (its log-probabilities or value), or any output's or intermediate value's name; `scores`
    says what a classifier's output is.
    """

    kind: ClassVar[str] = "onnx"

    def __init__(
        self,
        graph: str | Path | bytes,
        inputs: InputSchema,
        *,
        output: str | None = None,
        tap: str | None = None,
        classes: Sequence[str] | None = None,
        scores: Scores = "logits",
        preprocess: Preprocess | None = None,
        words: Words | None = None,
        feature_shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(inputs, tap=tap or "output", classes=classes, preprocess=preprocess, words=words)
        self.scores: Scores = scores
        model = _read(graph)
        self._bytes: bytes = model.SerializeToString()
        _expose(model, self.tap)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's errors share no public base class
            raise InputError(f"onnx expert: onnxruntime refuses the graph: {_line(error)}") from error
        if len(self._session.get_inputs()) != 1:
            names = [value.name for value in self._session.get_inputs()]
            raise InputError(f"onnx expert: expected a graph with one input, got {names}")
        self._input = self._session.get_inputs()[0]
        if self._input.type not in NUMPY_TYPES:
            raise InputError(f"onnx expert: the input {self._input.name!r} is a {self._input.type}, not numbers")
        self.output = self._answer(output)
        self._learn_shape(feature_shape)

    def _answer(self, output: str | None) -> str:
        found: dict[str, str] = {value.name: value.type for value in self._session.get_outputs()}
        floats = [name for name, kind in found.items() if kind in FLOATS]
        if output is None and floats:
            return floats[0]
        if output is None:
            raise InputError(
                f"onnx expert: no output is a tensor of floats ({found}); export classifiers with zipmap=False"
            )
        if found.get(output) not in FLOATS:
            raise InputError(f"onnx expert: output {output!r} is not one of the float outputs {floats}")
        return output

    def _run(self, prepared: Any, name: str) -> Tensor:
        batch: NDArray[Any] = np.ascontiguousarray(np.asarray(prepared), dtype=NUMPY_TYPES[self._input.type])
        shape = self._input.shape
        expected = [size if isinstance(size, int) else "any" for size in shape]
        fits = len(shape) == batch.ndim and all(
            not isinstance(size, int) or size == got for size, got in zip(shape[1:], batch.shape[1:], strict=True)
        )
        if shape and not fits:
            raise InputError(
                f"onnx expert: the graph's input {self._input.name!r} has shape {expected}, "
                f"got {list(batch.shape)}; "
                "change the input schema or preprocess"
            )
        # Many exports fix the batch size at 1; any other fixed size is refused by onnxruntime itself.
        single = bool(shape) and shape[0] == 1
        parts = [batch[row : row + 1] for row in range(len(batch))] if single else [batch]
        try:
            values = [self._session.run([name], {self._input.name: part})[0] for part in parts]
        except Exception as error:  # as above
            raise InputError(f"onnx expert: onnxruntime refuses shape {list(batch.shape)}: {_line(error)}") from error
        return tensor(np.concatenate(values)).float()

    def _tapped(self, prepared: Any) -> Tensor:
        if self.tap != "output":
            return self._run(prepared, self.tap)
        output = self._run(prepared, self.output)
        return output if self.classes is None else self._log_probs(output, self.scores)

    def _decided(self, prepared: Any) -> Decision:
        return self._decision_from(self._run(prepared, self.output), self.scores)

    def save(self, folder: Path) -> dict[str, Any]:
        """The graph as it was given, in one file."""
        (Path(folder) / GRAPH).write_bytes(self._bytes)
        return self._config([GRAPH], output=self.output, scores=self.scores)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any], *, given: Any = None, allow_pickle: bool = False) -> OnnxExpert:
        """`given` is a `Given` (or the function itself) where a preprocess function was used."""
        options = cls._options(config, as_given(given, "preprocess"))
        path = Path(folder) / GRAPH
        if not path.is_file():
            raise IntegrityError(f"{path} is missing")
        # As bytes: a saved graph is one file and may not point at others.
        return cls(path.read_bytes(), output=config["output"], scores=config["scores"], **options)


def _read(graph: str | Path | bytes) -> Any:
    """A ModelProto with all weights inside; external data is followed only from a path the user named."""
    try:
        if isinstance(graph, bytes):
            model = onnx.load_model_from_string(graph)
            if _points_outside(model.graph):
                raise InputError(
                    "onnx expert: the graph keeps its weights in another file; give its path, not its bytes"
                )
            return model
        if not Path(graph).is_file():
            raise InputError(f"no ONNX file at {graph}")
        return onnx.load(str(graph))
    except InputError:
        raise
    except Exception as error:  # protobuf's DecodeError moves between its versions
        raise InputError(f"onnx expert: not a readable ONNX model: {_line(error)}") from error


def _points_outside(graph: Any) -> bool:
    """True where a weight of the graph, of a constant or of a branch inside it lies in another file."""
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    tensors = [
        *graph.initializer,
        *(item.t for item in attributes),
        *(t for item in attributes for t in item.tensors),
    ]
    inner = [
        *(item.g for item in attributes if item.HasField("g")),
        *(g for item in attributes for g in item.graphs),
    ]
    external = onnx.TensorProto.EXTERNAL
    return any(t.data_location == external for t in tensors) or any(_points_outside(g) for g in inner)


def _expose(model: Any, tap: str) -> None:
    """Make the value `tap` a graph output; onnxruntime infers its type."""
    outputs = [value.name for value in model.graph.output]
    if tap == "output" or tap in outputs:
        return
    inner = [name for node in model.graph.node for name in node.output if name]
    if tap not in inner:
        raise InputError(f"onnx expert: no value {tap!r} to tap; there are {', '.join([*outputs, *inner])}")
    model.graph.output.append(onnx.ValueInfoProto(name=tap))


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
