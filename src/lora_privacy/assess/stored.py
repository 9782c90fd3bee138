"""Rebuild a saved assessment, or a part of one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from lora_privacy.assess.config import AssessConfig
from lora_privacy.assess.dynamics import LayerDynamics
from lora_privacy.assess.measure import EntryCheck, LayerNoise
from lora_privacy.assess.membership import Membership
from lora_privacy.assess.noise_plan import NoisePlan
from lora_privacy.assess.readings import plain_readings, private_readings
from lora_privacy.assess.result import Assessment, DataSummary, MethodResult
from lora_privacy.assess.secrets import SecretsResult
from lora_privacy.assess.spectra import LayerSpectrum
from lora_privacy.assess.training import Score, TrainingCurve
from lora_privacy.assess.updates import UpdateAttack
from lora_privacy.errors import LoraPrivacyError, StorageError

__all__ = ["assessment_from_dict", "trained_from_dict"]


def assessment_from_dict(data: dict[str, Any]) -> Assessment:
    """Rebuild what ``Assessment.to_dict`` gave; what is proved is computed anew.

    Raises:
        StorageError: It is something else.
    """
    try:
        config = AssessConfig.from_dict(data["config"])
        train, dev = (_summary(data[name]) for name in ("train", "dev"))
        methods = tuple(
            replace(
                trained_from_dict(method, config, train.examples),
                membership=_part(Membership, method["membership"]),
                update=_part(UpdateAttack, method["update"]),
                spectra=tuple(map(LayerSpectrum.from_dict, method["spectra"])),
            )
            for method in data["methods"]
        )
        return Assessment(
            config=config,
            model_name=data["model"],
            train=train,
            dev=dev,
            methods=methods,
            missing=tuple(data["missing"]),
            environment=data["environment"],
        )
    except (KeyError, TypeError, ValueError, AttributeError, LoraPrivacyError) as error:
        raise StorageError(
            f"this is no saved assessment of this version ({type(error).__name__}: {error}); run "
            "the assessment again, with --overwrite."
        ) from error


def trained_from_dict(data: dict[str, Any], config: AssessConfig, examples: int) -> MethodResult:
    """Rebuild a training without its attacks.

    Args:
        data: Of ``MethodResult.to_dict``.
        config: That it was run with.
        examples: Size of its training set.
    """
    curve = dict(data["curve"])
    curve["scores"] = tuple(Score(**score) for score in curve["scores"])
    if not curve["scores"]:
        raise ValueError("a training has no score")
    curve["losses"] = tuple(curve["losses"])
    layers = []
    for layer in data["layers"]:
        entry: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in layer["entry"].items()
        }
        if not isinstance(layer["layer"], str):
            raise ValueError("a layer has no name")
        layers.append(LayerNoise(**{**layer, "entry": EntryCheck(**entry)}))
    dynamics = tuple(
        LayerDynamics(**{name: _number(value) for name, value in layer.items()})
        for layer in data["dynamics"]
    )
    shapes = tuple((rows, rank) for rows, rank in data["shapes"])
    noise = _plan(data["noise"])
    if noise is not None:
        readings = private_readings(noise, config.delta, tuple(data["proved"]["assumptions"]))
    else:
        price = _plan(data["price"])
        readings = plain_readings(config, shapes, examples, curve["steps"], price)
    return MethodResult(
        method=data["method"],
        trained_parameters=data["trained_parameters"],
        curve=TrainingCurve(**curve),
        drift=dict(data["drift"]),
        shapes=shapes,
        layers=tuple(layers),
        dynamics=dynamics,
        proved=readings.proved,
        implied=readings.implied,
        flattering=readings.flattering,
        noise=noise,
        price=readings.price,
        secrets=_part(SecretsResult, data["secrets"]),
    )


def _plan(data: dict[str, Any] | None) -> NoisePlan | None:
    if data is None:
        return None
    projected = tuple((inputs, rank) for inputs, rank in data["projected"])
    return NoisePlan(**{**data, "projected": projected})


def _part(kind: Any, data: dict[str, Any] | None) -> Any:  # noqa: ANN401 - a type with from_dict
    return None if data is None else kind.from_dict(data)


def _summary(data: dict[str, Any]) -> DataSummary:
    return DataSummary(**{**data, "classes": tuple(data["classes"])})


def _number(value: Any) -> Any:  # noqa: ANN401
    return math.inf if value == "inf" else value
