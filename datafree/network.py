"""A model as the methods see it: it takes images or views in [0, 1] and normalises them itself."""

from contextlib import contextmanager

import torch
from torch import nn

from datafree.hooks import FeatureTap


class Network(nn.Module):
    """``model`` with its own normalisation and a tap on its features.

    Each network carries the mean and standard deviation that it was trained with, so that a
    teacher and a student with different ones see the same views.

    shape: (C, H, W) of the images. mean, std: per channel, in [0, 1] units. origin: what the file of its
    weights says of them (acc1, epoch, dataset, ...), if there is one.
    """

    def __init__(self, model, shape, mean, std, name="network", origin=None):
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)
        self.name, self.origin = name, origin or {}
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.tap = FeatureTap(model, shape)

    @property
    def num_classes(self):
        return self.tap.num_classes

    def normalise(self, views):
        return ((views - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def forward(self, views):
        """Views (N, C, H, W) in [0, 1] -> logits (N, classes)."""
        return self.model(self.normalise(views))

    def features(self, views):
        """Views (N, C, H, W) in [0, 1] -> :class:`datafree.hooks.Features`."""
        return self.tap(self.normalise(views))

    def compiled(self, mode):
        """Run by torch.compile from now on: ``default`` fuses, ``reduce-overhead`` replays CUDA graphs too."""
        torch._dynamo.config.cache_size_limit = 32  # both roles, modes and phases of all networks share one code
        self.compile(mode=mode)
        self.features = torch.compile(self.features, mode=mode)
        return self

    def freeze(self):
        """Eval mode for good and no weight gradients: what a teacher is."""
        self.eval().requires_grad_(False)
        return self

    @contextmanager
    def frozen(self):
        """Eval mode and no weight gradients inside the block; as before afterwards."""
        modes = {module: module.training for module in self.modules()}
        wanted = [parameter.requires_grad for parameter in self.parameters()]
        self.eval().requires_grad_(False)
        try:
            yield self
        finally:
            for module, training in modes.items():
                module.training = training
            for parameter, flag in zip(self.parameters(), wanted):
                parameter.requires_grad_(flag)
