"""A torch module as an expert: its output, or any named submodule's, in eval mode and without gradients."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_fusion.errors import InputError, IntegrityError
from model_fusion.fuse.experts.base import Decision
from model_fusion.fuse.experts.schema import InputSchema
from model_fusion.fuse.experts.scored import Preprocess, ScoredExpert, Scores, Words, as_given, tensor

WEIGHTS = "weights.safetensors"


class TorchExpert(ScoredExpert):
    """`module` maps what `preprocess` makes of B items (default: their stacked numbers) to [B, C] or [B].

    **Arguments**: `tap` is "output" (log-probabilities for a classifier, the raw value otherwise) or a name
    from `module.named_modules()`, flattened to [B, 1, D] ([B, T, D] stays); `scores` says what a
    classifier's output is; `weights` is a .safetensors or .pt file (read with `weights_only=True`) to fill
    `module` from.
    """

    kind: ClassVar[str] = "torch"

    def __init__(
        self,
        module: torch.nn.Module,
        inputs: InputSchema,
        *,
        preprocess: Preprocess | None = None,
        tap: str = "output",
        classes: Sequence[str] | None = None,
        scores: Scores = "logits",
        words: Words | None = None,
        weights: str | Path | None = None,
        feature_shape: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(inputs, tap=tap, classes=classes, preprocess=preprocess, words=words)
        self.module = module
        self.scores: Scores = scores
        named = dict(module.named_modules())
        if tap != "output" and (tap == "" or tap not in named):
            raise InputError(f"torch expert: no submodule {tap!r} to tap; there are {', '.join(filter(None, named))}")
        if weights is not None:
            _fill(module, read_weights(Path(weights)), str(weights))
        self._learn_shape(feature_shape)

    def _forward(self, prepared: Any) -> Tensor:
        batch = tensor(prepared)
        like = next(self.module.parameters(), None)
        if like is not None:
            batch = batch.to(like.device, like.dtype if batch.is_floating_point() else batch.dtype)
        with torch.no_grad(), _eval_mode(self.module):
            try:
                output = self.module(batch)
            except RuntimeError as error:
                first = str(error).splitlines()[0]
                raise InputError(
                    f"torch expert: the module refuses an input of shape {list(batch.shape)}: {first}"
                ) from error
        return _one_tensor(output, "output").detach().to("cpu", torch.float32)

    def _tapped(self, prepared: Any) -> Tensor:
        if self.tap == "output":
            output = self._forward(prepared)
            return output if self.classes is None else self._log_probs(output, self.scores)
        caught: list[Tensor] = []
        hook = self.module.get_submodule(self.tap).register_forward_hook(
            lambda _module, _args, output: caught.append(_one_tensor(output, self.tap))
        )
        try:
            self._forward(prepared)
        finally:
            hook.remove()
        if not caught:
            raise InputError(f"torch expert: the submodule {self.tap!r} did not run; tap one that forward() calls")
        return caught[-1]

    def _decided(self, prepared: Any) -> Decision:
        return self._decision_from(self._forward(prepared), self.scores)

    def save(self, folder: Path) -> dict[str, Any]:
        """Weights as safetensors. The architecture is code: `load` wants it as `given`."""
        # Cloned, because safetensors refuses tied tensors; an expert is small.
        state = {name: value.detach().cpu().clone().contiguous() for name, value in self.module.state_dict().items()}
        save_file(state, Path(folder) / WEIGHTS)
        return self._config([WEIGHTS], scores=self.scores)

    @classmethod
    def load(
        cls, folder: Path, config: dict[str, Any], *, given: Any = None, allow_pickle: bool = False
    ) -> TorchExpert:
        """`given` is the module (same architecture, any weights: they are overwritten) or `Given(module=…)`.

        Raises InputError without a module, IntegrityError where names or shapes of the weights do not fit it.
        """
        parts = as_given(given, "module")
        if parts.module is None:
            raise InputError("a torch expert's architecture is code that no file holds: load it with given=the module")
        options = cls._options(config, parts)
        path = Path(folder) / WEIGHTS
        _fill(parts.module, read_weights(path), str(path))
        return cls(parts.module, scores=config["scores"], **options)


def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from .pt/.pth/.bin with `weights_only=True`: no code is ever run."""
    if not path.is_file():
        raise InputError(f"no weight file at {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise IntegrityError(f"{path.name} is not a readable safetensors file: {error}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(
            f"{path.name} holds more than tensors and is not loaded, since that would run its code; "
            "save module.state_dict() instead"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path.name}: expected a state dict (names to tensors); save module.state_dict()")
    return state


def _fill(module: torch.nn.Module, state: dict[str, Tensor], where: str) -> None:
    expected = module.state_dict()
    for name in sorted(set(expected) | set(state)):
        if name not in state or name not in expected:
            raise IntegrityError(
                f"{where}: the tensor {name} is {'missing' if name in expected else 'not in the module'}"
            )
        if state[name].shape != expected[name].shape:
            raise IntegrityError(
                f"{where}: {name} has shape {list(state[name].shape)}, the module has {list(expected[name].shape)}"
            )
    module.load_state_dict(state)


@contextmanager
def _eval_mode(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside, each submodule's own mode afterwards: a module still in training is not disturbed."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _one_tensor(output: Any, name: str) -> Tensor:
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        output = output[0]
    if not isinstance(output, Tensor):
        raise InputError(f"torch expert: {name!r} gives a {type(output).__name__}; tap a submodule that gives a tensor")
    return output
