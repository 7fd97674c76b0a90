"""What the engine asks of a source of images."""

import torch

from datafree.errors import InputError


class BaseSynthesis:
    """Makes images and hands them out; a source of one's own overrides ``synthesize`` and ``sample``.

    ``--method path/to/file.py:Class`` makes it of these, which this class's constructor keeps as its attributes:
    teacher, student (:class:`datafree.network.Network`), augment (images -> views), card, config (all options),
    device. It counts what it makes in ``images_made``.

    control: whether the images are no attempt to be good, so that no alarm is raised about them.
    images_made: how many images were synthesised so far.
    g_steps: steps of a round, after each of which it calls ``tick``; 0 if it does not.
    epoch: set by the engine before each round, counted from 0.
    with_student: set by the engine; False during warm-up, when terms that look at the student rest.
    tick: set by the engine; called after each synthesis step, for the progress bar.
    """

    control = False
    images_made = 0
    g_steps = 0
    epoch = 0
    with_student = True
    device = torch.device("cpu")

    def __init__(self, teacher=None, student=None, augment=None, card=None, config=None, device="cpu"):
        self.teacher, self.student, self.augment, self.card, self.config = teacher, student, augment, card, config
        self.device = torch.device(device)

    @staticmethod
    def tick():
        """Nothing, until an engine sets it."""

    def synthesize(self):
        """One round of synthesis -> unweighted terms, name -> scalar tensor; {} if there is nothing to do."""
        return {}

    def sample(self, n):
        """n images (n, C, H, W) in [0, 1] on the device, and their classes (n,) or None.

        A source that keeps its images in a :class:`datafree.pool.ImagePool` called ``pool`` may return all that its
        ``sample`` does, so that the teacher need not be asked twice about a view.
        """
        raise NotImplementedError

    def latest(self):
        """Up to 256 images that show what the source makes now, with their classes or None."""
        # A peek must not move the stream on, or drawing a grid would change the training.
        made = self.images_made
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            batch = self.sample(256)[:2]
        self.images_made = made
        return batch

    def state_dict(self):
        """All that an exact resume needs, beside the random state; one of one's own adds to this."""
        return {"images_made": self.images_made}

    def load_state_dict(self, state):
        self.images_made = state["images_made"]


def checked(source, shape, device):
    """A source of one's own whose mistakes raise an InputError, those of the range of its images at the first draw.

    shape: (C, H, W) of the images that it has to give. device: where it has to give them.
    """
    sample, synthesize, name, first = source.sample, source.synthesize, type(source).__name__, True

    def checked_sample(n):
        nonlocal first
        batch = sample(n)
        if not isinstance(batch, tuple) or len(batch) not in (2, 3) or not torch.is_tensor(batch[0]):
            raise InputError(
                f"{name}.sample({n}) returned a {type(batch).__name__}; it has to return "
                "(images, targets) or (images, targets, numbers), targets None where there are none"
            )
        images, targets = batch[:2]
        if images.shape != (n, *shape) or not images.is_floating_point() or images.device.type != device.type:
            raise InputError(
                f"{name}.sample({n}) returned images {tuple(images.shape)} of {images.dtype} on "
                f"{images.device.type}; they have to be floats of shape {(n, *shape)} on {device.type}"
            )
        if targets is not None and not (torch.is_tensor(targets) and targets.shape == (n,)):
            raise InputError(
                f"{name}.sample({n}) returned classes {tuple(getattr(targets, 'shape', ()))}; they have "
                f"to be a tensor of shape ({n},), or None"
            )
        if first and not ((images >= 0) & (images <= 1)).all():
            raise InputError(
                f"{name}.sample({n}) returned images from {images.min():.4g} to {images.max():.4g}; they "
                "have to be in [0, 1]"
            )
        first = False
        return batch

    def checked_synthesize():
        terms = synthesize()
        terms = {} if terms is None else terms
        if not isinstance(terms, dict) or not all(torch.is_tensor(t) and t.numel() == 1 for t in terms.values()):
            raise InputError(
                f"{name}.synthesize() returned {terms!r}; it has to return the terms to log, name -> "
                "scalar tensor, or nothing"
            )
        return terms

    if type(source).sample is BaseSynthesis.sample:
        raise InputError(f"{name} has no method sample(n); it has to return n images and their classes or None")
    source.sample, source.synthesize = checked_sample, checked_synthesize
    return source
