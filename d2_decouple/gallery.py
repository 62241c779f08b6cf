# SPDX-License-Identifier: Apache-2.0
"""``python -m d2_decouple.gallery``: a page of pictures, the same images seen by several models."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import DatasetCatalog

from .config import ConfigError, find_config, nearest
from .data import ground_truth, register_bccd, require_dataset
from .data.images import ImageError, read_rgb
from .demo_assignment import build_predictor
from .engine import run_command
from .engine.predictor import Predictor
from .evaluation import GroundTruth, read_ground_truth
from .evaluation.files import put_between, write_text
from .evaluation.runs import commit_of
from .gallery_layout import jpeg_within
from .gallery_models import (
    ATSS,
    DECOUPLED_RCNN,
    FCOS,
    MODELS,
    PDNET,
    SALT,
    SAPD,
    SAPD_HARD,
    TSCODE,
    Model,
    Weights,
    find_weights,
    given_weights,
    provenance,
    training_command,
)
from .gallery_pictures import (
    SCORE_THRESH,
    Draw,
    Drawn,
    Scene,
    Shot,
    assignment_pictures,
    context_pictures,
    error_pictures,
    image_pictures,
    middle_objects,
    misalignment_pictures,
    point_pictures,
    stage_pictures,
)

__all__ = ["IMAGES", "SECTIONS", "Section", "main"]

IMAGES = ("BloodImage_00360", "BloodImage_00296", "BloodImage_00041")
"""Of BCCD's test set: overlapping cells of each class, several platelets, a crowd of red cells."""

_ROOT = Path(__file__).resolve().parents[1]
_LIMIT = 150_000  # bytes of a picture
_MADE = "made with"  # the block that says so
_END = "<!-- end -->"
_EPILOG = """
examples:
  python -m d2_decouple.gallery --weights-dir output/bccd_table
  python -m d2_decouple.gallery --weights-dir output/bccd_table --skip-missing \\
      --model pdnet_R_18_FPN_bccd output/model_final.pth --page gallery.md

The page is docs/gallery.md, its pictures lie in the folder docs/gallery. Of the page only what
stands between lines "<!-- gallery: NAME -->" and "<!-- end -->" is written anew; a page that is not
there is begun. Weights are sought as RECIPE_seedN_HASH/model_final.pth, as tools/bccd_table.py
leaves them; where some are missing, the command that trains them is printed. Images are looked for
where the data set has them: BCCD's in $DETECTRON2_DATASETS/BCCD.
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page.

    Attributes:
        name: of its block, and the beginning of its pictures' names.
        heading: in a page that is begun.
        draw: its pictures.
        models: whose predictors it needs, in the order of the pictures.
    """

    name: str
    heading: str
    draw: Draw
    models: tuple[Model, ...] = ()

    @property
    def start(self) -> str:
        """The line before its block."""
        return _start(self.name)


SECTIONS = (
    Section(name="images", heading="The images", draw=image_pictures),
    Section(name="points", heading="Points", draw=point_pictures, models=(PDNET, SALT)),
    Section(name="context", heading="Context", draw=context_pictures, models=(ATSS, TSCODE)),
    Section(name="stages", heading="Stages", draw=stage_pictures, models=(DECOUPLED_RCNN,)),
    Section(
        name="assignment",
        heading="Assignment",
        draw=assignment_pictures,
        models=(FCOS, ATSS, SAPD_HARD, SAPD, PDNET),
    ),
    Section(
        name="misalignment",
        heading="Misalignment",
        draw=misalignment_pictures,
        models=(ATSS, TSCODE, PDNET, SALT),
    ),
    Section(
        name="errors",
        heading="Errors",
        draw=error_pictures,
        models=(ATSS, PDNET, SALT, DECOUPLED_RCNN),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 1 if it could not be done.
    """
    args = _parser().parse_args(arguments)
    return run_command(lambda: _make(args), ImageError, ValueError, OSError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m d2_decouple.gallery",
        description=str(__doc__).splitlines()[0],
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--weights-dir",
        nargs="+",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="folders of trainings, as tools/bccd_table.py leaves them",
    )
    add(
        "--model",
        action="append",
        default=[],
        nargs=2,
        metavar=("RECIPE", "WEIGHTS"),
        help="a checkpoint of one of the gallery's recipes; again for others",
    )
    add("--seed", type=int, default=1, help="of the trainings that are sought (%(default)s)")
    add("--skip-missing", action="store_true", help="leave out what there are no weights for")
    add("--dataset", default="bccd_test", metavar="NAME", help="of the images (%(default)s)")
    add("--images", nargs="+", default=IMAGES, metavar="NAME", help="three by default")
    add("--page", type=Path, default=_ROOT / "docs" / "gallery.md", metavar="FILE.md")
    add("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    return parser


def _make(args: argparse.Namespace) -> None:
    page, folder = args.page, args.page.with_suffix("")
    if not page.parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {page.parent} to write {page.name} into; make it, or give --page"
        )
    text = page.read_text(encoding="utf-8") if page.is_file() else _skeleton()
    for name in (*(section.name for section in SECTIONS), _MADE):
        text = _between_markers(text, name, "", page)  # before anything is computed
    weights = _weights(args)
    scene = _scene(args.dataset, args.images)
    folder.mkdir(exist_ok=True)
    predictors: dict[str, Predictor] = {}
    files: list[str] = []
    for section in SECTIONS:
        missing = [model for model in section.models if model.recipe not in weights]
        if missing:
            text = _between_markers(text, section.name, _left_out(missing, args.seed), page)
            print(f"{section.name}: left out, no weights of {_titles(missing)}", flush=True)
            continue
        for model in section.models:
            if model.title not in predictors:
                predictors[model.title] = _predictor(weights[model.recipe], scene, args.device)
        chosen = {model.title: predictors[model.title] for model in section.models}
        written = _write(section.name, list(section.draw(scene, chosen)), folder)
        text = _between_markers(text, section.name, "\n\n".join(written.values()), page)
        files += written
        print(f"{section.name}: {', '.join(written)}", flush=True)
    shown = [model for model in MODELS if model.title in predictors]
    text = _between_markers(text, _MADE, _made_with(args, scene, shown, weights), page)
    write_text(page, text)
    print(f"page: {page}")
    if stale := sorted({x.name for x in folder.glob("*.jpg")} - {*files}):
        print(f"not on the page any more, delete them: {', '.join(stale)} in {folder}")


def _weights(args: argparse.Namespace) -> dict[str, Weights]:
    """By recipe; with --skip-missing some may be missing."""
    given = given_weights(args.model)
    found = {x.recipe: find_weights(x, given, args.weights_dir, args.seed) for x in MODELS}
    missing = [model for model in MODELS if found[model.recipe] is None]
    if missing and not args.skip_missing:
        places = ", ".join(map(str, args.weights_dir)) or "no folder: give --weights-dir"
        raise ConfigError(
            f"no weights of {', '.join(model.recipe for model in missing)} (looked in {places}); "
            f"train them by `{training_command(missing, args.seed)}`, name a checkpoint by "
            f"--model {missing[0].recipe} FILE, or leave out what needs them by --skip-missing"
        )
    return {recipe: weights for recipe, weights in found.items() if weights is not None}


def _scene(dataset: str, names: Sequence[str]) -> Scene:
    register_bccd()
    require_dataset(dataset)
    records = {Path(record["file_name"]).stem: record for record in DatasetCatalog.get(dataset)}
    truth = read_ground_truth(dataset)
    shots, objects = [], {}
    for name in dict.fromkeys(names):
        if name not in records:
            raise ConfigError(
                f"--images {name}: {dataset} has no such image; {nearest(name, records)}"
            )
        record = records[name]
        known = ground_truth(record)
        shots.append(
            Shot(
                name=name,
                pixels=read_rgb(record["file_name"]),
                truth=known,
                chosen=middle_objects(known),
            )
        )
        objects[record["image_id"]] = truth.images[record["image_id"]]
    chosen = GroundTruth(
        class_names=truth.class_names, dataset_ids=truth.dataset_ids, images=objects
    )
    return Scene(dataset=dataset, truth=chosen, shots=tuple(shots))


def _predictor(weights: Weights, scene: Scene, device: str | None) -> Predictor:
    file = None if weights.file is None else str(weights.file)
    predictor = build_predictor(weights.config, file, channels="RGB", device=device)
    if predictor.classes != scene.classes:
        raise ConfigError(
            f"{weights.config} knows the classes {', '.join(predictor.classes)}, {scene.dataset} "
            f"has {', '.join(scene.classes)}; give --dataset a set that the models were trained for"
        )
    return predictor


def _write(name: str, pictures: Sequence[Drawn], folder: Path) -> dict[str, str]:
    """Save pictures; what the page says of each, by its file's name."""
    written = {}
    for number, (pixels, alt) in enumerate(pictures, start=1):
        file = folder / (f"{name}.jpg" if len(pictures) == 1 else f"{name}_{number}.jpg")
        file.write_bytes(jpeg_within(pixels, _LIMIT))
        written[file.name] = f"![{alt}]({folder.name}/{file.name})"
    return written


def _skeleton() -> str:
    """A page without pictures."""
    parts = ["<!-- SPDX-License-Identifier: Apache-2.0 -->\n# Gallery"]
    parts += [f"## {x.heading}\n\n{x.start}\n{_END}" for x in SECTIONS]
    parts.append(f"## Made with\n\n{_start(_MADE)}\n{_END}")
    return "\n\n".join(parts) + "\n"


def _start(name: str) -> str:
    return f"<!-- gallery: {name} -->"


def _between_markers(text: str, name: str, content: str, page: Path) -> str:
    """The page with other content in a block."""
    block = f"{content}\n" if content else ""
    changed = put_between(text, f"{_start(name)}\n", _END, block)
    if changed is None:
        raise ConfigError(
            f"{page} has no place for {name}: put the lines {_start(name)} and {_END} into it"
        )
    return changed


def _left_out(missing: Sequence[Model], seed: int) -> str:
    return (
        f"*Not drawn: there were no weights of {_titles(missing)}. They are trained by "
        f"`{training_command(missing, seed)}`.*"
    )


def _titles(models: Sequence[Model]) -> str:
    return ", ".join(model.title for model in models)


def _made_with(
    args: argparse.Namespace, scene: Scene, shown: Sequence[Model], weights: Mapping[str, Weights]
) -> str:
    """Commit, images, and where the weights come from."""
    commit = commit_of(_ROOT, ("d2_decouple", "configs", "projects"))
    known = f"commit `{commit['id'][:7]}`" if commit["id"] else "an unknown commit"
    known += " with changes" if commit["dirty"] else ""
    images = ", ".join(f"`{shot.name}`" for shot in scene.shots)
    lines = [
        f"Drawn at {known}, from {images} of `{scene.dataset}`.",
        "",
        "| model | recipe | seed | AP | trained at commit | SHA-256 of the weights begins |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for model in shown:
        origin = provenance(model, weights[model.recipe], _ROOT / "results" / "bccd")
        cells = (model.title, _recipe_link(model, args.page), *origin)
        lines.append(f"| {' | '.join(cells)} |")
    trained = [model for model in shown if model.trained]
    lines += [
        "",
        f"A detection counts as there if it scores above {SCORE_THRESH:g}. AP is what the training "
        "measured at its end on BCCD's 72 test images; the commit is known where `results/bccd` "
        "keeps the same result.",
    ]
    if trained:
        lines += ["", "```bash", training_command(trained, args.seed), "```"]
    return "\n".join(lines)


def _recipe_link(model: Model, page: Path) -> str:
    """A link, if recipe and page lie in the same checkout."""
    file, own = find_config(model.recipe), page.resolve()
    if not (file.is_relative_to(_ROOT) and own.is_relative_to(_ROOT)):
        return f"`{model.recipe}`"
    up = "../" * (len(own.relative_to(_ROOT).parts) - 1)
    return f"[{model.recipe}]({up}{file.relative_to(_ROOT).as_posix()})"


if __name__ == "__main__":
    sys.exit(main())
