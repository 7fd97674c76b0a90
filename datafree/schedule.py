"""How many steps of what a run takes; everything that counts steps or rounds uses this."""

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from datafree.errors import InputError


class StepCounts(Protocol):
    """What :meth:`Schedule.of` reads of :class:`datafree.config.ScheduleOptions`, whose module imports this one.

    warmup_is_extra: whether ``warmup`` comes before ``epochs`` instead of being a part of them.
    """

    warmup_is_extra: ClassVar[bool]
    epochs: int
    ep_steps: int
    kd_steps: int
    g_steps: int
    warmup: int
    synthesis_rounds: int | None
    round_batches: int
    warmup_batches: int | None


class Rounds(Protocol):
    """What :meth:`Schedule.of` reads of a source of images, which may have other rounds than the options state."""

    g_steps: int
    batches: int
    warmup_batches: int


@dataclass(frozen=True)
class Schedule:
    """Epochs of rounds, each of some synthesis steps and some student steps.

    rounds: of an epoch. kd_steps: student steps of a round. g_steps: synthesis steps of a batch, of which a round has
    one or several; 0 for a source that takes no steps. batch_size: images that a student step draws. warmup: first
    epochs, in which images are synthesised and the student is not trained. synthesis_rounds: the first rounds of the
    run that synthesise; None for all. batches, warmup_batches: synthesised in a round, after the warm-up and in it.
    length: student steps of the run, had there been no warm-up, if its last epoch may be shorter; None if it has all
    rounds. eval_every: epochs between two evaluations; the last epoch has one in any case.
    """

    epochs: int
    rounds: int
    kd_steps: int
    batch_size: int
    g_steps: int = 0
    warmup: int = 0
    synthesis_rounds: int | None = None
    batches: int = 1
    warmup_batches: int = 1
    length: int | None = None
    eval_every: int = 1

    @classmethod
    def of(cls, options: StepCounts, batch_size: int, source: Rounds | None = None, eval_every: int = 1) -> "Schedule":
        """The schedule that the options make. source: what is built of them, whose rounds are its own.

        Raises InputError for options that do not go together.
        """
        o = options
        if o.kd_steps > o.ep_steps:
            raise InputError(
                f"kd_steps {o.kd_steps} is more than ep_steps {o.ep_steps}, so an epoch would have no round; "
                "lower --kd_steps or raise --ep_steps"
            )
        if left := o.ep_steps % o.kd_steps:
            raise InputError(
                f"ep_steps {o.ep_steps} is not a whole number of rounds of kd_steps {o.kd_steps}; "
                f"give --ep_steps {o.ep_steps - left} or {o.ep_steps - left + o.kd_steps}"
            )
        if o.warmup >= o.epochs and not o.warmup_is_extra:
            raise InputError(
                f"warmup {o.warmup} leaves none of {o.epochs} epochs for the student; lower --warmup or raise --epochs"
            )
        epochs = o.epochs + o.warmup if o.warmup_is_extra else o.epochs
        steps, batches = o.g_steps, o.round_batches
        warm = batches if o.warmup_batches is None or not o.warmup else o.warmup_batches
        if source:
            steps, batches, warm = source.g_steps, source.batches, source.warmup_batches
        counts = (o.warmup, o.synthesis_rounds, batches, warm)
        return cls(epochs, o.ep_steps // o.kd_steps, o.kd_steps, batch_size, steps, *counts, eval_every=eval_every)

    def lasting(self, length: int) -> "Schedule":
        """The same for another ``length``; where it ends, a round and an epoch may be shorter than the others."""
        return replace(self, epochs=-(-length // (self.rounds * self.kd_steps)), length=length)

    @property
    def steps(self) -> int:
        """Student steps of the whole run, had there been no warm-up."""
        return self.epochs * self.rounds * self.kd_steps if self.length is None else self.length

    @property
    def total_rounds(self) -> int:
        """Rounds of the whole run, those of the warm-up and a shorter last one included."""
        return -(-self.steps // self.kd_steps)

    def rounds_of(self, epoch: int) -> int:
        """Rounds of this epoch: ``rounds``, or fewer of the last one."""
        return max(0, min(self.rounds, self.total_rounds - epoch * self.rounds))

    def steps_of(self, epoch: int, round: int) -> int:
        """Student steps of this round after the warm-up: ``kd_steps``, or fewer of the last one."""
        return max(0, min(self.kd_steps, self.steps - self.student_steps_done(epoch, round, 0)))

    def evaluates(self, epoch: int) -> bool:
        """Whether this epoch (counted from 0) ends with an evaluation."""
        return epoch == self.epochs - 1 or (epoch + 1) % self.eval_every == 0

    def synthesises(self, epoch: int, round: int) -> bool:
        """Whether this round (both counted from 0) begins with synthesis."""
        return self.synthesis_rounds is None or epoch * self.rounds + round < self.synthesis_rounds

    @property
    def total_synthesis_rounds(self) -> int:
        """Rounds of the whole run that synthesise."""
        work = self.work_until(self.epochs)
        return work["warmup"] + work["synthesis"]

    @property
    def total_batches(self) -> int:
        """Batches that the whole run synthesises."""
        return self.batches_until(self.epochs)

    def batches_until(self, epoch: int, round: int = 0) -> int:
        """Batches that are synthesised before a position."""
        work = self.work_until(epoch, round)
        return work["warmup"] * self.warmup_batches + work["synthesis"] * self.batches

    def round_steps(self, warm: bool) -> int:
        """Synthesis steps of a round, in the warm-up or after it."""
        return self.g_steps * (self.warmup_batches if warm else self.batches)

    @property
    def total_student_steps(self) -> int:
        """Student steps of the whole run, over which the learning rate falls."""
        return self.work_until(self.epochs)["student"]

    def student_steps_done(self, epoch: int, round: int, step: int) -> int:
        """Student steps taken before ``step`` of ``round`` of ``epoch``, had there been no warm-up."""
        return (epoch * self.rounds + round) * self.kd_steps + step

    def progress(self, epoch: int, round: int, step: int) -> float:
        """The position in the run, in [0, 1)."""
        return self.student_steps_done(epoch, round, step) / self.steps

    def steps_until(self, epoch: int, round: int = 0, step: int = 0) -> int:
        """Steps of both phases before a position, for the progress bar."""
        work = self.work_until(epoch, round, step)
        synthesis = work["warmup"] * self.round_steps(True) + work["synthesis"] * self.round_steps(False)
        return synthesis + work["student"]

    def work_until(self, epoch: int, round: int = 0, step: int = 0) -> dict[str, int]:
        """Work before a position, by kinds that cost differently: rounds of synthesis in the warm-up and after it,
        student steps, and at the ends of epochs what only those of the warm-up have ("ranges", which a quantised
        network observes there), evaluations, and the rest ("closing").

        Before its first student step a round's images are not made.
        """
        begun = min(epoch * self.rounds + round + (step > 0), self.total_rounds)
        synthesised = begun if self.synthesis_rounds is None else min(begun, self.synthesis_rounds)
        warm, of_warmup = min(synthesised, self.warmup * self.rounds), self.warmup * self.rounds
        done = min(self.student_steps_done(epoch, round, step), self.steps)
        student = max(done - of_warmup * self.kd_steps, 0)
        evaluations = epoch // self.eval_every + (epoch == self.epochs and epoch % self.eval_every > 0)
        ends = {"ranges": min(epoch, self.warmup), "evaluation": evaluations, "closing": epoch}
        return {"warmup": warm, "synthesis": synthesised - warm, "student": student, **ends}
