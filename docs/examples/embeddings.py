"""A collection from its first text to the change of its model and back. Needs Python and nothing else.

    python embeddings.py [URL [MODEL [OTHER_MODEL]]]

URL is the daemon (default http://127.0.0.1:11435), MODEL an embedding model that an instance has. With
OTHER_MODEL the collection changes to that one; without it, to the same model with a prefix before each text.
A key is read from OLLAMA_MANAGER_KEY; it needs the scopes `client` and `operator`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request
from typing import Any

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:11435"
MODEL = sys.argv[2] if len(sys.argv) > 2 else None
OTHER = sys.argv[3] if len(sys.argv) > 3 else None
NAME = "example"
TEXTS = {
    "cpu": "A processor runs the instructions of a program.",
    "gpu": "A graphics card computes many numbers at once.",
    "tea": "Green tea is best with water that does not boil.",
}


def call(method: str, path: str, body: Any = None) -> Any:
    """Ask the daemon; a refusal ends the program with its message."""
    request = urllib.request.Request(f"{URL}/api/v1/collections{path}", method=method)
    request.add_header("Content-Type", "application/json")
    if key := os.environ.get("OLLAMA_MANAGER_KEY"):
        request.add_header("X-API-Key", key)
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(request, data, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        sys.exit(f"{method} {path}: {json.load(error)['error']['message']}")


def show(text: str) -> None:
    """Query the active version."""
    found = call("POST", f"/{NAME}/query", {"text": text, "k": 2})
    hits = ", ".join(f"{hit['id']} {hit['score']:.3f}" for hit in found["items"])
    print(f"  {text!r} in version {found['version']}: {hits}")


print("A collection gets its first version with its first items.")
call("POST", "", {"name": NAME, **({} if MODEL is None else {"model": MODEL})})
items = [{"id": one, "text": text, "metadata": {"length": len(text)}} for one, text in TEXTS.items()]
written = call("PUT", f"/{NAME}/items", {"items": items})
print(f"  {written['written']} items, {written['embedding_dim']} dimensions, version {written['version']}")
show(TEXTS["gpu"])

print("A change of the model is a backfill. Queries go on in the active version meanwhile.")
change = {"prefix": "passage: "} if OTHER is None else {"model": OTHER}
progress = call("POST", f"/{NAME}/backfill", change)
while progress["status"] == "running":
    time.sleep(0.2)
    progress = call("GET", f"/{NAME}/backfill")
print(f"  {progress['status']}: {progress['rows']} of {progress['items']} items have a new vector")

print("Cut over: from one query to the next all see the new version. Then back.")
call("POST", f"/{NAME}/cutover", {"version": progress["version"]})
show(TEXTS["gpu"])
call("POST", f"/{NAME}/rollback")
show(TEXTS["gpu"])
for version in call("GET", f"/{NAME}/versions"):
    print(
        f"  {version['version']} {version['state']}: {version['model']}, coverage {version['coverage']:.0%}"
    )
call("DELETE", f"/{NAME}")
