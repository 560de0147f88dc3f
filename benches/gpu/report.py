"""``python -m gpu.report DEVICE OUT``: results.md, a part of RESULTS.md, from results.jsonl."""

import json
import sys
from pathlib import Path

from gpu.judgement import Judgement


def main() -> None:
    """Of what was measured twice the last counts."""
    device, out = sys.argv[1], Path(sys.argv[2])
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    records = {line["work"]: line for line in lines if "work" in line}
    if not records:
        sys.exit("nothing has been measured")
    machine = next(line["machine"] for line in reversed(lines) if "machine" in line)
    judgement = Judgement(list(records.values()))
    tables = [*(record["table"] for record in records.values()), judgement.table()]
    note = [] if device == "cuda" else ["A rehearsal without a GPU: the figures mean nothing.", ""]
    (out / "results.md").write_text("\n".join([machine, "", *note, *tables]))
    print("\n".join([*note, tables[-1]]))
    # On a GPU some contender may have failed; here it is a title that nobody measures.
    if device == "cpu" and (missing := judgement.missing()):
        sys.exit(f"never measured: {', '.join(missing)}")


if __name__ == "__main__":
    main()
