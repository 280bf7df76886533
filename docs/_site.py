"""What the site shows beside the pages of this folder: the README, results, examples.

Links are written as they work in the repository, and made to work on the site here.
"""

from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
SHOWN = (
    "benchmarks/results/*.png",
    "benchmarks/results/*.json*",
    "examples/*.py",
    "notebooks/*.ipynb",
)


def on_files(files, config):
    """Adds what lies outside this folder, under the paths that it has there."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            there = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, there, abs_src_path=str(path)))
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    return files


def on_page_markdown(markdown, page, config, files):
    """Takes the step out of this folder off the links of its pages."""
    return markdown.replace("](../", "](") if "/" not in page.file.src_uri else markdown
