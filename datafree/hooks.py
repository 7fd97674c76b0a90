"""Looking inside any ``nn.Module``: stage features and BatchNorm statistics, by hooks.

No model has to return its features, so torchvision's, timm's and a user's own networks
are teachers and students as they are.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from datafree.errors import InputError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass
class Features:
    """What one forward pass gives: logits (N, C), embed (N, D), stages [(N, C_l, H_l, W_l)]."""

    logits: torch.Tensor
    embed: torch.Tensor
    stages: list[torch.Tensor]


def pooled(x):
    """Global average pooling, (N, C, H, W) -> (N, C) in fp32; a matrix stays as it is."""
    return x.mean((2, 3), dtype=torch.float32) if x.dim() == 4 else x


class FeatureTap:
    """Takes the stage outputs and the embedding out of ``model``.

    A *stage* is the output of the last block of the trunk at one spatial size: of the last
    module with children there, or of the last layer where there is none. The *embedding* is
    what the head was given, pooled if it is a map; the head is the last ``nn.Linear``, or a
    convolution if that learns last. Without a head the embedding is the last stage, pooled.
    One forward pass on zeros of ``shape`` (C, H, W) finds them; then a few hooks are left,
    which keep nothing outside a call of the tap.
    """

    def __init__(self, model, shape):
        self.model = model
        self._taken = None
        self._calls = {}
        calls, logits = _trace(model, shape)
        self.num_classes = logits.shape[1]
        head = _find_head(calls, self.num_classes)
        chosen = _choose_stages(calls[: calls.index(head)] if head else calls, _trunk(model, calls))
        self.stage_channels = [call.output[1] for call in chosen]
        self.stage_sizes = [call.output[2:] for call in chosen]
        for module in {id(call.module): call.module for call in chosen}.values():
            wanted = {call.number: chosen.index(call) for call in chosen if call.module is module}
            module.register_forward_hook(self._stage_hook(wanted))
        if head:
            head.module.register_forward_pre_hook(self._embed_hook)
        elif not chosen:
            raise InputError(
                "the network has neither convolution maps nor a linear head, so it has no features to "
                "compare; use a network with a trunk of nn.Modules"
            )
        self.embed_dim = head.input[1] if head else self.stage_channels[-1]

    def __call__(self, inputs):
        """Forward pass of normalised ``inputs`` (N, C, H, W) -> :class:`Features`."""
        self._taken, self._calls = {}, {}
        try:
            logits = self.model(inputs)
            taken = self._taken
        finally:
            self._taken = None
        stages = [taken[i] for i in range(len(self.stage_channels))]
        return Features(logits, taken["embed"] if "embed" in taken else pooled(stages[-1]), stages)

    def _stage_hook(self, wanted):
        def hook(module, args, output):
            if self._taken is not None:
                number = self._calls[id(module)] = self._calls.get(id(module), -1) + 1
                if number in wanted:
                    self._taken[wanted[number]] = output

        return hook

    def _embed_hook(self, module, args):
        if self._taken is not None:
            self._taken["embed"] = pooled(args[0])


@dataclass(eq=False)
class _Call:
    """One execution of a module in the tracing pass: shapes, and how often it had run before."""

    module: nn.Module
    number: int
    input: tuple
    output: tuple


@torch.no_grad()
def _trace(model, shape):
    """Run ``model`` on zeros in eval mode; every module call in order of completion, and the logits."""
    calls, counts = [], {}

    def record(module, args, output):
        if args and torch.is_tensor(args[0]) and torch.is_tensor(output):
            number = counts[module] = counts.get(module, -1) + 1
            calls.append(_Call(module, number, tuple(args[0].shape), tuple(output.shape)))

    modes = {module: module.training for module in model.modules()}
    hooks = [module.register_forward_hook(record) for module in model.modules()]
    parameter = next(model.parameters(), torch.zeros(()))
    try:
        logits = model.eval()(torch.zeros(2, *shape, device=parameter.device, dtype=parameter.dtype))
    except Exception as error:  # a network of one's own may raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(
            f"the network {type(model).__name__} cannot take images of {shape[0]} channels and "
            f"{shape[1]}x{shape[2]} pixels ({reason}); choose another network"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
    if not torch.is_tensor(logits) or logits.dim() != 2:
        raise InputError(
            f"the network {type(model).__name__} must return logits as one tensor (N, classes), "
            f"not {tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__}"
        )
    return calls, logits


def _trunk(module, calls):
    """Modules that the image passes one after the other: containers are opened, blocks are not.

    A module is opened when it is a plain container, when it does not map images to images, or
    when it shrinks them by more than one halving, for then it holds several stages.
    """
    modules = []
    for child in module.children():
        own = [call for call in calls if call.module is child]
        plain_container = type(child).forward is nn.Sequential.forward
        if own and not plain_container and all(_within_one_scale(call) for call in own):
            modules.append(child)
        else:
            modules += _trunk(child, calls)
    return modules


def _within_one_scale(call):
    return len(call.input) == len(call.output) == 4 and call.input[2] <= 2 * call.output[2] + 1


def _choose_stages(calls, trunk):
    """The last call of the trunk at each spatial size; of blocks where there are any."""
    groups = {}
    members = {id(module) for module in trunk}
    for call in calls:
        if id(call.module) in members and len(call.output) == 4:
            groups.setdefault(call.output[2:], []).append(call)
    chosen = []
    for group in groups.values():
        blocks = [call for call in group if next(call.module.children(), None) is not None]
        learned = any(next(call.module.parameters(), None) is not None for call in group)
        if learned:
            chosen.append((blocks or group)[-1])
    return chosen


def _find_head(calls, num_classes):
    """The call that answers the classes: the last learned layer's if a convolution, else a linear one's."""
    learned = [call for call in calls if next(call.module.parameters(recurse=False), None) is not None]
    answers = [call for call in learned if call.output[1:2] == (num_classes,)]
    heads = [call for call in answers if isinstance(call.module, nn.Linear) and len(call.input) == 2]
    if learned and learned[-1] in answers and isinstance(learned[-1].module, nn.Conv2d):
        return learned[-1]
    return heads[-1] if heads else None


class BatchNormTap:
    """Collects the batch statistics of what ``model``'s BatchNorm layers are given.

    Used as a context: what it adds exists only inside it, so that a forward pass elsewhere pays nothing.
    ``statistics`` is then a list of (mean, variance, running mean, running variance), each (C,), one entry a layer.
    """

    def __init__(self, model):
        self.layers = [m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None]
        self.statistics = []
        self._normalisers = {layer: partial(self._normalise, layer) for layer in self.layers}

    def __enter__(self):
        self.statistics, self._hooks, self._taken = [], [], []
        for layer in self.layers:
            if _is_plain_and_frozen(layer):
                layer.forward = self._normalisers[layer]  # the same each time, or a compiled network is compiled anew
                self._taken.append(layer)
            else:
                self._hooks.append(layer.register_forward_pre_hook(self._look))
        return self

    def __exit__(self, *exception):
        for hook in self._hooks:
            hook.remove()
        for layer in self._taken:
            del layer.forward

    def _normalise(self, layer, x):
        output, mean, variance = FrozenBatchNorm.apply(x, layer)
        self._keep(layer, mean, variance)
        return output

    def _look(self, layer, args):
        self._keep(layer, *ChannelStatistics.apply(args[0]))

    def _keep(self, layer, mean, variance):
        self.statistics.append((mean, variance, layer.running_mean, layer.running_var))


def _is_plain_and_frozen(layer):
    """Whether the layer is torch's own, does no more than normalise by its running statistics, and learns nothing."""
    own = type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and "forward" not in layer.__dict__
    return own and not layer.training and not any(p.requires_grad for p in layer.parameters())


def sees_images_alone(model):
    """Whether the answer to an image does not depend on the others of its batch, in evaluation mode."""
    return not any(isinstance(m, BATCH_NORMS) and m.running_mean is None for m in model.modules())


def channel_statistics(x):
    """Mean and biased variance per channel, (N, C, ...) -> two vectors (C,) in at least fp32.

    One pass, by the kernel of BatchNorm itself; ``torch.var_mean`` takes twenty times as long on the CPU where the
    channels come last.
    """
    return torch.batch_norm_update_stats(x.to(torch.promote_types(x.dtype, torch.float32)), None, None, 0.0)


def statistics_gradient(x, mean, grad_mean, grad_variance):
    """What :func:`channel_statistics` gives back to x, in one pass: d mean = 1 / n, d var = 2 (x - mean) / n."""
    count = x.numel() // x.shape[1]
    slope = 2 * grad_variance / count
    return torch.addcmul(_as_channels(grad_mean / count - slope * mean, x), x, _as_channels(slope, x))


def _as_channels(vector, x):
    return vector.view(1, -1, *[1] * (x.dim() - 2))


class ChannelStatistics(torch.autograd.Function):
    """:func:`channel_statistics` as one autograd node, so that no intermediate map is kept."""

    @staticmethod
    def forward(ctx, x):
        mean, variance = channel_statistics(x)
        ctx.save_for_backward(x, mean)
        return mean, variance

    @staticmethod
    def backward(ctx, grad_mean, grad_variance):
        x, mean = ctx.saved_tensors
        return statistics_gradient(x, mean, grad_mean, grad_variance).to(x.dtype)


class FrozenBatchNorm(torch.autograd.Function):
    """What a BatchNorm ``layer`` in evaluation mode makes of x, and the :func:`channel_statistics` of x.

    Together they need two passes on the way back, and keep x once; apart they need four.
    """

    @staticmethod
    def forward(ctx, x, layer):
        output = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)
        mean, variance = channel_statistics(x)
        scale = (layer.running_var + layer.eps).rsqrt()
        ctx.save_for_backward(x, mean, scale if layer.weight is None else scale * layer.weight)
        return output, mean, variance

    @staticmethod
    def backward(ctx, grad_output, grad_mean, grad_variance):
        x, mean, scale = ctx.saved_tensors
        gradient = statistics_gradient(x, mean, grad_mean, grad_variance)
        return torch.addcmul(gradient, grad_output, _as_channels(scale, x)).to(x.dtype), None
