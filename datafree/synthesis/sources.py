"""The two controls of every data-free claim: plain noise, and the real training images."""
import torch

from datafree.synthesis.base import BaseSynthesis


class NoiseSource(BaseSynthesis):
    """Gaussian noise with the data card's mean and standard deviation, clipped to [0, 1]; new at every draw."""

    control = True

    def __init__(self, card, device):
        self.shape, self.device = card.shape, device
        self.mean = torch.tensor(card.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(card.std, device=device).view(-1, 1, 1)

    def sample(self, n):
        self.images_made += n
        noise = torch.randn(n, *self.shape, device=self.device)
        return (noise * self.std + self.mean).clamp(0, 1), None

    def latest(self):
        # A peek must not move the stream on, or drawing a grid would change the training.
        made = self.images_made
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            images, targets = self.sample(256)
        self.images_made = made
        return images, targets

    def state_dict(self):
        return {"images_made": self.images_made}

    def load_state_dict(self, state):
        self.images_made = state["images_made"]


class RealSource(BaseSynthesis):
    """Real training images with their labels: the upper bound, and how teachers are made."""

    control = True

    def __init__(self, split):
        self.split = split

    def sample(self, n):
        return self.split.sample(n)

    def latest(self):
        # No more may this peek.
        state = self.split.state_dict()
        batch = self.split.sample(min(256, len(self.split)))
        self.split.load_state_dict(state)
        return batch

    def state_dict(self):
        return self.split.state_dict()

    def load_state_dict(self, state):
        self.split.load_state_dict(state)
