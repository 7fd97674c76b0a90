"""What the engine asks of a source of images."""
from datafree.errors import InputError


class BaseSynthesis:
    """Makes images and hands them out; a source of one's own overrides ``synthesize`` and ``sample``.

    ``--source path/to/file.py:Class`` calls ``Class(teacher, student, augment, card, config, device)`` by these
    names: two :class:`datafree.network.Network`, images -> views, the data card, all options, the device.

    control: whether the images are no attempt to be good, so that no alarm is raised about them.
    images_made: how many images were synthesised so far.
    with_student: set by the engine; False during warm-up, when terms that look at the student rest.
    tick: set by the engine; called after each synthesis step, for the progress bar.
    """

    control = False
    images_made = 0
    with_student = True

    @staticmethod
    def tick():
        """Nothing, until an engine sets it."""

    def synthesize(self):
        """One round of synthesis -> unweighted terms, name -> scalar tensor; {} if there is nothing to do."""
        return {}

    def sample(self, n):
        """n images (n, C, H, W) in [0, 1] on the device, and their classes (n,) or None."""
        raise NotImplementedError

    def latest(self):
        """Up to 256 images that show what the source makes now, with their classes or None."""
        return self.sample(256)

    def state_dict(self):
        """All that an exact resume needs."""
        return {}

    def load_state_dict(self, state):
        if state:
            raise InputError(f"the checkpoint's source has a state ({', '.join(state)}) that "
                             f"{type(self).__name__} does not know; resume with the method that wrote it")
