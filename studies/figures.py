"""`python -m studies.figures FIGURE.json...` draws FIGURE.svg, a picture for a README: panels from
left to right, each of {"axes": title, x, y, log and "series", "floor" as in eval.plot}."""
import json
import sys
from pathlib import Path

import eval as measure


def figure(path):
    """PATH.json -> PATH.svg; ValueError, which names the file, where it is no such thing."""
    try:
        panels = json.loads(path.read_text(encoding="utf-8"))["panels"]
        labels = dict.fromkeys(name for panel in panels for name in panel["series"])
        labels = labels if len(labels) <= len(measure.COLOURS) else ()  # else each panel its own
        drawn = [measure.plot(panel["series"], **panel["axes"], floor=panel.get("floor"),
                              labels=labels) for panel in panels]
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is no figure: {error!r}") from error
    inside = "".join(f'<g transform="translate({12 + 510 * i} 0)">{svg}</g>'
                     for i, (svg, _) in enumerate(drawn))
    size = f"{510 * len(drawn)} {max(height for _, height in drawn)}"
    measure.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" '
                       'font-family="system-ui,sans-serif" font-size="13">'
                       f'<rect width="100%" height="100%" fill="#fff"/>{inside}</svg>\n',
                       path.with_suffix(".svg"))


def main(arguments=None):
    """Exit status 0, or 2 and one line on stderr."""
    measure.print_anything()
    try:
        for path in map(Path, sys.argv[1:] if arguments is None else arguments):
            figure(path)
            print(path.with_suffix(".svg"))
    except (OSError, ValueError) as error:
        print("figures:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
