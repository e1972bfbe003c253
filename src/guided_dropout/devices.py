"""On which device a model is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from guided_dropout.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def has_float64(device: str | torch.device) -> bool:
    """Whether `device` computes in float64, in which the Fisher is summed up; MPS does not.

    A device that is not there counts as one that does: what is wrong with it shows when a model is moved to it.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        return True
    try:
        torch.zeros(1, dtype=torch.float64, device=device).add_(1)
    except (RuntimeError, TypeError):
        return False
    return True


def check_placement(device: str | None, device_map: str | None, processes: int) -> None:
    """Refuse what cannot be: a model is on one device, or spread over those of its only process.

    Raises:
        ModelError: it is something else, or the device does not compute in float64.
    """
    if device is not None and not has_float64(device):
        raise ModelError(
            f"--device {device} does not compute in float64; expected a device that does, for the Fisher's sums: "
            "use --device cpu"
        )
    if device_map is not None and device is not None:
        raise ModelError(f"--device {device} and --device-map {device_map}; expected one of them")
    if device_map is not None and processes > 1:
        raise ModelError(
            f"--device-map {device_map} in {processes} processes; expected one process, which uses all devices: start "
            "it without a launcher, or leave --device-map out to give each process a whole model"
        )


def to_device(model: PreTrainedModel, device: str | torch.device | None = None) -> PreTrainedModel:
    """Move `model` to `device`, by default the accelerator if there is one that computes in float64.

    Raises:
        ModelError: no such device.
    """
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = found if found is not None and has_float64(found) else "cpu"
    try:
        return model.to(torch.device(device))  # pyright: ignore[reportArgumentType]
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0].rstrip(".")
        raise ModelError(
            f"cannot put the model on device {device} ({reason}); expected a device that is there and holds it, for "
            "instance cpu or cuda:0: choose another --device, or a smaller model"
        ) from e
