"""What the engine asks of a learner: steps, and a state to resume from."""

import math

import torch

from datafree.runtime import autocast


class Learner:
    """A student with its optimiser (SGD, cosine to 0 over all steps) and what else its loss trains.

    A learner of one's own overrides :meth:`loss`.

    network: the student. extra: further parameters that are trained along. total_steps: steps of
    the whole run, over which the learning rate falls from ``settings.lr`` to 0.
    """

    def __init__(self, network, settings, total_steps, extra=(), precision="none"):
        self.network, self.precision = network, precision
        self.device = network.mean.device
        self.optimizer = torch.optim.SGD(
            [*network.parameters(), *extra], settings.lr, settings.momentum, weight_decay=settings.weight_decay
        )
        # In closed form, so that a resumed run may be longer than it was.
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: (1 + math.cos(math.pi * min(step / total_steps, 1))) / 2
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def loss(self, images, targets, numbers, progress):
        """Weighted loss and unweighted terms, name -> scalar tensor.

        images (N, C, H, W) in [0, 1]; targets (N,) or None; numbers (N,) that tell one image of the source from
        another, or None; progress in [0, 1) of the run.
        """
        raise NotImplementedError

    def step(self, images, targets, numbers=None, *, progress=0.0):
        """One update of the student -> detached terms, name -> scalar tensor."""
        self.network.train()
        torch.compiler.cudagraph_mark_step_begin()  # what the step before made may be overwritten
        with autocast(self.device, self.precision):
            loss, terms = self.loss(images, targets, numbers, progress)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return {name: term.detach() for name, term in terms.items()}

    def numbers(self):
        """What else is worth logging about the steps since the last call, name -> number."""
        return {}

    @property
    def lr(self):
        return self.optimizer.param_groups[0]["lr"]

    def parts(self):
        """Everything with a state, name -> object with state_dict and load_state_dict."""
        return {
            "student": self.network.model,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "scaler": self.scaler,
        }

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts().items()}

    def load_state_dict(self, state):
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        for group, rate in zip(self.optimizer.param_groups, self.schedule.base_lrs):
            group["lr"] = rate * self.schedule.lr_lambdas[0](self.schedule.last_epoch)
