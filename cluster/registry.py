"""The models that this cluster serves. Registered is registered: whether a model is in an arena now is another question."""

from __future__ import annotations

import difflib
import re

from polymux.cluster.config import MODEL_NAME
from polymux.transport.errors import ConfigError, ModelNotFound
from polymux.transport.messages import ModelSpec
from polymux.transport.units import ModelName

_NAME = re.compile(MODEL_NAME)


class Registry:
    """Specs by name, in the order in which they came. `catalogue` rises with every change."""

    def __init__(self, *, max_models: int) -> None:
        self._max_models = max_models
        self._specs: dict[ModelName, ModelSpec] = {}
        self.catalogue = 0

    def __contains__(self, model: object) -> bool:
        return model in self._specs

    def __len__(self) -> int:
        return len(self._specs)

    def register(self, spec: ModelSpec) -> bool:
        """False when it was there already, with the same weights; its limits and SLOs are then those of the new spec.

        Raises ConfigError for a bad name or size, for a name taken by other weights, and when the registry is full.
        """
        self._check(spec)
        known = self._specs.get(spec.model)
        if known == spec:
            return False
        if known is not None and (known.digest, known.dtype, known.kv) != (spec.digest, spec.dtype, spec.kv):
            raise ConfigError(
                f"model {spec.model!r} is registered with other weights (digest {known.digest:.12}, dtype {known.dtype}; now "
                f"{spec.digest:.12}, {spec.dtype}); give one of them another name",
                param="model",
            )
        if known is None and len(self._specs) >= self._max_models:
            raise ConfigError(f"{len(self._specs)} models are registered, limits.max_models={self._max_models}; raise it", param="model")
        self._specs[spec.model] = spec
        self.catalogue += 1
        return known is None

    def get(self, model: str) -> ModelSpec:
        """Raises ModelNotFound, with the name that was probably meant."""
        spec = self._specs.get(ModelName(model))
        if spec is None:
            close = difflib.get_close_matches(model, self._specs, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "GET /v1/models lists those that do"
            raise ModelNotFound(f"the model {model!r:.140} does not exist; {hint}", param="model")
        return spec

    def specs(self) -> tuple[ModelSpec, ...]:
        return tuple(self._specs.values())

    def _check(self, spec: ModelSpec) -> None:
        if not _NAME.fullmatch(spec.model):
            raise ConfigError(f"model={spec.model!r:.140} must be letters, digits and ._/:@+-, at most 128", param="model")
        for name in ("weight_bytes", "vocab_size", "max_model_len", "ttft_slo_s", "tpot_slo_s"):
            if not getattr(spec, name) > 0:
                raise ConfigError(f"model {spec.model!r} has {name}={getattr(spec, name)}; it must be above 0", param=name)
