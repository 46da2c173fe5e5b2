"""Score new photos with an adapted model, and act on the table.

    python examples/score_folder.py delta.safetensors new_photos scores.csv [labelled_photos]

The threshold between known and unknown is better with a few dozen labelled photos.
"""

import csv
import sys
from collections import defaultdict

from ueo_fast.cli import main

delta, folder, table, *labelled = sys.argv[1:]

# As `ueo-fast score ...` in a terminal. The base model is found by the fingerprint in the delta.
command = ["score", "--run", delta, "--data", folder, "--out", table, "--top-k", "2", "--overwrite"]
if labelled:
    command += ["--validation", labelled[0]]
status = main(command)
if status:
    sys.exit(status)  # the reason was printed

albums, review = defaultdict(list), []
with open(table, newline="", encoding="utf-8") as file:
    for row in csv.DictReader(file):
        if row["known"] == "true":
            albums[row["class_1"]].append(row["path"])
        else:
            review.append((float(row["mcm"]), row["image"], row["class_1"], row["class_2"]))

for name, paths in sorted(albums.items()):
    print(f"{name}: {len(paths)} photos")
print(f"to look at: {len(review)} photos")
for mcm, image, first, second in sorted(review)[:5]:
    print(f"  {image}: MCM {mcm:.5f}, perhaps {first} or {second}")
