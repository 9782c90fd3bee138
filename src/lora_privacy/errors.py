"""Named errors. A bad argument is a ``ValueError`` or ``TypeError``; all else is one of these."""

__all__ = [
    "AlreadyAdaptedError",
    "AttestationError",
    "BudgetSpentError",
    "CalibrationError",
    "ConfigError",
    "ConvergenceError",
    "DataError",
    "FolderInUseError",
    "IsolationError",
    "LedgerError",
    "LoraPrivacyError",
    "MissingPackageError",
    "NoTargetError",
    "NonFiniteError",
    "PrefixError",
    "ProbeError",
    "ProcessError",
    "StaleParameterError",
    "StalePrefixError",
    "StorageError",
    "TrainingOrderError",
    "UnsupportedEventError",
    "UnsupportedLawError",
    "UnsupportedLayerError",
    "UnsupportedTrainingError",
    "WeightsUnmovedError",
]


class LoraPrivacyError(Exception):
    """Base of every error of this library that is not a plain bad argument."""


class ConvergenceError(LoraPrivacyError):
    """A quadrature or root search missed its tolerance; no value is returned."""


class UnsupportedEventError(LoraPrivacyError):
    """An accountant was handed an event it has no proof for."""


class CalibrationError(LoraPrivacyError):
    """No searched value meets the privacy target, or all of them do; the message says which."""


class AttestationError(LoraPrivacyError):
    """An optimizer did not show that this step is the event that the accountant would charge."""


class UnsupportedLawError(LoraPrivacyError):
    """A computation is not known for this law of the noise; the message says what to use."""


class UnsupportedLayerError(LoraPrivacyError):
    """A layer has a type or a shape that is not supported."""


class NoTargetError(LoraPrivacyError):
    """No module matches the targets asked for; the message lists the candidates."""


class AlreadyAdaptedError(LoraPrivacyError):
    """The model carries adapters already."""


class NonFiniteError(LoraPrivacyError):
    """A gradient or a weight holds NaN or infinity."""


class DataError(LoraPrivacyError):
    """A data source is missing, empty, unlabelled, or lacks a column."""


class FolderInUseError(LoraPrivacyError):
    """An output folder belongs to another run."""


class MissingPackageError(LoraPrivacyError):
    """An optional package is missing; the message says what to install."""


class ProbeError(LoraPrivacyError):
    """A recorded gradient can no longer be computed, or a probe is used out of turn."""


class PrefixError(LoraPrivacyError):
    """A cached prefix does not fit the model, the batch or the example it is used for."""


class ConfigError(LoraPrivacyError):
    """A file of settings cannot be read, or names a setting that there is not."""


class StalePrefixError(PrefixError):
    """The weights below the first adapted block changed since the prefix was cached."""


class StorageError(LoraPrivacyError):
    """A saved adapter or file of arrays is missing, damaged, or belongs to another run."""


class UnsupportedTrainingError(LoraPrivacyError):
    """A method, an optimiser or a data loader for which the privacy argument does not hold."""


class ProcessError(LoraPrivacyError):
    """Processes that train together disagree, or one of them is gone."""


class TrainingOrderError(LoraPrivacyError):
    """Batches, backward passes and steps came in an order that the accounting does not cover."""


class BudgetSpentError(LoraPrivacyError):
    """All steps that the privacy target pays for are taken."""


class StaleParameterError(LoraPrivacyError):
    """The optimizer holds parameters that the model does not use any more."""


class IsolationError(LoraPrivacyError):
    """The gradient of one sample depends on another one, so that clipping bounds nothing."""


class WeightsUnmovedError(LoraPrivacyError):
    """A step that should have moved weights left them as they were."""


class LedgerError(LoraPrivacyError):
    """A ledger of private steps is damaged, or belongs to another mechanism."""
