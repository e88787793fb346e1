"""The command line: its parser, and what becomes of errors; what the verbs do is in `verbs`.

Exit status: 0 done; 1 a fault of ours; 2 the user's mistake; 3 training diverged; 130 interrupted; 141 nobody reads on.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from . import __version__, files, listing, verbs
from .arguments import FORMATS, Parser, counts, floats, formats, place, positive, scale, whole, words
from .errors import Diverged, UserError, one_line, printable
from .show import complain, process
from .stopping import interruptible


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. A wrong command line itself leaves through SystemExit(2).

    What a terminal's encoding lacks is printed as an escape. A reader who has seen enough, as `head` has, ends it quietly.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return run(argv)
        finally:
            if sys.stdout is not None:  # it is None where it was closed (>&-)
                sys.stdout.flush()
    except BrokenPipeError:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes both once more as it ends
        return 141


def run(argv: Sequence[str] | None) -> int:
    """Parse a command line, and do it; returns the exit status."""
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # else they ask for a torchvision that nobody here needs, and the like
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    # what torchao says of GPUs, and bitsandbytes of kernels, that are not there and that nobody needs, whoever imports them
    for chatter in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(chatter).setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # a hub that is asked for a model is told no more than its name
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(args, "overrides") and all("=" in text and text[0] != "-" for text in rest)):
        parser.error(f"unknown arguments: {printable(' '.join(rest))} (see: stepdistill {args.verb} --help)")
    if rest:
        args.overrides += rest  # overrides that came after an option
    try:
        with interruptible():
            status = args.run(args) or 0
        if together := sys.modules.get("stepdistill.distributed"):
            together.leave()
        return status
    except UserError as error:
        complain(str(error))
        return 2
    except Diverged as error:
        complain(str(error))
        return 3
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from there" * (args.verb in ("train", "pairs", "eval"))
        complain(f"interrupted{goes_on}")
        return 130
    except Exception as error:
        if (told := files.told(error)) is not None:
            complain(one_line(told))
            return 2
        if (together := sys.modules.get("stepdistill.distributed")) and together.lost(error):
            print(f"process {process()} lost the others; the one that failed says why, if it was not killed", file=sys.stderr)
            return 1
        raise  # a fault of ours


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each has an example of its use, and `run`, the function that does it."""
    parser = Parser(
        prog="stepdistill",
        description="Distil a diffusers pipeline to a few steps, and export a LoRA that stock diffusers loads.",
        epilog="first steps:\n  stepdistill train quickstart\n  stepdistill ls",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    shelf = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, run, text: str, *examples: str) -> argparse.ArgumentParser:
        example = "example:\n  " + "\n  ".join(examples)
        raw = argparse.RawDescriptionHelpFormatter
        made = shelf.add_parser(name, help=text, description=text, epilog=example, formatter_class=raw)
        made.set_defaults(run=run)
        return made

    def takes_recipe(made: argparse.ArgumentParser) -> None:
        made.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")
        made.add_argument("overrides", metavar="key=value", nargs="*", help="a recipe key in dots, and its value")

    made = verb(
        "train",
        verbs.train,
        "Train a recipe; again: go on where it was stopped.",
        "stepdistill train quickstart",
        "stepdistill train my.yaml train.steps=2000 optim.student_lr=5e-5 --output runs/longer",
    )
    takes_recipe(made)
    made.add_argument("--output", type=place, metavar="DIR", help="the run folder; otherwise runs/NAME")
    made.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="go on from the newest checkpoint (auto), move the old folder aside (never), or go on from a checkpoint",
    )
    made.add_argument("--dry-run", action="store_true", help="check the recipe, print it resolved, and stop")

    made = verb(
        "sample",
        verbs.sample,
        "Draw a picture, or a video.",
        'stepdistill sample runs/quickstart --prompt "a large red circle on a plain background" --steps 2',
        'stepdistill sample runs/quickstart --prompt "a small blue star" --show-steps',
        'stepdistill sample runs/quickstart --prompt "a small blue star" --base-first-steps 1 --seed 3',
    )
    made.add_argument("folder", metavar="RUN", type=place, help="a run folder, or an export folder")
    made.add_argument("--prompt", required=True, metavar="TEXT")
    made.add_argument("--steps", type=positive, metavar="N", help="otherwise the number the student was made for")
    made.add_argument("--seed", type=int, default=0, metavar="S", help="of the noise (0)")
    made.add_argument("--out", type=place, metavar="FILE", help="the picture (.png) or video (.webp, .png, .gif) to write")
    made.add_argument(
        "--show-steps",
        action="store_true",
        help="draw what the student, and its base model, take the picture to be at every step, in one .png (arXiv:2503.10637)",
    )
    made.add_argument(
        "--base-first-steps",
        type=whole,
        metavar="K",
        help="let the base model take the first K steps: pictures may differ more from one another (arXiv:2503.10637); 0 draws "
        "what is drawn without this option, but for pipelines that pack their noise, such as FLUX's",
    )
    made.add_argument(
        "--base-guidance",
        type=scale,
        metavar="W",
        help="guidance scale of those steps, 1 is none; otherwise what was distilled, at two evaluations a step",
    )

    made = verb(
        "eval",
        verbs.eval_,
        "Measure a student beside its teacher; again: only what is new.",
        "stepdistill eval runs/quickstart",
        "stepdistill eval runs/mine --preset coco30k-sd15 --prompts captions_val2014.json --reference val2014",
        "stepdistill eval runs/mine --prompts prompts.txt --reference photos --n 5000 --steps 1,2,4 --against teacher@25",
        "stepdistill eval runs/mine --folder geneval --prompts evaluation_metadata.jsonl --out mine-geneval",
    )
    made.add_argument("folder", metavar="RUN", type=place, help="a run folder, or an export folder")
    made.add_argument("--preset", metavar="NAME", help="tiny, the embedded world (otherwise); coco30k-sd15; coco10k-sdxl")
    made.add_argument("--prompts", type=place, metavar="FILE", help="one prompt a line; .jsonl, .csv; captions of COCO (.json)")
    made.add_argument("--reference", metavar="FOLDER|STATS", help="pictures that distances are taken from, or their statistics")
    made.add_argument(
        "--n", type=positive, metavar="N", help="pictures of each candidate; otherwise the preset's, or all prompts"
    )
    made.add_argument("--steps", type=counts, default=(), metavar="LIST", help="of the student, as in 1,2,4")
    help = "the teacher, as in teacher@25,teacher@4:unguided, or with a solver teacher@8:dpm; none: nobody"
    made.add_argument("--against", type=words, default=(), metavar="LIST", help=help)
    help = "what is measured: inception, inception-patch, clip, judge, clip-score, clip-score-dmd2, hps, image-reward"
    made.add_argument("--features", type=words, default=(), metavar="LIST", help=help)
    made.add_argument("--batch", type=positive, metavar="N", help="pictures sampled at a time; changes no figure")
    made.add_argument(
        "--folder", dest="layout", metavar="NAME", help="only draw --prompts, as geneval or dpg wants them, in --out"
    )
    made.add_argument("--out", type=place, metavar="DIR", help="of --folder; again: go on where it was stopped")

    made = verb(
        "report",
        verbs.report,
        "Write one HTML file of a run, or of several beside each other: figures, pictures, curves, and how to use it.",
        "stepdistill report runs/quickstart",
        "stepdistill report runs/lcm runs/dmd2 --out compared.html",
    )
    made.add_argument("folders", metavar="RUN", nargs="+", type=place, help="run folders")
    made.add_argument(
        "--out", type=place, metavar="FILE", help="otherwise RUN/report.html; of several runs in the folder above"
    )

    made = verb(
        "export",
        verbs.export,
        "Write files that stock diffusers, ComfyUI and A1111 load, and check them by loading them back.",
        "stepdistill export runs/quickstart --formats diffusers,kohya --out my-lora",
        "stepdistill export runs/quickstart --checkpoint 100",
    )
    made.add_argument("folder", metavar="RUN", type=place, help="a run folder")
    help = f"some of {','.join(FORMATS)}; otherwise all that fit"
    made.add_argument("--formats", type=formats, metavar="LIST", help=help)
    made.add_argument("--out", type=place, metavar="DIR", help="otherwise RUN/export, or RUN/export-STEP")
    made.add_argument("--checkpoint", type=positive, metavar="STEP", help="of RUN/checkpoints; otherwise the newest")

    made = verb(
        "pairs",
        verbs.pairs,
        "Make the teacher's pairs of noise and picture that a recipe learns from; again: go on where it was stopped.",
        "stepdistill pairs dmd_tiny_sd",
        "stepdistill pairs my.yaml pairs.count=4096 --out pairs/mine",
    )
    takes_recipe(made)
    made.add_argument("--out", type=place, metavar="DIR", help="otherwise the recipe's pairs.folder, or pairs/NAME")

    made = verb(
        "merge",
        verbs.merge,
        "Fold several LoRA files of one architecture into one, exactly, or compressed to a rank.",
        "stepdistill merge runs/fast style.safetensors --weights 1.0,0.7 --out both.safetensors",
        "stepdistill merge a.safetensors b.safetensors@0.5 --rank 32 --format kohya --out both_kohya.safetensors",
    )
    made.add_argument("loras", metavar="LORA", nargs="+", help="a file, run or export folder, as name or name@0.7")
    made.add_argument("--weights", type=floats, default=(), metavar="LIST", help="one for each; otherwise 1")
    made.add_argument("--out", type=place, required=True, metavar="FILE", help="a new .safetensors file")
    made.add_argument("--rank", type=positive, metavar="R", help="compress every layer to it; otherwise nothing is lost")
    spelling = "diffusers (also ComfyUI's, but for SD 1.5 and SDXL), or kohya"
    made.add_argument("--format", choices=("diffusers", "kohya"), default="diffusers", help=spelling)

    made = verb(
        "validate",
        verbs.validate,
        "Check recipes, and what they name as far as that is there.",
        "stepdistill validate my.yaml lora.rank=32",
        "stepdistill validate dmd2_sdxl lcm_sdxl mine/*.yaml",
    )
    made.add_argument("recipes", metavar="RECIPE", nargs="+", help="files, or names of shipped recipes")
    made.add_argument("overrides", metavar="key=value", nargs="*", help="a recipe key in dots, and its value")

    made = verb(
        "plan",
        verbs.plan,
        "Tell what a recipe will need of a GPU and a disk, before anything is downloaded.",
        "stepdistill plan dmd2_sdxl_24gb --gpu 24GB",
    )
    takes_recipe(made)
    made.add_argument("--gpu", metavar="SIZE", help="the card that it must fit, such as 24GB; says what to change")

    made = verb("ls", verbs.ls, "List what there is.", "stepdistill ls recipes", "stepdistill ls strategies")
    made.add_argument("what", nargs="?", choices=tuple(listing.SHELVES), help="otherwise everything")

    made = verb("cat", verbs.cat, "Print a recipe as it was written.", "stepdistill cat quickstart")
    made.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")

    made = verb("cp", verbs.cp, "Copy a recipe, to change it.", "stepdistill cp quickstart my.yaml")
    made.add_argument("recipe", metavar="RECIPE", help="a file, or the name of a shipped recipe")
    made.add_argument("dest", metavar="DEST", type=place, help="a new file, or a folder")

    made = verb("explain", verbs.explain, "Explain a strategy and every key that it has.", "stepdistill explain dmd2")
    made.add_argument("strategy", metavar="STRATEGY", help="of `stepdistill ls strategies`, or package.module:Class")
    made.add_argument("--trust-remote-code", action="store_true", help="import the package of package.module:Class")

    made = verb(
        "push",
        verbs.push,
        "Upload an export with its card to the hub, and nothing else.",
        "stepdistill push runs/mine --repo org/name --private",
        "stepdistill push runs/mine --repo org/name --base stabilityai/stable-diffusion-xl-base-1.0",
    )
    made.add_argument("folder", metavar="RUN", type=place, help="a run folder, or an export folder")
    made.add_argument("--repo", required=True, metavar="ORG/NAME", help="made if it is not there")
    made.add_argument("--private", action="store_true", help="nobody else may see it; otherwise everybody does")
    made.add_argument("--base", metavar="ORG/NAME", help="the base model, where it was given by a folder")

    verb("doctor", verbs.doctor, "Look at this machine and installation; says what to mend.", "stepdistill doctor")
    return parser
