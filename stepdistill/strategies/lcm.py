"""Latent consistency distillation. Luo et al. 2023, arXiv:2310.04378 (Alg. 1); as a LoRA, arXiv:2311.05556."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..diffusion import like
from ..fields import ranged
from ..losses import pseudo_huber
from ..sampling import Inference, trailing
from .base import Strategy
from .shared import begin_target, move_target, renoises


@dataclass
class LCM(Strategy):
    """The student learns to say from every point of the teacher's trajectory where that trajectory ends.

    As a LoRA the guidance scale is drawn at random and not told (LCM-LoRA); a whole copy may be told it.

    Objective: from a point on the way to a picture, and from the next point that the guided teacher's solver reaches, the
    student must name the same end.

        x_t  = alpha_t x0 + sigma_t eps      x0 a picture, t uniform on the grid
        D    = D_null + w (D_cond - D_null)  of the teacher, w ~ U(guidance)
        x_s  = the DDIM (flow: Euler) step of D from t to s, skip points lower
        y    = sg f(x_s, s), but x_s where s = 0
        L    = mean(sqrt((f(x_t, t) - y)^2 + huber^2) - huber)

    f is the student's clean prediction as it stands, in place of the paper's c_skip x_t + c_out f: the boundary is kept by what
    y is at s = 0. sg stops the gradient; y comes of the student itself or, with ema, of its average. All t weigh the same.
    Guidance acts in x_s alone, and is distilled in.

    When to choose it: for a student of about 4 to 8 steps, when there are pictures with captions like those it is to make. It
    is the steadiest of the strategies, for nothing learns against it, and one of the cheapest: 4 forwards a sample and
    iteration, of which 1 has a gradient (teacher 2, target 1, student 1), and no rollout. Its pictures keep the layout that the
    teacher makes of the same noise. In 1 or 2 steps drawings blur or break, and DMD2, which needs no pictures, keeps more of
    what the caption says (figures: stepdistill cat lcm_tiny_sd, dmd2_tiny_sd). Set the guidance range around the scale that you
    would sample the teacher with: the default is wide, and as a LoRA, which is not told the scale, the student learns something
    in between.

    Healthy curves: seen in lcm_tiny_sd and lcm_tiny_sd3, 1,500 iterations each; levels depend on huber, guidance, grid and
    teacher.

    - student/consistency compares the student with itself: it tells stability, not quality. It falls for 20 to 40 iterations
      (0.023 to 0.016 on tiny-sd), climbs back to where it began, and stays there, under noise of a third to a half of its
      value. With the default grid, guidance and huber it began at 0.13 and was at 0.15 after 45 iterations. Judge by the
      samples.
    - student/grad_norm doubles in the first hundred iterations (0.05 to 0.1), and is hardly ever above 1.
    - Sick: both jump at once. At thirty times the rate consistency went from 0.02 to 0.8 and grad_norm to 2 within 5
      iterations, and the samples were lost, although consistency then fell to 0.04 with the rate: lower optim.student_lr.
    """

    steps: int = ranged(4, low=1, high=50)  # evaluations of the student when it is sampled
    grid: int = ranged(50, low=1, high=1000)  # solver steps N from noise to data; pairs start at its points
    # intervals of the grid that one solver step jumps; the paper's k is 1000 skip / grid
    skip: int = ranged(1, low=1, high=1000)
    guidance: tuple[float, float] = ranged((6.0, 16.0), low=1, high=1000)  # range of the teacher's scale; the paper's w plus 1
    huber: float = ranged(1e-3, above=0, high=1000)  # constant c of the pseudo-Huber distance
    ema: float | None = ranged(None, low=0, below=1)  # decay of the target network (0.95); null: the student itself
    # tell the student its scale, and this one when it is sampled; null: no
    embed_guidance: float | None = ranged(None, low=1, high=1000)
    renoise: bool | None = None  # sample with new noise after each step; null: on DDPM tables yes, on flow no

    needs = frozenset({"x0"})

    @property
    def roles(self) -> tuple[str, ...]:
        return ("student",) if self.ema is None else ("student", "target")

    def check(self):
        if self.skip > self.grid:
            yield f"skip: {self.skip} jumps over more than the whole grid of {self.grid}; set skip to at most grid"
        if self.guidance[0] > self.guidance[1]:
            yield f"guidance: {list(self.guidance)} is no range; write the smaller scale first"

    def enter(self, roles, stage):
        begin_target(roles)

    def losses(self, roles, batch, draw):
        x0, w = batch.x0, draw.uniform(*self.guidance)  # [B, ...], [B]
        times = torch.tensor(roles.schedule.grid(self.grid), dtype=x0.dtype, device=x0.device)
        n = draw.integer(1, self.grid + 1)
        t, s = times[n], times[(n - self.skip).clamp(min=0)]  # [B], s < t
        cond = batch.cond | {"guidance": w} if self.embed_guidance is not None else batch.cond

        x_t = roles.noise(x0, t, batch.noise)
        with torch.no_grad():
            x_s = roles.move(roles.teacher.guided(x_t, t, batch.cond, batch.null, w), s)  # one step down the PF-ODE
            target = roles.get("target", roles.student)(x_s, s, cond).x0
            target = torch.where(like(s, x_s) == 0, x_s, target)  # the boundary: at t = 0 it ends where it is
        loss = pseudo_huber(roles.student(x_t, t, cond).x0, target, self.huber)
        yield "student", loss, {"consistency": loss}

    def after_step(self, roles, moved):
        move_target(roles, moved, self.ema)

    def inference(self, schedule, steps=None):
        return Inference(
            hops=trailing(schedule.grid(steps or self.steps)),
            renoise=renoises(self.renoise, schedule),
            guidance=self.embed_guidance,
        )
