"""The emoji: seven sets of drawings from npm, at any size, with one table of names."""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patchforge.model.errors import DataError
from patchforge.model.training.data import Pictures, load_picture

NAMES_PACKAGE = "emoji-datasource@16.0.0"
RASTER_PACKAGE = "@lobehub/fluent-emoji-3d@1.1.0"
DRAWN_PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "flat": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "blob": "@iconify-json/noto-v1@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
}
"""Style word → npm package of vector drawings; NOTICE has their licences."""
STYLES = ("3d", *DRAWN_PACKAGES)
PLAIN_FLAGS = ("country-flag", "subdivision-flag")
"""Subgroups to leave out: hundreds of near-duplicates."""
ALIASES = {
    # Names in fxemoji → one of the names that other sets use.
    "2hearts": "two hearts",
    "americasglobe": "earth americas",
    "asiaaustraliaglobe": "earth asia",
    "banknotedollar": "dollar",
    "banknoteeuro": "euro",
    "banknotepound": "pound",
    "banknoteyen": "yen",
    "bouquetofflowers": "bouquet",
    "bullhorn": "loudspeaker",
    "catside": "cat2",
    "cellphone": "mobile phone",
    "chilipepper": "hot pepper",
    "dogside": "dog2",
    "dragonhead": "dragon face",
    "dragonside": "dragon",
    "europeafricaglobe": "earth africa",
    "evergreen": "evergreen tree",
    "fallingleaf": "fallen leaf",
    "fishcakeswirl": "fish cake",
    "forkknife": "fork and knife",
    "frontfacingchick": "hatched chick",
    "hampster": "hamster",
    "heartblue": "blue heart",
    "heartgreen": "green heart",
    "heartpurple": "purple heart",
    "heartribbon": "gift heart",
    "heartyellow": "yellow heart",
    "heels": "high heel",
    "leopardside": "leopard",
    "monkeyhear": "hear no evil",
    "monkeysee": "see no evil",
    "monkeyspeak": "speak no evil",
    "mouseside": "mouse2",
    "pigside": "pig2",
    "pigsnout": "pig nose",
    "poo": "pile of poo",
    "present": "wrapped present",
    "racecar": "racing car",
    "ringingbell": "bell",
    "saggitarius": "sagittarius",
    "spurtingwhale": "spouting whale",
    "tennisball": "tennis",
    "tigerside": "tiger2",
    "toykotower": "tokyo tower",
}


@dataclass(frozen=True)
class _Emoji:
    """One emoji without skin tone. `names[0]` names the concept."""

    code: str
    names: list[str]
    subgroup: str


def fetch_emoji(folder: Path) -> None:
    """Download the packages into `folder` with `npm pack` (50 MB, once).

    Raises:
        DataError: npm is missing or fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in (NAMES_PACKAGE, RASTER_PACKAGE, *DRAWN_PACKAGES.values()):
        if _tarball(folder, package).exists():
            continue
        try:
            subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True)
        except FileNotFoundError as error:
            raise DataError("npm is needed once, to download the emoji packages, and is not on PATH") from error
        except subprocess.CalledProcessError as error:
            raise DataError(f"npm pack {package} failed: {error.stderr.strip()[-500:]}") from error


def emoji_pictures(folder: Path, size: int = 256) -> Pictures:
    """Build the table from the packages that `fetch_emoji` left in `folder`: all emoji without skin tones and flags.

    Pictures are ordered by style, then by code point. All styles of a concept share its names.

    Raises:
        DataError: a package is missing or has changed, or no renderer is installed.
    """
    index = json.loads(_read_files(folder, NAMES_PACKAGE, ["emoji.json"])["emoji.json"])
    sets = {style: _IconSet.read(folder, package) for style, package in DRAWN_PACKAGES.items()}
    emoji = {each.code: each for each in _list_emoji(index, sets["noto"].codes)}
    raster = _raster_pictures(folder, set(emoji))
    by_name = _codes_by_name(emoji, list(sets.values()))
    drawings = {style: icons.find(by_name) for style, icons in sets.items()}
    listed = [(code, "3d") for code in sorted(raster)]
    listed += [(code, style) for style in drawings for code in sorted(drawings[style])]
    images = np.empty((len(listed), size, size, 3), np.uint8)  # filled in place, because a list would double the memory
    for row, (code, style) in enumerate(listed):
        source = raster[code] if style == "3d" else _render(sets[style].svg(drawings[style][code]), size)
        images[row] = load_picture(source, size)
    class_names = sorted({each.subgroup for each in emoji.values()})
    shown = [emoji[code] for code, _ in listed]
    return Pictures(
        images=images,
        captions=[each.names for each in shown],
        styles=[style for _, style in listed],
        classes=np.array([class_names.index(each.subgroup) for each in shown]),
        class_names=class_names,
        weights=np.ones(len(listed), dtype=np.float32),
        concepts=[each.names[0] for each in shown],
    )


@dataclass(frozen=True)
class _IconSet:
    """A package of vector drawings by name; some sets also list code points."""

    sheet: dict[str, Any]
    codes: dict[str, str]
    """Code points without variation selectors → name, if the package lists them."""

    @classmethod
    def read(cls, folder: Path, package: str) -> _IconSet:
        files = _read_files(folder, package, ["icons.json", "chars.json"])
        codes = json.loads(files["chars.json"])
        return cls(json.loads(files["icons.json"]), {_plain_code(code): name for code, name in codes.items()})

    def find(self, by_name: dict[str, str]) -> dict[str, str]:
        """Map codes to names of drawings: with the package's own code points, otherwise with `by_name`."""
        if self.codes:
            wanted = set(by_name.values())
            return {code: name for code, name in self.codes.items() if code in wanted}
        found: dict[str, str] = {}
        for name in self.sheet["icons"]:
            code = by_name.get(_squash_name(ALIASES.get(name, name)))
            if code is not None:
                found.setdefault(code, name)
        return found

    def svg(self, name: str) -> str:
        """Return the drawing as an SVG document. An alias may mirror its parent.

        Raises:
            DataError: the alias rotates its parent, which no set does yet.
        """
        alias = self.sheet.get("aliases", {}).get(name, {})
        if "rotate" in alias:
            raise DataError(f"{name}: rotated aliases are not supported")
        icon = self.sheet["icons"][alias.get("parent", name)]
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = (icon.get(side, self.sheet.get(side, 16)) for side in ("width", "height"))
        body = icon["body"]
        if alias.get("hFlip"):
            body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
        if alias.get("vFlip"):
            body = f'<g transform="translate(0 {2 * top + height}) scale(1 -1)">{body}</g>'
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{body}</svg>'
        )


def _list_emoji(index: list[dict[str, Any]], common_names: dict[str, str]) -> Iterator[_Emoji]:
    for item in index:
        if item["category"] == "Component" or item["subcategory"] in PLAIN_FLAGS:
            continue
        code = _plain_code(item["unified"])
        aliases = [alias.replace("_", " ").replace("-", " ") for alias in item["short_names"]]
        aliases.append(common_names.get(code, "").replace("-", " "))
        names = dict.fromkeys([item["name"].lower(), *(each for each in aliases if len(each) > 2)])
        yield _Emoji(code, list(names), item["subcategory"])


def _codes_by_name(emoji: dict[str, _Emoji], sets: list[_IconSet]) -> dict[str, str]:
    """Map squashed names to codes. If several emoji have a name, sets with code points take precedence."""
    found: dict[str, str] = {}
    for icons in sets:
        listed = {name: code for code, name in reversed(icons.codes.items()) if code in emoji}
        for name, code in listed.items():
            found.setdefault(_squash_name(name), code)
        for alias, target in icons.sheet.get("aliases", {}).items():
            if target["parent"] in listed:
                found.setdefault(_squash_name(alias), listed[target["parent"]])
    for code, each in emoji.items():
        official = [unicodedata.name(chr(int(code, 16)), "")] if "-" not in code else []
        for name in (*each.names, *official):
            found.setdefault(_squash_name(name), code)
    return found


def _raster_pictures(folder: Path, wanted: set[str]) -> dict[str, bytes]:
    """Map codes to encoded pictures."""
    found = {}
    with _open_package(folder, RASTER_PACKAGE) as archive:
        for member in archive:
            path = Path(member.name)
            code = _plain_code(path.stem)
            if path.parent.as_posix() == "package/assets" and code in wanted:
                found[code] = _read_member(archive, member)
    return found


def _render(svg: str, size: int) -> bytes:
    """Render a PNG whose longer side is `size`.

    Raises:
        DataError: resvg is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise DataError("drawing the emoji needs resvg: pip install 'patchforge[train]'") from error
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))


def _squash_name(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _plain_code(code: str) -> str:
    """`1F441-FE0F` → `1f441`. Packages disagree about the variation selector, so it is removed."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def _tarball(folder: Path, package: str) -> Path:
    name, _, version = package.rpartition("@")
    return folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


def _open_package(folder: Path, package: str) -> tarfile.TarFile:
    try:
        return tarfile.open(_tarball(folder, package))
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot read {package}: {error}") from error


def _read_files(folder: Path, package: str, names: list[str]) -> dict[str, bytes]:
    with _open_package(folder, package) as archive:
        return {name: _read_member(archive, f"package/{name}") for name in names}


def _read_member(archive: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    try:
        stream = archive.extractfile(member)
    except KeyError:
        stream = None
    if stream is None:
        raise DataError(f"{member!r} is not a file in {archive.name!r}")
    return stream.read()
