"""Networks by name: ``MODELS[name](num_classes, in_channels=3)`` is an ``nn.Module`` that returns logits.

Every network takes images of any reasonable size. :func:`datafree.models.factory.build_model` builds those that
are not in the table, too.
"""

from collections import UserDict
from collections.abc import Callable
from typing import Any

from datafree.plugins import load_object


class Factories(UserDict[str, Any]):
    """Name -> factory. One given as ``module:function`` is imported when it is used, so that names cost no torch."""

    def __getitem__(self, name: str) -> Callable[..., Any]:
        factory = super().__getitem__(name)
        return load_object(factory) if isinstance(factory, str) else factory


MODELS = Factories(
    {
        "wrn16_1": "datafree.models.wresnet:wrn16_1",
        "wrn16_2": "datafree.models.wresnet:wrn16_2",
        "wrn40_1": "datafree.models.wresnet:wrn40_1",
        "wrn40_2": "datafree.models.wresnet:wrn40_2",
        "resnet8": "datafree.models.resnet_cifar:resnet8",
        "resnet20": "datafree.models.resnet_cifar:resnet20",
        "resnet32": "datafree.models.resnet_cifar:resnet32",
        "resnet56": "datafree.models.resnet_cifar:resnet56",
        "resnet110": "datafree.models.resnet_cifar:resnet110",
        "resnet8x4": "datafree.models.resnet_cifar:resnet8x4",
        "resnet32x4": "datafree.models.resnet_cifar:resnet32x4",
        "cifar_resnet20": "datafree.models.resnet_cifar:cifar_resnet20",
        "cifar_resnet32": "datafree.models.resnet_cifar:cifar_resnet32",
        "cifar_resnet44": "datafree.models.resnet_cifar:cifar_resnet44",
        "cifar_resnet56": "datafree.models.resnet_cifar:cifar_resnet56",
        "cifar_resnet110": "datafree.models.resnet_cifar:cifar_resnet110",
        "resnet18": "datafree.models.resnet:resnet18",
        "resnet34": "datafree.models.resnet:resnet34",
        "resnet50": "datafree.models.resnet:resnet50",
        "vgg8": "datafree.models.vgg:vgg8",
        "vgg11": "datafree.models.vgg:vgg11",
        "vgg13": "datafree.models.vgg:vgg13",
        "mobilenetv2": "datafree.models.mobilenetv2:mobilenetv2",
        "shufflenetv2": "datafree.models.shufflenetv2:shufflenetv2",
        "shufflenetv2_torchvision": "datafree.models.shufflenetv2:shufflenetv2_torchvision",
        "lenet5": "datafree.models.lenet:lenet5",
    }
)
