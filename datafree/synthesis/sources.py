"""The two controls of every data-free claim: plain noise, and the real training images."""

import torch

from datafree.synthesis.base import BaseSynthesis


class NoiseSource(BaseSynthesis):
    """Gaussian noise with the data card's mean and standard deviation, clipped to [0, 1]; new at every draw."""

    control = True

    def __init__(self, card, device):
        super().__init__(card=card, device=device)
        self.mean = torch.tensor(card.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(card.std, device=device).view(-1, 1, 1)

    def sample(self, n):
        self.images_made += n
        noise = torch.randn(n, *self.card.shape, device=self.device)
        return (noise * self.std + self.mean).clamp(0, 1), None


class RealSource(BaseSynthesis):
    """Real training images with their labels: the upper bound, and how teachers are made."""

    control = True

    def __init__(self, split):
        super().__init__()
        self.split = split

    def sample(self, n):
        return self.split.sample(n)

    def latest(self):
        # A peek must not move the stream on, here either.
        state = self.split.state_dict()
        batch = self.split.sample(min(256, len(self.split)))
        self.split.load_state_dict(state)
        return batch

    def state_dict(self):
        return self.split.state_dict()

    def load_state_dict(self, state):
        self.split.load_state_dict(state)
