"""What each verb of the command line does with its arguments. Torch and diffusers are imported only by those that need them."""

from __future__ import annotations

import shutil
from pathlib import Path

from . import listing
from .errors import UserError
from .show import tell


def train(args) -> None:
    from .recipe import dump_recipe, load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        tell(dump_recipe(recipe), end="")
        tell(f"# would train {recipe.train.steps} iterations of {recipe.train.batch} samples: {_plan(recipe)}")
        tell(f"# into {args.output or Path('runs') / recipe.name}; nothing was written")
        return
    from .runs import train as start

    start(recipe, args.output, args.resume)


def _plan(recipe) -> str:
    """Who would learn what, in words."""
    how = f"LoRA of rank {recipe.lora.rank}" if recipe.lora else "full copies"
    players = ", ".join(f"{who} ({' + '.join(names)})" for who, names in recipe.strategy.players(0).items())
    return f"{players}, as {how} on {recipe.model.source}"


def sample(args) -> None:
    asked = args.folder, args.prompt, args.steps, args.seed, args.out
    if args.base_guidance is not None and not args.base_first_steps:
        raise UserError("--base-guidance is of the steps that --base-first-steps K gives to the base model; give both")
    if args.show_steps or args.base_first_steps is not None:
        from .stepwise import sample_stepwise

        tell(sample_stepwise(*asked, args.base_first_steps or 0, args.show_steps, args.base_guidance))
        return
    from .serve import sample_run

    tell(sample_run(*asked))


def eval_(args) -> None:
    if args.layout:
        from .evaluate.exporters import export_pictures

        if args.prompts is None or args.out is None:
            raise UserError(f"--folder {args.layout} needs --prompts, the benchmark's own, and --out DIR, where pictures go")
        if len(args.steps) > 1:
            raise UserError(f"--steps {','.join(map(str, args.steps))}: a folder is of one number of steps; give one")
        tell(export_pictures(args.folder, args.layout, args.prompts, args.out, *args.steps))
        return
    if args.out is not None:
        raise UserError(
            f"--out {args.out} goes with --folder, which says what to draw there: --folder geneval, or --folder dpg"
        )
    from .evaluate.evaluation import evaluate_run

    own = (args.n, args.steps, args.against, args.features, args.batch)
    evaluate_run(args.folder, args.preset, args.prompts, args.reference, *own)


def report(args) -> None:
    from .report import write

    tell(write(args.folders, args.out))


def export(args) -> None:
    from .export import export_run

    tell(export_run(args.folder, args.formats, args.out, args.checkpoint))


def pairs(args) -> None:
    from .pairs import make
    from .recipe import load_recipe

    folder = make(load_recipe(args.recipe, args.overrides, pairs=False), args.out)
    tell(f"{folder} is complete; then: stepdistill train {args.recipe} pairs.folder={folder}")


def merge(args) -> None:
    from .merge import merge as fold

    tell(fold(args.loras, args.out, args.weights, args.rank, args.format))


def validate(args) -> None:
    from .recipe import load_recipe

    overrides = [word for word in args.recipes if "=" in word] + args.overrides
    names, problems = [word for word in args.recipes if "=" not in word], []
    if not names:
        raise UserError("name a recipe, and what changes in it after that: stepdistill validate my.yaml lora.rank=32")
    for name in names:
        try:
            recipe = load_recipe(name, overrides, there=False)
        except UserError as error:
            problems += str(error).splitlines()
        else:
            tell(f"{name}: in order ({recipe.train.steps} iterations of {recipe.train.batch} samples: {_plan(recipe)})")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))  # those of the command line are the same for each recipe


def plan(args) -> None:
    from .plan import make_plan
    from .plan_report import read_size, report
    from .recipe import load_recipe

    gpu = None if args.gpu is None else read_size(args.gpu)
    tell(report(make_plan(load_recipe(args.recipe, args.overrides)), gpu))


def ls(args) -> None:
    for n, what in enumerate([args.what] if args.what else listing.SHELVES):
        tell("\n" * (n > 0) + f"{what}:")
        rows = listing.SHELVES[what]()
        width = max(map(len, rows), default=0)
        tell("\n".join(f"  {name:<{width}}  {text}".rstrip() for name, text in rows.items()) or "  none")


def cat(args) -> None:
    tell(listing.find_recipe(args.recipe).read_text(encoding="utf-8", errors="backslashreplace"), end="")


def cp(args) -> None:
    source = listing.find_recipe(args.recipe)
    target = args.dest / source.name if args.dest.is_dir() else args.dest
    if target.exists():
        raise UserError(f"{target} exists and is not overwritten; give another name")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is no folder; make it first: mkdir -p {target.parent}")
    shutil.copyfile(source, target)
    tell(f"{target}: yours to change; then: stepdistill train {target}")


def explain(args) -> None:
    from .explain import explanation
    from .strategy_names import find_strategy

    kind = find_strategy(args.strategy, args.trust_remote_code)
    tell(explanation(args.strategy, kind, max(60, min(96, shutil.get_terminal_size().columns))))


def push(args) -> None:
    from .push import push as upload

    tell(upload(args.folder, args.repo, args.private, args.base))


def doctor(args) -> int:
    from .doctor import examine

    return examine()
