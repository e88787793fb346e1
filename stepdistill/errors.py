"""The errors that a caller is expected to handle. Everything else that is raised is a fault of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

LINE = 2000  # characters of a line of a message
BLANKS = "\u00a0\u3000\u200c\u200d"  # that do not print, but that languages and emoji need


class UserError(ValueError):
    """The user's mistake, told in one line or one list without a traceback; the command line exits with 2.

    What it quotes may be anybody's: as text it is printable.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class Diverged(RuntimeError):
    """A loss or gradient of training is not finite; the command line exits with 3.

    player: who was being trained; tensor: the loss or parameter that is not finite; step: the iteration;
    checkpoint: the last good state, or None if none was saved.
    """

    def __init__(self, player: str, tensor: str, step: int, checkpoint: Path | None = None):
        super().__init__(player, tensor, step)
        self.player, self.tensor, self.step, self.checkpoint = player, tensor, step, checkpoint

    def __str__(self) -> str:
        saved = f"the last good state is {self.checkpoint}" if self.checkpoint else "no checkpoint had been saved"
        return (
            f"training diverged at step {self.step}: {self.tensor} of player {self.player} is not finite; {saved}. "
            f"Lower optim.student_lr or optim.critic_lr, or lengthen optim.warmup, and start again with --resume never; "
            f"where it was a bad batch, train.skip=1 goes on from here without it."
        )


class Exploded(Diverged):
    """A player's losses, all finite, are many times their usual size; the command line exits with 3.

    usual, size: of a loss before, and now; checkpoints: those from before.
    """

    def __init__(self, player: str, usual: float, size: float, step: int, checkpoints: Sequence[Path] = ()):
        super().__init__(player, "the loss", step, checkpoints[-1] if checkpoints else None)
        self.usual, self.size, self.checkpoints = usual, size, tuple(checkpoints)

    def __str__(self) -> str:
        learner = "student_lr" if self.player == "student" else "critic_lr"
        before = " and ".join(map(str, self.checkpoints))
        saved = f"from before it are {before}" if before else "no checkpoint is from before it"
        return (
            f"training exploded by step {self.step}: losses of player {self.player} are of size {self.size:.3g}, usually "
            f"{self.usual:.3g}; {saved}. Lower optim.{learner} or optim.clip, or lengthen optim.warmup, and start again with "
            f"--resume never; or raise train.explosion, if that is as it should be."
        )


def one_line(text: str) -> str:
    """A message as one line that a terminal shows as it is: what would move its cursor is escaped, and of what is long the
    middle left out."""
    text = printable(text.replace("\n", "\\n").replace("\t", "\\t"))
    return text if len(text) <= LINE else f"{text[: LINE // 2]} ... {text[-LINE // 3 :]}"


def printable(text: str) -> str:
    """Text as a terminal may show it: what would move its cursor, change its colours or turn its letters around is spelt out,
    as in \\x1b; lines stay lines."""
    return "".join(c if c in "\n\t" or c.isprintable() or c in BLANKS else _spelt(c) for c in text)


def _spelt(c: str) -> str:
    return c.encode("unicode_escape", "surrogatepass").decode()
