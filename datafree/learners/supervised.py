"""Plain training on labelled images: how teachers are made."""

from torch.nn import functional as F

from datafree.learners.base import Learner


class SupervisedLearner(Learner):
    """Cross entropy with the true labels on augmented images."""

    def __init__(self, network, augment, settings, total_steps, precision="none"):
        super().__init__(network, settings, total_steps, precision=precision)
        self.augment = augment

    def loss(self, images, targets, numbers, progress):
        loss = F.cross_entropy(self.network(self.augment(images)).float(), targets)
        return loss, {"ce": loss}
