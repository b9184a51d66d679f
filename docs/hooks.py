"""Adds the recorded figures to the site, so that pages show them without a copy in `docs/`."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

FIGURES = Path(__file__).parents[1] / "results" / "figures"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Makes each figure available to the pages as `figures/NAME`."""
    for figure in sorted(FIGURES.glob("*.svg")):
        files.append(File.generated(config, f"figures/{figure.name}", abs_src_path=str(figure)))
    return files
