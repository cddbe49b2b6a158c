"""Dense captions in place of a picture (App. G): what Visual Genome says of an image, region by region."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from mmflow_utils.data.fields import read_list
from mmflow_utils.data.sample import Sample


def captions_file(scene_graphs: Path) -> Path:
    """Return where the captions belong: beside the scene graphs, under Visual Genome's own name.

    >>> captions_file(Path("data/gqa/val_sceneGraphs.json")).as_posix()
    'data/gqa/region_descriptions.json'
    """
    return scene_graphs.with_name("region_descriptions.json")


def add_captions(samples: Iterable[Sample], path: Path | str) -> list[Sample]:
    """Return the samples, each with the dense caption of its picture: the phrases about its regions, a sentence each.

    `path` is Visual Genome's `region_descriptions.json`, a list of `{"id": …, "regions": [{"phrase": …}]}`, read entry
    by entry since it has 700 MB. A sample that has its caption keeps it (those of the authors' CSV files do), and one
    that the file doesn't describe stays without; where it describes none of the pictures, that is a ValueError.
    """
    samples = list(samples)
    wanted = {sample.image_id for sample in samples if sample.caption is None}
    captions = {image_id: text for image_id, text in _read(path, wanted) if text} if wanted else {}
    if wanted and not captions:
        raise ValueError(
            f"{path} describes none of the {len(wanted)} pictures that are asked about: expected Visual"
            " Genome's region_descriptions.json, to which GQA's pictures belong"
        )
    return [sample if sample.caption else replace(sample, caption=captions.get(sample.image_id)) for sample in samples]


def _read(path: Path | str, wanted: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (image id, caption) for each entry about a wanted picture."""
    for number, entry in enumerate(read_list(path, "captions file region_descriptions.json of Visual Genome")):
        try:
            # Visual Genome's documentation says image_id, its file says id.
            image_id = str(entry["id"] if "id" in entry else entry["image_id"])
            if image_id in wanted:
                yield image_id, _join(region["phrase"] for region in entry["regions"])
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path}, entry {number}: expected an id and regions with a phrase each ({error!r}):"
                " unpack Visual Genome's region descriptions unchanged"
            ) from None


def _join(phrases: Iterable[str]) -> str:
    """Return phrases as the authors' files have them: in lower case, each ended by a full stop."""
    sentences = [phrase.strip(" .\n\t").lower() for phrase in phrases]
    return " ".join(f"{sentence}." for sentence in sentences if sentence)
