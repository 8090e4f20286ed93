"""`base+lora`: a checkpoint whose tensors have a LoRA adapter added as they are read. No peft needed."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model_fusion.architecture.align import aligned
from model_fusion.architecture.roles import role_of, tied
from model_fusion.checkpoint.adapter import Adapter, Pair
from model_fusion.checkpoint.formats import Entry
from model_fusion.checkpoint.reader import Checkpoint, map_tensor
from model_fusion.checkpoint.sources import Source
from model_fusion.errors import InputError


class AdaptedCheckpoint(Checkpoint):
    """W + scale · B A, with scale = alpha / r (rsLoRA: alpha / sqrt(r)); Hu et al. 2021, equation 3.

    Tensors that the adapter saves whole (modules_to_save, biases) replace the base's.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        if source.adapter is None:
            raise InputError(f"{source.spec}: no adapter given")
        self._adapter = Adapter(source.adapter)
        self._pairs: dict[str, Pair] = {}
        self._saved: dict[str, Entry] = {}
        for module, pair in self._adapter.pairs.items():
            target = self._target(f"{module}.weight")
            wanted = self.spec(target).shape
            shape = pair.shape[::-1] if self._transposed(target, pair) else pair.shape
            if shape != wanted:
                raise InputError(f"{self._adapter.file}: LoRA of {target!r} is {shape}, the base's tensor {wanted}")
            self._pairs[target] = pair
        for name, entry in self._adapter.saved.items():
            if not self._repeats(name, entry):
                target = self._target(name)
                if entry.shape != self.spec(target).shape:
                    wanted = self.spec(target).shape
                    raise InputError(f"{self._adapter.file}: {name!r} is {entry.shape}, the base's tensor {wanted}")
                self._saved[target] = entry

    def _target(self, name: str) -> str:
        """The base's name: checkpoints of headless models lack the outermost module's name (GPT-2's "transformer.")."""
        shorter = name.partition(".")[2]
        found = name if name in self else shorter if shorter in self else None
        if found is None:
            raise InputError(f"{self._adapter.file}: {name!r} has no counterpart in {self.folder}")
        return found

    def _repeats(self, name: str, entry: Entry) -> bool:
        """Whether a saved head is the saved embedding again, in a model that ties the two."""
        group = tied(self.config, [*self.names, name])
        if name in self or not group or name not in group[0]:
            return False
        embedding = self._adapter.saved.get(group[0][0])
        return embedding is not None and map_tensor(embedding).equal(map_tensor(entry))

    def _transposed(self, target: str, pair: Pair) -> bool:
        """Conv1D and embeddings store [in, out]. peft goes by the module's class too, not by fan_in_fan_out."""
        return pair.embedding or role_of(target, self.config).transposed

    @property
    def adapted(self) -> list[str]:
        """Names of the tensors that the adapter changes."""
        return [*self._pairs, *self._saved]

    def read(self, name: str) -> Tensor:
        """The tensor with its adapter, float32 where there is one (rounded only in the output)."""
        weight = map_tensor(self._saved[name]) if name in self._saved else super().read(name)
        pair = self._pairs.get(name)
        if pair is None:
            return weight
        a, b = pair.factors()
        delta = b @ a
        return weight.float().add(delta.T if self._transposed(name, pair) else delta, alpha=pair.scale)

    def stored(self, name: str) -> dict[str, Tensor]:
        parts = {} if name in self._saved else {name: super().read(name)}
        if name in self._saved:
            parts[f"{name}+lora_saved"] = map_tensor(self._saved[name])
        if name in self._pairs:
            pair = self._pairs[name]
            parts |= {f"{name}+lora_A": map_tensor(pair.a), f"{name}+lora_B": map_tensor(pair.b)}
        return parts


@torch.no_grad()
def adapt(weights: Mapping[str, nn.Parameter], checkpoint: Checkpoint) -> dict[str, str]:
    """Give the parameters of a loaded base, by name, what an adapter makes of them. Returns parameter → name on disk,
    for all that have one; also for a checkpoint without an adapter, which changes nothing."""
    names = {name: own for name, own in aligned(checkpoint.names, list(weights)).items() if name in weights}
    module_name = {own: name for name, own in names.items()}
    for own in checkpoint.adapted if isinstance(checkpoint, AdaptedCheckpoint) else ():
        weights[module_name[own]].copy_(checkpoint.read(own))
    return names
