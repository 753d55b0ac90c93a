"""Turn a manifest and the memory that holds its image into the tensors that a decoder computes with. Copies nothing."""

from __future__ import annotations

from dataclasses import fields

from torch import Tensor

from polymux.actors.models.config import ArchConfig
from polymux.actors.models.decoder import LayerWeights, ModelWeights
from polymux.actors.weights.image import ALIGNMENT, DTYPES, ImageManifest, TensorEntry
from polymux.actors.weights.parts import EMBEDDING, FINAL_NORM, HEAD, layer_entry, parts_of
from polymux.kernels import onednn
from polymux.transport.errors import WireError

_FIELDS = tuple(field.name for field in fields(LayerWeights))


def bind_weights(config: ArchConfig, manifest: ImageManifest, memory: Tensor) -> ModelWeights:
    """Views of `memory`, uint8 of at least `manifest.nbytes`, which must outlive them.

    Raises WireError when the manifest lacks a tensor, or has one that does not fit the configuration, the memory or this CPU.
    """
    if memory.numel() < manifest.nbytes or memory.data_ptr() % min(ALIGNMENT, onednn.ALIGNMENT):
        raise WireError(f"{memory.numel()} bytes at {memory.data_ptr():#x} cannot hold an image of {manifest.nbytes} aligned bytes")
    found = {entry.name: entry for entry in manifest.entries}
    names = {part.name for group in parts_of(config) for part in group} | {EMBEDDING}
    missing = names - found.keys()
    if missing:
        raise WireError(f"the weight image lacks {min(missing)} and {len(missing) - 1} more; build it again")
    tensors = {name: _bind_entry(found[name], memory) for name in names}
    for layer in range(config.num_layers):
        name = layer_entry(layer, "head_norms")
        if name in tensors:
            tensors[name] = tensors[name].view(-1, config.head_dim)
    layers = tuple(
        LayerWeights(**{field: tensors.get(layer_entry(layer, field)) for field in _FIELDS})  # type: ignore[arg-type]
        for layer in range(config.num_layers)
    )
    return ModelWeights(tensors[EMBEDDING], layers, tensors[FINAL_NORM], tensors[HEAD])


def _bind_entry(entry: TensorEntry, memory: Tensor) -> Tensor:
    data, dtype = memory[entry.offset : entry.offset + entry.nbytes], DTYPES[entry.dtype]
    if entry.layout != "onednn":
        return data.view(dtype).view(entry.shape)
    if not onednn.is_available(dtype):
        raise WireError(f"{entry.name} is packed for another CPU: this one has no packed {entry.dtype}; build the image here")
    try:
        return onednn.bind(data, entry.metadata, entry.shape, dtype)
    except (ValueError, RuntimeError) as error:
        raise WireError(f"{entry.name}: {error}; build the image again") from error
