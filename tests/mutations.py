"""Breaks the mathematics in the ways that matter, one at a time, and requires the tests against closed forms to notice.

python tests/mutations.py          # all; exit status 1 if a mutation survives, or fits the source no longer
python tests/mutations.py 3 17     # these
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import peft  # noqa: F401 - peft and diffusers so that each fork finds them loaded
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline  # noqa: F401

REPO = Path(__file__).resolve().parent.parent
LCM, DMD, DMD2, PHASED, VSD, F = (f"strategies/{name}.py" for name in ("lcm", "dmd", "dmd2", "phased_dmd", "vsd", "f_distill"))
TSCD, TRIG, SCM, RCM, BOOT, REFLOW = (f"strategies/{name}.py" for name in ("tscd", "trigflow", "scm", "rcm", "boot", "reflow"))
SHARED = "strategies/shared.py"
MUTATIONS = [  # file, what it says, what is put there, whose tests must notice
    ("losses.py", "return 0.5 * F.mse_loss(x, (x - grad)", "return F.mse_loss(x, (x - grad)", "losses"),
    ("losses.py", "return 0.5 * F.mse_loss(x, (x - grad)", "return F.mse_loss(x, (x - grad)", "dmd2"),
    ("losses.py", "return 0.5 * F.mse_loss(x, (x - grad)", "return F.mse_loss(x, (x - grad)", "vsd"),
    ("losses.py", "(x - grad).detach()", "(x + grad).detach()", "dmd2"),
    ("losses.py", "(x - grad).detach()", "(x + grad).detach()", "vsd"),
    ("losses.py", "(x - grad).detach()", "(x + grad).detach()", "f_distill"),
    ("losses.py", "(fake - real) * like", "(real - fake) * like", "dmd2"),
    ("losses.py", ".flatten(1).mean(1).clamp", ".mean().expand(len(x)).clamp", "losses"),
    ("losses.py", ".flatten(1).mean(1).clamp", ".mean().expand(len(x)).clamp", "dmd2"),
    ("losses.py", "1 / ((x if x0 is None else x0) - real).abs()", "1 / (x - fake).abs()", "dmd2"),
    ("losses.py", ".clamp(min=1e-5)", "", "losses"),
    ("losses.py", "weight * scale", "scale", "f_distill"),
    ("losses.py", "(((a - b).square() + c**2).sqrt() - c)", "(((a - b).square() + c**2).sqrt())", "lcm"),
    ("losses.py", "getattr(p, space) - getattr(target, space)", "p.eps - target.eps", "losses"),
    ("losses.py", "getattr(p, space) - getattr(target, space)", "p.eps - target.eps", "dmd2"),
    ("losses.py", "return F.softplus(-fake_logits).mean()", "return F.softplus(fake_logits).mean()", "dmd2"),
    ("losses.py", "F.softplus(-real_logits).mean() +", "F.softplus(real_logits).mean() +", "losses"),
    (LCM, "with torch.no_grad():", "with torch.enable_grad():", "lcm"),
    (LCM, "(n - self.skip).clamp(min=0)", "(n - self.skip)", "lcm"),
    (LCM, "n - self.skip", "n - 1", "lcm"),
    (LCM, "torch.where(like(s, x_s) == 0, x_s, target)", "target", "lcm"),
    (LCM, "roles.teacher.guided(x_t, t, batch.cond, batch.null, w)", "roles.teacher(x_t, t, batch.cond)", "lcm"),
    (LCM, "batch.cond, batch.null, w)", "batch.cond, batch.null, w + 1)", "lcm"),
    (LCM, 'roles["student" if self.ema is None else "target"]', 'roles["student"]', "lcm"),
    (LCM, "follow(roles.student, self.ema)", "follow(roles.student, 1 - self.ema)", "lcm"),
    (LCM, 'self.ema is not None and "student" in moved', "self.ema is not None", "lcm"),
    (LCM, "draw.integer(1, self.grid + 1)", "draw.integer(0, self.grid + 1)", "lcm"),
    (LCM, 'batch.cond | {"guidance": w} if', "batch.cond if", "lcm"),
    (LCM, 'if "target" in roles:', "if False:", "lcm"),
    (LCM, "(x_s, s, cond).x0", "(x_s, t, cond).x0", "lcm"),
    (
        DMD2,
        "fake = roles.fake(x_t, t, batch.cond).x0",
        "fake = roles.fake.guided(x_t, t, batch.cond, batch.null, self.guidance).x0",
        "dmd2",
    ),
    (DMD2, "distribution_matching(x0, real, fake)", "distribution_matching(x0, fake, real)", "dmd2"),
    (DMD2, "batch.null, self.guidance).x0", "batch.null, self.guidance + 1).x0", "dmd2"),
    (DMD2, "roles.teacher.guided(x_t", "roles.fake.guided(x_t", "dmd2"),
    (DMD2, "x0 = x0.detach()", "pass", "dmd2"),
    (
        DMD2,
        "x0 = x0.detach()",
        "x0 = generate(roles, self.inference(roles.schedule), batch, draw, grad=False)[0].x0",
        "dmd2",
    ),
    (DMD2, "if turn and self.alternate:", "if False:", "dmd2"),
    (DMD2, "grad=turn", "grad=True", "dmd2"),
    (DMD2, "t = roles.schedule.warp(draw.uniform(*self.t_range))", "t = roles.schedule.warp(draw.uniform())", "dmd2"),
    (DMD2, "t = roles.schedule.warp(draw.uniform(*self.t_range))", "t = draw.uniform(*self.t_range)", "dmd2"),
    (DMD2, 'matching + self.gan * logs["gan"]', 'matching + logs["gan"]', "dmd2"),
    (DMD2, "draw.step % self.student_every == 0", "draw.step % self.student_every == 1", "dmd2"),
    (DMD2, "if self.gan else frozenset()", "if True else frozenset()", "dmd2"),
    (DMD2, "(self.guidance - 1) * (cond", "self.guidance * (cond", "decoupled_dmd"),
    (DMD2, "(cond.x0 - null.x0)", "(null.x0 - cond.x0)", "decoupled_dmd"),
    (DMD2, "self.augment * (", "(", "decoupled_dmd"),
    (DMD2, "surrogate(x0, fake - real)", "surrogate(x0, real - fake)", "dmd2"),
    (DMD2, "else s * time", "else s", "decoupled_dmd"),
    (DMD2, "roles.teacher(x_t, t, batch.cond).x0 + self", "fake + self", "decoupled_dmd"),
    ("diffusion.py", "-a_t * s_s**2", "a_t * s_s**2", "phased_dmd"),
    ("diffusion.py", "mix(x_s, eps, 1 / a_s, -a_t * s_s**2 / (a_s**2 * step))", "x_s", "phased_dmd"),
    ("diffusion.py", "like(s_t / step, eps) * eps", "eps", "phased_dmd"),
    ("diffusion.py", "like(s_t / step, eps) * eps", "eps", "diffusion"),
    ("losses.py", "((x if x0 is None else x0) - real)", "(x - real)", "phased_dmd"),
    ("losses.py", "like(weight, error) * error", "error", "losses"),
    (PHASED, "(fake.score - real.score)", "(real.score - fake.score)", "phased_dmd"),
    (PHASED, "like(roles.transition(t, since)[0], x) *", "", "phased_dmd"),
    (PHASED, "x.detach()", "x", "phased_dmd"),
    (PHASED, "draw, self.fake_loss, s, self.clamp)", "draw, self.fake_loss, 0.0, self.clamp)", "phased_dmd"),
    (PHASED, "self.fake_loss, s, self.clamp", "self.fake_loss, s", "phased_dmd"),
    (PHASED, "real.x0, fake.x0, x0=x0", "fake.x0, real.x0, x0=x0", "phased_dmd"),
    (PHASED, "since = torch.full_like(t, s) if s else None", "since = None", "phased_dmd"),
    (PHASED, "t = times_above(s, roles", "t = times_above(0.0, roles", "phased_dmd"),
    (PHASED, "range(phase * each, (phase + 1) * each)", "range((phase + 1) * each)", "phased_dmd"),
    (PHASED, "torch.set_grad_enabled(turn)", "torch.no_grad()", "phased_dmd"),
    (PHASED, "roles.fake.reset()", "pass", "phased_dmd"),
    (PHASED, "fake = roles.fake(x_t, t, batch.cond)", "fake = roles.teacher(x_t, t, batch.cond)", "phased_dmd"),
    (PHASED, "batch.null, self.guidance)", "batch.null, 1.0)", "phased_dmd"),
    (SHARED, "(clamp * roles.transition(t, s)[1] ** 2)", "(clamp * roles.transition(t, s)[1])", "phased_dmd"),
    (SHARED, "schedule.warp(least + (1 - least) * draw", "since + (1 - since) * schedule.warp(draw", "phased_dmd"),
    (VSD, "real.sigma**2", "real.sigma", "vsd"),
    (VSD, "(real.eps - fake.eps)", "(fake.eps - real.eps)", "vsd"),
    (VSD, "fake = roles.fake.guided(x_t, t, batch.cond, batch.null, w)", "fake = roles.fake(x_t, t, batch.cond)", "vsd"),
    (VSD, "real = roles.teacher.guided(x_t, t, batch.cond, batch.null, w)", "real = roles.teacher(x_t, t, batch.cond)", "vsd"),
    (VSD, "(p.alpha * (p.eps - eps))", "(p.eps - eps)", "vsd"),
    (VSD, "(p.alpha * (p.eps - eps))", "(p.sigma * (p.eps - eps))", "vsd"),
    (VSD, ".square().mean()", ".square().sum()", "vsd"),
    (VSD, "x0 = x0.detach()", "pass", "vsd"),
    (VSD, "draw.uniform() < self.prompt_dropout", "draw.uniform() > self.prompt_dropout", "vsd"),
    (VSD, "grad=True", "grad=False", "vsd"),
    (F, "lambda r: 1 / (r + 1)", "lambda r: r / (r + 1)", "f_distill"),
    (F, "lambda r: r.sqrt() / 4", "lambda r: r.sqrt()", "f_distill"),
    (F, "lambda r: r + 1,", "lambda r: r - 1,", "f_distill"),
    (F, "lambda r: 2 / r", "lambda r: 1 / r", "f_distill"),
    (F, '"forward_kl": lambda r: r,', '"forward_kl": lambda r: 1 / r,', "f_distill"),
    (F, "logits.mean(1)", "-logits.mean(1)", "f_distill"),
    (F, "logits.mean(1)", "logits.sum(1)", "f_distill"),
    (F, ".clamp(*map(math.log, self.ratio_range))", "", "f_distill"),
    (F, "return h / distributed.mean(h.mean())", "return h", "f_distill"),
    (F, "fake.x0, h), gan", "fake.x0), gan", "f_distill"),
    (F, "(u - low) / (high - low)", "u", "f_distill"),
    (F, "decay * self.value + (1 - decay)", "(1 - decay) * self.value + decay", "f_distill"),
    (F, "torch.where(count > 0, new, self.value)", "new", "f_distill"),
    (F, "matching + self.gan * gan", "matching + gan", "f_distill"),
    (F, "x0 = x0.detach()", "pass", "f_distill"),
    (SHARED, "torch.set_grad_enabled(grad)", "torch.set_grad_enabled(True)", "dmd2"),
    (SHARED, "space or roles.fake.kind", '"eps"', "dmd2"),
    (SHARED, "roles.fake(roles.noise(x, t, eps, s), t, cond)", "roles.teacher(roles.noise(x, t, eps, s), t, cond)", "dmd2"),
    (SHARED, "hops[draw.choice(len(hops))]", "hops[0]", "dmd2"),
    (SHARED, "how.hops[last].time", "how.hops[0].time", "dmd2"),
    (SHARED, "for x in (real, fake))", "for x in (fake, real))", "dmd2"),
    (SHARED, "weight * loss", "loss", "dmd2"),
    (SHARED, "roles[reads].features", 'roles["student"].features', "dmd2"),
    (SHARED, "torch.where(which.reshape(-1, *[1] * (x.ndim - 1)), batch.null[name], x)", "x", "vsd"),
    (SHARED, "INSIDE = (0.002, 0.998)", "INSIDE = (0.0, 1.0)", "roles"),
    ("sampling.py", "roles.noise(p.x0, t, normal(p.x0)) if how.renoise else", "", "sampling"),
    ("sampling.py", "if how.renoise else roles.move(p, t)", "", "sampling"),
    ("sampling.py", "there.time, normal", "here.time, normal", "dmd2"),
    ("sampling.py", "x_t.new_full([len(x_t)], how.hops[k].time)", "x_t.new_full([len(x_t)], how.hops[0].time)", "sampling"),
    ("sampling.py", "times[:0:-1]", "times[::-1]", "sampling"),
    ("sampling.py", "how.told is None else full * how.told", "True else full", "sampling"),
    ("sampling.py", 'cond = cond | {"guidance": full * how.guidance}', "pass", "sampling"),
    ("schedules.py", "(round(size * k / n) - 1) / (size - 1)", "(round(size * k / n) - 1) / size", "schedules"),
    ("schedules.py", "(round(size * k / n) - 1)", "round((size - 1) * k / n)", "schedules"),
    ("schedules.py", "self.shift * u / (1 + (self.shift - 1) * u)", "u / (self.shift + (1 - self.shift) * u)", "schedules"),
    ("schedules.py", "theta.sin() / (theta.sin() + theta.cos())", "theta.sin()", "schedules"),
    ("diffusion.py", "(a * x_t - s * raw) / norm", "(a * x_t + s * raw) / norm", "diffusion"),
    ("diffusion.py", "(x_t - s * raw) / (a + s), (x_t + a * raw) / (a + s)", "x_t - s * raw, x_t + a * raw", "diffusion"),
    ("diffusion.py", "cond.eps - null.eps", "null.eps - cond.eps", "diffusion"),
    ("diffusion.py", "ratio**2 * s_s**2", "ratio * s_s**2", "diffusion"),
    ("diffusion.py", "-self.eps / self.sigma", "self.eps / self.sigma", "diffusion"),
    ("batch.py", "seed_of(seed, step, int(i))", "seed_of(seed, step, 0)", "batch"),
    ("batch.py", "random.Random(seed_of(seed, step))", "random.Random(seed_of(seed, step, *index))", "batch"),
    ("batch.py", "random.Random(seed_of(seed, step))", "random.Random(seed_of(seed))", "batch"),
    ("roles.py", "(nullcontext(), wearing(block, adapter))", "(nullcontext(), nullcontext())", "roles"),
    ("roles.py", "p.data = p.data.float()", "pass", "roles"),
    ("roles.py", "other.parameters(), 1 - decay", "other.parameters(), decay", "roles"),
    ("roles.py", "torch.promote_types(raw.dtype, torch.float32)", "raw.dtype", "roles"),
    ("roles.py", "torch.cat([cond[name], null[name]])", "torch.cat([null[name], cond[name]])", "lcm"),
    (SHARED, "distribution_matching(x0, real.x0, fake.x0)", "distribution_matching(x0, fake.x0, real.x0)", "dmd"),
    (SHARED, "distribution_matching(x0, real.x0, fake.x0)", "-distribution_matching(x0, real.x0, fake.x0)", "dmd"),
    (SHARED, "roles.teacher.guided(x_t", "roles.fake.guided(x_t", "dmd"),
    (SHARED, "batch.null, scale)", "batch.null, scale + 1)", "dmd"),
    (
        SHARED,
        "fake = roles.fake(x_t, t, batch.cond)",
        "fake = roles.fake.guided(x_t, t, batch.cond, batch.null, scale)",
        "dmd",
    ),
    (SHARED, "with torch.no_grad():\n        real", "with torch.enable_grad():\n        real", "dmd"),
    (SHARED, "t = roles.schedule.warp(draw.uniform(*t_range))", "t = draw.uniform(*t_range)", "dmd"),
    (SHARED, "t = roles.schedule.warp(draw.uniform(*t_range))", "t = roles.schedule.warp(draw.uniform())", "dmd"),
    (DMD, "batch._replace(noise=draw.normal(batch.noise))", "batch", "dmd"),
    (DMD, "generate(roles, how, batch, draw, grad=True)[0]", "x0", "dmd"),
    (DMD, "generate(roles, how, batch, draw, grad=True)[0]", "generate(roles, how, batch, draw, grad=False)[0]", "dmd"),
    (DMD, "matching + self.regression * regression", "matching + regression", "dmd"),
    (DMD, "matching + self.regression * regression", "matching - self.regression * regression", "dmd"),
    (DMD, "pseudo_huber(x0, end, self.huber)", "len(x0) * pseudo_huber(x0, end, self.huber)", "dmd"),
    (DMD, "pseudo_huber(x0, end, self.huber)", "pseudo_huber(x0, end, 1e-3)", "dmd"),
    (DMD, "perceptual.lpips(roles.decode(x0), end)", "perceptual.lpips(x0, end)", "dmd"),
    (DMD, "perceptual.lpips(roles.decode(x0), end)", "perceptual.lpips(roles.decode(x0.detach()), end)", "dmd"),
    (DMD, "end = roles.decode(end)", "pass", "dmd"),
    (DMD, "fit_fake(roles, x0.detach()", "fit_fake(roles, x0", "dmd"),
    (DMD, "fit_fake(roles, x0.detach()", "fit_fake(roles, batch.x0", "dmd"),
    (DMD, "draw, self.fake_loss)", "draw)", "dmd"),
    ("losses.py", "(x - grad).detach()", "(x + grad).detach()", "dmd"),
    ("losses.py", "1 / ((x if x0 is None else x0) - real).abs()", "1 / (x - fake).abs()", "dmd"),
    ("perceptual.py", "* distance).mean()", "* distance).sum()", "dmd"),
    ("perceptual.py", ".requires_grad_(False)", "", "dmd"),
    ("perceptual.py", ".eval()", "", "dmd"),
    (LCM, "roles.move(roles.teacher.guided(x_t, t, batch.cond, batch.null, w), s)", "roles.noise(x0, s, batch.noise)", "lcm"),
    ("attention.py", "F.scaled_dot_product_attention: attention, ", "", "attention"),
    ("attention.py", "F.group_norm(x.contiguous(),", "F.group_norm(x,", "attention"),
    ("attention.py", "1 / math.sqrt(q.shape[-1]) if scale is None else scale", "1 / math.sqrt(q.shape[-1])", "attention"),
    (
        "attention.py",
        "x.repeat_interleave(q.shape[-3] // x.shape[-3], -3)",
        "x.repeat(1, q.shape[-3] // x.shape[-3], 1, 1)",
        "attention",
    ),
    ("attention.py", ".masked_fill(~attn_mask.any(-1, keepdim=True), 0)", "", "attention"),
    ("attention.py", "torch.promote_types(query.dtype, torch.float32)", "query.dtype", "attention"),
    ("attention.py", "logits + attn_mask", "logits - attn_mask", "attention"),
    ("attention.py", "if tangent is None:", "if False:", "attention"),
    ("diffusion.py", "return self.v / (self.alpha**2 + self.sigma**2).sqrt()", "return self.v", "trigflow"),
    (TRIG, "like((alpha**2 + sigma**2).sqrt(), x) * x, t", "x, t", "trigflow"),
    (TRIG, "law[0] + law[1] * torch.special.ndtri(u)", "law[0] + law[1] * u", "trigflow"),
    (TRIG, "mix(batch.noise, -batch.x0,", "mix(batch.noise, batch.x0,", "trigflow"),
    (TRIG, "(k + draw.uniform()) / count", "draw.uniform()", "trigflow"),
    (TRIG, "reversed(range(count))", "range(count)", "trigflow"),
    (TRIG, "turned(x, velocity, below - theta), below", "turned(x, velocity, theta - below), below", "trigflow"),
    (TRIG, "(at.theta + h).clamp(max=angle(schedule, 1.0, at.theta))", "at.theta + h", "trigflow"),
    (TRIG, "(like(speed, at.x) * at.velocity, speed)", "(like(speed, at.x) * at.velocity, None)", "trigflow"),
    (TRIG, "(like(speed, at.x) * at.velocity, speed)", "(at.velocity, speed)", "trigflow"),
    (TRIG, "like(speed / (ends[0] - ends[1]), at.x)", "like(1 / (ends[0] - ends[1]), at.x)", "trigflow"),
    (TRIG, "g = -(cos**2) * (F - at.velocity)", "g = -cos * (F - at.velocity)", "trigflow"),
    (TRIG, "- share * (cos * sin * at.x + slope)", "+ share * (cos * sin * at.x + slope)", "trigflow"),
    (TRIG, "- share * (cos * sin * at.x + slope)", "- (cos * sin * at.x + share * slope)", "trigflow"),
    (TRIG, "- share * (cos * sin * at.x + slope)", "- (cos * sin * at.x + slope)", "scm"),
    (TRIG, "F + g / like(size + c, g)", "F - g / like(size + c, g)", "trigflow"),
    (TRIG, "g / like(size + c, g)", "g", "trigflow"),
    (TRIG, ".square().flatten(1).mean(1).sqrt()", ".square().flatten(1).sum(1).sqrt()", "trigflow"),
    (SCM, "min(1.0, draw.step / self.warmup)", "draw.step / self.warmup", "scm"),
    (SCM, "if self.warmup else 1.0", "if self.warmup else 0.0", "scm"),
    (SCM, '"teacher" else None', '"data" else None', "scm"),
    (SCM, "(-usual).exp() * error / tan + usual", "(-usual).exp() * error / tan - usual", "scm"),
    (SCM, "error / tan + usual", "error + usual", "scm"),
    (SCM, "first * 2 ** (step // self.double_every), last", "first * 2 ** (step // self.double_every), first", "scm"),
    (SCM, "torch.where(like(end, x) > 0, x, target)", "target", "scm"),
    (SCM, "/ (at.theta - below)", "", "scm"),
    (SCM, "turned(at.x, at.velocity, below - at.theta)", "at.x", "scm"),
    (SCM, "with torch.no_grad():", "with torch.enable_grad():", "scm"),
    (
        TRIG,
        "with torch.no_grad():\n        cos, sin",
        "with torch.enable_grad():\n        cos, sin",
        "trigflow",
    ),
    (SCM, ".cos().clamp(min=1e-6)", ".cos()", "scm"),
    (SCM, "(square + self.huber**2).sqrt() - self.huber", "square.sqrt()", "scm"),
    (RCM, "warm or draw.step % self.student_every == 0", "draw.step % self.student_every == 0", "rcm"),
    (RCM, "if not warm:", "if True:", "rcm"),
    (RCM, "self.matching * loss", "loss", "rcm"),
    (RCM, 'batch.cond, draw, "trig")', "batch.cond, draw)", "rcm"),
    (RCM, "torch.minimum(t, ", "(", "rcm"),
    (RCM, "torch.set_grad_enabled(grad)", "torch.no_grad()", "rcm"),
    (RCM, "x_t, t = draw.normal(batch.noise)", "x_t, t = batch.noise", "rcm"),
    (RCM, "range(draw.choice(self.rollout))", "range(self.rollout)", "rcm"),
    (BOOT, "with torch.no_grad():", "with torch.enable_grad():", "boot"),
    (BOOT, "torch.where(like(first, z) == 1, 0, y)", "y", "boot"),
    (BOOT, "1 - a_t * s_s / (a_s * s_t)", "1 - s_s / s_t", "boot"),
    (BOOT, "torch.where(s == 0, 1, 1 - a_t * s_s / (a_s * s_t))", "1 - a_t * s_s / (a_s * s_t)", "boot"),
    (BOOT, "batch.noise / like(s_1, y)", "batch.noise", "boot"),
    (BOOT, "batch.null, self.guidance)", "batch.null, 1.0)", "boot"),
    (BOOT, "clean(y.lerp(d, kappa), s)", "clean(y, s)", "boot"),
    (BOOT, "(d + clean(y.lerp(d, kappa), s)) / 2", "d", "boot"),
    (BOOT, "torch.where(first, self.boundary * error, error)", "error", "boot"),
    (BOOT, "torch.where(first, self.boundary * error, error)", "self.boundary * error", "boot"),
    (BOOT, 'roles["student" if self.ema is None else "target"]', "roles.student", "boot"),
    (BOOT, "torch.ones_like(told), batch.cond, told)", "told, batch.cond)", "boot"),
    (BOOT, "signal(roles.student, batch, s)", "signal(roles.student, batch, t)", "boot"),
    (BOOT, "self.grid - self.reach(draw.step) + 1", "1", "boot"),
    (BOOT, "follow(roles.student, self.ema)", "follow(roles.student, 1 - self.ema)", "boot"),
    (BOOT, "told=0.0", "told=None", "boot"),
    (REFLOW, "1 - draw.uniform()", "draw.uniform()", "reflow"),
    (REFLOW, "tau = torch.ones_like(tau)", "pass", "reflow"),
    (REFLOW, "-alpha / sigma)", "alpha / sigma)", "reflow"),
    (REFLOW, "eps = mix(batch.noise, x0, 1 / sigma, -alpha / sigma)", "eps = batch.noise", "reflow"),
    (REFLOW, "math.sinh(a / 2)", "math.sinh(a)", "reflow"),
    (REFLOW, "(2 * u - 1)", "(1 - 2 * u)", "reflow"),
    (REFLOW, "/ a if a else u", "/ a if a else u**2", "reflow"),
    (REFLOW, 'denoising(p, target, "flow")', 'denoising(p, target, "x0")', "reflow"),
    (REFLOW, "self.huber, 1 - tau)", "self.huber)", "reflow"),
    (REFLOW, "1 / tau if self.divide_lpips", "tau if self.divide_lpips", "reflow"),
    (REFLOW, "perceptual.lpips(roles.decode(p.x0), end", "perceptual.lpips(p.x0, end", "reflow"),
    (REFLOW, "end = roles.decode(target.x0)", "end = target.x0", "reflow"),
    (REFLOW, "renoise=False", "renoise=True", "reflow"),
    (REFLOW, "(noise - clean) * tau", "noise * tau", "reflow"),
    (REFLOW, "torch.atan2(at, 1 - at)", "at * torch.pi / 2", "reflow"),
    (REFLOW, "step >= self.reflow_steps", "step > self.reflow_steps", "reflow"),
    ("losses.py", "c = c * off.shape[1]", "pass", "reflow"),
    ("losses.py", "off.square().sum(1) + c**2", "off.square().mean(1) + c**2", "reflow"),
    ("perceptual.py", "weight.to(distance) * distance", "distance", "reflow"),
    (TSCD, "(n - 1) // length * length", "n // length * length", "tscd"),
    (TSCD, "(n - 1) // length * length", "0 * n", "tscd"),
    (TSCD, "with torch.no_grad():", "with torch.enable_grad():", "tscd"),
    (TSCD, "torch.where(like(s, x_s) == like(end, x_s), x_s, target)", "target", "tscd"),
    (TSCD, 'roles["student" if self.ema is None else "target"]', 'roles["student"]', "tscd"),
    (TSCD, "(x_s, s, batch.cond), end)", "(x_s, t, batch.cond), end)", "tscd"),
    (TSCD, "roles.teacher.guided(x_t, t, batch.cond, batch.null, w)", "roles.teacher(x_t, t, batch.cond)", "tscd"),
    (TSCD, "roles.move(roles.student(x_t, t, batch.cond), end)", "roles.student(x_t, t, batch.cond).x0", "tscd"),
    (TSCD, "(1 - share) * consistency + share", "consistency + share", "tscd"),
    (TSCD, "roles, target, y.detach()", "roles, target, y", "tscd"),
    (TSCD, "roles, target, y.detach()", "roles, y.detach(), target", "tscd"),
    (TSCD, "draw, since=end)", "draw)", "tscd"),
    (TSCD, "batch.cond, draw, end))", "batch.cond, draw))", "tscd"),
    (TSCD, "self.segments[stage])", "self.segments[-1])", "tscd"),
    (TSCD, "follow(roles.student, self.ema)", "follow(roles.student, 1 - self.ema)", "tscd"),
    (TSCD, "sum(self.guidance) / 2", "self.guidance[1]", "tscd"),
    (SHARED, "times_above(0.0 if since is None else since", "times_above(0.0", "tscd"),
    (SHARED, "draw.normal(x), since), t", "draw.normal(x)), t", "tscd"),
    ("sampling.py", "scaled(time, 1 - how.eta)", "scaled(time, how.eta)", "sampling"),
    ("sampling.py", "roles.noise(x_s, t, normal(x_s), s)", "roles.noise(x_s, t, normal(x_s))", "sampling"),
    ("sampling.py", "return p.x0 if how.eta is None else", "return p.x0 if True else", "sampling"),
    ("schedules.py", "math.floor(by * torch", "round(by * torch", "sampling"),
]


def oracle(name: str) -> str:
    """The tests that must notice."""
    return next(str(path.relative_to(REPO)) for path in (REPO / "tests").rglob(f"test_{name}.py"))


def survives(file: str, old: str, new: str, tests: str, root: Path) -> str:
    """Why the tests did not notice, or nothing. They run in a fork, on a copy of the package below root."""
    source = (REPO / "stepdistill" / file).read_text()
    if old not in source:
        return f"{file} no longer says {old!r}: bring the mutation up to date"
    skip = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.npz", "*.png")
    for part in ("stepdistill", "tests"):
        shutil.copytree(REPO / part, root / part, ignore=skip)
    (root / "stepdistill" / file).write_text(source.replace(old, new))
    if (child := os.fork()) == 0:
        os.chdir(root)
        sys.path.insert(0, str(root))
        out = os.open(root / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        status = 9
        try:
            assert importlib.import_module("stepdistill").__file__.startswith(str(root))
            status = int(pytest.main(["-q", "-x", "--tb=no", "-p", "no:cacheprovider", tests]))
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 1:  # tests failed, as they must
        return ""
    last = (root / "log").read_text().strip().splitlines()[-1:]
    return f"{tests} {'passes' if status == 0 else f'could not run ({status})'} with {new!r} for {old!r}: {last}"


def main(chosen: list[int]) -> int:
    torch.set_num_threads(1)
    began, alive = time.monotonic(), 0
    for k in chosen or range(len(MUTATIONS)):
        with tempfile.TemporaryDirectory() as root:
            file, old, new, name = MUTATIONS[k]
            why = survives(file, old, new, oracle(name), Path(root))
        alive += bool(why)
        if why:
            print(f"{k}: {MUTATIONS[k][0]}: {why}", flush=True)
        elif (k + 1) % 20 == 0:
            print(f"{k + 1}/{len(MUTATIONS)} mutations, {alive} not noticed, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{len(chosen or MUTATIONS)} mutations, {alive} not noticed, {time.monotonic() - began:.0f} s")
    return int(alive > 0)


if __name__ == "__main__":
    sys.exit(main([int(k) for k in sys.argv[1:]]))
