"""Networks by name: ``MODELS[name](num_classes, in_channels=3)`` gives an ``nn.Module`` that returns logits.

Every network takes images of any reasonable size. Networks that are not in the table come by
:func:`datafree.models.custom.build_model`.
"""

from . import lenet, mobilenetv2, resnet, resnet_cifar, shufflenetv2, vgg, wresnet

MODELS = {
    "wrn16_1": wresnet.wrn16_1,
    "wrn16_2": wresnet.wrn16_2,
    "wrn40_1": wresnet.wrn40_1,
    "wrn40_2": wresnet.wrn40_2,
    "resnet8": resnet_cifar.resnet8,
    "resnet20": resnet_cifar.resnet20,
    "resnet32": resnet_cifar.resnet32,
    "resnet56": resnet_cifar.resnet56,
    "resnet110": resnet_cifar.resnet110,
    "resnet8x4": resnet_cifar.resnet8x4,
    "resnet32x4": resnet_cifar.resnet32x4,
    "cifar_resnet20": resnet_cifar.cifar_resnet20,
    "cifar_resnet32": resnet_cifar.cifar_resnet32,
    "cifar_resnet44": resnet_cifar.cifar_resnet44,
    "cifar_resnet56": resnet_cifar.cifar_resnet56,
    "cifar_resnet110": resnet_cifar.cifar_resnet110,
    "resnet18": resnet.resnet18,
    "resnet34": resnet.resnet34,
    "resnet50": resnet.resnet50,
    "vgg8": vgg.vgg8,
    "vgg11": vgg.vgg11,
    "vgg13": vgg.vgg13,
    "mobilenetv2": mobilenetv2.mobilenetv2,
    "shufflenetv2": shufflenetv2.shufflenetv2,
    "lenet5": lenet.lenet5,
}
